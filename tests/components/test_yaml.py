"""A configuration means what it says: YAML without its surprises, and `--set` by the type of the field."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from components.registry.gates import load_gates
from components.run.config import load_config, parse_config, shipped_configs
from components.settings import UserError
from components.yaml_text import YamlError, parse_value, parse_yaml


def load(tmp_path: Path, text: str, *overrides: str):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(str(path), overrides)


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as refused:
        load(tmp_path, text, *overrides)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1500
    return str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "training: {tokens: 5_000}\nsae: {d_sae: 8}\ntraining: {batch_size: 8}",
        "training:\n  tokens: 5\n  tokens: 6",
        "corpus: {source: files, paths: [a], 'source': files}",
        "sae: &a {d_sae: 8}\nname: x\nname: y",
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, text: str):
    assert "stands twice in one mapping, again in line" in refusal(tmp_path, text)
    with pytest.raises(UserError, match=r"tracking\.gates: .*'bounds' stands twice"):
        (tmp_path / "gates.yaml").write_text("bounds: {}\nbounds: {}")
        load_gates(str(tmp_path / "gates.yaml"))


@pytest.mark.parametrize("how", ["file", "set"])
@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("training.tokens", "2e6", 2_000_000), ("training.tokens", "2_000_000", 2_000_000), ("training.tokens", "010", 10),
        ("training.learning_rate", "1e-3", 1e-3), ("training.learning_rate", ".5", 0.5), ("name", "123", "123"),
        ("name", "007", "007"), ("name", "1e3", "1e3"), ("corpus.text_column", "2024", "2024"), ("rerun", "1", "1"),
        ("corpus.text_column", "yes", "yes"), ("corpus.text_column", "2024-07-26", "2024-07-26"), ("sae.d_sae", "64", 64),
        ("corpus.text_column", "20:30", "20:30"), ("corpus.text_column", "1_000", "1_000"),
        ("corpus.text_column", "0x10", "0x10"),
        ("language_model.trust_remote_code", "true", True), ("corpus.bos", "none", "none"), ("execution.address", "null", None),
    ],
)  # fmt: skip
def test_a_value_is_what_its_field_takes(how: str, field: str, text: str, value: object, tmp_path: Path):
    section, _, leaf = field.rpartition(".")
    written = f"{section}: {{{leaf}: {text}}}" if section else f"{leaf}: {text}"
    found = load(tmp_path, written) if how == "file" else load(tmp_path, "name: x", f"{field}={text}")
    for part in field.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("how", ["file", "set"])
@pytest.mark.parametrize(
    ("field", "text"),
    [("training.tokens", "true"), ("training.tokens", "20:30"), ("training.learning_rate", "false"), ("seed", "yes"),
     ("training.tokens", "0x10"), ("sae.d_sae", "true"), ("activations.exclude.positions", "[true]"), ("training.tokens", "~")],
)  # fmt: skip
def test_what_is_no_number_is_not_taken_for_one(how: str, field: str, text: str, tmp_path: Path):
    *sections, leaf = field.split(".")
    written = f"{leaf}: {text}"
    for section in reversed(sections):
        written = f"{section}: {{{written}}}"
    said = refusal(tmp_path, written) if how == "file" else refusal(tmp_path, "name: x", f"{field}={text}")
    assert said.startswith(field)


def test_set_takes_the_whole_text(tmp_path: Path):
    config = load(tmp_path, "corpus: {source: files, paths: [a]}", "corpus.text_column=a #1", "corpus.paths=[b]")
    assert config.corpus.text_column == "a #1"
    assert config.corpus.paths == ("b",)
    for text in ("a: b", "*.jsonl", "&x", "!tag", "# all", "key: [", "- x", "it's", "a, b"):
        assert parse_value(text) == text
    assert load(tmp_path, "training:", "training.tokens=5").training.tokens == 5, "a section without a field"


def ten_times(number: int) -> str:
    return ", ".join([f"*a{number}"] * 10)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a0: &a0 [x,x,x]\n" + "\n".join(f"a{n}: &a{n} [{ten_times(n - 1)}]" for n in range(1, 10)), "with its aliases"),
        ("a0: &a0 {x: 1}\n" + "\n".join(f"a{n}: &a{n} {{<<: [{ten_times(n - 1)}]}}" for n in range(1, 10)), "with its aliases"),
        ("a: &a [*a]", "stands for what it is in"),
        ("a: " + "[" * 20_000, "nested too deeply"),
        ("a: " + "{a: " * 20_000, "nested too deeply"),
        ("a: !!int x", "not what the tag !!int"),
        ("a: !!float x", "not what the tag !!float"),
        ("a: !!bool x", "not what the tag !!bool"),
        ("a: !!timestamp x", "tag !!timestamp"),
        ("a: !!binary x", "tag !!binary"),
        ("a: !!set {x, y}", "tag !!set"),
        ("a: !!python/object/apply:os.system [true]", "tag !!python"),
        ("a: !own x", "tag !own"),
        ("? [a]\n: b", "is no text"),
        ('name: "\\ud800"', "surrogate"),
        ('name: "\\U00110000"', "is not YAML"),
        ('corpus: {text_column: "a\\0b"}', "zero byte"),
        ("x: " + "9" * 5_000, "not YAML"),
        ("x" * 300_000, "longer than"),
        ("a: b\n---\na: b", "is not YAML"),
    ],
)  # fmt: skip
def test_what_no_configuration_needs_is_one_sentence_and_quick(tmp_path: Path, text: str, said: str):
    started = time.monotonic()
    assert said in refusal(tmp_path, text)
    assert time.monotonic() - started < 5


def test_aliases_and_merges_work_as_far_as_somebody_needs_them():
    text = "base: &base {a: 1, b: [x]}\none: {<<: *base, a: 2}\ntwo: *base"
    assert parse_yaml(text) == yaml.safe_load(text)


def test_other_yaml_is_read_as_pyyaml_reads_it():
    texts = [path.read_text() for path in shipped_configs().values()]
    texts += [
        "a: 'it''s'\nb: |\n  two\n  lines\nc: >-\n  folded\n  text\nd: {e: [1, -2.5, .inf], f: null}\ng: ''\n",
        "",
        "# nothing",
    ]
    for text in texts:
        assert parse_yaml(text) == yaml.safe_load(text)


def test_a_text_on_the_command_line_that_is_no_unicode_is_refused(tmp_path: Path):
    assert "surrogate" in refusal(tmp_path, "name: x", "corpus.text_column=\udcff")
    with pytest.raises(YamlError):
        parse_value('"\\udc00"')
    with pytest.raises(UserError, match=r"corpus\.text_column: .*surrogate"):
        parse_config({"corpus": {"text_column": "\ud800"}})


def test_the_home_folder_is_meant_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load(
        tmp_path,
        "storage: {root: ~/root, cache: ~/cache}\ncorpus: {source: files, paths: [~/texts]}\nlanguage_model: {name: ~/model}\n"
        "tracking: {gates: ~/gates.yaml}",
        "training.start_from=~/sae",
    )
    found = [config.storage.root, config.storage.cache, *config.corpus.paths, config.language_model.name, config.tracking.gates]
    assert [*found, config.training.start_from] == [
        f"{tmp_path}/{name}" for name in ("root", "cache", "texts", "model", "gates.yaml", "sae")
    ]
    monkeypatch.setenv("SAE_STORAGE_ROOT", "~/elsewhere")
    assert parse_config({}).storage.root == f"{tmp_path}/elsewhere"


@pytest.mark.parametrize("field", ["storage.root", "corpus.paths"])
@pytest.mark.parametrize("address", ["github://a:b@c/d", "http://host/x", "gs://bucket/x", "simplecache::s3://bucket/x"])
def test_an_address_of_another_network_is_refused_by_its_field(field: str, address: str, tmp_path: Path):
    section, _, leaf = field.partition(".")
    value = f"['{address}']" if leaf == "paths" else f"'{address}'"
    said = refusal(
        tmp_path, f"{section}: {{source: files, {leaf}: {value}}}" if leaf == "paths" else f"{section}: {{{leaf}: {value}}}"
    )
    assert said.startswith(field)
    assert "accepted is a path of this machine, file:// or s3://" in said
