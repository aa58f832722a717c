"""YAML as people mean it: the core schema of YAML 1.2, without what a configuration has no use for.

`true` and `false` are the only truth values, `010` is ten, `2e6` a number and `20:30` a text. A key that stands twice, a tag or
aliases that unfold to more than a configuration could hold are refused. Numbers remember how they were written, for the fields
that want a text. (PyYAML itself reads YAML 1.1, and takes the last of two equal keys without a word.)
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import Resolver
from yaml.scanner import Scanner

from components.bounds import WrittenFloat, WrittenInt

LONGEST_TEXT = 200_000
"""Characters of a file; PyYAML reads about as many in a second."""
_MOST_VALUES = 20_000
_CORE = "tag:yaml.org,2002:"
_MERGE = f"{_CORE}merge"
_PLAIN = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9][0-9_]*"),
    "float": re.compile(
        r"[-+]?(\.[0-9][0-9_]*|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
    ),
}
_QUOTES = ("[", "{", '"', "'")


class YamlError(ValueError):
    """What is wrong with a text, as the end of a sentence about it."""


def parse_yaml(text: str) -> Any:
    """The plain values in a YAML document, None in an empty one; keys are texts. A YamlError for what is none."""
    if len(text) > LONGEST_TEXT:
        raise YamlError(f"is longer than the {LONGEST_TEXT:,} characters that are accepted")
    try:
        node = _Loader(text).get_single_node()
        if node is None:
            return None
        _require_size(node, {}, set())
        return _value(node)
    except yaml.MarkedYAMLError as error:
        place = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise YamlError(f"is not YAML: {error.problem or error.context}{place}") from error
    except RecursionError as error:
        raise YamlError("is nested too deeply") from error
    except YamlError:
        raise
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise YamlError(f"is not YAML: {' '.join(str(error).split())}") from error


def read_text(path: Path) -> str:
    """Of a file of YAML, no more than `parse_yaml` takes: it may be a device without end."""
    with path.open(encoding="utf-8") as stream:
        return stream.read(LONGEST_TEXT + 1)


def parse_value(text: str) -> Any:
    """The value that a person gives a field on a command line: a list, a mapping or a quoted text in YAML's terms; else all of
    the text, as a number or truth value where it is one."""
    if text.lstrip().startswith(_QUOTES):
        return parse_yaml(text)
    return _scalar(_tag_of(text.strip()), text)


class _Loader(Reader, Scanner, Parser, Composer, Resolver):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own name)

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        Resolver.__init__(self)

    def resolve(self, kind: Any, value: Any, implicit: Any) -> str:
        if kind is ScalarNode:
            return _tag_of(value) if implicit[0] else f"{_CORE}str"
        return f"{_CORE}seq" if kind is SequenceNode else f"{_CORE}map"


def _tag_of(text: str) -> str:
    if text == "<<":
        return _MERGE
    return _CORE + next((name for name, pattern in _PLAIN.items() if pattern.fullmatch(text)), "str")


def _require_size(node: Node, sizes: dict[int, int], above: set[int]) -> int:
    """Values in a node, each alias counted as what it stands for."""
    if id(node) in above:
        raise YamlError(f"is not accepted: an alias in line {node.start_mark.line + 1} stands for what it is in")
    if id(node) not in sizes:
        children: list[Node] = []
        if isinstance(node, SequenceNode):
            children = node.value
        elif isinstance(node, MappingNode):
            children = [part for pair in node.value for part in pair]
        sizes[id(node)] = 1 + sum(_require_size(child, sizes, above | {id(node)}) for child in children)
        if sizes[id(node)] > _MOST_VALUES:
            raise YamlError(f"holds, with its aliases, over {_MOST_VALUES:,} values")
    return sizes[id(node)]


def _value(node: Node) -> Any:
    if isinstance(node, ScalarNode):
        return _scalar(node.tag, node.value, node)
    if isinstance(node, SequenceNode) and node.tag == f"{_CORE}seq":
        return [_value(child) for child in node.value]
    if isinstance(node, MappingNode) and node.tag == f"{_CORE}map":
        return _mapping(node)
    raise YamlError(
        f"is not accepted: the tag {node.tag.replace(_CORE, '!!')} in line {node.start_mark.line + 1} is not accepted"
    )


def _mapping(node: MappingNode) -> dict[str, Any]:
    own: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    for key, child in node.value:
        if not isinstance(key, ScalarNode):
            raise YamlError(f"is not accepted: the key in line {key.start_mark.line + 1} is no text")
        if key.tag == _MERGE:
            for part in child.value if isinstance(child, SequenceNode) else [child]:
                if not isinstance(part, MappingNode):
                    raise YamlError(f"is not accepted: what is merged in line {key.start_mark.line + 1} is no mapping")
                merged = _mapping(part) | merged
        elif key.value in own:
            raise YamlError(
                f"is not accepted: '{key.value[:80]}' stands twice in one mapping, again in line {key.start_mark.line + 1}"
            )
        else:
            own[_text(key.value)] = _value(child)
    return merged | own


def _scalar(tag: str, text: str, node: Node | None = None) -> Any:
    number = text.strip().replace("_", "")
    match tag.removeprefix(_CORE):
        case "null":
            return None
        case "bool" if _PLAIN["bool"].fullmatch(text.strip()):
            return text.strip().lower() == "true"
        case "int" if _PLAIN["int"].fullmatch(text.strip()):
            return WrittenInt.of(int(number), text)
        case "float" if _PLAIN["float"].fullmatch(text.strip()):
            return WrittenFloat.of(float(re.sub(r"\.(?=inf|nan)", "", number.lower())), text)
        case "str" | "merge":
            return _text(text)
    place = "" if node is None else f" in line {node.start_mark.line + 1}"
    raise YamlError(f"is not accepted: '{text[:40]}' is not what the tag {tag.replace(_CORE, '!!')}{place} says")


def _text(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise YamlError("is not accepted: a text in it holds half of a surrogate pair, which is no character")
    return text
