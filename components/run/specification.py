"""A run, resolved once: configuration, corpus, language model, device and all digests, frozen, as JSON from task to task.

Nothing here trains, extracts or writes. `sae plan` prints it, and every step starts from it, so that a plan cannot say one
thing and a run do another; and what changes in the world while a run goes on changes nothing in that run.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Any, Self

import torch

from components import storage
from components.activations.dataset.job import Extraction
from components.activations.dataset.manifest import Manifest, read_manifest
from components.activations.online.folder import OnlineFolder
from components.corpus import sources as corpus_sources
from components.corpus.labelled import list_labelled
from components.corpus.manifest import TokenManifest, read_token_manifest
from components.corpus.sources import ListedSource, corpus_content, list_corpus
from components.evaluation.record import EvaluationRecord, read_evaluation
from components.evaluation.settings import EvaluationSettings
from components.hardware import resolve_device
from components.interpretation.record import InterpretationRecord, read_interpretation
from components.interpretation.settings import InterpretationSettings
from components.language_model.hook_points import HookPoint, parse_hook_point
from components.language_model.record import ModelRecord, resolve_model
from components.language_model.source import ModelSource, find_model
from components.language_model.tokenizer import chat_date, load_encoder
from components.run import identity
from components.run.coder import coder_columns, coder_training, hook_points_said, registered_name
from components.run.config import RunConfig
from components.run.repetition import asked_for
from components.run.start import CHAMPION, Wanted, find_start
from components.sae.coder import Column
from components.settings import Record
from components.settings import digest as content_digest
from components.tracking.code import git_tags
from components.training.job import Start, Training, TrainingRecord, read_training_record


class Specification(Record):
    """What a run is. Properties are computed from it alone; methods look at what is there already."""

    config: RunConfig
    """With every revision resolved to a commit."""
    device_name: str
    code: dict[str, str]
    """Commit of the code that began the run, as tags; none outside a checkout."""
    model: ModelRecord
    sources: tuple[ListedSource, ...]
    """Of the corpus, in the order of its settings."""
    labelled: tuple[ListedSource, ...] = ()
    """Of the labelled text of `evaluation.probing`, in the order of its tasks."""
    reads: tuple[str, ...]
    """Hook points that the coder reads."""
    writes: tuple[str, ...]
    """Those that it writes: the same, but for a transcoder."""
    token_identity: dict[str, Any]
    token_digest: str
    dataset_identity: dict[str, Any]
    dataset_digest: str
    sae_identity: dict[str, Any]
    sae_digest: str
    start: Start | None = None
    """The coder that training continues from; None for new weights."""
    start_said: str = "from new weights"
    """How that came about, for people."""

    def to_json(self) -> str:
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str) -> Self:
        return _parsed(cls, text)

    @cached_property
    def source(self) -> ModelSource:
        return self.model.source

    @property
    def device(self) -> torch.device:
        return torch.device(self.device_name)

    @property
    def points(self) -> list[HookPoint]:
        """The hook points that are stored, in the order of the columns."""
        return [parse_hook_point(column.name) for column in self.model.columns]

    @property
    def hook_point(self) -> str:
        """Where the coder is, for people and in names."""
        return hook_points_said(self.reads, self.writes)

    @property
    def point(self) -> HookPoint:
        """Where what it writes is put in the model; of a crosscoder, its last hook point."""
        return parse_hook_point(self.writes[-1])

    @property
    def read_points(self) -> tuple[HookPoint, ...]:
        """What is read where that is not `point` alone."""
        return () if self.reads == self.writes[-1:] else tuple(map(parse_hook_point, self.reads))

    @property
    def bos(self) -> int | None:
        return None if self.config.corpus.bos == "none" else load_encoder(self.source).bos

    @property
    def read_columns(self) -> tuple[Column, ...]:
        return tuple(Column(name, self.widths[name]) for name in self.reads)

    @property
    def written_columns(self) -> tuple[Column, ...]:
        return tuple(Column(name, self.widths[name]) for name in self.writes)

    @property
    def widths(self) -> dict[str, int]:
        return {column.name: column.width for column in self.model.columns}

    @property
    def d_in(self) -> int:
        return sum(column.width for column in self.read_columns)

    @property
    def d_sae(self) -> int:
        return self.config.sae.features(self.d_in)

    @property
    def of_images(self) -> bool:
        return self.config.corpus.source == "images"

    def _url(self, kind: str, key: str) -> str:
        return storage.join(self.config.storage.root, kind, f"{self.config.name}-{key}")

    # tokens

    @property
    def token_url(self) -> str:
        return self._url("tokens", self.token_digest)

    def token_manifest(self) -> TokenManifest | None:
        return read_token_manifest(self.token_url)

    # activations

    @property
    def dataset_url(self) -> str:
        return self._url("activations", self.dataset_digest)

    def dataset_manifest(self) -> Manifest | None:
        url = self.dataset_url
        return OnlineFolder(url).first_manifest() if self.config.activations.mode == "online" else read_manifest(url)

    def extraction(self, token_manifest: TokenManifest) -> Extraction:
        made_from = {"name", "seed", "corpus", "language_model", "activations"}
        return Extraction(
            url=self.dataset_url,
            digest=self.dataset_digest,
            identity=self.dataset_identity,
            configuration=self.config.model_dump(mode="json", include=made_from),
            settings=self.config.activations,
            source=self.model.source,
            widths=self.widths,
            token_url=self.token_url,
            token_manifest=token_manifest,
            seed=self.config.seed,
        )

    # coder

    @property
    def sae_url(self) -> str:
        return self._url("saes", self.sae_digest)

    def training_record(self) -> TrainingRecord | None:
        return read_training_record(self.sae_url)

    def training(self) -> Training:
        return coder_training(
            self.config, self.model, self.reads, self.writes, url=self.sae_url, digest=self.sae_digest,
            identity=self.sae_identity, dataset_url=self.dataset_url, start=self.start,
        )  # fmt: skip

    def repeated(self, rerun: str | None) -> Specification:
        """The same run with another word in `rerun`: on the same activations, another coder."""
        return _named(self, self.config.model_copy(update={"rerun": rerun}), _identity_of(self.start))

    def varied(self, config: RunConfig) -> Specification:
        """Another coder on the same activations. config: this run's own, other in `sae` and `training` alone."""
        varied = {"sae": config.sae, "training": config.training}
        assert config == self.config.model_copy(update=varied), "the rest decides what it is trained and measured on"
        reads, writes = coder_columns(config, self.model, self.source)
        other = self.model_copy(update={"config": config, "reads": reads, "writes": writes})
        return other.starting_from(config.training.start_from, must_fit=True)

    def starting_from(self, start_from: str | None, must_fit: bool) -> Specification:
        """The same run, continuing from what that means now, see `find_start`."""
        wanted = Wanted(
            config=self.config,
            registered_model=self.registered_model,
            source=self.source,
            reads=self.read_columns,
            writes=self.written_columns,
            base=self.base_digest,
        )
        found = find_start(wanted, start_from, must_fit)
        resolved = self.model_copy(update={"start": found.start, "start_said": found.said})
        return _named(resolved, self.config, _identity_of(found.start))

    # evaluation

    def evaluation_identity(self, weights_sha256: str) -> dict[str, Any]:
        return self._on_text_identity(self.config.evaluation, weights_sha256)

    def evaluation_record(self) -> EvaluationRecord | None:
        """The evaluation of the trained coder, None where either is missing."""
        record = self.training_record()
        if record is None:
            return None
        return read_evaluation(self.sae_url, identity.digest(self.evaluation_identity(record.weights_sha256)))

    # interpretation

    def interpretation_identity(self, weights_sha256: str) -> dict[str, Any]:
        return self._on_text_identity(self.config.interpretation, weights_sha256)

    def _on_text_identity(self, settings: EvaluationSettings | InterpretationSettings, weights_sha256: str) -> dict[str, Any]:
        return identity.coder_on_text_identity(
            settings, weights_sha256, self.token_digest, self.model.identity, self._placed, self.config.activations,
            self._labelled_content,
        )  # fmt: skip

    def interpretation_record(self) -> InterpretationRecord | None:
        """Of the trained coder's feature data, None where there is none."""
        record = self.training_record()
        if record is None:
            return None
        return read_interpretation(self.sae_url, identity.digest(self.interpretation_identity(record.weights_sha256)))

    def given_evaluation_url(self, digest: str) -> str:
        """Where the evaluation of an SAE made elsewhere is kept."""
        return self._url("evaluations", digest)

    def kept_spans_url(self, digest: str) -> str:
        """Where an evaluation that is going on keeps what it has measured."""
        return f"{self.given_evaluation_url(digest)}.spans"

    @property
    def _placed(self) -> dict[str, Any]:
        return identity.placed(self.reads, self.writes)

    def evaluation_set(self, tokens: int) -> str:
        """The digest of what two coders must share to be compared; tokens: that were measured."""
        config = self.config
        found = identity.evaluation_set_identity(
            config.evaluation, self.token_identity, self.model.identity, self._placed, tokens, config.activations
        )
        return identity.digest(found)

    # registry

    @property
    def registered_model(self) -> str:
        return registered_name(self.config, self.model.slug, self.hook_point)

    @property
    def run_digest(self) -> str:
        config = self.config
        return identity.digest(
            identity.run_identity(
                config.name, self.sae_digest, self.token_digest, config.evaluation, self.registered_model,
                config.tracking.experiment, self._labelled_content,
            )
        )  # fmt: skip

    @property
    def _labelled_content(self) -> list[dict[str, Any]]:
        return [source.content for source in self.labelled]

    @property
    def base_digest(self) -> str:
        """Of all that decides a run as its user asked for it: whether it is the first of its kind or a repetition of ours,
        whoever is champion now, and whether `retrain` let it start from that one."""
        config, wanted = self.config.model_copy(update={"rerun": asked_for(self.config.rerun)}), self.config.training.start_from
        begun = {"of": CHAMPION} if wanted == CHAMPION else _identity_of(self.start)
        start = None if wanted in (None, "scratch") else begun
        return _named(self, config, start).run_digest

    @property
    def model_digest(self) -> str:
        return content_digest(self.model.identity)


@lru_cache(maxsize=2)
def _parsed(kind: type[Any], text: str) -> Any:
    return kind.model_validate_json(text)


def resolve(config: RunConfig, champion_must_fit: bool = True) -> Specification:
    """Ask the world once: revisions, the corpus's files, the model's shape, the device, the checkout, the coder to start from.

    champion_must_fit: where `training.start_from` is `champion` and that one is of another shape or architecture, it is a
    mistake; without, training starts from new weights. Raises a UserError for what is not there.
    """
    images = config.corpus.source == "images"
    source = find_model(config.language_model).pinned()
    config = config.model_copy(update={"corpus": corpus_sources.pinned(config.corpus), "language_model": source.settings})
    model = resolve_model(source, config.activations.hook_points, images, config.corpus.prompt)
    reads, writes = coder_columns(config, model, source)
    sources = list_corpus(config.corpus)
    content, date = corpus_content(config.corpus, sources), chat_date(config.corpus, source)
    tokens = identity.token_identity(config.corpus, content, model.tokenizer, config.seed, date)
    token_digest = identity.digest(tokens)
    names = [column.name for column in model.columns]
    probing = config.evaluation.probing
    stored = identity.activation_identity(config.activations, token_digest, model.identity, names, config.seed)
    resolved = Specification(
        config=config,
        device_name=str(resolve_device(config.device)),
        code=git_tags(),
        model=model,
        sources=sources,
        labelled=() if probing is None else list_labelled(probing.tasks),
        reads=reads,
        writes=writes,
        token_identity=tokens,
        token_digest=token_digest,
        dataset_identity=stored,
        dataset_digest=identity.digest(stored),
        sae_identity={},
        sae_digest="",
    )
    return resolved.starting_from(config.training.start_from, champion_must_fit)


def _named(specification: Specification, config: RunConfig, start: Mapping[str, str] | None) -> Specification:
    """With the coder's identity. start: `Start.identity` of what training continues from."""
    coder = config.sae.identity(specification.d_in)
    found = identity.coder_identity(
        config.training, coder, specification.dataset_digest, specification.reads, specification.writes, config.seed,
        config.rerun, start,
    )  # fmt: skip
    return specification.model_copy(update={"config": config, "sae_identity": found, "sae_digest": identity.digest(found)})


def _identity_of(start: Start | None) -> dict[str, str] | None:
    return None if start is None else start.identity
