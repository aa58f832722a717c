"""What a run knows of its language model once it is resolved: plain values, so that no step asks for them again."""

from __future__ import annotations

from typing import Any

from components.corpus.images import ImageLayout
from components.language_model.hook_points import depth, expand_hook_points, reads_images
from components.language_model.settings import LanguageModelSettings
from components.language_model.source import ModelSource, second_model
from components.language_model.tokenizer import require_same_tokens
from components.language_model.weights import require_weights
from components.settings import Record, UserError


class StoredColumn(Record):
    """A hook point of the model."""

    name: str
    width: int
    """d_in"""
    depth: float
    """Share of the model that runs before it is reached."""


class FoundModel(Record):
    """A language model that exists: from what it is loaded."""

    settings: LanguageModelSettings
    location: str
    """A folder, or a name on the Hub."""
    commit: str | None


class ModelRecord(FoundModel):
    """What a run asks of a language model."""

    second: FoundModel | None = None
    """That of `language_model.second`."""
    slug: str
    """Its name as part of a file or registry name."""
    family: str
    layers: int
    width: int
    """Of the residual stream."""
    parameters: int
    vocabulary: int
    longest_text: int | None
    """Tokens that it can read at once, None where there is no limit."""
    identity: dict[str, Any]
    """What decides its function."""
    tokenizer: str
    """What decides the tokens: of the tokenizer's files, or of the image processor's."""
    columns: tuple[StoredColumn, ...]
    """Hook points that are stored, in the order of the dataset's columns."""
    reads_images: bool
    """Whether the columns are in a vision tower."""
    image_layout: ImageLayout | None = None

    @property
    def source(self) -> ModelSource:
        """From which it is loaded."""
        other = self.second
        second = None if other is None else ModelSource(other.settings, other.location, other.commit)
        return ModelSource(self.settings, self.location, self.commit, second)

    def require_stored(self, hook_point: str, field: str) -> None:
        """A UserError for a hook point that is not among the columns."""
        names = [column.name for column in self.columns]
        if hook_point not in names:
            raise UserError(f"{field}: '{hook_point}' is not in activations.hook_points, which has {', '.join(names)}")

    def layout(self) -> ImageLayout:
        assert self.image_layout is not None
        return self.image_layout


def resolve_model(source: ModelSource, hook_points: tuple[str, ...], images: bool, prompt: str | None) -> ModelRecord:
    """All that is asked of a model before a run, once; a UserError for what it does not have. images: whether the corpus is."""
    points = expand_hook_points(hook_points, source, "activations.hook_points")
    require_weights(source.alone)
    if source.second is not None:
        with second_model():
            require_weights(source.second)
        _require_pair(source, images)
    widths = source.widths(points)
    in_tower = reads_images(source.skeleton, points)
    layout = source.image_layout(prompt) if images else None
    if images and in_tower != (prompt is None):
        places = "in the vision tower" if in_tower else "in the text decoder"
        advice = "leave corpus.prompt out" if in_tower else f"give corpus.prompt, or name places such as vision.{points[0]}"
        raise UserError(f"activations.hook_points: '{points[0]}' is {places} of '{source.settings.name}'; {advice}")
    return ModelRecord(
        settings=source.settings,
        location=source.location,
        commit=source.commit,
        second=None if source.second is None else _found(source.second),
        slug=source.slug,
        family=source.family,
        layers=source.layers,
        width=source.width,
        parameters=sum(parameter.numel() for parameter in source.skeleton.parameters()),
        vocabulary=getattr(source.config.get_text_config(), "vocab_size", 0),
        longest_text=source.longest_text,
        identity=source.identity,
        tokenizer=source.processor_identity if images else source.tokenizer_identity,
        columns=tuple(
            StoredColumn(name=str(point), width=widths[point], depth=depth(source.skeleton, point)) for point in points
        ),
        reads_images=in_tower,
        image_layout=layout,
    )


def _found(source: ModelSource) -> FoundModel:
    return FoundModel(settings=source.settings, location=source.location, commit=source.commit)


def _require_pair(source: ModelSource, images: bool) -> None:
    """That two models read the same tokens, and text."""
    assert source.second is not None
    for one, field in ((source, "language_model"), (source.second, "language_model.second")):
        if images or one.family != "causal":
            name = one.settings.name
            raise UserError(
                f"{field}.name: two models are accepted where both are causal and read text; '{name}' is {one.family}"
            )
    require_same_tokens(source)
