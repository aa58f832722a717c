"""What decides how much a run takes, whether its language model is here or on paper."""

from __future__ import annotations

from components.activations.dataset.schema import Layout
from components.activations.settings import ActivationSettings
from components.language_model.hook_points import parse_hook_point
from components.planning.place import ModelOnPaper
from components.run.config import RunConfig
from components.run.estimate import reader_bytes
from components.run.specification import Specification
from components.settings import Record, UserError

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_RESIDUAL = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_in", "mixer_out")


class Shape(Record):
    name: str
    model: str
    parameters: int
    """Of the language model."""
    model_bytes: int
    """Of its weights as they are held."""
    depth: float
    """Share of the model that runs before the last hook point is reached."""
    widths: dict[str, int]
    """Of the stored columns."""
    activations: ActivationSettings
    sequences: int
    """Of the train split."""
    context_length: int
    stored: int
    """Tokens of the dataset."""
    exact: bool
    """Whether they have been counted; else they are what the configuration asks for."""
    architecture: str
    d_in: int
    d_out: int
    d_sae: int
    k: int | None
    skip: bool
    batch_size: int
    gradient_accumulation_steps: int
    steps: int
    autocast: str
    reader: int
    """Bytes of the trainer's windows."""
    checkpoint_tokens: int
    feature_parallel: int
    """Processes that share the features, by the configuration,"""
    data_parallel: int
    """and those that share each batch."""

    @property
    def layout(self) -> Layout:
        return Layout(self.widths, self.activations.dtype)

    @property
    def bytes(self) -> int:
        """Of the dataset."""
        return self.stored * self.layout.row_bytes

    @property
    def trained(self) -> int:
        return self.steps * self.batch_size

    @property
    def shared(self) -> int:
        """Parameters of the coder that no share of its features has for itself."""
        return self.d_out + self.d_in * self.d_out * self.skip

    @property
    def coder_parameters(self) -> int:
        return (self.d_in + self.d_out + 1) * self.d_sae + self.shared

    @property
    def training_flops(self) -> float:
        """Dense, see `components.run.estimate`."""
        return float((4 * self.d_in + 6 * self.d_out) * self.d_sae * self.trained)

    @property
    def extraction_flops(self) -> float:
        return 2.0 * self.parameters * self.depth * self.stored


def shape_of(run: Specification) -> Shape:
    """Of a run whose language model is here."""
    online = run.config.activations.mode == "online"
    tokens, manifest = run.token_manifest(), None if online else run.dataset_manifest()
    split = None if tokens is None else tokens.splits["train"]
    known = manifest.tokens if manifest is not None else None if split is None else split.tokens
    stored = run.config.corpus.train_tokens if known is None else known
    return _shape(
        run.config, run.model.settings.name, run.model.parameters, run.model.settings.dtype, dict(run.widths),
        max(column.depth for column in run.model.columns), run.reads, run.writes, stored, known is not None,
        None if split is None else split.sequences,
    )  # fmt: skip


def shape_on_paper(config: RunConfig, model: ModelOnPaper) -> Shape:
    """Of a run whose language model is said in numbers. A UserError for a hook point whose width they do not tell."""
    widths, depth = {}, 0.0
    for name in config.activations.hook_points:
        point = parse_hook_point(name)
        if point.kind not in _RESIDUAL or point.tower or point.layer is None or point.layer >= model.layers:
            raise UserError(
                f"activations.hook_points: of '{name}' no width is known on paper; accepted are {', '.join(_RESIDUAL)} with a "
                f"layer from 0 to {model.layers - 1}"
            )
        widths[name] = model.width
        depth = max(depth, (point.layer + 1) / model.layers)
    settings = config.training
    reads = settings.crosscoder or (settings.hook_point or config.activations.hook_points[0],)
    writes = (settings.target,) if settings.target else reads
    for name in {*reads, *writes} - set(widths):
        raise UserError(f"training.hook_point: '{name}' is not in activations.hook_points")
    return _shape(
        config, config.language_model.name, model.parameters, model.dtype or config.language_model.dtype, widths, depth, reads,
        writes, config.corpus.train_tokens, False, None,
    )  # fmt: skip


def _shape(
    config: RunConfig, model: str, parameters: int, dtype: str, widths: dict[str, int], depth: float, reads: tuple[str, ...],
    writes: tuple[str, ...], stored: int, exact: bool, sequences: int | None,
) -> Shape:  # fmt: skip
    d_in, d_out = (sum(widths[name] for name in names) for names in (reads, writes))
    return Shape(
        name=config.name,
        model=model,
        parameters=parameters,
        model_bytes=parameters * (1 if config.language_model.quantization else _BYTES[dtype]),
        depth=depth,
        widths=widths,
        activations=config.activations,
        sequences=sequences or -(-stored // config.corpus.context_length),
        context_length=config.corpus.context_length,
        stored=stored,
        exact=exact,
        architecture=config.sae.architecture,
        d_in=d_in,
        d_out=d_out,
        d_sae=config.sae.features(d_in),
        k=getattr(config.sae, "k", None),
        skip=config.sae.skip,
        batch_size=config.training.batch_size,
        gradient_accumulation_steps=config.training.gradient_accumulation_steps,
        steps=config.training.steps,
        autocast=config.training.autocast,
        reader=reader_bytes(config.activations, stored, sum(widths[name] for name in {*reads, *writes})),
        checkpoint_tokens=config.training.checkpoint_tokens,
        feature_parallel=config.execution.training.feature_parallel,
        data_parallel=config.execution.training.data_parallel,
    )
