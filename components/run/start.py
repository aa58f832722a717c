"""The coder that a training continues from (`training.start_from`): found once, and compared with what is to be trained."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from components import storage
from components.evaluation.given import other_model, other_place
from components.interop.names import kind_of
from components.interop.saelens import CONFIG_NAME, WEIGHTS_NAME, read_config
from components.language_model.source import ModelSource
from components.redaction import redacted
from components.run.repetition import BASE_TAG, RERUN_TAG
from components.sae.architectures import architectures
from components.sae.coder import Coder, Column
from components.settings import UserError
from components.storage import file_sha256
from components.training.job import Start
from components.training.start import as_trained, content_of

if TYPE_CHECKING:
    from components.run.config import RunConfig

CHAMPION, SCRATCH = "champion", "scratch"
START_TAG = "sae.started_from"
"""Of a version: `Start.location` of the coder that its training continued from."""
_REGISTERED = "models:/"
_RECORD = "training.json"
_IMPORTED_TAG = "sae.imported"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to be trained, as far as it decides from what it may start."""

    config: RunConfig
    registered_model: str
    source: ModelSource
    reads: tuple[Column, ...]
    writes: tuple[Column, ...]
    base: str
    """`Specification.base_digest`."""

    @property
    def coder(self) -> Coder:
        """Without weights."""
        with torch.device("meta"):
            return self.new_coder()

    def new_coder(self) -> Coder:
        settings, width = self.config.sae, sum(column.width for column in self.reads)
        return architectures()[settings.architecture](settings, self.reads, self.writes, settings.features(width))


@dataclass(frozen=True, kw_only=True)
class Found:
    """From what a training starts, and the sentence that says so."""

    start: Start | None
    said: str


def find_start(wanted: Wanted, start_from: str | None, must_fit: bool) -> Found:
    """What `start_from` means now. must_fit: a champion that does not fit is a mistake, and not passed over.

    A UserError names the field, the value and what is accepted.
    """
    if start_from is None or start_from == SCRATCH:
        return Found(start=None, said="from new weights")
    if start_from == CHAMPION:
        return _champion(wanted, must_fit)
    if start_from.startswith(_REGISTERED):
        version, client = _version(wanted, start_from)
        start, wrong = _registered(wanted, client, version)
    else:
        start, wrong = _in_folder(wanted, start_from)
    if wrong is not None:
        raise _misfit(f"'{start_from}'", wrong)
    return Found(start=start, said=f"from {redacted(start_from)}")


def _misfit(start_from: str, wrong: str) -> UserError:
    return UserError(f"training.start_from: {redacted(start_from)} does not fit: {wrong}")


def _champion(wanted: Wanted, must_fit: bool) -> Found:
    from components.registry import versions as registry

    client, name = _client(wanted), wanted.registered_model
    if client is None:
        return Found(start=None, said=f"from new weights: there is no registry yet, and so no champion of {name}")
    # Whoever asks again for what was made already gets that, although it may have become the champion itself.
    filtered = f"name = '{name}' and tags.`{BASE_TAG}` = '{wanted.base}'"
    made = [one for one in registry.search_versions(client, filtered) if one.tags.get(RERUN_TAG) == wanted.config.rerun]
    if made:
        version, label = made[-1], f"as version {made[-1].version} of {name}, which is the same"
        location = version.tags.get(START_TAG)
        if location is None:
            return Found(start=None, said=f"from new weights, {label}")
        found = registered_version(client, location)
        if found is not None and (start := _registered(wanted, client, found)[0]) is not None:
            return Found(start=start, said=f"from {location}, {label}")
    champion = registry.champion_of(client, name)
    if champion is None:
        return Found(start=None, said=f"from new weights: {name} has no champion")
    start, wrong = _registered(wanted, client, champion)
    label = f"{_REGISTERED}{name}/{champion.version}"
    if wrong is not None and must_fit:
        raise _misfit(f"'{CHAMPION}', which is {label},", wrong)
    if wrong is not None:
        return Found(start=None, said=f"from new weights: the champion, {label}, does not fit: {wrong}")
    return Found(start=start, said=f"from {label}, the champion")


def _client(wanted: Wanted) -> Any | None:
    from components.tracking import store

    config = wanted.config
    if not store.database_exists(config.tracking, config.storage.root):
        return None
    return store.connect(config.tracking, config.storage.root)


def _version(wanted: Wanted, address: str) -> tuple[Any, Any]:
    from components.registry import versions as registry

    client = _client(wanted)
    if client is None:
        raise UserError(f"training.start_from: there is no registry yet that could hold '{address}'; give tracking.uri")
    try:
        return registry.resolve_version(client, address), client
    except UserError as error:
        raise UserError(f"training.start_from: {str(error).removeprefix('VERSION: ')}") from error


def registered_version(client: Any, location: str) -> Any | None:
    """The version at `models:/NAME/VERSION`, None where it is not there (any more)."""
    from components.registry import versions as registry

    if not location.startswith(_REGISTERED):
        return None
    name, _, number = location.removeprefix(_REGISTERED).rpartition("/")
    return registry.version_or_none(client, name, number)


def _registered(wanted: Wanted, client: Any, version: Any) -> tuple[Start | None, str | None]:
    """The coder of a version, or why it does not fit; the weights of one that was trained here stay where they are."""
    from components.registry.download import version_files
    from components.registry.versions import WEIGHTS_TAG

    location = f"{_REGISTERED}{version.name}/{version.version}"
    with tempfile.TemporaryDirectory(prefix="sae-start-") as scratch:
        folder = Path(scratch)
        own = _IMPORTED_TAG not in version.tags
        try:
            version_files(client, version, (CONFIG_NAME, _RECORD if own else WEIGHTS_NAME), folder)
        except UserError as error:
            return None, str(error)
        wrong = misfit(wanted, folder) or (None if own else _untrainable(wanted, folder, location))
        if wrong is not None:
            return None, wrong
        config = file_sha256(folder / CONFIG_NAME)
        return Start(location=location, weights_sha256=version.tags[WEIGHTS_TAG], config_sha256=config), None


def _in_folder(wanted: Wanted, location: str) -> tuple[Start, str | None]:
    """The coder in a folder, and why it does not fit."""
    with _copied(location) as folder:
        return content_of(folder, location), misfit(wanted, folder) or _untrainable(wanted, folder, location)


def _untrainable(wanted: Wanted, folder: Path, location: str) -> str | None:
    """Of a coder made elsewhere nothing is known but its tensors: they are tried now, and not after the extraction."""
    try:
        as_trained(wanted.new_coder(), folder, [1.0] * len(wanted.reads), [1.0] * len(wanted.writes))
    except ValueError as error:
        return str(error).replace(str(folder), redacted(location))
    return None


@contextmanager
def _copied(location: str) -> Iterator[Path]:
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not storage.exists(storage.join(location, name)):
            raise UserError(
                f"training.start_from: '{redacted(location)}' holds no {name}; accepted are '{CHAMPION}', '{SCRATCH}', "
                f"{_REGISTERED}NAME/VERSION, {_REGISTERED}NAME@ALIAS and a folder in SAELens' format"
            )
    names = [CONFIG_NAME, WEIGHTS_NAME, *([_RECORD] if storage.exists(storage.join(location, _RECORD)) else [])]
    with storage.local_copies(location, names) as folder:
        yield folder


def misfit(wanted: Wanted, folder: Path) -> str | None:
    """Why the coder whose `cfg.json` (and record, if it is one of ours) lies in `folder` is none from which the wanted training
    can continue, None where it is one."""
    try:
        config = read_config(folder)
    except ValueError as error:
        return str(error).replace(f"{folder}/", "")
    coder = wanted.coder
    architecture = wanted.config.sae.architecture
    written, known = coder.exported(), _own_architecture(folder / _RECORD)
    if known is not None and known != architecture:
        return f"its architecture is '{known}'; sae.architecture is '{architecture}', and the same is accepted"
    if config["architecture"] != str(kind_of(coder)):
        return (
            f"its architecture is '{config['architecture']}' in SAELens' terms; accepted is '{kind_of(coder)}', which is "
            f"what sae.architecture '{architecture}' is there"
        )
    if set(written.tensors) != set(coder.state_dict()) and type(coder).load_exported is Coder.load_exported:
        return f"sae.architecture '{architecture}' has no `load_exported`, by which its export could be read back"
    if config["d_sae"] != coder.d_sae:
        return f"it has {config['d_sae']} features; sae.d_sae or sae.expansion_factor asks for {coder.d_sae}, which is accepted"
    place = other_place(config, wanted.reads, wanted.writes, wanted.source)
    return place or other_model(config, wanted.config.language_model.name)


def _own_architecture(record: Path) -> str | None:
    """Of a coder that was trained here, which SAELens' format may have under another name; None of one made elsewhere."""
    try:
        found = json.loads(record.read_text())
    except (OSError, ValueError):
        return None
    return found.get("architecture") if isinstance(found, dict) else None
