"""The pictures of an image corpus in which features fire: small, and as the model sees them, so that patches lie where they
belong."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components import storage
from components.corpus.images import ImageLayout
from components.evaluation.held_out import HeldOut
from components.interpretation.record import interpretation_url
from components.language_model.vision import as_seen

LONGEST_SIDE = 192
"""Pixels; larger ones are made smaller."""
_QUALITY = 88
_AT_ONCE = 64
_FILE = "pictures.parquet"
_SCHEMA = pa.schema({"document": pa.int64(), "name": pa.string(), "picture": pa.binary()})


def write_pictures(url: str, text: HeldOut, requested: int, sequences: np.ndarray) -> None:
    """Put `pictures.parquet` under `url`: id, name and JPEG of each image among the first `requested` tokens whose sequence's
    number is in `sequences`, in order. Memory: `_AT_ONCE` images."""
    assert text.images is not None
    names, wanted, first = _names(text), set(sequences.tolist()), 0
    target = storage.join(url, _FILE)
    with storage.whole_file(target) as path, pq.ParquetWriter(path, _SCHEMA, compression="none") as writer:
        for block in text.batches(requested, _AT_ONCE):
            chosen = [row for row in range(len(block)) if first + row in wanted]
            first += len(block)
            if not chosen:
                continue
            documents = [int(block.documents[row].max()) for row in chosen]
            images = [(block.images or ())[row] for row in chosen]
            small = [_jpeg(picture) for picture in as_seen(text.images.source.image_processor, images)]
            columns = [documents, [names[document] for document in documents], small]
            arrays = [pa.array(column, type=kind) for column, kind in zip(columns, _SCHEMA.types, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=_SCHEMA))


def _names(text: HeldOut) -> dict[int, str]:
    """Of each image, the last part of where it came from."""
    with storage.local_copies(text.url, ("documents.parquet",)) as folder:
        table = pq.read_table(folder / "documents.parquet", columns=["document", "name", "split"])
    rows = table.filter(pc.equal(table["split"], "held_out"))
    return dict(zip(rows["document"].to_pylist(), (name.rsplit("/", 1)[-1] for name in rows["name"].to_pylist()), strict=True))


def _jpeg(picture: Any) -> bytes:
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    with io.BytesIO() as stream:
        picture.save(stream, format="JPEG", quality=_QUALITY, subsampling=0)
        return stream.getvalue()


@dataclass(frozen=True)
class Pictures:
    """Those beside a coder, and where in a sequence their patches are."""

    sae_url: str
    layout: ImageLayout
    names: dict[int, str] = field(init=False)

    def __post_init__(self) -> None:
        with storage.local_copies(interpretation_url(self.sae_url), (_FILE,)) as folder:
            table = pq.read_table(folder / _FILE, columns=["document", "name"])
        object.__setattr__(self, "names", dict(zip(*(column.to_pylist() for column in table.columns), strict=True)))

    def files(self) -> Iterator[tuple[int, bytes]]:
        """Id and JPEG of each, a few at a time."""
        with storage.local_copies(interpretation_url(self.sae_url), (_FILE,)) as folder:
            for batch in pq.ParquetFile(folder / _FILE).iter_batches(batch_size=_AT_ONCE, columns=["document", "picture"]):
                yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)

    def patch(self, place: int) -> tuple[int, int] | None:
        """See `ImageLayout.patch`."""
        return self.layout.patch(place)

    def where(self, document: int, place: int) -> str:
        """Image and patch in words: `cat.png (2, 3)`; of an image without a picture, its id."""
        patch, name = self.patch(place), self.names.get(document, f"image {document}")
        return name if patch is None else f"{name} ({patch[0]}, {patch[1]})"

    def described(self, found: dict[str, Any]) -> dict[str, Any]:
        """Of an example: the picture's name, the activations over its patches row by row, which of them it is of (`patch`,
        `cell`), and the tokens of the prompt behind it with theirs."""
        layout, along, place = self.layout, found["activations"], found["place"]
        on_picture = set(layout.places) if layout.grid is not None else set()
        others = [
            number
            for number, token in enumerate(layout.tokens)
            if token >= 0 and layout.counted[number] and number not in on_picture
        ]
        return {
            "name": self.names[found["document"]],
            "patch": self.patch(place),
            "cell": layout.places.index(place) if place in on_picture else -1,
            "patches": [along[number] for number in layout.places] if on_picture else [],
            "peak": others.index(place) if place in others else -1,
            "tokens": [found["tokens"][number] for number in others],
            "activations": [along[number] for number in others],
        }
