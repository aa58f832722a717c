"""Every number of the configuration has bounds that JSON, JavaScript and PostgreSQL carry."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from components.bounds import LARGEST_FLOAT, LARGEST_INT, Bounded, Days
from components.run.config import RunConfig, parse_config
from components.settings import UserError


def subclasses(kind: type) -> Iterator[type[Bounded]]:
    for one in kind.__subclasses__():
        yield one
        yield from subclasses(one)


def settings_classes() -> list[type[Bounded]]:
    """Those of the whole configuration, and every other that is imported."""
    return sorted({one for one in subclasses(Bounded) if one.model_fields}, key=lambda one: one.__name__)


def numbers_in(annotation: Any) -> set[type]:
    if annotation in (int, float):
        return {annotation}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return set()
    return set().union(*map(numbers_in, get_args(annotation)), set())


def numeric_fields() -> list[tuple[type[Bounded], str]]:
    return [
        (one, name) for one in settings_classes() for name, field in one.model_fields.items() if numbers_in(field.annotation)
    ]


def accepted(kind: type[Bounded], name: str, value: float | tuple[float, ...]) -> bool:
    try:
        kind.model_validate({name: value})
    except ValidationError as error:
        return not any(part["loc"][:1] == (name,) for part in error.errors())
    return True


@pytest.mark.parametrize(("kind", "name"), numeric_fields(), ids=lambda part: getattr(part, "__name__", part))
def test_a_number_that_would_poison_the_server_is_refused_everywhere(kind: type[Bounded], name: str):
    for value in (1e30, -1e30, 10**30, -(10**30), float(2 * LARGEST_INT), 2 * LARGEST_INT, float("inf"), float("nan")):
        assert not accepted(kind, name, value)
        assert not accepted(kind, name, (value, value))
    field = kind.model_fields[name]
    if not field.is_required():
        assert accepted(kind, name, field.get_default(call_default_factory=True))  # and rightly so


def unbounded(schema: Any, path: str = "") -> Iterator[str]:
    """Places in a JSON schema that take a number without a minimum or a maximum."""
    if isinstance(schema, dict):
        if schema.get("type") in ("integer", "number") and "const" not in schema and "enum" not in schema:
            low = any(key in schema for key in ("minimum", "exclusiveMinimum"))
            high = schema.get("maximum", schema.get("exclusiveMaximum"))
            if not low or high is None or high > LARGEST_INT:
                yield path
        for key, part in schema.items():
            yield from unbounded(part, f"{path}.{key}")
    elif isinstance(schema, list):
        for index, part in enumerate(schema):
            yield from unbounded(part, f"{path}.{index}")


def test_the_form_has_a_minimum_and_a_maximum_for_every_number():
    assert len(numeric_fields()) > 30
    schema = RunConfig.model_json_schema()
    assert list(unbounded(schema)) == []
    training = schema["$defs"]["TrainingSettings"]["properties"]
    assert training["learning_rate"]["maximum"] == LARGEST_FLOAT
    assert training["learning_rate"]["exclusiveMinimum"] == 0
    assert training["tokens"]["maximum"] == LARGEST_INT
    assert training["sparsity_warmup" if "sparsity_warmup" in training else "learning_rate_warmup"]["maximum"] == 1
    assert schema["properties"]["seed"]["maximum"] == LARGEST_INT


def test_the_refusal_names_field_value_and_what_is_accepted():
    with pytest.raises(UserError, match=r"^training\.learning_rate: 1e\+30 is not accepted: .*less than or equal to 10{15}$"):
        parse_config({"training": {"learning_rate": 1e30}})
    with pytest.raises(UserError, match=r"^seed: 10{18} is not accepted: .*9007199254740991"):
        parse_config({"seed": 10**18})
    with pytest.raises(UserError, match=r"^training\.adam_betas\.0: -1e\+30 is not accepted"):
        parse_config({"training": {"adam_betas": [-1e30, 0.9]}})


def test_an_age_in_days_is_one_that_a_calendar_holds():
    days = TypeAdapter(Days)
    assert [days.validate_python(age) for age in (0, 0.5, 36_500)] == [0, 0.5, 36_500]
    for age in (1e300, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValidationError):
            days.validate_python(age)
