"""The settings under `sae`: those of the architecture that `sae.architecture` names.

Importing this imports no torch: the architectures are looked up when a configuration is first read.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

from components.sae.settings import CoderSettings

DEFAULT_ARCHITECTURE = "relu"


class _OfAnyArchitecture:
    """Validates `sae` with the settings class of its `architecture`, and offers the form all of them."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        serialization = core_schema.plain_serializer_function_ser_schema(
            lambda settings, info: settings.model_dump(mode=info.mode), info_arg=True
        )
        return core_schema.no_info_plain_validator_function(_parsed, serialization=serialization)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        from components.sae.architectures import architectures

        every = []
        for name, found in architectures().items():
            form = found.Settings.model_json_schema()
            if name != DEFAULT_ARCHITECTURE:  # else what names none would fit several, and Prefect refuses that
                form["required"] = ["architecture", *form.get("required", ())]
            every.append(form)
        return {"oneOf": every}


def _parsed(value: Any) -> CoderSettings:
    if isinstance(value, CoderSettings):
        return value
    from components.sae.architectures import architectures

    if not isinstance(value, dict):
        raise ValueError(f"sae: {value!r} is not accepted: it must be a mapping of fields")
    known = architectures()
    name = value.get("architecture", DEFAULT_ARCHITECTURE)
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"sae.architecture: {name!r} is not accepted: there are {', '.join(known)}")
    settings = known[name].Settings
    try:
        return settings.model_validate({**value, "architecture": name})
    except ValidationError as error:
        raise ValueError(_sentence(error.errors()[0], settings)) from error


def _sentence(error: Any, settings: type[CoderSettings]) -> str:
    """One pydantic error as one sentence with the field, the value and what is accepted."""
    field = ".".join(["sae", *(str(part) for part in error["loc"])])
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(error["loc"][-1]), settings.model_fields, n=1)
        hint = f", did you mean '{close[0]}'?" if close else ""
        return f"{field}: there is no such field{hint} (accepted here: {', '.join(settings.model_fields)})"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return f"{field}: {error['input']!r:.200} is not accepted: {error['msg'][0].lower()}{error['msg'][1:]}"


if TYPE_CHECKING:
    SAESettings = CoderSettings
else:
    SAESettings = Annotated[CoderSettings, _OfAnyArchitecture()]


def default_settings() -> CoderSettings:
    return _parsed({})
