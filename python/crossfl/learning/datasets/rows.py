"""Rows of encoded samples in Arrow's stream format, written and mapped.

The only module that imports pyarrow when it is imported, and so to be imported when it is needed:
pyarrow starts a thread, and no step is forked from a process with more than one.
"""

import contextlib
import mmap
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from crossfl.learning.datasets.encoding import IGNORED, Encoded
from crossfl.learning.datasets.samples import Image

BATCH_VALUES = 1 << 22
"""Token ids, or numbers of images, that are written as a batch."""
BATCH_ROWS = 1 << 16

Array = np.ndarray[Any, np.dtype[Any]]


def batches(file: mmap.mmap) -> "list[pa.RecordBatch]":
    """The batches of a mapped file; none of their values is read."""
    return list(pa.ipc.open_stream(pa.py_buffer(file)))


class Rows(contextlib.AbstractContextManager["Rows"]):
    """Writes rows of values and marks, batch by batch.

    Of text, values are token ids, and marks are the places where labels begin and end to be
    ignored, in turn. Of an image, values are its numbers, and the mark is its class.
    """

    def __init__(self, path: Path, ids: type[np.integer[Any]]) -> None:
        self.shape: tuple[int, ...] = ()
        """Of the images; empty of text."""
        self.groups = array("q")
        """The number of the group of each row, where it has one."""
        self._names: dict[str, int] = {}
        self._path, self._ids = path, ids
        self._writer: Any = None
        self._begin()

    def _begin(self) -> None:
        self._values: list[Array] = []
        self._marks = array("q")
        self._ends, self._mark_ends = array("i", [0]), array("i", [0])

    def add(self, sample: Encoded, group: str | None) -> None:
        """Append a text."""
        turns: Iterable[int] = ()
        if sample.ids != sample.labels:
            ignored = np.asarray(sample.labels) == IGNORED
            turns = np.flatnonzero(np.diff(ignored, prepend=False)).tolist()
        self._append(np.asarray(sample.ids, self._ids), turns, group)

    def add_image(self, image: Image, group: str | None) -> None:
        """Append an image."""
        self.shape = image.pixels.shape
        self._append(image.pixels.reshape(-1), [image.label], group)

    def _append(self, values: Array, marks: Iterable[int], group: str | None) -> None:
        self._values.append(values)
        self._marks.extend(marks)
        self._ends.append(self._ends[-1] + len(values))
        self._mark_ends.append(len(self._marks))
        if group is not None:
            self.groups.append(self._names.setdefault(group, len(self._names)))
        if self._ends[-1] >= BATCH_VALUES or len(self._values) >= BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        if not self._values:
            return
        columns = {
            "values": _lists(self._ends, np.concatenate(self._values)),
            "marks": _lists(self._mark_ends, np.asarray(self._marks)),
        }
        batch = pa.record_batch(columns)
        if self._writer is None:
            self._writer = pa.ipc.new_stream(self._path, batch.schema)
        self._writer.write_batch(batch)
        self._begin()

    def __exit__(self, *_: object) -> None:
        self._flush()
        if self._writer is None:
            schema = pa.schema({name: pa.list_(pa.int64()) for name in ("values", "marks")})
            self._writer = pa.ipc.new_stream(self._path, schema)
        self._writer.close()


def _lists(ends: Sequence[int], values: Array) -> "pa.ListArray[Any]":
    return pa.ListArray.from_arrays(pa.array(np.asarray(ends), pa.int32()), pa.array(values))
