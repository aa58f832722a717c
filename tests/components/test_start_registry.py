"""Training that continues from a registered version: the champion, a number, an alias; and what the registry remembers."""

from __future__ import annotations

from pathlib import Path

import pytest

from components import steps
from components.registry.catalogue import show
from components.registry.gates import Gates
from components.registry.promotion import promote
from components.registry.records import Outcome
from components.registry.versions import lineage_of, recorded_stability
from components.run.config import RunConfig, parse_config
from components.run.specification import Specification, resolve
from components.settings import UserError
from components.tracking.store import connect


def config_of(tree: dict, **training: object) -> RunConfig:
    return parse_config({**tree, "training": {**tree["training"], **training}})


def starting(tree: dict, start_from: object, **training: object) -> Specification:
    return resolve(config_of(tree, start_from=str(start_from), **training))


def registered(run: Specification) -> Outcome:
    steps.extract(run)
    with steps.tracked(run, {}) as open_run:
        steps.train(run, open_run.add_points)
        steps.evaluate(run)
        return steps.register(run, open_run)


@pytest.fixture
def short(tiny_tree: dict) -> dict:
    tiny_tree["training"] |= {"tokens": 5_000, "learning_rate": 1e-2}
    tiny_tree["evaluation"] = {"tokens": 400, "baselines": []}
    return tiny_tree


def test_from_the_champion_a_version_or_an_alias_and_it_is_remembered(short: dict, tmp_path: Path):
    first = resolve(parse_config(short))
    registered(first)
    name = first.registered_model
    longer = {"tokens": 10_000}
    runs = [starting(short, where, **longer) for where in ("champion", f"models:/{name}/1", f"models:/{name}@champion")]
    assert {run.start.location for run in runs} == {f"models:/{name}/1"}
    assert {run.sae_digest for run in runs} == {runs[0].sae_digest}
    assert runs[0].start.weights_sha256 == first.training_record().weights_sha256
    assert runs[0].start_said == f"from models:/{name}/1, the champion"
    folder = starting(short, first.sae_url, **longer)
    assert folder.sae_digest == runs[0].sae_digest  # the same coder, wherever it lies

    outcome = registered(runs[0])
    client = connect(first.config.tracking, first.config.storage.root)
    version = client.get_model_version(name, str(outcome.model_version))
    assert version.tags["sae.started_from"] == f"models:/{name}/1"
    assert f"training started from: models:/{name}/1" in version.description
    lineage = lineage_of(client, version)
    assert lineage.start.model_dump() == runs[0].start.model_dump()
    again = lineage.reproduction()
    assert again["training"]["start_from"] == f"models:/{name}/1"
    assert show(client, f"{name}/2")["lineage"]["started_from"] == f"models:/{name}/1"
    assert resolve(parse_config({**again, "storage": short["storage"]})).sae_digest == runs[0].sae_digest
    # the weights are those of a training from the folder, too
    elsewhere = starting({**short, "storage": {"root": str(tmp_path / "elsewhere")}}, first.sae_url, **longer)
    steps.extract(elsewhere)
    assert steps.train(elsewhere).weights_sha256 == runs[0].training_record().weights_sha256


def test_whoever_asks_again_gets_the_same_although_it_has_become_champion(short: dict):
    first = resolve(parse_config(short))
    registered(first)
    run = starting(short, "champion", tokens=40_000)
    outcome = registered(run)
    client = connect(first.config.tracking, first.config.storage.root)
    promote(client, first.registered_model, str(outcome.model_version), Gates(evaluation_tokens=1), force="a test")
    again = starting(short, "champion", tokens=40_000)
    assert again.sae_digest == run.sae_digest
    assert steps.finished_run(again) is None  # its features have not been looked at
    steps.interpret(again)
    assert steps.finished_run(again).model_version == outcome.model_version
    assert again.start_said.startswith(f"from models:/{first.registered_model}/1, as version 2")
    # another one goes on from the new champion
    assert starting(short, "champion", tokens=41_000).start.location == f"models:/{first.registered_model}/2"


def test_a_champion_that_does_not_fit_is_a_mistake_or_passed_over(short: dict):
    first = resolve(parse_config(short))
    registered(first)
    for sae, said in (
        ({"d_sae": 128}, "it has 64 features; sae.d_sae or sae.expansion_factor asks for 128"),
        ({"architecture": "jumprelu", "d_sae": 64}, "its architecture is 'relu'; sae.architecture is 'jumprelu'"),
    ):
        other = config_of({**short, "sae": sae}, start_from="champion")
        with pytest.raises(UserError, match=r"training\.start_from: 'champion', which is models:/.*/1, does not fit") as caught:
            resolve(other)
        assert said in str(caught.value)
        lenient = resolve(other, champion_must_fit=False)
        assert lenient.start is None
        assert said in lenient.start_said
        assert lenient.start_said.startswith("from new weights: the champion, models:/")
    with pytest.raises(UserError, match=r"training\.start_from: there is no 'models:/.*/7' in the registry"):
        starting(short, f"models:/{first.registered_model}/7")


def test_a_coder_made_elsewhere_is_compared_and_started_from_like_one_of_ours(short: dict, tmp_path: Path):
    first = resolve(parse_config(short))
    registered(first)
    given = tmp_path / "given"
    given.mkdir()
    for name in ("cfg.json", "sae_weights.safetensors"):
        (given / name).write_bytes(Path(first.sae_url, name).read_bytes())
    name = first.registered_model
    _, _, outcome = steps.import_given(first, str(given))
    client = connect(first.config.tracking, first.config.storage.root)
    version = client.get_model_version(name, str(outcome.model_version))
    # The same coder: it has all of the champion's features.
    found = recorded_stability(version)
    assert (found["champion"], found["kept_share"], found["new"]) == ("1", 1.0, 0)
    warm = starting(short, f"models:/{name}/{outcome.model_version}", tokens=10_000)
    assert warm.start.location == f"models:/{name}/{outcome.model_version}"
    steps.train(warm)
    with pytest.raises(UserError, match=r"training\.start_from: .* accepted is 'topk', which is what sae\.architecture"):
        starting({**short, "sae": {"architecture": "topk", "d_sae": 64}}, f"models:/{name}/{outcome.model_version}")
