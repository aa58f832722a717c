"""Configurations as nobody should write them, made from a seed: fields with values of the wrong kind, and damaged YAML."""

from __future__ import annotations

import random
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import yaml
from pydantic import BaseModel

from components.run.config import RunConfig
from components.sae.architectures import architectures

LONG = "n" * 5_000
NUMBERS = [0, 1, -1, 2, 3, 7, 10, 255, 4_096, 2**31, 2**53, 2**63, 2**64, 10**30, -(2**63), 0.5, 1e-9, 1e15, 1e300, -0.0, 1.5,
           float("inf"), float("-inf"), float("nan")]  # fmt: skip
TEXTS = [
    "", " ", "x", "X", "~", "~/x", "~nobody/x", ".", "..", "/", "/dev/null", "/dev/zero", "/dev/stdin", "/proc/self/mem",
    "/proc/none", "/etc/shadow", "a/../../../b", "a//b", "a::b", "::", "://", "x://y", "file://", "file:///nowhere",
    "s3://", "s3:///x", "s3://bucket", "s3://bucket/x", "github://a:b@c/d", "http://127.0.0.1:9/x", "hf://a/b", "hf://",
    "zip://a.zip::b", "simplecache::s3://a/b", "memory://x", "gs://bucket/x", "ftp://127.0.0.1:9/x", "data:text/plain,x",
    "sqlite:///", "sqlite://", "sqlite:////proc/none/x.db", "postgresql://127.0.0.1:9/x", "mysql://x", "mssql://",
    "http://[::1", "http://user:secret@host/", "models:/", "models:/x/1", "models:/x@y", "models:///", "champion",
    "scratch", "auto", "cpu", "cuda", "cuda:99", "cuda:x", "meta", "mps", "cpu:0", "cpu:7", "resid_post.0",
    "resid_post.99", "resid_post.-1", "resid_post.*", "resid_post.{0,1}", "resid_post.{", "resid_post.[", "mlp_out.1",
    "model.layers.0.mlp", "model.layers.0.mlp.act_fn", "model.layers.*.mlp.down_proj:in", "vision.resid_post.1", "model",
    ":in", "*", "**", "[", "]", "{", "}", "[a", "{a,b}", "a[b-", "?", "%", "%s", "{0}", "$HOME", "`x`", "[/INST]",
    "[bold]", "\\", "\\d+", "(", "a\nb", "a\tb", "a\rb", "\x1b[31m", "\u0000", "a\u0000b", "\ud800", "a\udfffb", "\ufeff",
    "\u202e", "naïve", "你好", "🙂" * 300, "é" * 200, "none", "null", "true", "false", "yes", "on", "010", "0x10", "20:30",
    "2e6", "1_000", ".inf", "nan", "1e400", "2024-01-01", "<<", "&a", "*a", "!x", "!!int x", "- a", "a: b", "# x", "a #1",
    "'", '"', "|", ">", "@", "`", "relu", "topk", "batchtopk", "jumprelu", "gated", "matryoshka", "files", "images",
    "huggingface", "standard_library", "text", "messages", "document", "sequence", "float16", "bfloat16", "float8", "int8",
    "eager", "sdpa", "flash_attention_2", "flex_attention", "ray", "dask", "threads", "zstd", "builtin/stdlib-llama",
    "builtin/", "builtin/..", "builtin/../builtin/stdlib-llama", "a/b/c", "gpt2", "openai-community/gpt2", "-x", "--",
    "{{ x }}", "{% for %}", "{% for m in messages %}{{ m.content }}{% endfor %}", "{{ ''.__class__ }}",
    "{% set x = range(10**9)|list %}", LONG, "/" + LONG, "a/" * 2_500, LONG + "/x", "s3://" + LONG, "x" * 256, "x" * 129,
]  # fmt: skip
SPLICES = [
    "&a ", "*a", "<<: *a", "!!int ", "!!python/name:os.system ", "? ", ": ", "- ", "|", ">", "{", "}", "[", "]", '"', "'",
    "#", "%YAML 1.1\n", "---\n", "...\n", "\t", "\n", "\r", "\x00", "\x07", "\u2028", "\ufeff", '"\\ud800"', '"\\x00"',
    "!<tag:yaml.org,2002:int> x", ".inf", "~", "[" * 2_000, "{a: " * 500, "a: " * 20, " " * 5_000, "x" * 5_000,
    "9" * 5_000, "training: {tokens: 5}\n", "\U0010ffff",
]  # fmt: skip


def fields_of(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The place of every field that can be set."""
    for name, field in model.model_fields.items():
        nested = field.annotation if isinstance(field.annotation, type) else None
        if nested is not None and issubclass(nested, BaseModel) and name != "sae":
            yield (*above, name)
            yield from fields_of(nested, (*above, name))
        else:
            yield (*above, name)


FIELDS = sorted({*fields_of(RunConfig), *(("sae", f) for kind in architectures().values() for f in kind.Settings.model_fields)})


def configurations(tree: dict[str, Any], seed: int, count: int) -> Iterator[tuple[str, list[str]]]:
    """(text of a YAML file, overrides of `--set`) of each, from a tree that is right."""
    for number in range(count):
        chance = random.Random(seed * 1_000_003 + number)
        kind = chance.random()
        changed = deepcopy(tree)
        overrides: list[str] = []
        if kind < 0.55:
            for _ in range(chance.choice((1, 1, 1, 2, 3))):
                _set(changed, chance.choice(FIELDS), _value(chance, 2))
        elif kind < 0.8:
            for _ in range(chance.choice((1, 1, 2))):
                field = ".".join(chance.choice(FIELDS)) if chance.random() < 0.9 else chance.choice(TEXTS)
                value = chance.choice(TEXTS) if chance.random() < 0.7 else repr(_value(chance, 2))
                overrides.append(f"{field}={value}" if chance.random() < 0.97 else value)
        text = _dumped(changed)
        yield (_damaged(text, chance) if kind >= 0.8 else text), overrides


def _set(tree: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    for part in place[:-1]:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[place[-1]] = value


def _value(chance: random.Random, depth: int) -> Any:
    kind = chance.random()
    if kind < 0.45 or (depth == 0 and kind > 0.85):
        return chance.choice(TEXTS)
    if kind < 0.75:
        return chance.choice(NUMBERS)
    if kind < 0.85:
        return chance.choice([True, False, None])
    if kind < 0.93:
        return [_value(chance, depth - 1) for _ in range(chance.choice((0, 1, 1, 2, 3, 50)))]
    if kind < 0.95:
        return [
            {"weight": chance.choice(NUMBERS), "source": chance.choice(TEXTS), "paths": [chance.choice(TEXTS)]}
            for _ in range(2)
        ]
    keys = [
        chance.choice(TEXTS) if chance.random() < 0.3 else chance.choice(FIELDS)[-1] for _ in range(chance.choice((0, 1, 2)))
    ]
    return {key: _value(chance, depth - 1) for key in keys}


def _dumped(tree: dict[str, Any]) -> str:
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=False)
    return text if isinstance(text, str) else str(text)


def _damaged(text: str, chance: random.Random) -> str:
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
        lines, place = text.split("\n"), chance.randrange(len(text) + 1)
        match chance.randrange(6):
            case 0:
                text = text[:place] + chance.choice(SPLICES) + text[place:]
            case 1:
                text = text[:place] + text[place + chance.choice((1, 3, 40)) :]
            case 2:
                lines.insert(chance.randrange(len(lines)), chance.choice(lines))
                text = "\n".join(lines)
            case 3:
                del lines[chance.randrange(len(lines))]
                text = "\n".join(lines) + "\n"
            case 4:
                row = chance.randrange(len(lines))
                lines[row] = chance.choice(("  ", " ", "\t", "- ")) + lines[row]
                text = "\n".join(lines)
            case _:
                text = (
                    text[:place]
                    + chr(chance.choice((0, 7, 0x85, 0xA0, 0x2028, 0xFEFF, 0x1F642, chance.randrange(32, 127))))
                    + text[place:]
                )
        text = text or "\n"
    return text
