"""Bounds of every number and text in a configuration. (It imports nothing of the project's, so that the SAE may use it too.)

A run's parameters go through JSON, JavaScript and PostgreSQL. PostgreSQL gives 1e30 back as a whole number of more than 64
bits, and Prefect's server then answers 500 to every listing of runs that holds it, for everybody.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

LARGEST_INT = 2**53 - 1
"""Beyond it JavaScript, and so Prefect's form, rounds a whole number."""
LARGEST_FLOAT = 1e15
"""Below `LARGEST_INT`: a float without a fraction comes back from PostgreSQL as a whole number."""
LONGEST_SECONDS = 315_360_000.0
"""Ten years. A thread that is to wait for more than 292 fails instead."""
_LARGEST = {"int": LARGEST_INT, "float": LARGEST_FLOAT}
_NO_SCHEMAS = {"default", "metadata", "serialization", "expected", "cls", "config"}

Days = Annotated[float, Field(ge=0, le=36_500, allow_inf_nan=False)]
"""An age in days, as a parameter of a flow."""


class WrittenInt(int):
    """A number that knows how it was written, for a field that wants a text: `007`, `1_000`."""

    written: str

    @classmethod
    def of(cls, value: int, written: str) -> Self:
        number = cls(value)
        number.written = written
        return number


class WrittenFloat(float):
    written: str

    @classmethod
    def of(cls, value: float, written: str) -> Self:
        number = cls(value)
        number.written = written
        return number


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("not_a_number", "input should be a number, and not true or false")
    return value


def _text(value: Any) -> Any:
    value = getattr(value, "written", value)
    if isinstance(value, str) and not value.isascii() and any("\ud800" <= part <= "\udfff" for part in value):
        raise PydanticCustomError("no_text", "it holds half of a surrogate pair, which is no character")
    if isinstance(value, str) and "\0" in value:
        raise PydanticCustomError("no_text", "it holds a zero byte, which no name and no path may")
    return value


_LOOKED_AT = {"int": _number, "float": _number, "str": _text}


def _bound(schema: Any) -> None:
    """Bounds for the numbers and texts in a schema, in place; models inside are references and see to themselves."""
    if isinstance(schema, list | tuple):
        for part in schema:
            _bound(part)
        return
    if not isinstance(schema, dict):
        return
    validator = schema.get("function")
    if isinstance(validator, dict) and validator.get("function") in (
        _number,
        _text,
    ):  # of a model inside that has seen to itself
        return
    kind = schema.get("type", "")
    if kind in _LARGEST:
        _limit(schema, _LARGEST[kind])
    if kind in _LOOKED_AT:
        inner = dict(schema)
        schema.clear()
        schema.update(core_schema.no_info_before_validator_function(_LOOKED_AT[kind], inner))
    else:
        for key, part in schema.items():
            if key not in _NO_SCHEMAS:
                _bound(part)


def _limit(schema: dict[str, Any], largest: float) -> None:
    for closed, opened, limit, beyond in (("ge", "gt", -largest, float.__lt__), ("le", "lt", largest, float.__gt__)):
        for key in (closed, opened):
            if key in schema and beyond(float(schema[key]), float(limit)):
                del schema[key]
        if closed not in schema and opened not in schema:
            schema[closed] = limit


class Bounded(BaseModel):
    """A pydantic model whose numeric fields all have bounds, those inside tuples and Optionals too.

    A field's own bounds hold where they are tighter. They show in the JSON schema as `minimum` and `maximum`, and the order of
    the fields in a form as `position`: PostgreSQL gives a schema's properties back by the length of their names.
    """

    form_first: ClassVar[tuple[str, ...]] = ()
    """The fields that people set, which come first in a form; the others follow as they are declared."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core)
        properties = handler.resolve_ref_schema(schema).get("properties", {})
        first = [name for name in cls.form_first if name in properties]
        for position, name in enumerate([*first, *(name for name in properties if name not in first)]):
            properties[name]["position"] = position
        return schema

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _bound(handler.resolve_ref_schema(schema))
        return schema
