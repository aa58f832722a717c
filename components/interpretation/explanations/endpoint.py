"""Any endpoint that speaks OpenAI's chat completions (`POST <base>/chat/completions`), also when it speaks rudely."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt
from tenacity.wait import wait_random_exponential

from components.interpretation.explanations.asking import Answer, Charged, Message, Unavailable
from components.redaction import redacted

_LARGEST_ANSWER = 1 << 21
_LONGEST_WAIT = 120.0
_BUSY = {408, 409, 425, 429, 500, 502, 503, 504, 529}


class _Again(Exception):
    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class Endpoint:
    """An `Explainer` at `base`. key: sent as a bearer token and kept nowhere else. Several threads may ask at once."""

    def __init__(
        self,
        base: str,
        model: str,
        key: str | None,
        timeout: float,
        attempts: int,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.name = f"{model} at {base}"
        self._url, self._model, self._timeout, self._attempts, self._sleep = (
            f"{base}/chat/completions",
            model,
            timeout,
            attempts,
            sleep,
        )
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        # A redirect would take the key elsewhere; it is a refusal.
        self._client = httpx.Client(headers=headers, timeout=timeout, follow_redirects=False)

    def close(self) -> None:
        self._client.close()

    def ask(self, messages: Sequence[Message], answer_tokens: int) -> Answer:
        """Raises `Charged` where what came back is no answer, `Unavailable` where nothing does after all attempts."""
        body = {"model": self._model, "messages": list(messages), "max_tokens": answer_tokens, "temperature": 0}
        retrying = Retrying(
            stop=stop_after_attempt(self._attempts), wait=_wait, sleep=self._sleep, retry=retry_if_exception_type(_Again),
            reraise=True,
        )  # fmt: skip
        try:
            return retrying(self._once, body)
        except _Again as error:
            raise Unavailable(f"{redacted(self._url)} did not answer {self._attempts} times: {error}") from None

    def _once(self, body: dict[str, Any]) -> Answer:
        deadline = time.monotonic() + 2 * self._timeout
        try:
            with self._client.stream("POST", self._url, json=body) as response:
                if response.status_code != 200:
                    self._refuse(response)
                content = bytearray()
                for part in response.iter_bytes():
                    content += part
                    if len(content) > _LARGEST_ANSWER:
                        raise Charged(f"an answer of more than {_LARGEST_ANSWER:,} bytes")
                    if time.monotonic() > deadline:  # one byte now and then is no timeout of the connection
                        raise Charged("an answer that does not end")
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise _Again(_short(error)) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:  # the request may have arrived
            raise Charged(_short(error)) from None
        return parsed(bytes(content))

    def _refuse(self, response: httpx.Response) -> None:
        if response.status_code in _BUSY:
            raise _Again(f"status {response.status_code}", retry_after(response.headers.get("Retry-After"), time.time()))
        raise Unavailable(f"{redacted(self._url)} refuses: status {response.status_code}")


def parsed(content: bytes) -> Answer:
    """The answer in a response's body; raises `Charged` for what is none."""
    try:
        tree = json.loads(content)
        text = tree["choices"][0]["message"]["content"]
        usage = tree.get("usage") or {}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise Charged("a response that is no chat completion") from None
    if not isinstance(text, str) or not text.strip():
        raise Charged("an empty answer")
    counts = (usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens"))
    read, written = (
        count if isinstance(count, int) and not isinstance(count, bool) and 0 <= count < 2**40 else None for count in counts
    )
    return Answer(text, read, written)


def retry_after(header: str | None, now: float) -> float | None:
    """Seconds that a `Retry-After` asks for, as a number or a date; None where it says nothing of use."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - now
        except (ValueError, TypeError, OverflowError):
            return None
    return min(max(seconds, 0.0), _LONGEST_WAIT) if math.isfinite(seconds) else None


_backing_off = wait_random_exponential(multiplier=1.0, max=60.0)


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome is not None else None
    asked = error.after if isinstance(error, _Again) else None
    return _backing_off(state) if asked is None else asked


def _short(error: Exception) -> str:
    return redacted((str(error).splitlines() or [""])[0] or type(error).__name__)[:200]
