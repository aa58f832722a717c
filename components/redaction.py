"""What may be shown of addresses and messages: no user information, no secret of a query or a connection string, and no
value of a secret environment variable. It needs the standard library alone, so anything can use it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, quote_plus, unquote, urlsplit

HIDDEN = "***"
SECRET_VARIABLES = re.compile("(SECRET|SECRET_KEY|ACCESS_KEY|PASSWORD|TOKEN|AUTH_STRING|API_KEY)$", re.IGNORECASE)
_SHORTEST = 4
"""A shorter value of a variable would be found in ordinary words."""

# Up to the last @ of the authority; or, where a password holds what should have been encoded, of all: not after a port.
_USER = re.compile(r"(?<=://)(?:[^\s/?#'\"<>]*|[^\s/?#'\"<>\[:@]*:(?!\d+[/?#])[^\s'\"<>]*)@")
_NAMES = r"password|passwd|pwd|passphrase|secret|token|credential|signature|(?:access|secret|api|account)[_-]?key(?:[_-]?id)?"
_VALUE = r"\{[^}]*\}|%7B.*?%7D|'[^']*'|\"[^\"]*\"|(?:(?!%26|%3B)[^\s&;'\"<>)\]}])+"
_PAIR = re.compile(rf"({_NAMES})(\s*=\s*|%3D|['\"]\s*:\s*)(?:{_VALUE})", re.IGNORECASE)
_HEADER = re.compile(r"\b(Basic|Bearer) [A-Za-z0-9+/=._~-]{8,}")


def redacted(text: str) -> str:
    """A text, or an address of any kind, as it may be shown."""
    for secret in sorted(_secret_values(), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return without_secrets(text)


def without_secrets(text: str) -> str:
    """Without the secrets that its own form gives away; whatever the environment holds. For what is stored for good."""
    return _HEADER.sub(rf"\1 {HIDDEN}", _PAIR.sub(rf"\1\2{HIDDEN}", _USER.sub("", text)))


def public(value: Any) -> Any:
    """Plain values (of JSON), every text in them `without_secrets`."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, dict):
        return {key: public(item) for key, item in value.items()}
    return [public(item) for item in value] if isinstance(value, list | tuple) else value


def holds_password(address: str) -> bool:
    """Whether there is more in an address than who asks: a database's user name alone is no secret, but one for a web server
    may be a token."""
    user = _USER.search(address)
    if user is not None and (":" in user.group() or address.startswith("http")):
        return True
    return _PAIR.search(_USER.sub("", address)) is not None


@contextmanager
def errors_redacted() -> Iterator[None]:
    """What is raised inside says no secret, nor does what caused it; its type stays."""
    try:
        yield
    except BaseException as error:
        redact_error(error)
        raise


def redact_error(error: BaseException) -> None:
    """In place: the texts of an error and of those that led to it."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        one.args = tuple(redacted(part) if isinstance(part, str) else part for part in one.args)
        for name, value in list(vars(one).items()):
            if isinstance(value, str):
                setattr(one, name, redacted(value))
        pending += [one.__cause__, one.__context__, *(part for part in one.args if isinstance(part, BaseException))]


def _secret_values() -> set[str]:
    """Of the environment: as they are, and as addresses hold them."""
    found = set()
    for name, value in os.environ.items():
        if SECRET_VARIABLES.search(name):
            found.add(value)
        elif "://" in value:
            try:
                found.add(unquote(urlsplit(value).password or ""))
            except ValueError:
                continue
    plain = {value for value in found if len(value) >= _SHORTEST}
    return plain | {encode(value, safe="") for value in plain for encode in (quote, quote_plus)}
