"""Encoded samples on disk: written once, in Arrow's stream format, and mapped by every rank.

A dataset is encoded as a whole before any of it is drawn. So what cannot be encoded is known, and
how many pieces a long text has: the order of the samples follows from their number alone. Neither
writer nor reader holds more of it than a batch. The file is as `datasets` maps it, too
(`Dataset.from_file`), whose import would cost every job more than a second.
"""

import json
import mmap
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from crossfl.errors import CrossFLError
from crossfl.learning.datasets.drawing import Drawn, Groups, Passes
from crossfl.learning.datasets.encoding import IGNORED, UNMARKED, Encoded, encoded, marks_turns
from crossfl.learning.datasets.samples import (
    Chat,
    Image,
    Placed,
    Reasons,
    Sample,
    Text,
    check_share,
    left_out,
)
from crossfl.storage.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS, FACTS = "samples.arrow", "facts.json"
ENDS, MEMBERS = "ends.npy", "members.npy"
"""Where the samples of each group end, and the samples, group by group."""
RESIDENT = 1 << 28
"""Bytes of the mapped file that may be resident before they are given back to the page cache."""
AROUND = 1 << 16
"""Bytes that the kernel maps around each one that is read."""

Array = np.ndarray[Any, np.dtype[Any]]


class Source(Protocol):
    """Samples with their places, and why others are left out."""

    reasons: Reasons

    def placed(self) -> Iterator[Placed]:
        """The samples, one after the other."""


class EncodedSamples:
    """The samples that a model learns from, each of at most `length` tokens.

    A text that is longer becomes several samples. Each begins with the last token of the one
    before, so that every token but the first is predicted once. What has a prompt is cut instead.

    Args:
        samples: what is read.
        tokenizer: the model's; of an image classifier, None.
        length: the sequence length, in tokens.
        classes: how many an image classifier tells apart.
        grouped: whether groups are drawn before samples.

    Raises:
        CrossFLError: not even half of the samples can be encoded.
    """

    def __init__(
        self,
        samples: Source,
        tokenizer: "PreTrainedTokenizerBase | None",
        length: int,
        classes: int | None = None,
        *,
        grouped: bool = False,
    ) -> None:
        # A file that is mapped stays until it is let go of, without a name.
        with tempfile.TemporaryDirectory(prefix="crossfl-samples-") as folder:
            write(Path(folder), samples, tokenizer, length, classes, grouped=grouped)
            self._map(Path(folder))

    @classmethod
    def mapped(cls, folder: Path) -> Self:
        """Those that `write` has left in a folder."""
        samples = cls.__new__(cls)
        samples._map(folder)
        return samples

    def _map(self, folder: Path) -> None:
        from crossfl.learning.datasets.rows import batches

        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        self.cut: int = facts["cut"]
        """Samples of which the end is left out."""
        self.bad: list[str] = facts["bad"]
        """A reason for each row that is left out, or the first ones."""
        self.bad_samples: int = facts["bad_samples"]
        """How many rows are left out."""
        self.notices: list[str] = facts["notices"]
        """What is not learnt from, in words that may leave the facility."""
        self._shape = tuple(facts["shape"])
        with (folder / ROWS).open("rb") as stream:
            self._file = mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ)
        self._file.madvise(mmap.MADV_RANDOM)
        self._batches = batches(self._file)
        self._ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)
        self._columns: list[dict[str, tuple[Array, Array]] | None] = [None] * len(self._batches)
        self._let_go()
        self._grouped = (folder / ENDS).is_file()
        if self._grouped:
            self._group_ends, self._members = (
                np.load(folder / name, mmap_mode="r") for name in (ENDS, MEMBERS)
            )

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Encoded | Image:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right"))
        row = index - (int(self._ends[number - 1]) if number else 0)
        columns = self._columns[number] or self._views(number)
        values = _cell(columns["values"], row)
        self._touched += values.nbytes + 2 * AROUND
        if self._touched > RESIDENT:
            values = values.copy()
            self._let_go()
        if self._shape:
            pixels = values.reshape(self._shape).copy()  # what is mapped must not be written
            return Image(pixels, int(_cell(columns["marks"], row)[0]))
        ids = values.tolist()
        labels = list(ids)
        turns = [*_cell(columns["marks"], row).tolist(), len(ids)]
        for begin, end in zip(turns[::2], turns[1::2], strict=False):
            labels[begin:end] = [IGNORED] * (end - begin)
        return Encoded(ids, labels)

    def order(self, seed: str) -> Drawn:
        """The order in which they are drawn, by a seed."""
        if self._grouped:
            return Groups(self._group_ends, self._members, seed)
        return Passes(len(self), seed)

    def _views(self, number: int) -> dict[str, tuple[Array, Array]]:
        """Offsets and values of each column of a batch, as they lie in the file."""
        batch = self._batches[number]
        views = {
            name: (
                column.offsets.to_numpy(zero_copy_only=True),
                column.values.to_numpy(zero_copy_only=True),
            )
            for name, column in zip(batch.schema.names, batch.columns, strict=True)
        }
        self._columns[number] = views
        return views

    def _let_go(self) -> None:
        """Have the pages of the file count as the page cache's, and not as this process's."""
        self._touched = 0
        self._file.madvise(mmap.MADV_DONTNEED)


def _cell(column: tuple[Array, Array], row: int) -> Array:
    offsets, values = column
    return values[offsets[row] : offsets[row + 1]]


def write(
    folder: Path,
    samples: Source,
    tokenizer: "PreTrainedTokenizerBase | None",
    length: int,
    classes: int | None = None,
    *,
    grouped: bool = False,
) -> None:
    """Encode samples into a folder that is there; arguments are those of `EncodedSamples`.

    Raises:
        CrossFLError: not even half of the samples can be encoded, or the disk has no room.
    """
    from crossfl.learning.datasets.rows import Rows

    failed, cut, chats, count = Reasons(), 0, False, 0
    pending: deque[Placed] = deque()

    def kept() -> Iterator[Sample]:
        for placed in samples.placed():
            pending.append(placed)
            yield placed.sample

    narrow = tokenizer is not None and len(tokenizer) <= 1 << 16
    try:
        with Rows(folder / ROWS, np.uint16 if narrow else np.int32) as rows:
            for result in encoded(kept(), tokenizer, classes):
                placed = pending.popleft()
                group = placed.sample.group
                if grouped and group is None and not isinstance(result, CrossFLError):
                    result = CrossFLError("it has no 'group', and training.sampling is groups")
                if isinstance(result, CrossFLError):
                    failed.add(f"{placed.place}: {result}")
                    continue
                count += 1
                chats = chats or isinstance(placed.sample, Chat)
                if isinstance(result, Image):
                    rows.add_image(result, group)
                    continue
                whole = isinstance(placed.sample, Text) and placed.sample.prompt is None
                cut += not whole and len(result.ids) > length
                for piece in _pieces(result, length) if whole else (_begin(result, length),):
                    rows.add(piece, group)
        if grouped:
            _write_groups(folder, rows.groups)
    except OSError as error:
        raise CrossFLError(
            f"the encoded samples cannot be written to {folder.parent}: {error.strerror}; make "
            "room there"
        ) from None
    good = count
    failed.extend(samples.reasons)
    check_share(good, failed, "the dataset")
    notices = left_out(failed, "the dataset")
    if cut:
        notices.append(
            f"samples longer than training.sequence_length ({length}), of which the end is cut "
            f"off: {cut:,}"
        )
    if tokenizer and chats and not marks_turns(tokenizer):
        notices.append(UNMARKED)
    facts = {
        "cut": cut,
        "bad": failed.first,
        "bad_samples": failed.count,
        "notices": notices,
        "shape": rows.shape,
    }
    write_json(folder / FACTS, facts)


def _begin(whole: Encoded, length: int) -> Encoded:
    return Encoded(whole.ids[:length], whole.labels[:length])


def _pieces(whole: Encoded, length: int) -> Iterator[Encoded]:
    for start in range(0, max(1, len(whole.ids) - 1), length - 1):
        part = slice(start, start + length)
        yield Encoded(whole.ids[part], whole.labels[part])


def _write_groups(folder: Path, groups: Sequence[int]) -> None:
    numbers = np.asarray(groups)
    np.save(folder / MEMBERS, np.argsort(numbers, kind="stable"))
    np.save(folder / ENDS, np.concatenate([[0], np.cumsum(np.bincount(numbers))]))
