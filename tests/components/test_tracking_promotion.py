"""Promotion, refusal and rollback in a real MLflow store, also by several at once."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient

from components.interop.saelens import WEIGHTS_NAME, saelens_files
from components.registry import promotion, registration
from components.registry.gates import Gates
from components.registry.history import Ledger, champion_version, ensure_model
from components.registry.promotion import promote, rollback
from components.registry.records import Lineage
from components.registry.versions import earlier_metrics, resolve_version, versions_of_dataset
from components.run.config import RunConfig
from components.sae.architectures.relu import ReLUSAE, ReLUSettings
from components.settings import UserError
from components.tracking.runs import tracked_run
from components.tracking.settings import TrackingSettings
from components.tracking.store import connect

GATES = Gates(evaluation_tokens=100)
NOBODY = Gates(evaluation_tokens=10**9)
"""Gates that no version passes: it is registered, and promoted later."""


class Registry:
    """A store, and versions of small real SAEs in it, with metrics as given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = TrackingSettings()
        self.client: MlflowClient = connect(self.settings, str(folder))
        self.count = 0
        self.lock = threading.Lock()

    def add(self, name: str, recovered: float, l0: float = 10.0, gates: Gates = GATES) -> promotion.Decision:
        with self.lock:
            self.count += 1
            number = self.count
        artifact = self.folder / f"sae-{number}"
        artifact.mkdir()
        sae = ReLUSAE.autoencoder(ReLUSettings(d_sae=16), 8)
        sae.initialise(number)
        files = saelens_files(sae, {})
        lineage = Lineage(
            mlflow_run="run", sae_digest="s", weights_sha256="w", dataset_digest=f"data-{name}", dataset_url="d",
            token_digest="t", token_url="u", configuration=RunConfig().model_dump(mode="json"),
        )  # fmt: skip
        for file, content in {**files, "lineage.json": lineage.model_dump_json().encode()}.items():
            (artifact / file).write_bytes(content)
        candidate = registration.Candidate(
            name=name,
            folder=artifact,
            run_digest=f"run-{number}",
            weights_sha256=sha256(files[WEIGHTS_NAME]).hexdigest(),
            metrics={"loss_recovered": recovered, "l0": l0, "explained_variance": 0.5, "evaluation_tokens": 1000},
            evaluation_set="set",
            lineage=lineage,
            tags={"sae.dataset_digest": f"data-{name}"},
            model_tags={},
        )
        with tracked_run(self.settings, str(self.folder), f"n{number}", f"run-{number}", {}, {}) as run:
            return registration.register(run, candidate, gates)[1]

    def champion(self, name: str) -> str | None:
        return champion_version(self.client, name)

    def artifacts(self, name: str, version: str) -> list[str]:
        run = self.client.get_model_version(name, version).run_id
        return [Path(entry.path).name for entry in self.client.list_artifacts(run, "gates")]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(tmp_path_factory.mktemp("registry"))


def test_a_worse_one_is_refused_with_the_gate_and_the_amount_and_a_better_one_wins(registry: Registry):
    assert registry.add("plain", 0.90).alias == "champion"
    refused = registry.add("plain", 0.85)
    assert (refused.alias, registry.champion("plain")) == ("challenger", "1")
    assert "champion.loss_recovered" in refused.reason
    assert "short by 0.05" in refused.reason
    tags = registry.client.get_model_version("plain", "2").tags
    assert (tags["sae.alias"], tags["sae.gates_passed"]) == ("challenger", "false")
    table = {row["gate"]: row for row in json.loads(tags["sae.gates"])["gates"]}
    assert table["champion.loss_recovered"]["short_by"] == pytest.approx(0.05)
    written = registry.artifacts("plain", "2")
    assert sorted(Path(name).suffix for name in written) == [".json", ".md"]
    assert registry.client.get_model_version("plain", "2").description.startswith("# plain, version 2")

    assert registry.add("plain", 0.92).alias == "champion"
    assert registry.champion("plain") == "3"
    assert int(registry.client.get_model_version_by_alias("plain", "challenger").version) == 2
    found = registry.client.get_registered_model("plain").tags
    assert "version 3, promote" in found["sae.promotion.00002"]
    assert [entry["version"] for entry in earlier_metrics(registry.client, "plain")] == [1, 2, 3]
    assert earlier_metrics(registry.client, "plain")[2]["alias"] == "champion"
    assert earlier_metrics(registry.client, "nothing of this name") == []
    assert versions_of_dataset(registry.client, "data-plain") == ["plain/1", "plain/2", "plain/3"]
    assert versions_of_dataset(registry.client, "data") == []


def test_rollback_restores_the_champion_before_and_goes_further_back_each_time(registry: Registry):
    for recovered in (0.6, 0.7, 0.8):
        registry.add("back", recovered)
    assert registry.champion("back") == "3"
    entry, replaced = rollback(registry.client, "back", "it forgets names")
    assert (entry.version, replaced, registry.champion("back")) == ("2", "3", "2")
    assert "it forgets names" in registry.client.get_model_version("back", "3").tags["sae.rolled_back"]
    assert rollback(registry.client, "back", "")[0].version == "1"
    with pytest.raises(UserError, match="first champion"):
        rollback(registry.client, "back", "")
    assert registry.champion("back") == "1"
    # what was rolled back may win again, and a rollback then leads to the champion before it
    assert promote(registry.client, "back", "3", GATES).alias == "champion"
    assert rollback(registry.client, "back", "")[0].version == "1"
    actions = [(entry.action, entry.version) for entry in Ledger(registry.client, "back").entries()]
    assert [action for action, _ in actions] == ["promote"] * 3 + ["rollback"] * 2 + ["promote", "rollback"]


def test_rollback_passes_over_a_version_whose_files_are_gone(registry: Registry):
    for recovered in (0.6, 0.7, 0.8):
        registry.add("gone", recovered)
    _weights(registry, "gone", "2").write_bytes(b"half of it")
    assert rollback(registry.client, "gone", "")[0].version == "1"


def _weights(registry: Registry, name: str, version: str) -> Path:
    source = registry.client.get_model_version(name, version).source
    model = registry.client.get_logged_model(source.removeprefix("models:/"))
    return next(Path(model.artifact_location.removeprefix("file://")).rglob(WEIGHTS_NAME))


def test_a_damaged_version_is_never_promoted_not_even_by_force(registry: Registry):
    registry.add("damaged", 0.9, gates=NOBODY)
    _weights(registry, "damaged", "1").write_bytes(b"half of it")
    decision = promote(registry.client, "damaged", "1", GATES, force="it must go out")
    assert decision.alias == "challenger"
    assert "files" in decision.reason
    assert registry.champion("damaged") is None


def test_force_is_recorded_with_its_reason(registry: Registry):
    registry.add("forced", 0.9)
    registry.add("forced", 0.5)
    decision = promote(registry.client, "forced", "2", GATES, force="the first one leaks a name")
    assert registry.champion("forced") == "2"
    assert "the first one leaks a name" in decision.reason
    assert "champion.loss_recovered" in decision.reason
    assert Ledger(registry.client, "forced").entries()[-1].action == "force"
    assert "challenger" not in registry.client.get_registered_model("forced").aliases
    assert resolve_version(registry.client, "forced@champion").version == resolve_version(registry.client, "forced/2").version


def test_an_alias_that_was_moved_by_hand_is_part_of_the_history(registry: Registry):
    for recovered in (0.7, 0.8):
        registry.add("hand", recovered)
    registry.client.set_registered_model_alias("hand", "champion", "1")
    assert registry.add("hand", 0.75).alias == "champion"  # it beats version 1, which somebody wants there
    assert [entry.action for entry in Ledger(registry.client, "hand").entries()] == ["promote", "promote", "by hand", "promote"]
    assert rollback(registry.client, "hand", "")[0].version == "1"


def test_a_promotion_killed_before_its_alias_is_ended_by_the_next_one(registry: Registry):
    for recovered in (0.7, 0.8):
        registry.add("killed", recovered)
    registry.add("killed", 0.9, gates=NOBODY)
    ledger = Ledger(registry.client, "killed")
    ledger.append(ledger.entries(), "3", "promote", 2, "killed right after this line")
    assert registry.champion("killed") == "2"
    assert registry.add("killed", 0.85).alias == "challenger"  # measured against 3, not against 2
    assert promote(registry.client, "killed", "3", GATES).alias == "champion"
    assert registry.champion("killed") == "3"


@pytest.mark.parametrize("slow", ["better", "worse"])
def test_of_two_racing_promotions_the_better_one_is_champion_and_both_are_recorded(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, slow: str
):
    """Both have decided against the same champion before either writes; the `slow` one then waits for the other."""
    name = f"race-{slow}"
    registry.add(name, 0.6)
    versions = {"better": "2", "worse": "3"}
    registry.add(name, 0.8, gates=NOBODY)
    registry.add(name, 0.7, gates=NOBODY)
    both_decided, other_done = threading.Barrier(2), threading.Event()
    append = Ledger.append
    turns: dict[str, int] = dict.fromkeys(versions, 0)

    def waiting(ledger, after, version, action, parent, reason):
        who = next(key for key, value in versions.items() if value == version)
        turns[who] += 1
        if turns[who] == 1:
            both_decided.wait(30)
            if who == slow:
                other_done.wait(30)
        return append(ledger, after, version, action, parent, reason)

    monkeypatch.setattr(Ledger, "append", waiting)

    def race(who: str) -> promotion.Decision:
        try:
            return promote(registry.client, name, versions[who], GATES)
        finally:
            if who != slow:
                other_done.set()

    with ThreadPoolExecutor(2) as threads:
        better, worse = threads.map(race, ("better", "worse"))
    assert better.alias == "champion"
    assert registry.champion(name) == versions["better"]
    promoted = [entry.version for entry in Ledger(registry.client, name).entries()]
    assert promoted == (["1", "2"] if slow == "worse" else ["1", "3", "2"])
    assert worse.alias == ("challenger" if slow == "worse" else "champion")
    for version in versions.values():
        assert registry.artifacts(name, version)
        assert "sae.gates" in registry.client.get_model_version(name, version).tags


def test_a_slow_writer_of_the_alias_puts_it_right_again(registry: Registry, monkeypatch: pytest.MonkeyPatch):
    registry.add("slow", 0.6)
    registry.add("slow", 0.7, gates=NOBODY)
    registry.add("slow", 0.8, gates=NOBODY)
    set_alias = MlflowClient.set_registered_model_alias
    once = []

    def late(client, name, alias, version):
        if not once and alias == "champion":
            once.append(version)
            promote(registry.client, name, "3", GATES)  # a whole other promotion, between the entry and its alias
        set_alias(client, name, alias, version)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", late)
    promote(registry.client, "slow", "2", GATES)
    assert once == ["2"]
    assert registry.champion("slow") == "3"


def test_many_at_once_write_each_entry_once(registry: Registry):
    ensure_model(registry.client, "crowd", "sae-foundry", {})
    ledger = Ledger(registry.client, "crowd")

    def add(worker: int) -> int:
        while (entry := ledger.append(ledger.entries(), str(worker), "promote", 0, "")) is None:
            pass
        return entry.number

    with ThreadPoolExecutor(6) as threads:
        numbers = list(threads.map(add, range(6)))
    assert sorted(numbers) == [1, 2, 3, 4, 5, 6]
    assert [(entry.number, entry.version) for entry in ledger.entries()] == sorted((n, str(w)) for w, n in enumerate(numbers))


def test_the_first_two_versions_at_once_make_one_model_with_one_history(registry: Registry):
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: ensure_model(registry.client, "new", "sae-foundry", {}), range(4)))
    experiment = registry.client.get_experiment_by_name("sae-foundry-promotions").experiment_id
    kept = registry.client.search_runs([experiment], "tags.`sae.ledger_of` = 'new'")
    assert [run.info.run_id for run in kept] == [registry.client.get_registered_model("new").tags["sae.ledger"]]


def test_a_reader_of_the_champion_never_sees_a_broken_version_in_many_promotions(registry: Registry):
    registry.add("read", 0.6)
    registry.add("read", 0.7)
    stop = threading.Event()
    seen: set[str] = set()
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    wanted = {registry.client.get_model_version("read", v).tags["sae.weights_sha256"] for v in ("1", "2")}

    def read() -> int:
        count = 0
        while not stop.is_set():
            version = registry.client.get_model_version_by_alias("read", "champion")
            seen.add(version.tags["sae.weights_sha256"])
            if count % 10 == 0:
                answer = mlflow.pyfunc.load_model("models:/read@champion").predict(x)
                assert answer["reconstruction"].shape == (3, 8)
                assert np.isfinite(answer["reconstruction"]).all()
            count += 1
        return count

    with ThreadPoolExecutor(1) as threads:
        reader = threads.submit(read)
        for turn in range(8):
            assert promote(registry.client, "read", "12"[turn % 2], GATES, force=f"turn {turn}").alias == "champion"
        stop.set()
        assert reader.result(timeout=60) > 5
    assert seen == wanted
    assert len(Ledger(registry.client, "read").entries()) == 10
