"""A mixture holds its weights in tokens, in every stretch of it, and says so where a source was too small."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from components.corpus.encoder import Encoder
from components.corpus.settings import CorpusSettings
from components.corpus.sources import corpus_content, list_corpus
from components.corpus.tokens import prepare_tokens, read_sequences
from components.run.config import flattened, load_config, parse_config
from components.settings import UserError

ENCODER = Encoder(encode=lambda texts: [[ord(c) for c in text] for text in texts], bos=1, separator=2)


def corpus_identity(settings):
    return corpus_content(settings, list_corpus(settings))


@pytest.fixture
def corpora(tmp_path: Path) -> dict[str, Path]:
    """Three JSONL files of documents of very different lengths, each with letters of its own."""
    random = np.random.default_rng(0)
    shapes = {"a": (3000, 20), "b": (600, 400), "c": (40, 100)}
    for letter, (count, length) in shapes.items():
        lengths = random.integers(length // 2, length, count)
        lines = [json.dumps({"text": f"{number}" + letter * int(size)}) for number, size in enumerate(lengths)]
        (tmp_path / f"{letter}.jsonl").write_text("\n".join(lines))
    return {letter: tmp_path / f"{letter}.jsonl" for letter in shapes}


def mixture(corpora: dict[str, Path], weights: dict[str, float], **more) -> CorpusSettings:
    values = {"context_length": 32, "held_out_fraction": 0.3, "train_tokens": 20_000, "held_out_tokens": 8_000, **more}
    parts = [{"source": "files", "paths": [str(corpora[name])], "weight": w, "name": name} for name, w in weights.items()]
    return CorpusSettings(mixture=parts, **values)


def owners(url: str, manifest: dict, split: str) -> list[str]:
    """The source of every counted token, in order, found through documents.parquet."""
    table = pq.read_table(f"{url}/documents.parquet", columns=["document", "source", "split"]).to_pydict()
    assert all(table["split"][document] in ("train", "held_out") for document in table["document"])
    block = read_sequences(url, manifest, split, 0, 10**9)
    return [table["source"][document] for document in block.documents.ravel() if document >= 0]


def test_weights_are_shares_of_tokens_in_both_splits_and_in_every_stretch(corpora: dict[str, Path], tmp_path: Path):
    url = str(tmp_path / "tokens")
    manifest = prepare_tokens(mixture(corpora, {"a": 3, "b": 7}), ENCODER, 0, url)
    assert manifest == prepare_tokens(mixture(corpora, {"a": 3, "b": 7}), ENCODER, 0, str(tmp_path / "again"))
    for split, budget, tolerance in (("train", 20_000, 0.1), ("held_out", 8_000, 0.2)):
        found = owners(url, manifest, split)
        assert len(found) == manifest.splits[split].tokens == budget
        assert abs(found.count("a") - 0.3 * budget) <= 1
        for source in manifest.sources:
            assert source.splits[split].tokens == found.count(source.name)
        quarters = [found[start : start + budget // 4].count("a") / (budget // 4) for start in range(0, budget, budget // 4)]
        assert quarters == pytest.approx([0.3] * 4, abs=tolerance), "the sources take turns"
        documents = [source.splits[split].documents for source in manifest.sources]
        assert sum(documents) == manifest.splits[split].documents
    assert [source.ended for source in manifest.sources] == [False, False]


def test_where_a_source_ends_the_others_share_the_rest(
    corpora: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    url = str(tmp_path / "tokens")
    with caplog.at_level(logging.WARNING):
        manifest = prepare_tokens(mixture(corpora, {"a": 1, "b": 1, "c": 2}), ENCODER, 0, url)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert "c ended" in warnings[0]
    lines = [json.loads(line)["text"] for line in corpora["c"].read_text().splitlines()]
    found = {split: owners(url, manifest, split) for split in ("train", "held_out")}
    assert sum(found[split].count("c") for split in found) == sum(map(len, lines)), "all of the source that ended is used"
    for split, budget in (("train", 20_000), ("held_out", 8_000)):
        assert len(found[split]) == budget
        assert abs(found[split].count("a") - found[split].count("b")) <= 2, "equal weights stay equal"
    assert [source.ended for source in manifest.sources] == [False, False, True]


def test_a_mixture_that_ends_holds_every_document_once(corpora: dict[str, Path], tmp_path: Path):
    url = str(tmp_path / "tokens")
    chosen = mixture(corpora, {"a": 0.2, "c": 0.8}, train_tokens=10**7, held_out_tokens=10**7)
    manifest = prepare_tokens(chosen, ENCODER, 0, url)
    texts = [json.loads(line)["text"] for name in "ac" for line in corpora[name].read_text().splitlines()]
    assert manifest.documents == len(set(texts))
    assert sum(entry.tokens for entry in manifest.splits.values()) == sum(map(len, set(texts)))
    assert [source.ended for source in manifest.sources] == [True, True]


def test_one_source_in_a_mixture_gives_the_same_sequences_as_alone(corpora: dict[str, Path], tmp_path: Path):
    mixed = mixture(corpora, {"b": 5.0})
    alone = CorpusSettings(
        source="files", paths=(str(corpora["b"]),), **mixed.model_dump(include={
            "context_length", "held_out_fraction", "train_tokens", "held_out_tokens"
        })
    )  # fmt: skip
    manifests = [prepare_tokens(chosen, ENCODER, 0, str(tmp_path / name)) for chosen, name in ((mixed, "m"), (alone, "a"))]
    assert manifests[0].splits == manifests[1].splits
    assert "source" not in pq.read_schema(tmp_path / "a" / "documents.parquet").names


def test_weights_decide_the_identity_and_their_unit_does_not(corpora: dict[str, Path]):
    identity = corpus_identity(mixture(corpora, {"a": 1, "b": 3}))
    assert identity == corpus_identity(mixture(corpora, {"a": 0.25, "b": 0.75}))
    assert identity != corpus_identity(mixture(corpora, {"a": 1, "b": 2}))
    assert identity != corpus_identity(mixture(corpora, {"a": 1, "c": 3}))


def test_unnamed_sources_are_told_apart():
    kinds = [{"weight": 1}, {"weight": 1, "source": "files", "paths": ["x"]}, {"weight": 1, "source": "files", "paths": ["y"]}]
    assert [source.name for _, source in CorpusSettings(mixture=kinds).sources] == ["standard_library", "files-1", "files-2"]


def test_a_mixture_is_set_from_the_command_line_and_tracked_leaf_by_leaf(tmp_path: Path):
    path = tmp_path / "c.yaml"
    path.write_text("corpus: {mixture: [{weight: 1}, {weight: 2, source: files, paths: [x]}]}")
    config = load_config(str(path), ["corpus.mixture.1.weight=5", "corpus.near_duplicates.threshold=0.7"])
    assert [source.weight for source in config.corpus.mixture] == [1.0, 5.0]
    assert flattened(config.model_dump(mode="json"))["corpus.mixture.1.weight"] == 5.0
    assert parse_config(config.model_dump(mode="json")) == config
    with pytest.raises(UserError, match=r"corpus\.mixture\.7\.weight.*'7' is no place in a list of 2"):
        load_config(str(path), ["corpus.mixture.7.weight=5"])
