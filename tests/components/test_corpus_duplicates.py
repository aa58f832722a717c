"""What is nearly equal to an earlier document is dropped, within a split and across; what is not stays."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from components.corpus.documents import split_of
from components.corpus.duplicates import Duplicates
from components.corpus.encoder import Encoder
from components.corpus.settings import CorpusSettings, NearDuplicateSettings
from components.corpus.tokens import prepare_tokens
from components.run.identity import token_identity

ENCODER = Encoder(encode=lambda texts: [[ord(c) for c in text] for text in texts], bos=1, separator=2)
RANDOM = np.random.default_rng(0)
VOCABULARY = [f"word{number}" for number in range(5000)]


def words(count: int) -> list[str]:
    return [str(word) for word in RANDOM.choice(VOCABULARY, count)]


def jaccard(one: str, two: str, length: int) -> float:
    """Of the sets of shingles, exactly."""
    sets = []
    for text in (one, two):
        parts = text.split()
        sets.append({tuple(parts[start : start + length]) for start in range(len(parts) - length + 1)})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def edited(text: str, changes: int) -> str:
    parts = text.split()
    for place in RANDOM.choice(len(parts), changes, replace=False):
        parts[place] = "changed"
    return " ".join(parts)


def test_near_twins_are_dropped_across_the_splits_and_unrelated_documents_kept(tmp_path: Path):
    originals = [" ".join(words(200)) for _ in range(150)]
    twins = [edited(text, 2) for text in originals]
    cousins = [edited(text, 40) for text in originals]
    assert all(jaccard(one, two, 5) > 0.88 for one, two in zip(originals, twins, strict=True))
    assert all(jaccard(one, two, 5) < 0.5 for one, two in zip(originals, cousins, strict=True))
    across = sum(split_of(one, 0.5) != split_of(two, 0.5) for one, two in zip(originals, twins, strict=True))
    assert across > 50, "or the test shows nothing about the splits"
    for name, texts in (("1", originals), ("2", twins), ("3", cousins)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    values = {"source": "files", "paths": (str(tmp_path / "*.jsonl"),), "held_out_fraction": 0.5}
    values |= {"train_tokens": 10**8, "held_out_tokens": 10**8}
    off = CorpusSettings(**values)
    on = CorpusSettings(**values, near_duplicates=NearDuplicateSettings())
    kept = {}
    for name, chosen in (("off", off), ("on", on), ("again", on)):
        manifest = prepare_tokens(chosen, ENCODER, 0, str(tmp_path / name))
        table = pq.read_table(tmp_path / name / "documents.parquet").to_pydict()
        kept[name] = list(zip(table["name"], table["split"], strict=True))
        assert manifest.sources[0].duplicates_dropped == {"exact": 0, "near": 450 - len(kept[name])}
    assert len(kept["off"]) == 450
    assert kept["on"] == kept["again"]
    by_number: dict[str, list[str]] = {}
    for name, _ in kept["on"]:
        file, line = name.split(":")
        by_number.setdefault(line, []).append(file[0])
    assert len(by_number) == 150
    assert all("3" in files and len(files) == 2 for files in by_number.values()), "one of each pair of twins, every cousin"
    assert token_identity(on, {}, "t", 0) != token_identity(off, {}, "t", 0)


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_the_threshold_is_one_of_the_jaccard_similarity(threshold: float):
    """Against exact similarities: everything well above is found, nothing well below (4 standard errors)."""
    settings = NearDuplicateSettings(threshold=threshold, shingle_words=2, permutations=256)
    margin = 4 * (threshold * (1 - threshold) / settings.permutations) ** 0.5
    found: dict[str, list[bool]] = {"above": [], "below": []}
    for _ in range(150):
        text = " ".join(words(150))
        other = edited(text, int(RANDOM.choice([1, 1, 2, 3, 8, 14, 20, 30, 45, 60])))
        similarity = jaccard(text, other, 2)
        duplicates = Duplicates(settings)
        first, second = duplicates.fingerprints([text, other])
        duplicates.take(first)
        assert duplicates.find(first) == "exact"
        if abs(similarity - threshold) > margin:
            found["above" if similarity > threshold else "below"].append(duplicates.find(second) == "near")
        duplicates.close()
    assert len(found["above"]) > 15
    assert len(found["below"]) > 15
    assert np.mean(found["above"]) > 0.97
    assert not any(found["below"])


def test_text_without_spaces_has_shingles_too():
    duplicates = Duplicates(NearDuplicateSettings(threshold=0.7))
    letters = [chr(0x4E00 + int(number)) for number in RANDOM.choice(2000, 300)]
    first, twin, other = duplicates.fingerprints(["".join(letters), "".join(letters[:290]), "".join(letters[::-1])])
    duplicates.take(first)
    assert duplicates.find(twin) == "near"
    assert duplicates.find(other) is None


def test_the_memory_of_the_index_is_bounded():
    code = """
import psutil
from components.corpus import duplicates
def memory(): return psutil.Process().memory_info().rss / 1e6
duplicates._CACHE_KIB = 512
index = duplicates.Duplicates(None)
fingerprints = lambda first: index.fingerprints([f"document {number}" for number in range(first, first + 1000)])
for fingerprint in fingerprints(0):
    index.take(fingerprint)
start = memory()
for first in range(1000, 200_000, 1000):
    for fingerprint in fingerprints(first):
        index.take(fingerprint)
assert [index.find(fingerprint) for fingerprint in fingerprints(0)] == ["exact"] * 1000
assert index.find(index.fingerprints(["another"])[0]) is None
print(memory() - start)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2, "MB; the same index in memory grows by 4.6, a set of Python objects by over 20"
