"""A first configuration for a model and a corpus, with sizes that fit them and a word on each."""

from __future__ import annotations

from dataclasses import dataclass

from components.language_model.hook_points import HookPoint
from components.language_model.settings import LanguageModelSettings
from components.language_model.source import find_model
from components.settings import UserError

BUDGETS = {"small": (8, 2_000_000, 1_000_000), "medium": (16, 50_000_000, 20_000_000), "large": (32, 500_000_000, 200_000_000)}
"""Features per dimension, tokens to train on, tokens of the corpus."""
_REFERENCE_FEATURES, _REFERENCE_RATE = 16_384, 2e-4
"""Learning rate of the TopK family at batches of 4,096 (Gao et al. 2024 and who followed): it falls with the root of the
number of features."""


@dataclass(frozen=True, kw_only=True)
class FirstChoices:
    name: str
    model: str
    paths: tuple[str, ...]
    """Empty for the standard library of the running Python."""
    text_column: str = "text"
    hook_point: str | None = None
    budget: str = "small"


def first_config(choices: FirstChoices) -> str:
    """YAML. A UserError for what is not there."""
    if choices.budget not in BUDGETS:
        raise UserError(f"--budget: '{choices.budget}' is not accepted: there are {', '.join(BUDGETS)}")
    source = find_model(LanguageModelSettings(name=choices.model))
    width = source.config.get_text_config().hidden_size
    layers = source.config.get_text_config().num_hidden_layers
    point = choices.hook_point or str(HookPoint("resid_post", layers // 2))
    expansion, tokens, corpus_tokens = BUDGETS[choices.budget]
    features = expansion * width
    # A twentieth of the width, and neither less nor more than is usual.
    k = min(128, max(8, round(width / 20)))
    batch = 4_096 if tokens > 10_000_000 else 1_024
    rate = min(4e-3, _REFERENCE_RATE * (_REFERENCE_FEATURES / features) ** 0.5 * (4 if batch == 1_024 else 1))
    longest = source.longest_text or 256
    files = f"""  source: files
  # Files, folders and globs, local or s3://: text, .jsonl (.gz, .zst, ...), .parquet.
  paths: {_flow(choices.paths)}
  text_column: {_quoted(choices.text_column)} # of tables
"""
    library = "  source: standard_library # of the Python that runs; your own: source: files, paths: [...]\n"
    text = "corpus:\n" + (files if choices.paths else library)
    return f"""# {choices.name}: {features:,} features on {choices.model}. `sae plan` says what it would take.
name: {choices.name}

{text}  context_length: {min(256, longest)} # tokens of a sequence; the model reads up to {longest:,}
  train_tokens: {corpus_tokens}
  held_out_tokens: {max(100_000, corpus_tokens // 20)} # of documents that are never trained on

language_model:
  name: {_quoted(choices.model)} # {layers} blocks, width {width}

# The residual stream after the middle block. Several places, globs and module paths work too; `sae data show` warns of
# attention sinks, for which there is `exclude`.
activations:
  hook_points: [{point}]

# BatchTopK leaves the least loss at the same L0 of what was measured here (benchmarks/README.md).
sae:
  architecture: batchtopk
  expansion_factor: {expansion} # {features:,} features
  k: {k} # active features per token; compare some: sae sweep FILE --grid sae.k={max(4, k // 2)},{k},{2 * k}
  # How features begin: half way to tokens, reading the distance from the middle of the data.
  decoder_bias_init: geometric_median # which a few tokens of enormous norm do not move
  decoder_token_share: 0.5
  subtract_decoder_bias: true

training:
  tokens: {tokens}
  batch_size: {batch}
  learning_rate: {rate:.1e} # the one thing to sweep where quality counts
  dead_after_tokens: {max(200_000, tokens // 10)}

evaluation:
  tokens: 100_000
"""


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _flow(paths: tuple[str, ...]) -> str:
    return "[" + ", ".join(map(_quoted, paths)) + "]"
