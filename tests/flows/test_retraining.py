"""`retrain` as a flow run: what is stale goes on from the champion, and says so."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from components.registry.versions import lineage_of, recorded_stability
from components.run.config import parse_config
from components.run.specification import resolve
from components.tracking.store import connect

RETRAIN = """
import json, sys
from components.run.config import parse_config
from flows.retraining import retrain

for number, tree in enumerate(json.load(sys.stdin)):
    state = retrain(parse_config(tree), return_state=True)
    print("STATE", json.dumps({"type": state.type.value, "name": state.name, "message": state.message}), flush=True)
"""


def test_it_goes_on_from_the_champion_where_the_corpus_grew_and_anew_where_the_shape_changed(
    tiny_tree: dict, text_corpus: str, tmp_path: Path, prefect_environment: dict
):
    corpus = Path(shutil.copytree(text_corpus, tmp_path / "texts"))
    grown = Path(shutil.copytree(text_corpus, tmp_path / "grown"))
    for number in range(12):
        (grown / f"new-{number}.txt").write_text(f"document {number} was not there before " * 40)
    tiny_tree["training"] |= {"tokens": 10_000, "learning_rate": 1e-2}
    first = {**tiny_tree, "corpus": {**tiny_tree["corpus"], "paths": [str(corpus)]}}
    second = {**tiny_tree, "corpus": {**tiny_tree["corpus"], "paths": [str(grown)]}}
    third = {**second, "sae": {"d_sae": 96}, "training": {**tiny_tree["training"], "start_from": "champion"}}
    done = subprocess.run(
        [sys.executable, "-c", RETRAIN], input=json.dumps([first, second, second, third]), capture_output=True, text=True,
        env=prefect_environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    states = [json.loads(line.removeprefix("STATE ")) for line in done.stdout.splitlines() if line.startswith("STATE ")]
    assert [state["type"] for state in states] == ["COMPLETED"] * 4, states
    # Again, nothing has changed: it stands, or stands refused, as its gates decided.
    assert states[0]["name"] == "Promoted"
    assert "nothing to do: version 2" in states[2]["message"]

    run = resolve(parse_config(first))
    client, name = connect(run.config.tracking, run.config.storage.root), run.registered_model
    versions = [client.get_model_version(name, str(number)) for number in (1, 2, 3)]
    started = [version.tags.get("sae.started_from") for version in versions]
    assert started == [None, f"models:/{name}/1", None]
    assert lineage_of(client, versions[1]).start.weights_sha256 == versions[0].tags["sae.weights_sha256"]
    assert recorded_stability(versions[1])["champion"] == "1"
    # the flow's log says from what training starts, and why not from the champion
    assert f"training starts from models:/{name}/1, the champion" in done.stderr
    assert "training starts from new weights: the champion, models:/" in done.stderr
    assert "asks for 96" in done.stderr
