"""The feature browser of an image corpus, in Chromium, from the disk: pictures with the patches on which a feature fires."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from chromium import Page, axe_source
from seeing import draw_pictures, save_llava, tree

from components import steps
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.steps.interpretation import feature_data

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Specification:
    """Of a vision-language model, whose prompt goes on behind the picture."""
    folder = tmp_path_factory.mktemp("seen")
    for name, make in (("pictures", draw_pictures), ("llava", save_llava)):
        (folder / name).mkdir()
        make(folder / name)
    corpus = {"source": "images", "paths": [str(folder / "pictures")], "prompt": "the model <image> fires where"}
    config = tree(folder, folder / "llava", corpus, ["resid_post.1"])
    config["evaluation"] = {"tokens": 90, "baselines": []}
    config["interpretation"] = {"tokens": 90, "examples": 3, "drawn": 10}
    made = resolve(parse_config(config))
    for step in (steps.extract, steps.train, steps.evaluate, steps.interpret):
        step(made)
    return made


def test_a_picture_shows_where_a_feature_fires_and_how_strongly(page: Page, run: Specification):
    data = feature_data(run)
    chosen, best = next(
        (number, one)
        for number in range(data.d_sae)
        for one in data.feature(number)["examples"][:1]
        if one["patch"] is not None and any(one["activations"])
    )
    site = Path(run.sae_url, "browser")
    page.shape(1280, 900)
    page.open((site / "index.html").as_uri())
    page.wait("document.querySelectorAll('tbody .tile').length > 5")
    assert page.run("getComputedStyle(document.querySelector('.tile')).backgroundImage").startswith('url("file:')
    page.open(f"{(site / 'index.html').as_uri()}#{chosen}")
    page.wait("document.querySelector('.picture img')?.naturalWidth === 32")
    cells = "[...document.querySelector('.picture').querySelectorAll('.patches b')]"
    assert page.run(f"{cells}.length") == 16
    shades = page.run(f"{cells}.map((cell) => Number(getComputedStyle(cell).backgroundColor.match(/[0-9.]+(?=\\)$)/)[0]))")
    assert shades[best["cell"]] == min(shades)  # the lightest
    assert sorted(shades) == [shades[place] for place in sorted(range(16), key=lambda place: -best["patches"][place])]
    place = page.run("(({x, y}) => [x, y])(document.querySelector('.patches b.peak').getBoundingClientRect())")
    corner = page.run(
        "(({x, y, width, height}) => [x, y, width, height])(document.querySelector('.picture img').getBoundingClientRect())"
    )
    row, column = best["patch"]
    assert place == pytest.approx([corner[0] + column * corner[2] / 4, corner[1] + row * corner[3] / 4], abs=1)
    page.hover(*page.place("document.querySelector('.patches b.peak')"))
    page.wait("document.querySelector('.tip')?.hidden === false")
    tip = page.run("document.querySelector('.tip').textContent")
    assert tip.startswith(f"row {row}, column {column}: ")
    assert float(re.search(r"[0-9.e-]+$", tip)[0]) == pytest.approx(best["activation"], rel=1e-3)
    assert "fires" in page.run("document.querySelector('.example').innerText")  # the prompt behind the picture
    assert all(url.startswith(f"{site.as_uri()}/") for url in page.requests if url != "about:blank"), page.requests
    assert page.said == []


@pytest.mark.parametrize("place", ["", "#3"])
def test_there_is_no_serious_violation(page: Page, run: Specification, place: str):
    page.open("about:blank")
    page.wait("location.href === 'about:blank'")
    page.open(f"{Path(run.sae_url, 'browser', 'index.html').as_uri()}{place}")
    page.wait("document.querySelectorAll('.tile, .picture').length > 2")
    page.run(f"{axe_source()}; null")
    found = page.run("axe.run().then((result) => result.violations.map((one) => [one.impact, one.id, one.nodes[0].html]))")
    assert not [one for one in found if one[0] in ("serious", "critical")], found
