"""Find, identify and load a language model and its tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch

from components.corpus.documents import Render
from components.corpus.encoder import Encoder
from components.language_model.settings import LanguageModelSettings
from components.settings import UserError, digest, is_commit
from components.storage import file_sha256

BUILTIN_ROOT = Path(__file__).parent / "builtin"
_WEIGHT_PATTERNS = ("config.json", "*.safetensors", "*.safetensors.index.json")
_TOKENIZER_PATTERNS = (
    "tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.model", "chat_template*", "additional_chat_templates/*"
)  # fmt: skip


@dataclass(frozen=True)
class ModelSource:
    """A model that exists: where transformers finds it, the exact revision, and its architecture's sizes."""

    settings: LanguageModelSettings
    location: str
    commit: str | None

    @cached_property
    def config(self) -> Any:
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.location, revision=self.commit)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"language_model.name: '{self.settings.name}' has no usable config.json: {reason}") from error

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
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config)

    @property
    def slug(self) -> str:
        """The model's name as part of a file or registry name."""
        return Path(self.settings.name).name if Path(self.settings.name).is_dir() else self.settings.name.split("/")[-1]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the model's function: name and commit on the Hub, content hashes for a folder."""
        if self.commit is not None:
            return {"name": self.settings.name, "commit": self.commit, "dtype": self.settings.dtype}
        return {"weights": _folder_digest(self.location, _WEIGHT_PATTERNS), "dtype": self.settings.dtype}

    @cached_property
    def tokenizer_identity(self) -> str:
        return self.commit or _folder_digest(self.location, _TOKENIZER_PATTERNS)


def find_model(settings: LanguageModelSettings) -> ModelSource:
    """Resolve the settings to a model that exists; a UserError where there is none. Loads no weights."""
    if settings.name.startswith("builtin/"):
        folder = BUILTIN_ROOT / settings.name.removeprefix("builtin/")
        if not (folder / "config.json").is_file():
            shipped = ", ".join(sorted(f"builtin/{path.parent.name}" for path in BUILTIN_ROOT.glob("*/config.json")))
            raise UserError(f"language_model.name: there is no '{settings.name}'; what ships is {shipped}")
        return ModelSource(settings, str(folder), None)
    if Path(settings.name).is_dir():
        return ModelSource(settings, settings.name, None)
    return ModelSource(settings, settings.name, _hub_commit(settings))


def pinned(settings: LanguageModelSettings) -> LanguageModelSettings:
    """The same model with its Hub revision resolved to a commit, so that no later step can see another one."""
    commit = find_model(settings).commit
    return settings if commit is None else settings.model_copy(update={"revision": commit})


def load_model(source: ModelSource, device: torch.device) -> torch.nn.Module:
    """The causal language model, in evaluation mode and without gradients."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        source.location, revision=source.commit, dtype=getattr(torch, source.settings.dtype), use_safetensors=True
    )
    return model.to(device).eval().requires_grad_(False)


def load_encoder(source: ModelSource) -> Encoder:
    """The model's tokenizer as the corpus uses it; a UserError where it has neither BOS nor EOS."""
    tokenizer = load_tokenizer(source)
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else bos
    if bos is None:
        raise UserError(f"language_model.name: the tokenizer of '{source.settings.name}' has neither a BOS nor an EOS token")

    return Encoder(
        identity=source.tokenizer_identity,
        encode=_encode_of(tokenizer),
        bos=bos,
        separator=separator,
        render=_render_of(tokenizer, source.settings.name),
    )


def _encode_of(tokenizer: Any) -> Callable[[list[str]], list[list[int]]]:
    """Texts -> token ids, no special tokens added: over all cores, without the offsets that nothing here reads."""
    if not tokenizer.is_fast:
        return lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return lambda texts: [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _render_of(tokenizer: Any, name: str) -> Render:
    def render(messages: list[dict[str, Any]], template: str | None) -> str:
        from jinja2 import TemplateError

        if template is None and not tokenizer.chat_template:
            raise ValueError(f"the tokenizer of '{name}' has no chat template; give one as chat_template")
        try:
            text = str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
        except (TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error
        # Where BOS stands is up to the corpus settings; the template's own would make it two.
        return text.removeprefix(tokenizer.bos_token) if tokenizer.bos_token else text

    return render


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer; a UserError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source.location, revision=source.commit)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"language_model.name: '{source.settings.name}' has no usable tokenizer: {reason}") from error


def _hub_commit(settings: LanguageModelSettings) -> str:
    """The commit that a Hub revision stands for: asked of the Hub, or of its local cache where there is no network."""
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    if is_commit(settings.revision):
        return settings.revision
    accepted = "give a Hub name, an existing local folder, or 'builtin/stdlib-llama'"
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
def _folder_digest(folder: str, patterns: tuple[str, ...]) -> str:
    paths = sorted({path for pattern in patterns for path in Path(folder).glob(pattern)})
    return digest([[path.name, file_sha256(path)] for path in paths])
