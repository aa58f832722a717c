"""The folder of an online dataset: where its generations come and go, and what stays of them.

`generation-00000/` ... are activation datasets as any other, each of sequences of its own. What is read is a stream
of them, in order and again from the first one on, some of them side by side (see `stream`): place `p` is generation
`p % count`. Beside them lie `first.json`, the manifest of the first generation as it was, whose means and scales hold for all
of them; `ledger.json`, how many rows each had that was there; `wanted.json`, from which place on they are needed, by the
training that reads them; and `failure.json`, why no more of them are made.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice

from components import storage
from components.activations.dataset.manifest import Manifest, read_manifest_file
from components.activations.online.stream import Stretch, portions, stretches
from components.records import put_record, read_record
from components.settings import Record, UserError

_NAME = re.compile(r"generation-(\d{5,})")
_REMEDY = "delete the folder to make its generations anew"


class Entry(Record):
    """What stays of a generation."""

    rows: int
    content: str
    """SHA-256 of the checksums of its shards, in their order."""
    tokens_per_second: float | None = None
    """By which it was extracted and shuffled; None where that was interrupted."""

    @classmethod
    def of(cls, manifest: Manifest, seconds: float | None = None) -> Entry:
        content = sha256(" ".join(shard.sha256 for shard in manifest.shards).encode()).hexdigest()
        return cls(rows=manifest.tokens, content=content, tokens_per_second=manifest.tokens / seconds if seconds else None)


class Ledger(Record):
    generations: int
    """How many there are in all."""
    mixed: int = 1
    """How many are read side by side."""
    entries: tuple[Entry, ...] = ()
    """Of those that were there already: the first ones."""


class Wanted(Record):
    """What a training still reads."""

    training: str
    """Digests of the coders."""
    first: int
    """Place in the stream of the first generation that is needed."""
    rows: int
    """At which the training ends, from the beginning of the stream on."""
    tokens_per_second: float | None = None
    """Of the training while it had data; None where it has not come that far."""
    waited: float | None = None
    """Share of its time in which it had none."""


class Failure(Record):
    kind: str
    text: str

    def as_error(self) -> Exception:
        if self.kind == UserError.__name__:
            return UserError(self.text)
        return RuntimeError(f"extraction failed: {self.kind}: {self.text}")


class WaitEnded(Exception):
    """Somebody asked to stop while a generation was waited for."""


@dataclass(frozen=True)
class OnlineFolder:
    url: str

    def generation_url(self, number: int) -> str:
        return storage.join(self.url, f"generation-{number:05d}")

    def present(self) -> list[int]:
        """The numbers of the generations of which there is anything."""
        return [int(found[1]) for found in map(_NAME.fullmatch, storage.list_folders(self.url)) if found]

    def delete(self, number: int) -> None:
        """The manifest first: half of a generation is never taken for whole."""
        url = self.generation_url(number)
        storage.delete(storage.join(url, "manifest.json"))
        storage.delete(url)
        if storage.is_local(url):
            storage.delete(f"{url}.lock")

    def clear(self) -> None:
        for number in self.present():
            self.delete(number)

    def first_manifest(self) -> Manifest | None:
        """Of the first generation, which may be gone."""
        return read_manifest_file(storage.join(self.url, "first.json"))

    def ledger(self) -> Ledger | None:
        return read_record(Ledger, self._at("ledger"), _REMEDY)

    def begin(self, generations: int, mixed: int = 1) -> None:
        """Put the ledger, unless it is there."""
        if self.ledger() is None:
            put_record(Ledger(generations=generations, mixed=mixed), self._at("ledger"))

    def enter(self, number: int, manifest: Manifest, seconds: float | None = None) -> str | None:
        """Note a generation that is there; a sentence where it was there before and has other bytes now.

        A RuntimeError where it has another number of rows: what was trained on would no longer be told from what was not.
        """
        if number == 0 and self.first_manifest() is None:
            storage.put_json_once(manifest.model_dump(mode="json"), storage.join(self.url, "first.json"))
        ledger, entry = self.ledger(), Entry.of(manifest, seconds)
        assert ledger is not None
        if number >= len(ledger.entries):
            assert number == len(ledger.entries), "generations are made in their order"
            put_record(ledger.model_copy(update={"entries": (*ledger.entries, entry)}), self._at("ledger"))
            return None
        before = ledger.entries[number]
        if before.rows != entry.rows:
            raise RuntimeError(
                f"{self.generation_url(number)} has {entry.rows} rows and had {before.rows} when it was first made: another "
                f"device or library decides otherwise which tokens count; delete {self.url} and start the training anew"
            )
        if before.content != entry.content:
            return (
                f"{self.generation_url(number)} has other bytes than when it was first made: another device or library rounds"
            )
        return None

    def wanted(self) -> Wanted | None:
        return read_record(Wanted, self._at("wanted"), _REMEDY)

    def want(self, wanted: Wanted) -> None:
        put_record(wanted, self._at("wanted"))

    def fail(self, failure: Failure | None) -> None:
        """Say why no more generations are made; None: they are."""
        if failure is None:
            storage.delete(self._at("failure"))
        else:
            put_record(failure, self._at("failure"))

    def failure(self) -> Failure | None:
        return read_record(Failure, self._at("failure"), _REMEDY)

    def stretches(self) -> Iterator[Stretch]:
        """Of the stream, one after the other, as far as the ledger goes: without end, once every generation was there."""
        ledger = self.ledger()
        if ledger is not None:
            known = dict(enumerate(entry.rows for entry in ledger.entries))
            yield from stretches(ledger.generations, ledger.mixed, known.get)

    def place_of(self, row: int) -> int:
        """The first place in the stream that is needed from a row on. What holds the row need not be known yet."""
        ledger, passed = self.ledger(), 0
        if ledger is None:
            return 0
        for stretch in self.stretches():
            if row < stretch.end:
                break
            passed += 1
        return next(islice(portions(ledger.generations, ledger.mixed), passed, None))[0][0]

    def waited_for(self, found: Callable[[], object], should_stop: Callable[[], bool], hears: bool = True) -> None:
        """Wait until `found` gives something. Raises what kept it from being made where it `hears`, and WaitEnded where it
        should stop."""
        pause = 0.02 if storage.is_local(self.url) else 0.5
        while not found():
            if should_stop():
                raise WaitEnded
            failure = self.failure() if hears else None
            if failure is not None:
                raise failure.as_error()
            time.sleep(pause)

    def _at(self, name: str) -> str:
        return storage.join(self.url, f"{name}.json")
