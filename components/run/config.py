"""The configuration of a run: one tree, composed of the settings that each component owns.

YAML files, `--set` on the command line, the form in the Prefect UI and the parameters in MLflow are all this tree.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from components import storage
from components.activations.settings import ActivationSettings
from components.bounds import LONGEST_SECONDS
from components.corpus.settings import CorpusSettings
from components.evaluation.settings import EvaluationSettings
from components.interpretation.settings import InterpretationSettings
from components.language_model.settings import LanguageModelSettings
from components.redaction import redacted
from components.sae.choice import SAESettings, default_settings
from components.settings import Settings, UserError, digest, first_line
from components.storage.addresses import Address, LocalPath
from components.tracking.settings import TrackingSettings
from components.training.settings import RankSettings, TrainingSettings
from components.yaml_text import YamlError, parse_value, parse_yaml, read_text


class StorageSettings(Settings):
    root: Address = Field(
        default_factory=lambda: os.environ.get("SAE_STORAGE_ROOT") or "data", min_length=1, validate_default=True
    )
    """Folder or `s3://bucket/prefix` under which everything is stored; SAE_STORAGE_ROOT of the machine, or else `data`."""

    cache: LocalPath | None = None
    """Local folder that keeps activations read from an object store for the next epoch or run; none where not given."""

    cache_bytes: int = Field(default=50_000_000_000, ge=0)
    """Largest size of the cache folder in bytes; what was used longest ago is removed."""


class ExecutionSettings(Settings):
    """How a run is carried out; it does not change the result."""

    runner: Literal["threads", "ray", "dask"] = "threads"
    """Where the workers are: in this process, or on a Ray or Dask cluster (`pip install sae-foundry[ray]`, `[dask]`)."""

    workers: int = Field(default=1, ge=1)
    """How many work at the same time, each with a copy of the language model; at most one per GPU is of use."""

    training_limit: str | None = Field(default_factory=lambda: os.environ.get("SAE_TRAINING_LIMIT") or None)
    """Prefect's global concurrency limit that a training waits for, such as `gpu`; SAE_TRAINING_LIMIT of the machine, or
    else none."""

    training_timeout_minutes: float | None = Field(default=None, gt=0, le=LONGEST_SECONDS / 60)
    """A training that takes longer is stopped, leaves a checkpoint, and fails."""

    training: RankSettings = RankSettings()
    """How many processes train the coder, and what each of them holds."""

    extraction_device: str | None = None
    """Where the language model runs beside a training whose `activations.mode` is `online`, such as `cuda:1`; `device` where it
    is not given."""

    address: str | None = None
    """Of the cluster, such as `ray://head:10001` or `tcp://scheduler:8786`; a local one is started where it is not given."""

    @model_validator(mode="after")
    def _an_address_is_of_a_cluster(self) -> ExecutionSettings:
        if self.address is not None and self.runner == "threads":
            raise ValueError(f"execution.address: '{self.address}' has no meaning with runner 'threads'; use ray or dask")
        return self


class RunConfig(Settings):
    form_first = (
        "name",
        "language_model",
        "corpus",
        "activations",
        "sae",
        "training",
        "evaluation",
        "interpretation",
        "tracking",
    )

    name: str = Field(default="quickstart", pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=128)
    """Name of the run, part of folder names: lower case letters, digits, dots and dashes."""

    seed: int = Field(default=0, ge=0)
    """Decides the order of documents, the shuffle and the SAE's first weights."""

    device: str = "auto"
    """`auto` (CUDA where there is one, else the CPU), `cpu`, `cuda` or `cuda:0`."""

    rerun: str | None = Field(default=None, pattern=r"^[a-z0-9][a-z0-9._-]*(\+[a-z0-9._-]+)?$", max_length=128)
    """Trains again what was trained before, on the same activations: another word, another training. It gives the same
    weights unless code, libraries or machine have changed. `retrain` adds `+` and a word of its own where the code changed,
    the last SAE is too old, or a run is forced."""

    storage: StorageSettings = Field(default_factory=lambda: StorageSettings())
    corpus: CorpusSettings = CorpusSettings()
    language_model: LanguageModelSettings = LanguageModelSettings()
    activations: ActivationSettings = ActivationSettings()
    sae: SAESettings = Field(default_factory=default_settings)
    training: TrainingSettings = TrainingSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    interpretation: InterpretationSettings = InterpretationSettings()
    tracking: TrackingSettings = TrackingSettings()
    execution: ExecutionSettings = Field(default_factory=lambda: ExecutionSettings())

    @property
    def title(self) -> str:
        """The run in a few words, for people: two configurations of one name have different ones."""
        sae, training = self.sae, self.training
        size = f"{sae.d_sae:,}" if sae.d_sae else f"x{sae.expansion_factor or 8:g}"
        target = getattr(sae, "target_l0", None) if getattr(sae, "sparsity", "target_l0") == "target_l0" else None
        said = {**({"target_l0": "L0 "} if target else {}), **_SPARSITIES}
        sparsity = next((f" {word}{getattr(sae, name):g}" for name, word in said.items() if hasattr(sae, name)), "")
        place = training.hook_point or "+".join(training.crosscoder or self.activations.hook_points)
        # What nobody would read is told apart by a digest.
        rest = digest(self.model_dump(mode="json", exclude={"storage", "execution", "tracking", "device"}))[:4]
        return f"{self.name}: {sae.architecture} {size}{sparsity}, {place}, {training.tokens:,} tokens, {rest}"

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_in_its_old_place(cls, tree: Any) -> Any:
        for (section, field), (reason, now) in _MOVED.items():
            if isinstance(tree, Mapping) and isinstance(tree.get(section), Mapping) and field in tree[section]:
                raise ValueError(f"{section}.{field}: it {reason} now; write {now}")
        return tree


_SPARSITIES = {"k": "k ", "sparsity_coefficient": "lambda "}
_MOVED = {
    ("training", "sparsity_coefficient"): ("belongs to the architecture", "sae.sparsity_coefficient"),
    ("training", "sparsity_warmup"): ("belongs to the architecture", "sae.sparsity_warmup"),
    ("evaluation", "exclude_norms_above"): ("holds for all that is done with the tokens", "activations.exclude.norms_above"),
}


def shipped_configs() -> dict[str, Path]:
    """The configurations that come with the project, by name."""
    folder = Path(str(resources.files("flows") / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_config(source: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The configuration in a YAML file (also on `s3://`), or of the shipped one of that name, with `field=value` overrides.

    Raises a UserError that names the field, the value and what is accepted.
    """
    try:
        tree = parse_yaml(read_config(source)) or {}
    except OSError as error:
        names = ", ".join(shipped_configs())
        raise UserError(f"CONFIG: cannot read '{source}'; give a YAML file or one of {names}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"CONFIG: '{source}' is not YAML: {' '.join(str(error).split())}") from error
    except YamlError as error:
        raise UserError(f"CONFIG: '{source}' {error}") from error
    except UserError:
        raise
    except Exception as error:  # each file system has its own exceptions; all mean the same to the user
        raise UserError(f"CONFIG: cannot read '{source}' ({first_line(error)})") from error
    if not isinstance(tree, dict):
        raise UserError(f"CONFIG: '{source}' holds a {type(tree).__name__}; it must be a mapping of fields")
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree)


def read_config(source: str) -> str:
    """The text of a YAML file, local or on `s3://`, or of the shipped configuration of that name."""
    if not storage.is_local(source):
        return storage.read_bytes(source).decode("utf-8")
    path = Path(source)
    return read_text(path if os.path.isfile(path) else shipped_configs().get(source, path))


def parse_config(tree: Mapping[str, Any]) -> RunConfig:
    """The configuration in a tree of plain values; a UserError for the first thing that does not fit."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(error_sentence(error.errors()[0])) from error


def _apply(tree: dict[str, Any], override: str) -> None:
    field, equals, text = override.partition("=")
    if not equals or not field:
        raise UserError(f"--set: '{override}' is not of the form field=value, such as training.tokens=2_000_000")
    try:
        value = parse_value(text)
    except YamlError as error:
        raise UserError(f"--set: the value of '{_short(field)}', '{_short(text)}', {error}") from error
    *parents, last = field.split(".")
    node: Any = tree
    for parent in parents:
        if isinstance(node, dict) and node.get(parent) is None:
            node[parent] = {}  # a section that is there without a field, too
        child = _entry(node, parent, field) if isinstance(node, list) else node[parent]
        if not isinstance(child, dict | list):
            raise UserError(f"--set: '{field}': '{parent}' is a value and has no fields")
        node = child
    if isinstance(node, list):
        _entry(node, last, field)
        node[int(last)] = value
    else:
        node[last] = value


def _entry(entries: list[Any], place: str, field: str) -> Any:
    if re.fullmatch("[0-9]{1,9}", place) is None or int(place) >= len(entries):
        raise UserError(f"--set: '{field}': '{place}' is no place in a list of {len(entries)}, counted from 0")
    return entries[int(place)]


def error_sentence(error: Any) -> str:
    """One pydantic error as one sentence with the field, the value and what is accepted."""
    location = [str(part) for part in error["loc"]]
    field = ".".join(location) or "configuration"
    if error["type"] == "extra_forbidden":
        known = _fields_at(location[:-1])
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f", did you mean '{close[0]}'?" if close else ""
        return f"{_short(field)}: there is no such field{hint} (accepted here: {', '.join(known)})"
    if error["type"] == "value_error":
        return _short(str(error["ctx"]["error"]), 1_000)
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{_short(field)}: {_short(redacted(repr(error['input'])))} is not accepted: {_short(message, 400)}"


def _short(text: str, longest: int = 200) -> str:
    """In one line, and no longer than somebody reads."""
    text = text.replace("\n", "\\n").replace("\r", "\\r")
    return text if len(text) <= longest else f"{text[:longest]}..."


def _fields_at(location: list[str]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for part in location:
        if part.isdigit():  # a place in a list of settings
            continue
        field = model.model_fields.get(part)
        candidates = [] if field is None else [field.annotation, *get_args(field.annotation)]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)


def flattened(tree: Mapping[str, Any]) -> dict[str, Any]:
    """`{"training.tokens": 2000000, ...}`: the leaves of a configuration's tree of plain values by their dotted names."""
    leaves: dict[str, Any] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                visit(f"{prefix}.{key}" if prefix else key, child)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for index, child in enumerate(value):
                visit(f"{prefix}.{index}", child)
        else:
            leaves[prefix] = value

    visit("", dict(tree))
    return leaves
