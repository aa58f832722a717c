"""One writer at a time: a lock of the operating system on a local disk, a lease of numbered claims on an object store."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from components.storage.files import delete, is_local, join, list_names, local_path, put_bytes, put_json_once, read_bytes

logger = logging.getLogger(__name__)


class ClaimLost(RuntimeError):
    """Another process has taken over what this one was working on."""


class Claim:
    """The right to write an artifact, for as long as `check` does not raise."""

    def check(self, now: bool = False) -> None:
        """Raise ClaimLost where another process has taken over. It looks at most every few seconds, unless `now`."""


@contextmanager
def exclusive(url: str) -> Iterator[None]:
    """Hold the only right on this machine to work on `url`; waits while another process holds it.

    The operating system releases it when its holder dies. Under `s3:` there is no such lock, and nothing is held.
    """
    if not is_local(url):
        yield
        return
    path = local_path(url)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        logger.info("waiting for another process that works on %s", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def claimed(url: str, beat_seconds: float = 20.0, dead_seconds: float = 90.0) -> Iterator[Claim]:
    """Hold the right to write the artifact at `url`, on a local disk and on an object store; waits while another holds it.

    A local lock goes with its holder. On an object store claims are numbered, and put only where there is none: the
    highest number holds. Its holder rewrites a beat every `beat_seconds`; a rival that has not seen it change for
    `dead_seconds` of its own time (while the store answered) puts the next number. No two clocks are compared. A holder
    that was only slow learns of it from `check`, to be called before every write that matters.
    """
    if is_local(url):
        with exclusive(url):
            yield Claim()
        return
    claims = join(url, "claims")
    while True:
        lease = _Lease(claims, _free_number(claims, beat_seconds, dead_seconds), beat_seconds)
        if lease.take():
            break
    lease.beat.start()
    try:
        yield lease
    finally:
        lease.release()


class _Lease(Claim):
    def __init__(self, claims: str, number: int, beat_seconds: float) -> None:
        self.claims, self.number, self.beat_seconds = claims, number, beat_seconds
        self.owner = uuid.uuid4().hex
        self.beat = threading.Thread(target=self._beat, name="claim", daemon=True)
        self._ended = threading.Event()
        self._looking = threading.Lock()
        self._seen = 0.0

    def take(self) -> bool:
        if not put_json_once({"owner": self.owner}, _claim(self.claims, self.number)):
            return False
        return self._holds()  # a rival's claim of another number may have been there already

    def check(self, now: bool = False) -> None:
        with self._looking:
            if now or time.monotonic() - self._seen > self.beat_seconds / 4:
                if not self._holds():
                    raise ClaimLost(f"another process has taken over '{self.claims.rsplit('/', 1)[0]}'; this one ends here")
                self._seen = time.monotonic()

    def release(self) -> None:
        self._ended.set()
        self.beat.join()
        if self._holds():
            # Its own last: whoever was slow and had a lower number finds it gone, and not the highest again.
            for number in sorted(_numbers(self.claims)):
                if number <= self.number:
                    delete(_claim(self.claims, number))
            for name in list_names(self.claims):
                if name.endswith(".beat") and int(name.removesuffix(".beat")) <= self.number:
                    delete(join(self.claims, name))

    def _holds(self) -> bool:
        if max(_numbers(self.claims), default=0) != self.number:
            return False
        try:
            return self.owner.encode() in read_bytes(_claim(self.claims, self.number))
        except FileNotFoundError:
            return False

    def _beat(self) -> None:
        while True:
            try:
                put_bytes(uuid.uuid4().bytes, join(self.claims, f"{self.number:05d}.beat"))
            except Exception:  # each store has its own; it may be back for the next beat
                logger.warning("cannot renew the claim on %s", self.claims, exc_info=True)
            if self._ended.wait(self.beat_seconds):
                return


def _free_number(claims: str, beat_seconds: float, dead_seconds: float) -> int:
    """The number of the next claim, as soon as nobody holds the last one."""
    pause = min(beat_seconds, dead_seconds) / 4
    number, last, unchanged, seen = 0, b"", 0.0, 0.0
    while True:
        highest = max(_numbers(claims), default=0)
        if highest == 0:
            return 1
        beat = _bytes_if_present(join(claims, f"{highest:05d}.beat"))
        at = time.monotonic()
        if (highest, beat) != (number, last):
            if number == 0:
                logger.info("waiting for another process that works on %s", claims.rsplit("/", 1)[0])
            number, last, unchanged = highest, beat, 0.0
        else:
            unchanged += min(at - seen, 2 * pause)  # a store that was away kept the holder from its beat, too
        if unchanged >= dead_seconds:
            return highest + 1
        seen = at
        time.sleep(pause)


def _claim(claims: str, number: int) -> str:
    return join(claims, f"{number:05d}.json")


def _numbers(claims: str) -> list[int]:
    return [int(name.removesuffix(".json")) for name in list_names(claims) if name.endswith(".json")]


def _bytes_if_present(url: str) -> bytes:
    try:
        return read_bytes(url)
    except FileNotFoundError:
        return b""
