"""What has a name keeps it: digests and training curves of before, and where every field stands."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel, create_model

from components.activations.settings import ActivationSettings, ExcludeSettings
from components.corpus.settings import CorpusSettings
from components.evaluation.settings import EvaluationSettings
from components.run import identity
from components.run.config import RunConfig, load_config, parse_config
from components.sae.architectures import architectures
from components.sae.coder import Column
from components.training.job import Training
from components.training.settings import TrainingSettings
from components.training.step import new_coder, take_step

GOLDEN = Path(__file__).parents[1] / "golden"
WRITE = "SAE_WRITE_GOLDEN"
AGAIN = f"and write the golden file anew: `{WRITE}=1 .venv/bin/python -m pytest tests/components/test_identity.py`"

TYPICAL: dict[str, dict[str, Any]] = {
    "files": {"corpus": {"source": "files", "paths": ["texts"], "context_length": 128, "bos": "document"}},
    "mixture": {
        "corpus": {"mixture": [{"weight": 1, "source": "standard_library"}, {"weight": 3, "source": "files", "paths": ["a"]}]}
    },
    "several hook points": {"activations": {"hook_points": ["resid_post.1", "mlp_out.2"], "dtype": "bfloat16"}},
    "again": {"rerun": "again"},
    "measured without outliers": {"activations": {"exclude": {"norms_above": 10}}, "evaluation": {"tokens": 5_000}},
    **{name: {"sae": {"architecture": name, "d_sae": 512}} for name in architectures()},
}


def configs() -> dict[str, RunConfig]:
    shipped = {name: load_config(name) for name in ("quickstart", "paper", "gpt2")}
    return shipped | {name: parse_config(tree) for name, tree in TYPICAL.items()}


def digests(config: RunConfig) -> dict[str, str]:
    """Of everything, with the world as it would be resolved held still."""
    content = {"source": "files", "files": 3, "content": "0123456789abcdef", "text_column": "text"}
    model = {"weights": "fedcba9876543210", "dtype": "float32"}
    points = list(config.activations.hook_points)
    tokens = identity.token_identity(config.corpus, content, "tokenizer", config.seed)
    named = identity.digest(tokens)
    stored = identity.digest(identity.activation_identity(config.activations, named, model, points, config.seed))
    coder = identity.digest(
        identity.coder_identity(
            config.training, config.sae.identity(128), stored, points[:1], points[:1], config.seed, config.rerun
        )
    )
    place = identity.placed(points[:1], points[:1])
    measured = identity.coder_on_text_identity(config.evaluation, "0" * 64, named, model, place, config.activations)
    compared = identity.evaluation_set_identity(config.evaluation, tokens, model, place, 5_000, config.activations)
    run = identity.run_identity(config.name, coder, named, config.evaluation, "model", "sae-foundry")
    return {
        "tokens": named,
        "activations": stored,
        "coder": coder,
        "evaluation": identity.digest(measured),
        "evaluation_set": identity.digest(compared),
        "run": identity.digest(run),
    }


def golden(name: str, found: dict[str, Any]) -> dict[str, Any]:
    path = GOLDEN / name
    if os.environ.get(WRITE):
        path.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
    return json.loads(path.read_text())


def test_what_has_a_name_keeps_it():
    found = {name: digests(config) for name, config in configs().items()}
    kept = golden("digests.json", found)
    changed = {f"{name}: {kind}" for name in kept for kind in kept[name] if found.get(name, {}).get(kind) != kept[name][kind]}
    assert not changed, (
        f"digests changed ({', '.join(sorted(changed))}), so data is made anew and versions are no longer comparable. A new "
        "field belongs to those that came later (identity.Fields.later, CoderSettings.decides_later). Where other results are "
        f"meant, raise the version of the kind (identity.VERSIONS) or of the architecture, {AGAIN}"
    )
    assert set(found) == set(kept), AGAIN


SETTINGS: dict[str, type[BaseModel]] = {
    "corpus": CorpusSettings,
    "activations": ActivationSettings,
    "training": TrainingSettings,
    "evaluation": EvaluationSettings,
}


def with_section(config: RunConfig, section: str, settings: BaseModel) -> RunConfig:
    return config.model_copy(update={section: settings})


@pytest.mark.parametrize("section", [*SETTINGS, "sae"])
def test_a_new_field_with_its_default_changes_no_name(section: str):
    kept = json.loads((GOLDEN / "digests.json").read_text())
    for name, config in configs().items():
        old = getattr(config, section)
        new = create_model(f"New{type(old).__name__}", __base__=type(old), brand_new=(int, 3))
        again = with_section(config, section, new.model_validate(old.model_dump(mode="json")))
        assert digests(again) == kept[name], (section, name)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("corpus", "context_length", 64),
        ("activations", "rows_per_group", 4096),
        ("training", "batch_size", 2048),
        ("evaluation", "reference_tokens", 99),
        ("sae", "decoder_init_norm", 0.2),
    ],
)
def test_a_changed_default_is_another_name(section: str, field: str, value: Any):
    config = parse_config({})
    old = type(getattr(config, section))
    new = create_model(f"New{old.__name__}", __base__=old, **{field: (type(value), value)})
    fields = {} if section != "sae" else {"architecture": "relu"}
    assert digests(with_section(config, section, new(**fields))) != digests(config)


def test_a_field_that_came_later_is_in_an_identity_only_where_it_is_set():
    old = TrainingSettings()
    new = create_model("Newer", __base__=TrainingSettings, brand_new=(int, 3))
    fields = identity.Fields(identity.TRAINING.always, later=("brand_new",))
    assert fields.of(new()) == identity.TRAINING.of(old)
    assert fields.of(new(brand_new=4)) == {**identity.TRAINING.of(old), "brand_new": 4}


@pytest.mark.parametrize("section", SETTINGS)
def test_every_field_stands_in_exactly_one_list(section: str):
    fields = getattr(identity, {"corpus": "CORPUS", "activations": "ACTIVATIONS"}.get(section, section.upper()))
    listed = [*fields.always, *fields.later, *fields.resolved, *fields.without_effect]
    if section == "corpus":
        listed = [name for name in listed if name in CorpusSettings.model_fields]
    assert sorted(listed) == sorted(SETTINGS[section].model_fields), (
        f"a field of {SETTINGS[section].__name__} is in no list of components/run/identity.py, or in two: a new one that "
        "changes what comes out belongs to `later`, one that does not to `without_effect`"
    )


@pytest.mark.parametrize("name", architectures())
def test_every_field_of_an_architecture_decides_something(name: str):
    settings = architectures()[name].Settings
    listed = [*settings.decides, *settings.decides_later, "d_sae", "expansion_factor"]
    assert sorted(listed) == sorted(settings.model_fields), (
        f"a field of {settings.__name__} is not listed: a new one belongs to its `decides_later`"
    )


def test_two_evaluations_are_comparable_whatever_else_they_list():
    config = load_config("quickstart")
    other = with_section(config, "evaluation", config.evaluation.model_copy(update={"baselines": (), "neighbours": 9}))
    assert digests(other)["evaluation"] != digests(config)["evaluation"]
    assert digests(other)["evaluation_set"] == digests(config)["evaluation_set"]
    longer = with_section(config, "corpus", config.corpus.model_copy(update={"train_tokens": 5_000_000}))
    assert digests(longer)["evaluation_set"] == digests(config)["evaluation_set"]
    masked = config.activations.model_copy(update={"exclude": ExcludeSettings(positions=(0,))})
    elsewhere = with_section(config, "activations", masked)
    assert digests(elsewhere)["evaluation_set"] != digests(config)["evaluation_set"]


# Curves


def curve(name: str) -> dict[str, list[float]]:
    """A short training on fixed numbers, float32, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(48, 16, generator=generator), dim=1)
    settings = TrainingSettings(tokens=40 * 128, batch_size=128, learning_rate=3e-3, dead_after_tokens=1_000)
    small = {"d_sae": 32} | ({"k": 4} if "k" in architectures()[name].Settings.model_fields else {})
    column = Column("x", 16)
    job = Training(
        url="", digest="", identity={}, settings=settings, coder=architectures()[name].Settings(**small), dataset_url="",
        reads=("x",), writes=("x",), seed=0, metadata={},
    )  # fmt: skip
    training = new_coder(job, (column,), (column,), torch.device("cpu"))
    mean = torch.zeros(16)
    for step in range(40):
        firing = (torch.rand(128, 48, generator=generator) < 0.08) * torch.rand(128, 48, generator=generator)
        x = 4 * firing @ directions
        take_step(training, settings, x, x, mean, measured=step % 8 == 7)
    names = ("loss", "reconstruction_loss", "l0", "gradient_norm")
    return {key: [point[key] for point in training.curves] for key in names}


@pytest.mark.parametrize("name", architectures())
def test_the_same_training_has_the_same_curve(name: str):
    found = curve(name)
    path = GOLDEN / "curves.json"
    if os.environ.get(WRITE):
        every = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**every, name: found}, indent=2, sort_keys=True) + "\n")
    kept = json.loads(path.read_text())[name]
    for key, values in kept.items():
        # Another number of threads or another processor rounds sums otherwise; another recipe does more than that.
        assert found[key] == pytest.approx(values, rel=2e-3, abs=1e-3), (
            f"{name}: the same settings and numbers give another {key}. If that is meant, raise the `version` of its settings "
            f"(or identity.VERSIONS['coder'] where it concerns all), {AGAIN}"
        )
