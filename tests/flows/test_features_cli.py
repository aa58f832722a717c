"""`sae features` as a user meets it."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from completions import sensible, serving
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from components import steps
from components.interpretation.prompt_sets import shipped_sets
from components.run.config import load_config, parse_config
from components.run.specification import resolve
from flows.cli import app


@pytest.fixture
def config(tiny_tree: dict, tmp_path: Path) -> str:
    tiny_tree["interpretation"] = {"tokens": 500, "examples": 2}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_tree))
    plan = resolve(parse_config(tiny_tree))
    steps.extract(plan)
    steps.train(plan)
    steps.evaluate(plan)
    return str(path)


def pages_are_served(config: str, index: Path) -> None:
    """By `sae features open`, and nothing beside them."""
    command = [sys.executable, "-c", "import flows.cli; flows.cli.main()", "features", "open", config, "--no-launch"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "500"}) as process:
        try:
            assert process.stderr is not None
            ((address, page),) = re.findall(r"http://(127.0.0.1:\d+)(/\S+)", process.stderr.readline())

            def asked(path: str) -> tuple[int, bytes]:
                connection = http.client.HTTPConnection(address, timeout=60)
                connection.request("GET", path)
                with connection.getresponse() as answer:
                    return answer.status, answer.read()

            script = next(index.parent.rglob("*.js"))
            sae, saes = index.parents[1], index.parents[2]
            assert page == f"/{sae.name}/browser/index.html"
            assert asked(page) == (200, index.read_bytes())
            assert asked(f"/{script.relative_to(saes)}?1") == (200, script.read_bytes())
            beside, up = f"{sae.name}/evaluation.json", f"{sae.name}/browser/x/../../evaluation.json"
            assert (saes / beside).is_file()
            absent = (f"{sae.name}/browser/nothing", "a/browser/%00")
            strangers = (beside, up, up.replace("..", "%2e%2e"), f"/{saes}/{beside}", *absent)
            assert {asked(f"/{path}")[0] for path in strangers} == {404}
        finally:
            process.terminate()


def test_features_are_made_listed_and_shown(config: str):
    def sae(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["features", *arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    missing = CliRunner().invoke(app, ["features", "list", config])
    assert missing.exit_code == 2
    assert "run `sae features make`" in " ".join(missing.output.split())
    assert CliRunner().invoke(app, ["features", "open", config]).exit_code == 2
    made = json.loads(sae("make", config, "--json"))
    assert Path(made["browser"]).is_file()
    pages_are_served(config, Path(made["browser"]))
    rows = json.loads(sae("list", config, "--json", "--limit", "5"))["features"]
    assert len(rows) == 5
    assert [row["density"] for row in rows] == sorted((row["density"] for row in rows), reverse=True)
    feature = rows[0]["feature"]
    pure = json.loads(sae("list", config, "--json", "--sort", "one_token"))["features"]
    shares = [row.pop("one_token") for row in pure]
    assert shares == sorted(shares, reverse=True)
    sample = [
        one["tokens"][one["peak"]].strip() or one["tokens"][one["peak"]]
        for one in json.loads(sae("show", config, str(pure[0]["feature"]), "--json"))["examples"]
        if one["kind"] == "sample"
    ]
    assert shares[0] == max(Counter(sample).values()) / len(sample)
    shown = json.loads(sae("show", config, str(feature), "--json"))
    assert shown["row"] == rows[0]
    assert shown["examples"][0]["tokens"][shown["examples"][0]["peak"]] in rows[0]["tokens"]
    texts = ("--text", "alpha 7", "--text", "alpha 9", "--against", "zebra")
    found = json.loads(sae("search", config, *texts, "--json"))["features"]
    assert found
    assert [row["difference"] for row in found] == sorted((row["difference"] for row in found), reverse=True)
    assert all(0 < row["texts"] <= 2 and row["against"] <= 1 and len(row["tokens"]) == row["texts"] for row in found)
    assert str(found[0]["feature"]) in sae("search", config, *texts)
    assert CliRunner().invoke(app, ["features", "search", config, "--text", ""]).exit_code == 2
    steered = json.loads(sae("steer", config, str(feature), "--prompt", "alpha", "--tokens", "4", "--json"))
    assert steered["held_at"] == pytest.approx(5 * rows[0]["max"], rel=1e-3)
    assert steered["plain"] != steered["steered"]
    assert CliRunner().invoke(app, ["features", "steer", config, "0", "--prompt", "a " * 200]).exit_code == 2
    assert str(feature) in sae("list", config)
    assert f"feature {feature}: fires on" in sae("show", config, str(feature))
    assert CliRunner().invoke(app, ["features", "show", config, "9999"]).exit_code == 2
    attributed = sae("attribute", config, "--prompt", "the feature fires", "--token", "self", "--ablate")
    assert "(Spearman)" in attributed
    np.save(probe := Path(config).parent / "probe.npy", np.ones(32))
    assert len(json.loads(sae("search", config, "--direction", str(probe), "--limit", "3", "--json"))["features"]) == 3
    added = json.loads(
        sae("steer", config, str(feature), "--prompt", "alpha", "--mode", "scale", "--positions", "new", "--json")
    )
    assert (added["mode"], added["held_at"]) == ("scale", 5.0)
    options = ("--prompt", "alpha", "--tokens", "4", "--save", str(Path(config).parent / "steered"))
    assert CliRunner().invoke(app, ["features", "steer", config, str(feature), *options]).exit_code == 2
    written = json.loads(sae("steer", config, str(feature), *options, "--mode", "add", "--json"))
    loaded = AutoModelForCausalLM.from_pretrained(written["saved"])
    ids = torch.tensor([[0, *AutoTokenizer.from_pretrained(written["saved"]).encode("alpha", add_special_tokens=False)]])
    for _ in range(4):
        ids = torch.cat([ids, loaded(ids).logits[:, -1:].argmax(dim=-1)], dim=1)
    assert AutoTokenizer.from_pretrained(written["saved"]).decode(ids[0, -4:]) == written["steered"]
    rare = str(json.loads(sae("list", config, "--json", "--limit", "64"))["features"][-1]["feature"])
    measured = json.loads(sae("effect", config, rare, "--json", "--scale", "0", "--scale", "10", "--text", "alpha beta"))
    low, high = measured["scales"]
    assert 0 <= low["kl_divergence"] < high["kl_divergence"]
    assert measured["unrelated_tokens"] > 0
    assert low["unrelated_loss_added"] == pytest.approx(0, abs=1e-6), "there is nothing to take away in unrelated text"
    assert abs(high["unrelated_loss_added"]) > 1e-4
    assert "its likely tokens" in sae("effect", config, rare)
    silent = Path(made["browser"]).parent.parent / "features.parquet"
    table = pq.read_table(silent)
    place = table.schema.get_field_index("max_activation")
    pq.write_table(table.set_column(place, "max_activation", pa.array(np.zeros(64, np.float32))), silent)
    refused = CliRunner().invoke(app, ["features", "effect", config, rare])
    assert (refused.exit_code, "so it has no largest activation" in " ".join(refused.output.split())) == (2, True)
    pq.write_table(table, silent)
    folder = Path(config).parent / "exported"
    written = json.loads(sae("export", config, str(folder), "--format", "feature-json", "--json"))
    assert (folder / "features" / "index.json.gz").is_file()
    assert written["features"] == 64
    assert CliRunner().invoke(app, ["features", "export", config, str(folder), "--format", "delphi"]).exit_code == 2
    with serving(sensible) as server:
        explainer = {"endpoint": server.base, "model": "m", "input_price": "1", "output_price": "2", "scored": "4"}
        named = [part for name, value in explainer.items() for part in ("--set", f"interpretation.explainer.{name}={value}")]
        estimate = json.loads(sae("explain", config, "--features", "2", "--estimate", "--json", *named))
        assert server.requests == []
        explained = json.loads(sae("explain", config, "--features", "2", "--max-cost", "0.1", "--json", *named))
        assert (explained["explained"], explained["estimate"]) == (2, estimate["estimate"])
        capped = CliRunner().invoke(app, ["features", "explain", config, "--feature", "0", "--max-cost", "0", "--json", *named])
        assert (capped.exit_code, json.loads(capped.stdout)["stopped"]) == (1, "the cost cap is reached")
    (first, *_) = json.loads(sae("search", config, "--explanation", "fires on", "--json"))["features"]
    assert "explained as: fires on" in sae("show", config, str(first["feature"]))
    assert str(first["feature"]) in sae("search", config, "--explanation", "fires")
    assert CliRunner().invoke(app, ["features", "search", config]).exit_code == 2


def test_prompts_and_their_contrast_find_features(config: str, tmp_path: Path):
    own = tmp_path / "own.yaml"
    pairs = [{"text": f"the {word} fires along", "against": f"the {word} of a row"} for word in "abcdefghijklmnop"]
    own.write_text(yaml.safe_dump({"name": "own", "about": "fires along", "pairs": pairs}))

    def sae(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["features", *arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    (found,) = json.loads(sae("contrast", config, "--prompts", str(own), "--json"))["sets"]
    best = found["candidates"][0]
    assert (found["chosen_on"], found["measured_on"]) == (8, 8)
    assert best["held_out"]["auroc"] == 1.0
    assert best["p_corrected"] < 0.05
    assert best["fires_on"][0]["text"].endswith("fires along")
    assert best["corpus"]["of"] > 10
    assert not (Path(found_at(config)) / "safety.json").exists()
    report = json.loads(sae("safety", config, "--json"))
    assert {one["name"] for one in report["sets"]} == set(shipped_sets())
    page = Path(report["page"]).read_text()
    assert all(one["name"] in page for one in report["sets"])
    assert "No finding is no clearance" in sae("safety", config)
    rows = json.loads(sae("multilingual", config, "--json", "--limit", "3"))["features"]
    assert len(rows) == 3
    assert "languages" in sae("multilingual", config)
    wrong = CliRunner().invoke(app, ["features", "safety", config, "--prompts", "no-such"])
    assert (wrong.exit_code, "there is no file 'no-such'" in " ".join(wrong.output.split())) == (2, True)
    # A run that asks for it has it beside its SAE, from where it goes into the MLflow run.
    run = resolve(load_config(config, ["interpretation.safety=true", f"interpretation.prompt_sets=['{own}']"]))
    steps.require_safety(run)
    kept = json.loads((Path(run.sae_url) / "safety.json").read_text())
    assert [one["name"] for one in kept["sets"]] == [*shipped_sets(), "own"]
    assert run.sae_url == found_at(config)


def found_at(config: str) -> str:
    return resolve(load_config(config)).sae_url
