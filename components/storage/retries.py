"""Patience with an object store: wait while it is away, slow or broken for a moment; give up at once where waiting is vain.

s3fs and botocore retry a single request a few times within seconds; this is for what takes longer, such as a restart.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_exponential_jitter

from components.settings import UserError

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 180.0
"""How long an operation is repeated, counted from its first failure."""

_VAIN = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_VAIN_NUMBERS = (errno.EINVAL, errno.ENAMETOOLONG, errno.EMSGSIZE, errno.ENOSPC, errno.EDQUOT)
_NO_KEYS = ("NoCredentialsError", "PartialCredentialsError")
_VAIN_NAMES = (*_NO_KEYS, "ParamValidationError", "NoRegionError")
_LIBRARIES = ("botocore", "aiobotocore", "aiohttp", "urllib3")

_seconds: ContextVar[float] = ContextVar("patience_seconds", default=PATIENCE_SECONDS)


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Within this block (and thread), operations are repeated for so long."""
    token = _seconds.set(seconds)
    try:
        yield
    finally:
        _seconds.reset(token)


def patiently(filesystem: AbstractFileSystem, operation: str, *arguments: Any, **named: Any) -> Any:
    """`filesystem.operation(*arguments, **named)`; on an object store again and again while the error may pass."""
    call = getattr(filesystem, operation)
    if isinstance(filesystem, LocalFileSystem):
        return call(*arguments, **named)
    first_failure: list[float] = []
    limit = _seconds.get()

    def stop(state: RetryCallState) -> bool:
        first_failure.append(time.monotonic())
        return time.monotonic() - first_failure[0] > limit

    def warn(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        if state.attempt_number in (1, 5) or state.attempt_number % 20 == 0:
            logger.warning("%s of %s: %s: %s; trying again", operation, arguments[0], type(error).__name__, error)

    retrying = Retrying(
        retry=retry_if_exception(may_pass),
        wait=wait_exponential_jitter(multiplier=0.2, max=5.0, jitter=0.5),
        stop=stop,
        before_sleep=warn,
        reraise=True,
    )
    try:
        return retrying(call, *arguments, **named)
    except Exception as error:
        if type(error).__name__ not in _NO_KEYS:
            raise
        what = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile that has them"
        raise UserError(f"'{arguments[0]}': there are no keys for the object store ({error}); {what}") from error


def may_pass(error: BaseException) -> bool:
    """Whether the same operation may work a little later: the network, a timeout, a 5xx, "slow down"."""
    if isinstance(error, _VAIN) or type(error).__name__ in _VAIN_NAMES:
        return False
    if isinstance(error, OSError):
        return error.errno not in _VAIN_NUMBERS
    return type(error).__module__.split(".")[0] in _LIBRARIES
