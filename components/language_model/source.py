"""Find and identify a model: where it is, what decides its function, how wide it is where; no weights are loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.corpus.images import ImageLayout
from components.language_model.architectures import (
    Family,
    TwoModels,
    classifies,
    family_of,
    model_class,
    model_config,
    vision_tower,
    width,
)
from components.language_model.fetched import PREFIX, fetched_folder
from components.language_model.gguf import SUFFIX, converted, gguf_of
from components.language_model.hook_points import HookPoint, capture, locate, reads_images, within
from components.language_model.settings import LanguageModelSettings
from components.language_model.vision import load_processor, prompt_layout, trial_pixels, vision_layout
from components.records import json_object
from components.settings import UserError, digest, first_line, is_commit
from components.storage import file_sha256

BUILTIN_ROOT = Path(__file__).parent / "builtin"
_SKELETON_DTYPE = torch.bfloat16
_SAYS_NOTHING = re.compile(
    r".{1,3}|[0-9a-f]{7,64}|[0-9]+|(my[-_]?)?(models?|checkpoints?|weights|final|best|latest|last|out|output|export|main|step|epoch)"
    r"([-_.]?[0-9]+)?"
)
"""Names of folders that could hold any model."""
_WEIGHT_PATTERNS = ("config.json", "*.safetensors", "*.safetensors.index.json", "adapter_config.json")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5")
_PROCESSOR_PATTERNS = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER_PATTERNS = (
    "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model", "chat_template*",
    "additional_chat_templates/*",
    # Of tokenizers that have vocabularies of their own kind; a test compares them with transformers' lists.
    "added_tokens.json", "*.tiktoken", "tekken.json", "*.spm", "*.tokenizer", "bpe.codes", "byte_maps.json", "dict.txt",
    "emoji.json", "*_vocab.json", "vocab-*.json", "normalizer.json", "word_*.json",
)  # fmt: skip


@dataclass(frozen=True)
class ModelSource:
    """A model that exists: where transformers finds it, the exact revision, and its architecture's sizes."""

    settings: LanguageModelSettings
    location: str
    commit: str | None
    second: ModelSource | None = None
    """A model that reads the same tokens; all but `skeleton`, `widths`, `slug`, `identity`, `longest_text` is of the first."""
    with_head: bool = False
    """Whether the head of an image classifier is loaded as well."""

    @cached_property
    def alone(self) -> ModelSource:
        """The first of two models, without the second."""
        if self.second is None:
            return self
        return replace(self, settings=self.settings.model_copy(update={"second": None}), second=None)

    def pinned(self) -> ModelSource:
        """The same by the commits that its revisions stand for."""
        changed: dict[str, Any] = {} if self.commit is None else {"revision": self.commit}
        second = None if self.second is None else self.second.pinned()
        if second is not None and self.settings.second is not None:
            revision = {"revision": second.settings.revision}
            changed["second"] = self.settings.second.model_copy(update=revision)
        return replace(self, settings=self.settings.model_copy(update=changed), second=second)

    @cached_property
    def config(self) -> Any:
        """transformers' configuration of the part that is loaded."""
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(
                self.location, revision=self.commit, trust_remote_code=self.settings.trust_remote_code
            )
        except Exception as error:  # a wrong value fails in whatever way the library happens to fail on it
            reason = first_line(error)
            if "trust_remote_code" in str(error):
                reason = "it brings its own code, which only language_model.trust_remote_code: true would run"
            raise UserError(f"language_model.name: '{self.settings.name}' has no usable config.json: {reason}") from error
        if any("--" in str(code) for code in (getattr(config, "auto_map", None) or {}).values()):
            raise UserError(
                f"language_model.name: the code of '{self.settings.name}' is in another repository, at no fixed commit"
            )
        return model_config(config)

    @property
    def family(self) -> Family:
        return family_of(self.config)

    @property
    def classifies(self) -> bool:
        return classifies(self.config)

    @property
    def layers(self) -> int:
        return self.config.get_text_config().num_hidden_layers

    @property
    def width(self) -> int:
        """Width of the residual stream, `d_model`."""
        return self.config.get_text_config().hidden_size

    @cached_property
    def skeleton(self) -> torch.nn.Module:
        """The model without its weights: shapes and modules only."""
        if self.second is not None:
            return TwoModels(self.alone.skeleton, self.second.skeleton)
        # Neither decides a shape; all kernels take them. A model writes what it is given into its configuration, hence the
        # copy: without it, the model itself would later be loaded with them.
        options = self.class_options | {"attn_implementation": "eager", "dtype": _SKELETON_DTYPE}
        try:
            with torch.device("meta"):
                return model_class(self.config).from_config(deepcopy(self.config), **options).eval()
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"language_model.name: config.json of '{self.settings.name}' describes no model that can be made: "
                f"{first_line(error)}"
            ) from error

    @property
    def class_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"trust_remote_code": self.settings.trust_remote_code}
        if self.settings.attention_implementation is not None:
            options["attn_implementation"] = self.settings.attention_implementation
        return options

    def widths(self, points: Sequence[HookPoint]) -> dict[HookPoint, int]:
        """`d_in` at each hook point, without loading weights.

        Uniform names are places in the residual stream or of its width; module paths are tried in a forward pass of the
        skeleton. Raises a UserError for a place that has no `[batch, length, d_in]`.
        """
        found = {}
        for point in points:
            if point.layer is not None:
                owner, inner = within(self.skeleton, point)
                found[point] = width(owner, inner.tower)
        for point in points:
            if point not in found:
                found[point] = self._width_of_module(point)
        return {point: found[point] for point in points}

    def _width_of_module(self, point: HookPoint) -> int:
        in_tower = reads_images(self.skeleton, [point])
        batch, length = 2, 3
        inputs: dict[str, Tensor] = {"input_ids": torch.zeros(batch, length, dtype=torch.long, device="meta")}
        if self.family != "encoder":
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])  # else transformers looks at the positions
        if in_tower:
            pixels = self._trial_pixels
            inputs = {"pixel_values": torch.empty(batch, *pixels.shape[1:], device="meta", dtype=_SKELETON_DTYPE)}
            length = self._image_length(pixels)
        try:
            shape = capture(self.skeleton, [point], inputs)[point].shape
        except UserError:
            raise
        except Exception as error:  # a forward pass that looks at values, of which a skeleton has none
            module, reads_input = locate(self.skeleton, point)
            size = getattr(module, "in_features" if reads_input else "out_features", None)
            if size is None:
                raise UserError(
                    f"activations.hook_points: the width of '{point}' cannot be told without the weights "
                    f"({type(error).__name__}); accepted there are linear layers and uniform names such as mlp_out.3"
                ) from error
            return int(size)
        if shape[1] != length:
            raise UserError(
                f"activations.hook_points: '{point}' has {shape[1]} rows for a sequence of {length}; accepted are places with "
                "[batch, length, d_in]"
            )
        return shape[2]

    @property
    def slug(self) -> str:
        """The model's name as part of a file or registry name; of two models, both names."""
        own = self._own_slug
        return own if self.second is None else f"{own}+{self.second.slug}"

    @property
    def _own_slug(self) -> str:
        """A folder whose name says nothing has what it holds before it, `llama-30x576-st`; a snapshot in the Hub's cache has
        the name that it has there."""
        if not os.path.isdir(self.settings.name):
            return self.settings.name.split("/")[-1].removesuffix(SUFFIX)
        folder = Path(os.path.abspath(self.settings.name))
        if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
            return folder.parents[1].name.split("--")[-1]
        if _SAYS_NOTHING.fullmatch(folder.name.lower()) is None:
            return folder.name
        text = self.config.get_text_config()
        shape = "x".join(str(getattr(text, name)) for name in ("num_hidden_layers", "hidden_size") if hasattr(text, name))
        return "-".join(filter(None, (self.config.model_type, shape, folder.name)))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the model's function: name and commit on the Hub, content hashes for a folder; and how it is run,
        as far as that changes values. Settings at their default are left out."""
        if self.second is not None:
            return {**self.alone.identity, "second": self.second.identity}
        changing = ("attention_implementation", "quantization", "trust_remote_code")
        settings = self.settings.model_dump(include={"dtype"}) | {
            name: getattr(self.settings, name) for name in changing if getattr(self.settings, name)
        }
        if self.commit is not None:
            return {"name": self.settings.name, "commit": self.commit, **settings}
        patterns = (*_WEIGHT_PATTERNS, "*.py") if self.settings.trust_remote_code else _WEIGHT_PATTERNS
        return {"weights": _folder_digest(self.location, patterns), **settings}

    @cached_property
    def tokenizer_identity(self) -> str:
        """Content of the files that the tokenizer is made of; with code of its own, of all but the weights. What config.json
        says of its class counts where no file of the tokenizer's does."""
        if self.commit is not None:
            return self.commit
        every = ("*",) if self.settings.trust_remote_code else ()
        files = _folder_digest(self.location, (*_TOKENIZER_PATTERNS, *every), weights=False)
        named = json_object(Path(self.location) / "tokenizer_config.json").get("tokenizer_class") is not None
        config = json_object(Path(self.location) / "config.json")
        chosen = [config.get("model_type"), config.get("tokenizer_class")]
        return files if named else digest([files, chosen])

    @property
    def longest_text(self) -> int | None:
        """Tokens that the model can read at once, None where there is no limit."""
        if self.second is not None:
            return min(filter(None, (self.alone.longest_text, self.second.longest_text)), default=None)
        longest: int | None = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        embeddings: Any = getattr(getattr(self.skeleton, "embeddings", None), "position_embeddings", None)
        if longest is not None and getattr(embeddings, "padding_idx", None) is not None:
            return longest - embeddings.padding_idx - 1  # RoBERTa counts from there
        return longest

    # images

    @cached_property
    def processor_identity(self) -> str:
        return self.commit or _folder_digest(self.location, (*_PROCESSOR_PATTERNS, *_TOKENIZER_PATTERNS))

    @cached_property
    def processor(self) -> Any:
        """What turns images and text into the inputs of a vision-language model."""
        return load_processor(self.location, self.commit, self.settings.name, self.settings.trust_remote_code, text=True)

    @cached_property
    def image_processor(self) -> Any:
        return load_processor(self.location, self.commit, self.settings.name, self.settings.trust_remote_code, text=False)

    @cached_property
    def _trial_pixels(self) -> Tensor:
        tower = vision_tower(self.skeleton) or self.skeleton
        return trial_pixels(self.image_processor, self.settings.name, signature(tower.forward).parameters)

    def _image_length(self, pixels: Tensor) -> int:
        """Rows of the vision tower's residual stream for one image."""
        first = HookPoint("resid_pre", 0, "vision" if self.family == "vision_language" else "")
        return capture(self.skeleton, [first], {"pixel_values": pixels.to("meta", _SKELETON_DTYPE)})[first].shape[1]

    def image_layout(self, prompt: str | None) -> ImageLayout:
        """How the sequence of every image looks: that of a vision tower, or with a prompt that of a text decoder."""
        name = self.settings.name
        if self.family not in ("vision", "vision_language"):
            raise UserError(f"corpus.source: 'images' needs a model that sees; '{name}' reads text alone")
        if prompt is not None and self.family == "vision":
            raise UserError(f"corpus.prompt: '{name}' reads no text; leave the prompt out")
        if prompt is not None:
            accepted = signature(self.skeleton.forward).parameters
            return prompt_layout(self.processor_identity, self.processor, prompt, self.config, name, accepted)
        pixels = self._trial_pixels
        config = self.config.vision_config if self.family == "vision_language" else self.config
        return vision_layout(self.processor_identity, self._image_length(pixels), pixels, config.patch_size, name)


@contextmanager
def second_model() -> Iterator[None]:
    """What is wrong with a model is said of `language_model.second`."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("language_model.", "language_model.second.")) from error


def find_model(settings: LanguageModelSettings) -> ModelSource:
    """Resolve the settings to a model that exists; a UserError where there is none. Loads no weights."""
    if settings.second is not None:
        with second_model():
            second = find_model(LanguageModelSettings(**settings.second.model_dump()))
        return replace(find_model(settings.model_copy(update={"second": None})), settings=settings, second=second)
    if settings.name.startswith("builtin/"):
        folder = BUILTIN_ROOT / settings.name.removeprefix("builtin/")
        if not (folder / "config.json").is_file():
            shipped = ", ".join(sorted(f"builtin/{path.parent.name}" for path in BUILTIN_ROOT.glob("*/config.json")))
            raise UserError(f"language_model.name: there is no '{settings.name}'; what ships is {shipped}")
        return ModelSource(settings, str(folder), None)
    if settings.name.startswith(PREFIX):
        return ModelSource(settings, str(fetched_folder(settings.name)), None)
    file = gguf_of(settings.name)
    if file is not None:
        return ModelSource(settings, str(converted(file)), None)
    if os.path.isdir(settings.name):  # which takes a name that is too long for a no
        return ModelSource(settings, settings.name, None)
    return ModelSource(settings, settings.name, _hub_commit(settings))


def _hub_commit(settings: LanguageModelSettings) -> str:
    """The commit that a Hub revision stands for: asked of the Hub, or of its local cache where there is no network."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    if is_commit(settings.revision):
        return settings.revision
    accepted = "give a Hub name, an existing local folder or .gguf file, or 'builtin/stdlib-llama'"
    try:
        return str(HfApi().model_info(settings.name, revision=settings.revision).sha)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise UserError(
            f"language_model.name: there is no model '{settings.name}' at revision '{settings.revision}'; {accepted}"
        ) from error
    except Exception as error:  # every transport has its own exceptions, and all mean that the Hub is out of reach
        cached = try_to_load_from_cache(settings.name, "config.json", revision=settings.revision)
        if isinstance(cached, str):
            return Path(cached).parent.name
        raise UserError(
            f"language_model.name: cannot reach the Hugging Face Hub for '{settings.name}' ({type(error).__name__}) "
            f"and it is not in the local cache; {accepted}"
        ) from error


@lru_cache
def _folder_digest(folder: str, patterns: tuple[str, ...], weights: bool = True) -> str:
    found = {path for pattern in patterns for path in Path(folder).glob(pattern) if path.is_file()}
    paths = sorted(path for path in found if weights or path.suffix not in _WEIGHT_SUFFIXES)
    return digest([[path.name, file_sha256(path)] for path in paths])
