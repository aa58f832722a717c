"""The feature browser as somebody meets it: in Chromium, from the disk."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from chromium import Page, axe_source

from components import steps
from components.evaluation.record import About
from components.evaluation.stability import Dictionary, compare
from components.interpretation.browser import STATUSES, Site, write_browser
from components.interpretation.described import FeatureData
from components.interpretation.explanations.table import Explanation, write_explanations
from components.interpretation.history import read_history
from components.interpretation.matches import MatchesRecord, read_matches, write_matches
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.steps.interpretation import decode_of, feature_data

pytestmark = pytest.mark.integration

HOSTILE = '</script><script>document.title="owned"</script><img src=x onerror=alert(1)>\u202egnp.exe\u2028'
PHONE, DESK = (390, 844), (1280, 900)


@dataclass
class Versions:
    now: Specification
    before: Specification

    def history(self, feature: int) -> list[dict]:
        return feature_data(self.now).feature(feature)["history"]

    @property
    def url(self) -> str:
        return Path(self.now.sae_url, "browser", "index.html").as_uri()


@pytest.fixture(scope="module")
def versions(tiny_tree_in: Callable[[Path], dict], tmp_path_factory: pytest.TempPathFactory) -> Versions:
    """Two trainings, of which one was compared with the other; some tokens, and an explanation, are hostile."""
    tree = tiny_tree_in(tmp_path_factory.mktemp("browsed"))
    tree["interpretation"] = {"tokens": 700, "examples": 3, "drawn": 10, "logits": 4}
    tree["evaluation"] = {"tokens": 900, "reference_tokens": 1_000, "baselines": []}
    tree["training"]["tokens"] = 6_000
    runs = [resolve(parse_config({**tree, "seed": seed})) for seed in (1, 2)]
    for run in runs:
        for step in (steps.extract, steps.train, steps.evaluate, steps.interpret):
            step(run)
    now, before = runs
    counts, table = compare(*(Dictionary.read(Path(run.sae_url)) for run in runs))
    weights = now.training_record().weights_sha256
    record = MatchesRecord(
        weights_sha256=weights, registered_model="tiny", version="1", sae_digest=before.sae_digest,
        folder=Path(before.sae_url).name, counts=counts,
    )  # fmt: skip
    write_matches(now.sae_url, record, table)
    decode = decode_of(now)
    said = Explanation(feature=2, explanation=f"about {HOSTILE}", detection=0.9, fuzzing=None, explainer=f"m {HOSTILE}")
    matches = read_matches(now.sae_url, weights)
    then = [said.model_copy(update={"feature": number}) for number in range(64)]
    write_explanations(before.sae_url, before.training_record().weights_sha256, then)
    past = read_history(str(Path(now.sae_url).parent), now.sae_url, matches)
    data = FeatureData(now.sae_url, lambda token: HOSTILE if token % 3 == 0 else decode(token), matches, {2: said}, past)
    about = About(name=HOSTILE, language_model="m", hook_point="resid_post.1", architecture="relu", d_in=32, d_sae=64)
    write_browser(now.sae_url, about, data)
    return Versions(now, before)


def opened(page: Page, url: str, wanted: str) -> None:
    page.open("about:blank")
    page.wait("location.href === 'about:blank'")
    page.requests.clear()
    page.said.clear()
    page.open(url)
    page.wait(wanted)


ROWS = "document.querySelectorAll('tbody tr').length"
TEXT = "(document.getElementById('main')?.innerText ?? '')"


def test_a_reader_finds_a_feature_reads_it_and_compares_versions(page: Page, versions: Versions):
    page.shape(*DESK)
    opened(page, versions.url, f"{ROWS} > 5")
    table = page.run(ROWS)
    page.click(*page.place("document.querySelector('input[type=search]')"))
    page.type("about </script>")
    page.wait(f"{ROWS} === 1")
    assert "about </script><script>" in page.run("document.querySelector('tbody').innerText")
    page.click(*page.place("document.querySelector('tbody a')"))
    page.wait("document.querySelectorAll('.example').length > 5")
    text = page.run(TEXT)
    assert "Feature 2" in text
    for title in ("Tokens it fires on", "Makes likely", "Fires together with", "How strongly it fires", "strongest group"):
        assert title in text
    (past,) = versions.history(2)
    line = page.run("[...document.querySelectorAll('main h2')].find((h) => h.innerText === 'In earlier versions')"
                    ".parentElement.querySelector('tbody tr').innerText")  # fmt: skip
    assert "version 1" in line
    if past["feature"] is None:
        assert "new since" in line
    else:
        assert str(past["feature"]) in line
        assert "about </script><script>" in line
    assert '<script>document.title="owned"' in text
    assert "⟨U+202E⟩" in text
    assert "\u202e" not in page.run("document.documentElement.textContent")
    assert page.run("document.title") == "Feature 2"
    assert page.run("document.querySelectorAll('main img, main script').length") == 0
    page.hover(*page.place("document.querySelector('.example b.peak')"))
    page.wait("document.querySelector('.tip')?.hidden === false")
    value = re.search(r": ([0-9.e-]+)$", page.run("document.querySelector('.tip').textContent"))
    first = page.run("document.querySelector('.example small').innerText")
    assert value is not None
    assert first.startswith(value[1])
    page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
    page.wait("location.hash === '#3' && document.title === 'Feature 3'")

    page.click(*page.place("[...document.querySelectorAll('nav a')].find((a) => a.innerText === 'Versions')"))
    page.wait(f"{TEXT}.includes('What is not here any more')")
    new = page.run("[...document.querySelectorAll('main a')].find((a) => a.innerText.endsWith(' new')).innerText")
    page.click(*page.place("[...document.querySelectorAll('main a')].find((a) => a.innerText.endsWith(' new'))"))
    page.run("Object.assign(state, {query: ''}); route()")
    page.wait(f"{ROWS} > 0 && {TEXT}.includes('only those that fire')")
    assert page.run("document.querySelector('select').value") == str(STATUSES.index("new"))
    assert page.run(ROWS) <= int(new.split()[0].replace(",", "")) < table + 64
    page.run("state.status = 0; location.hash = '#versions'")
    page.wait(f"{TEXT}.includes('What is not here any more')")
    there = page.run("document.querySelector('tbody a').href")
    inside = Path(versions.now.sae_url, "browser").as_uri()
    assert there.startswith(Path(versions.before.sae_url, "browser", "index.html").as_uri())
    assert all(url.startswith(f"{inside}/") for url in page.requests), page.requests
    assert page.said == []
    opened(page, there, "document.getElementById('main')?.innerText.includes('Where it fires most')")
    assert page.said == []


def test_the_map_is_panned_zoomed_and_clicked(page: Page, versions: Versions):
    page.shape(*DESK)
    opened(page, f"{versions.url}#map", "document.querySelector('canvas')?.width > 300")
    x, y = page.place("document.querySelector('canvas')")
    before = page.run("[view.x, view.y]")
    page.drag((x, y), (x + 80, y - 40))
    after = page.run("[view.x, view.y]")
    assert after[0] < before[0]
    assert after[1] > before[1]
    page.call("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=-200)
    page.wait("view.zoom > 1.2")
    page.run("Object.assign(view, {x: DATA.x[2], y: DATA.y[2], zoom: 4})")
    page.run("document.querySelector('canvas').dispatchEvent(new KeyboardEvent('keydown', {key: '+'}))")
    page.hover(x, y)
    page.wait("/^Feature \\d+: fires on/.test(document.querySelector('.said').innerText)")
    page.click(x, y)
    page.wait("location.hash === '#2'")
    assert page.said == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_there_is_no_serious_violation_and_a_phone_shows_it_whole(page: Page, versions: Versions, dark: bool):
    axe = axe_source()
    pages = {
        "": f"{ROWS} > 5",
        "#2": "document.querySelectorAll('.example').length > 5",
        "#versions": f"{TEXT}.includes('any more')",
        "#map": "document.querySelector('canvas')?.width > 300",
    }
    for width, height in (DESK, PHONE):
        page.shape(width, height, dark)
        for place, ready in pages.items():
            opened(page, f"{versions.url}{place}", ready)
            assert page.run("matchMedia('(prefers-color-scheme: dark)').matches") == dark
            assert page.run("document.documentElement.scrollWidth <= innerWidth"), (place, width)
            page.run(f"(() => {{ {axe} }})()")
            found = page.run("axe.run({preload: false}).then((found) => JSON.stringify(found.violations))")
            serious = [one for one in json.loads(found) if one["impact"] in ("serious", "critical")]
            assert not serious, json.dumps(serious)[:3_000]
            assert page.said == []


def synthetic(folder: Path, count: int) -> str:
    """A site of so many features, with pages of the first block."""
    random, site = np.random.default_rng(0), Site()
    density, places = 10.0 ** random.uniform(-6, -1, count), random.uniform(-1, 1, (count, 2))
    vocabulary = [f" word{number}" for number in range(5_000)]
    chosen = random.integers(0, len(vocabulary), (count, 12))
    for feature in range(count):
        said = [vocabulary[place] for place in chosen[feature]]
        row = {"density": density[feature], "max": 10.0, "mean": 1.0, "score": 0.5, "place": places[feature].tolist()}
        explanation = f"fires on{said[0]} and{said[1]}; number {feature:06d}"
        words = {"tokens": "".join(said[:6]), "logits": "".join(said[6:]), "explanation": explanation}
        site.add({**row, **words, "status": STATUSES[1 + feature % 3]})
    return Path(site.finish(str(folder), f"{count} features", None)).as_uri()


@pytest.mark.parametrize(("count", "seconds"), [(16_384, 2), (100_000, 3)])
def test_a_large_dictionary_opens_at_once(page: Page, tmp_path: Path, count: int, seconds: int):
    page.shape(*DESK)
    url = synthetic(tmp_path, count)
    # Another process may hold a shared machine's cores at the moment: of three attempts the best.
    measured = []
    for _ in range(3):
        page.open("about:blank")
        began = time.monotonic()
        opened(page, url, f"{ROWS} === 100")
        measured.append(time.monotonic() - began)
        if measured[-1] < seconds:
            break
    print(f"{count} features: first table in {min(measured):.2f} s")
    assert min(measured) < seconds
    assert f"of {count:,} features" in page.run(TEXT)
    assert len([url for url in page.requests if "/words/" in url]) == 0
    page.click(*page.place("document.querySelector('input[type=search]')"))
    page.type(f"number {count - 1:06d}")
    page.wait(f"{ROWS} === 1 && !{TEXT}.includes('searched')")
    assert page.run("document.querySelector('tbody a').innerText") == str(count - 1)
    assert page.said == []
