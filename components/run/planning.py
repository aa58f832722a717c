"""From a configuration to the work: what each step would read and write, and whether it is done already.

Nothing here trains, extracts or writes. `sae plan` prints it, and every step starts from it, so that a plan cannot say
one thing and a run do another.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from components import storage
from components.activations.dataset.job import Extraction, dataset_identity
from components.activations.dataset.manifest import Manifest, read_manifest
from components.activations.dataset.reader import WINDOW_GROUPS
from components.activations.dataset.schema import DTYPES, TOKEN_BYTES
from components.corpus import sources as corpus_sources
from components.corpus.images import ImageLayout, image_identity
from components.corpus.tokens import token_identity
from components.evaluation.evaluate import evaluation_identity, read_evaluation
from components.hardware import resolve_device
from components.language_model import loading
from components.language_model.hook_points import HookPoint, depth, expand_hook_points, reads_images
from components.language_model.loading import ModelSource, find_model, load_encoder, require_runnable
from components.run.config import RunConfig
from components.run.late_checks import check_later_steps
from components.settings import UserError, digest
from components.storage.cache import CachePlace
from components.training.loop import Training, read_training_record, training_identity


@dataclass(frozen=True)
class Plan:
    """A configuration, resolved. Properties are computed when they are asked for and then kept."""

    config: RunConfig

    @cached_property
    def source(self) -> ModelSource:
        return find_model(self.config.language_model)

    @cached_property
    def device(self) -> torch.device:
        return resolve_device(self.config.device)

    @cached_property
    def points(self) -> list[HookPoint]:
        """The hook points that are stored, in the order of the columns."""
        return expand_hook_points(self.config.activations.hook_points, self.source, "activations.hook_points")

    @cached_property
    def point(self) -> HookPoint:
        """The hook point that the SAE is trained on."""
        if self.config.training.hook_point is None:
            return self.points[0]
        return expand_hook_points([self.config.training.hook_point], self.source, "training.hook_point")[0]

    @property
    def hook_point(self) -> str:
        return str(self.point)

    @cached_property
    def widths(self) -> dict[HookPoint, int]:
        return self.source.widths(list(dict.fromkeys([*self.points, self.point])))

    @property
    def d_in(self) -> int:
        return self.widths[self.point]

    @property
    def d_sae(self) -> int:
        return self.config.sae.features(self.d_in)

    def _url(self, kind: str, key: str) -> str:
        return storage.join(self.config.storage.root, kind, f"{self.config.name}-{key}")

    # tokens

    @property
    def of_images(self) -> bool:
        return self.config.corpus.source == "images"

    @cached_property
    def image_layout(self) -> ImageLayout:
        return self.source.image_layout(self.config.corpus.prompt)

    @cached_property
    def token_identity(self) -> dict[str, Any]:
        if self.of_images:
            return image_identity(self.config.corpus, self.source.processor_identity, self.config.seed)
        return token_identity(self.config.corpus, self.source.tokenizer_identity, self.config.seed)

    @cached_property
    def token_digest(self) -> str:
        return digest(self.token_identity)

    @property
    def token_url(self) -> str:
        return self._url("tokens", self.token_digest)

    def token_manifest(self) -> dict[str, Any] | None:
        return storage.read_json_if_present(storage.join(self.token_url, "manifest.json"))

    # activations

    @cached_property
    def dataset_identity(self) -> dict[str, Any]:
        return dataset_identity(self.config.activations, self.source, self.token_identity, self.config.seed)

    @cached_property
    def dataset_digest(self) -> str:
        return digest(self.dataset_identity)

    @property
    def dataset_url(self) -> str:
        return self._url("activations", self.dataset_digest)

    def dataset_manifest(self) -> Manifest | None:
        return read_manifest(self.dataset_url)

    def extraction(self, token_manifest: dict[str, Any]) -> Extraction:
        return Extraction(
            url=self.dataset_url,
            identity=self.dataset_identity,
            configuration=self.config.model_dump(
                mode="json", include={"name", "seed", "corpus", "language_model", "activations"}
            ),
            settings=self.config.activations,
            source=self.source,
            token_url=self.token_url,
            token_manifest=token_manifest,
            seed=self.config.seed,
        )

    def cache(self) -> CachePlace | None:
        settings = self.config.storage
        return None if settings.cache is None else CachePlace(folder=settings.cache, limit=settings.cache_bytes)

    # SAE

    @cached_property
    def sae_identity(self) -> dict[str, Any]:
        config = self.config
        identity = training_identity(config.training, config.sae, self.dataset_digest, self.hook_point, config.seed)
        return identity if config.rerun is None else {**identity, "rerun": config.rerun}

    @cached_property
    def sae_digest(self) -> str:
        return digest(self.sae_identity)

    @property
    def sae_url(self) -> str:
        return self._url("saes", self.sae_digest)

    def training_record(self) -> dict[str, Any] | None:
        return read_training_record(self.sae_url)

    def training(self, manifest: Manifest) -> Training:
        corpus = self.config.corpus
        return Training(
            url=self.sae_url,
            identity=self.sae_identity,
            settings=self.config.training,
            sae=self.config.sae,
            dataset_url=self.dataset_url,
            manifest=manifest,
            hook_point=self.hook_point,
            seed=self.config.seed,
            metadata={
                "model_name": self.config.language_model.name,
                "hook_name": self.hook_point,
                "context_size": len(self.image_layout) if self.of_images else corpus.context_length,
                "prepend_bos": corpus.bos != "none",
                "dataset_path": corpus.title,
            },
            cache=self.cache(),
        )

    # evaluation

    def evaluation_identity(self, weights_sha256: str) -> dict[str, Any]:
        return evaluation_identity(
            self.config.evaluation, weights_sha256, self.token_digest, self.source.identity, self.hook_point
        )

    def evaluation_record(self) -> dict[str, Any] | None:
        """The evaluation of the trained SAE, None where either is missing."""
        record = self.training_record()
        if record is None:
            return None
        return read_evaluation(self.sae_url, self.evaluation_identity(record["weights_sha256"]))

    def given_evaluation_url(self, identity: dict[str, Any]) -> str:
        """Where the evaluation of an SAE made elsewhere is kept."""
        return self._url("evaluations", digest(identity))

    def evaluation_set(self, tokens: int) -> str:
        """What two SAEs must share to be compared: held-out text, language model, hook point and way of measuring.
        How much text was prepared for training is no part of it."""
        text = {key: value for key, value in self.token_identity.items() if key != "train_tokens"}
        # What is listed beside the metrics changes none of them.
        beside = {"baselines", "baseline_tokens", "neighbours", "batch_sequences"}
        settings = self.config.evaluation.model_dump(mode="json", exclude=beside)
        return digest([self.evaluation_identity("") | {"tokens": digest(text), "settings": settings}, tokens])

    # registry

    @property
    def registered_model(self) -> str:
        tracking = self.config.tracking
        name = tracking.registered_model or f"{self.source.slug}.{self.hook_point}"
        name = f"{name}.{tracking.purpose}" if tracking.purpose else name
        return name.replace("/", "-").replace(":", "-")

    @cached_property
    def run_digest(self) -> str:
        """The digest of all that a run's results depend on: where it is stored and tracked is left out."""
        tracked = {"registered_model": self.registered_model, "experiment": self.config.tracking.experiment}
        evaluation = self.config.evaluation.model_dump(mode="json", exclude={"batch_sequences"})
        return digest([self.config.name, self.sae_digest, self.token_digest, evaluation, tracked])


def pinned(config: RunConfig) -> RunConfig:
    """The configuration with every Hub revision resolved to a commit: each step of a run sees the same one."""
    corpus, model = corpus_sources.pinned(config.corpus), loading.pinned(config.language_model)
    return config.model_copy(update={"corpus": corpus, "language_model": model})


def check(plan: Plan, only_data: bool = False, evaluated: bool = True) -> None:
    """Raise a UserError for anything that would stop the run later: model, layer, device, corpus, root.

    only_data: activations are made and nothing is trained on them, so held-out documents are as good as others.
    evaluated: the SAE is spliced into the model, which must give next-token logits.
    """
    config, source = plan.config, plan.source
    reason = without_evaluation(plan)
    if evaluated and not only_data and reason is not None:
        raise UserError(f"{reason}; use `sae extract` and `sae train`")
    require_runnable(source, plan.device)
    if plan.point not in plan.points:
        stored = ", ".join(map(str, plan.points))
        raise UserError(f"training.hook_point: '{plan.point}' is not in activations.hook_points, which has {stored}")
    _check_inputs(plan)
    if config.activations.split != "train" and not only_data:
        raise UserError("activations.split: an SAE is trained on 'train'; 'held_out' is for `sae extract` alone")
    plan.widths  # noqa: B018
    plan.token_identity  # noqa: B018
    storage.require_writable(config.storage.root, "storage.root")
    check_later_steps(config, plan.d_sae, plan.registered_model, evaluated and not only_data)


def without_evaluation(plan: Plan) -> str | None:
    """Why an SAE on this model and corpus cannot be evaluated, None where it can."""
    name, family = plan.config.language_model.name, plan.source.family
    if family in ("encoder", "vision"):
        what = "a text encoder" if family == "encoder" else "a vision transformer"
        return f"language_model.name: '{name}' is {what} without next-token logits, on which the evaluation of an SAE rests"
    return "corpus.source: an SAE on 'images' cannot be evaluated, there being no next token" if plan.of_images else None


def _check_inputs(plan: Plan) -> None:
    """That the model reads what the corpus holds, at the places where it is to be read."""
    corpus, name = plan.config.corpus, plan.config.language_model.name
    images = reads_images(plan.source.skeleton, plan.points)
    if plan.of_images:
        plan.image_layout  # noqa: B018
        if images != (corpus.prompt is None):
            places = "in the vision tower" if images else "in the text decoder"
            advice = "leave corpus.prompt out" if images else f"give corpus.prompt, or name places such as vision.{plan.point}"
            raise UserError(f"activations.hook_points: '{plan.point}' is {places} of '{name}'; {advice}")
        return
    if images:
        raise UserError(f"corpus.source: '{plan.point}' of '{name}' reads images; accepted is 'images', not '{corpus.source}'")
    longest = plan.source.longest_text
    if longest is not None and corpus.context_length > longest:
        raise UserError(
            f"corpus.context_length: {corpus.context_length} is more than the {longest} tokens that '{name}' can read"
        )
    corpus_sources.require_chat_templates(corpus, load_encoder(plan.source).render)


def estimate(plan: Plan) -> dict[str, Any]:
    """What a run would do and what it would take, as plain JSON."""
    config, d_in, d_sae = plan.config, plan.d_in, plan.d_sae
    tokens = plan.token_manifest()
    manifest = plan.dataset_manifest()
    record = plan.training_record()
    stored = manifest.tokens if manifest else (tokens["splits"]["train"]["tokens"] if tokens else config.corpus.train_tokens)
    held_out = tokens["splits"]["held_out"]["tokens"] if tokens else config.corpus.held_out_tokens
    row_bytes = TOKEN_BYTES + sum(plan.widths[point] for point in plan.points) * DTYPES[config.activations.dtype].itemsize
    steps = -(-config.training.tokens // config.training.batch_size)
    sae_parameters = 2 * d_in * d_sae + d_in + d_sae
    model_parameters = sum(parameter.numel() for parameter in plan.source.skeleton.parameters())
    share = max(depth(plan.source.skeleton, point) for point in plan.points)
    evaluated = min(config.evaluation.tokens, held_out)
    settings = config.activations
    # chunks on their way to the disk beside the next one, then shards being shuffled at the same time
    chunk_bytes = min(stored, settings.sequences_per_chunk * config.corpus.context_length) * row_bytes
    shuffled_bytes = settings.shuffle_workers * (min(stored, settings.rows_per_shard) + 4 * settings.rows_per_group) * row_bytes
    vocabulary = getattr(plan.source.config.get_text_config(), "vocab_size", 0)
    logit_bytes = config.evaluation.batch_sequences * config.corpus.context_length * vocabulary * 4
    # weights, gradients and Adam's two moments; features and their gradients; the reader's four windows
    window_bytes = min(stored, WINDOW_GROUPS * settings.rows_per_group) * d_in * DTYPES[settings.dtype].itemsize
    training_bytes = 16 * sae_parameters + 12 * config.training.batch_size * d_sae + 4 * window_bytes
    return {
        "name": config.name,
        "device": str(plan.device),
        "language_model": {
            "name": config.language_model.name, "parameters": model_parameters, "layers": plan.source.layers,
            "d_model": plan.source.width, "hook_point": ", ".join(map(str, plan.points)),
        },
        "tokens": {
            "digest": plan.token_digest, "url": plan.token_url, "exists": tokens is not None, "corpus": config.corpus.title,
            "train": stored, "held_out": held_out, "exact": tokens is not None,
        },
        "activations": {
            "digest": plan.dataset_digest, "url": plan.dataset_url, "exists": manifest is not None,
            "tokens": stored, "bytes": stored * row_bytes, "bytes_per_token": row_bytes,
            # scattered chunks and finished shards stand side by side until the commit
            "peak_bytes": stored * 2 * row_bytes,
            "flops": 2 * model_parameters * share * stored,
        },
        "sae": {
            "digest": plan.sae_digest, "url": plan.sae_url, "exists": record is not None,
            "architecture": config.sae.architecture, "d_in": d_in, "d_sae": d_sae, "parameters": sae_parameters,
        },
        "training": {
            "tokens": steps * config.training.batch_size, "epochs": steps * config.training.batch_size / stored,
            "steps": steps, "flops": 5 * 2 * d_in * d_sae * steps * config.training.batch_size,
        },
        "evaluation": {
            "exists": plan.evaluation_record() is not None, "impossible": without_evaluation(plan), "tokens": evaluated,
            # one pass as it is, and three from the hook point on
            "flops": (1 + 3 * (1 - share)) * 2 * model_parameters * evaluated,
        },
        "memory_bytes": {
            "extraction": 4 * model_parameters + max(4 * chunk_bytes, shuffled_bytes),
            "training": training_bytes,
            "evaluation": 4 * model_parameters + 2 * logit_bytes,
        },
        "registered_model": plan.registered_model,
    }  # fmt: skip
