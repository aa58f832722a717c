"""What a check finds, checks that run side by side under one time limit, and one HTTP request with the server's clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any, Literal

import httpx

from components.redaction import redacted

Status = Literal["ok", "warning", "failure", "skipped"]
SECTIONS = ("versions", "storage", "MLflow", "Prefect", "device", "machine", "clock")
"""In the order in which people read them."""

REQUEST_SECONDS = 4.0
"""How long one request may wait for a connection, and again for an answer."""
ALL_SECONDS = 18.0
"""How long all checks together may take."""

NO_ANSWER = (httpx.HTTPError, httpx.InvalidURL)

CLOCK_WARNING_SECONDS = 5.0
CLOCK_FAILURE_SECONDS = 900.0
"""S3 refuses signatures that are older or younger than this."""


@dataclass(frozen=True)
class Check:
    section: str
    name: str
    status: Status
    found: str
    advice: str | None = None
    """What to do about it, one sentence; None where nothing has to be done."""


@dataclass(frozen=True)
class Job:
    """Checks that depend on each other: one generator, in a thread of its own."""

    section: str
    checks: Callable[[], Iterator[Check]]


def run(jobs: Sequence[Job], seconds: float = ALL_SECONDS) -> list[Check]:
    """What all jobs find within `seconds`, by section; an error or a job that does not end is a failure and stops no other."""
    found: list[list[Check]] = [[] for _ in jobs]

    def work(job: Job, into: list[Check]) -> None:
        try:
            into.extend(job.checks())  # one by one: what was found before an error or the time limit is kept
        except Exception as error:
            advice = "This is an error of the check itself or of a library under it; see whether the versions above are right."
            into.append(Check(job.section, "check", "failure", explained(error), advice))

    # Daemons: a library that hangs must not keep the command from ending.
    threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in zip(jobs, found, strict=True)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    checks: list[Check] = []
    for job, thread, into in zip(jobs, threads, found, strict=True):
        thread.join(max(0.0, deadline - time.monotonic()))
        checks += list(into)
        if thread.is_alive():
            advice = (
                "Something answers too slowly: run `sae doctor` again, and look at the network and the load of this machine."
            )
            checks.append(Check(job.section, "time limit", "failure", f"not done after {seconds:.0f} s", advice))
    if not any(check.section == "clock" for check in checks):
        checks.append(Check("clock", "clock", "skipped", "no server answered whose clock could be compared"))
    clean = [replace(check, found=redacted(check.found), advice=check.advice and redacted(check.advice)) for check in checks]
    return sorted(clean, key=lambda check: SECTIONS.index(check.section))


def explained(error: BaseException) -> str:
    """An error as one short line: what the network said, without the pages that httpx, requests and MLflow put around it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, TimeoutError | httpx.TimeoutException):
            return f"no answer within {REQUEST_SECONDS:.0f} s"
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    error = getattr(error, "orig", None) or error  # SQLAlchemy's holds the database's own
    line = " ".join(str(error).split())
    return f"{type(error).__name__}: {line[:200]}{'...' if len(line) > 200 else ''}" if line else type(error).__name__


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    seconds: float
    clock_offset: float | None
    """By how many seconds the server's clock is ahead of this machine's; None where it sends no date."""


def timed(send: Callable[[], Any]) -> Answer:
    """The response that `send` gets (httpx's or requests'), with how long it took and the server's clock."""
    before, started = time.time(), time.monotonic()
    response = send()
    taken = time.monotonic() - started
    return Answer(response.status_code, response.content, taken, clock_offset(response.headers.get("Date"), before, taken))


def ask(url: str, client: httpx.Client | None = None, body: Any = None) -> Answer:
    """A GET, or a POST of `body` as JSON; every status is an answer, and no answer one of the errors in `NO_ANSWER`."""
    client, method = client or httpx.Client(), "GET" if body is None else "POST"
    return timed(lambda: client.request(method, url, json=body, timeout=REQUEST_SECONDS, follow_redirects=True))


def clock_offset(date: str | None, before: float, taken: float) -> float | None:
    """Seconds by which the server of a `Date` header is ahead; the request began at `before` and took `taken` seconds."""
    if date is None:
        return None
    try:
        server = parsedate_to_datetime(date).timestamp()
    except ValueError:
        return None
    # The date has whole seconds and was made at some time during the request: only what is beyond both is an offset.
    earliest, latest = before - 1.0, before + taken
    return server - latest if server > latest else min(0.0, server - earliest)


def clock_check(server: str, answer: Answer) -> Iterator[Check]:
    """This machine's clock against that of a server that has just answered; nothing where it sent no date."""
    if answer.clock_offset is None:
        return
    offset = abs(answer.clock_offset)
    if offset < CLOCK_WARNING_SECONDS:
        yield Check("clock", server, "ok", f"within {CLOCK_WARNING_SECONDS:.0f} s of this machine's")
        return
    direction = "ahead of" if answer.clock_offset > 0 else "behind"
    found = f"the server's clock is {_duration(offset)} {direction} this machine's"
    advice = "Set the clock that is wrong, and have both machines follow a time server (`timedatectl set-ntp true`)"
    if offset < CLOCK_FAILURE_SECONDS:
        yield Check("clock", server, "warning", found, f"{advice}.")
    else:
        yield Check("clock", server, "failure", found, f"{advice}: S3 refuses requests that are over 15 minutes off.")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def human_bytes(count: float) -> str:
    """Decimal units, as disks are sold: `1.2 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
