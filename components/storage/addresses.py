"""Addresses in a configuration: paths of this machine, `s3://`, and nothing that would ask another network."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

LOCAL_SCHEMES = ("", "file", "local")
# Of a process's own memory: for tests.
_SCHEMES = (*LOCAL_SCHEMES, "s3", "s3a", "memory")
ACCEPTED = "a path of this machine, file:// or s3://"


def scheme_of(url: str) -> str:
    """What stands before `://`, empty where nothing does."""
    head, separator, _ = url.partition("://")
    return head if separator else ""


def unknown_scheme(url: str) -> str | None:
    """Why an address is none here, None for one that is."""
    scheme = scheme_of(url)
    return None if scheme in _SCHEMES else f"'{url}' starts with '{scheme}://'; accepted is {ACCEPTED}"


def expanded(path: str) -> str:
    """`~` and `~user` at the start as the folders that a shell takes them for."""
    return os.path.expanduser(path) if path.startswith("~") else path


def _accepted(url: str) -> str:
    if unknown_scheme(url) is not None:
        raise PydanticCustomError("address", "accepted is {accepted}", {"accepted": ACCEPTED})
    return expanded(url)


LocalPath = Annotated[str, AfterValidator(expanded)]
"""A path, or a name that means something else."""
Address = Annotated[str, AfterValidator(_accepted)]
"""Of files, on this machine or on S3."""
