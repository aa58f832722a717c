"""What the tests share: small language models made here, and a corpus of text files."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

# No test may reach a hub or a server that the environment of whoever runs it happens to name.
for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "PREFECT_API_URL", "PREFECT_PROFILE"):
    os.environ.pop(name, None)
os.environ["HF_HUB_OFFLINE"] = "1"

BUILTIN = Path(__file__).parent.parent / "components" / "language_model" / "builtin" / "stdlib-llama"
WORDS = "the sparse feature of a model fires where tokens in the residual stream point along its decoder row".split()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models this small lose more to waking threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _migrated_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """MLflow's tables are made once for all tests: its migrations take 5 to 30 s of every fresh SQLite file."""
    from mlflow.store.db import utils

    made = utils._initialize_tables
    store = tmp_path_factory.mktemp("migrated") / "mlflow.db"

    def copied(engine) -> None:
        if engine.dialect.name != "sqlite":
            return made(engine)
        if not store.exists():
            made(engine)
            with closing(sqlite3.connect(engine.url.database)) as source, closing(sqlite3.connect(store)) as target:
                source.backup(target)
        with closing(sqlite3.connect(store)) as source, closing(sqlite3.connect(engine.url.database)) as target:
            source.backup(target)
        return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "_initialize_tables", copied)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a random two-layer Llama of width 32 and the tokenizer that ships."""
    import shutil

    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for path in BUILTIN.glob("tokenizer*"):
        shutil.copy(path, folder)
    return str(folder)


@pytest.fixture(scope="session")
def text_corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of 120 short documents, each different."""
    folder = tmp_path_factory.mktemp("texts")
    generator = torch.Generator().manual_seed(1)
    for number in range(120):
        picks = torch.randint(len(WORDS), (200,), generator=generator).tolist()
        (folder / f"{number:03d}.txt").write_text(f"document {number}: " + " ".join(WORDS[pick] for pick in picks))
    return str(folder)


@pytest.fixture
def tiny_tree(tiny_tree_in: Callable[[Path], dict], tmp_path: Path) -> dict:
    """A configuration, as plain values, that runs in about a second."""
    return tiny_tree_in(tmp_path)


@pytest.fixture(scope="session")
def tiny_tree_in(tiny_model: str, text_corpus: str) -> Callable[[Path], dict]:
    """The same with its storage root and gates in a folder."""
    return lambda folder: _tiny_tree(tiny_model, text_corpus, folder)


def _tiny_tree(tiny_model: str, text_corpus: str, tmp_path: Path) -> dict:
    return {
        "name": "tiny",
        "device": "cpu",
        "storage": {"root": str(tmp_path / "root")},
        "corpus": {
            "source": "files",
            "paths": [text_corpus],
            "context_length": 32,
            "held_out_fraction": 0.2,
            "train_tokens": 6_000,
            "held_out_tokens": 1_500,
        },
        "language_model": {"name": tiny_model},
        "activations": {
            "hook_points": ["resid_post.1"],
            "rows_per_shard": 2_000,
            "rows_per_group": 512,
            "sequences_per_chunk": 32,
        },
        "sae": {"d_sae": 64},
        "training": {"tokens": 20_000, "batch_size": 256, "checkpoint_tokens": 4_000, "log_tokens": 2_000},
        "evaluation": {"tokens": 1_000},
        "tracking": {"gates": str(tiny_gates(tmp_path))},
    }


def tiny_gates(folder: Path) -> Path:
    """Gates for SAEs of a random model on a few tokens: the comparisons with the champion, and no bounds."""
    path = folder / "gates.yaml"
    path.write_text("evaluation_tokens: 100\n")
    return path
