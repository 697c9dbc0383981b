"""Reading one split of a dataset, a row after the other: what is read need not fit into memory."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from crossfl.errors import CrossFLError
from crossfl.learning.datasets import formats, mixtures, splits
from crossfl.learning.datasets.columns import sample_of
from crossfl.learning.datasets.samples import (
    Image,
    Placed,
    Reasons,
    Sample,
    Samples,
    attempt,
    check_share,
)
from crossfl.learning.datasets.splits import Split

if TYPE_CHECKING:
    from pyarrow import RecordBatch

HELD_OUT = 10
"""Where a dataset has no validation split, every tenth sample is held out for it."""


class Source(NamedTuple):
    """The files of a split, as they are read."""

    files: list[Path]
    """In order."""
    hold_out: bool
    """Whether validation samples are to be held out of them."""
    noun: str | None
    """What a row is not that cannot be read; unset, as the kind of each file says."""
    rows: Callable[[Path], formats.Rows]


class Scan:
    """One split of a dataset, read from its first row to its last whenever it is asked for.

    Args:
        path: a file of one of the kinds in `formats`, a folder of them (`splits`), or a folder
            saved by Hugging Face `datasets`. Its rows have columns as in `columns`.
        split: the split.
    """

    def __init__(self, path: Path, split: Split) -> None:
        self._path, self._split = path, split
        self.reasons = Reasons()
        """Why rows are left out, of those that were read."""
        self.good = 0
        """Samples that could be read, with those that are held out."""
        self._taken = 0

    def placed(self) -> Iterator[Placed]:
        """The samples, each with its place; an image of another shape than most is left out.

        Raises:
            CrossFLError: the dataset has no such split, is empty, or not even half of it can be
                read.
        """
        self.reasons, self.good, self._taken = Reasons(), 0, 0
        usual = None
        hold_out, rows = self._attempts()
        for placed in rows:
            if isinstance(placed, str):
                self.reasons.add(placed)
                continue
            if isinstance(placed.sample, Image):
                usual = usual or self._usual_shape()
                if placed.sample.pixels.shape != usual:
                    self.reasons.add(f"{placed.place}: its image is of another shape than most")
                    continue
            self.good += 1
            held = (self.good - 1) % HELD_OUT == 0
            if not hold_out or held == (self._split == "valid"):
                self._taken += 1
                yield placed
        self.check()

    def check(self) -> None:
        """Check that at least half of what was read is samples, and that there is one.

        Raises:
            CrossFLError: it is not so.
        """
        check_share(self.good, self.reasons, f"dataset {self._path}")
        if not self._taken:
            because = f"; {self.reasons.first[0]}" if self.reasons.count else ""
            raise CrossFLError(
                f"dataset {self._path} is empty: it has no {self._split} sample{because}"
            )

    def _attempts(self) -> tuple[bool, Iterator[Placed | str]]:
        try:
            source = source_of(self._path, self._split)
        except OSError as error:
            raise self._unreadable(error) from None

        def every() -> Iterator[Placed | str]:
            try:
                for file in source.files:
                    kind = formats.format_of(file)
                    noun = source.noun or (kind.noun if kind else "")
                    for number, read_row in source.rows(file):
                        yield attempt(file, number, noun, partial(_sample, read_row))
            except OSError as error:
                raise self._unreadable(error) from None

        return source.hold_out, every()

    def _unreadable(self, error: OSError) -> CrossFLError:
        return CrossFLError(f"dataset {self._path} cannot be read ({error.strerror})")

    def _usual_shape(self) -> tuple[int, ...]:
        """The shape of most images, of which no batch could hold two."""
        _, rows = self._attempts()
        samples = (placed.sample for placed in rows if not isinstance(placed, str))
        shapes = Counter(s.pixels.shape for s in samples if isinstance(s, Image))
        ((shape, _),) = shapes.most_common(1)
        return tuple(shape)


def read(path: Path, split: Split, most: int | None = None) -> Samples:
    """Read one split of a dataset into memory, or its first samples; of a mixture, part by part.

    Args:
        path: the dataset, as for `Scan`; or a mixture of such (`mixtures`).
        split: the split.
        most: samples to read; unset, all.

    Raises:
        CrossFLError: the dataset has no such split, is empty, or not even half of it can be read.
    """
    samples = Samples()
    scans = [Scan(part, split) for part in mixtures.parts_of(path)]
    in_turn = (p for turn in zip_longest(*(scan.placed() for scan in scans)) for p in turn if p)
    for placed in islice(in_turn, most):
        samples.add(placed)
    for scan in scans:
        check_share(scan.good, scan.reasons, f"dataset {path}")
        samples.reasons.extend(scan.reasons)
    return samples


def source_of(path: Path, split: Split) -> Source:
    """The files of a split of a dataset.

    Raises:
        CrossFLError: the dataset has no such split, or is none.
    """
    if path.is_dir() and _is_saved(path):
        return _saved(path, split)
    files, hold_out = splits.source_of(path, split) if path.is_dir() else ([path], True)
    if unknown := [file for file in files if formats.format_of(file) is None]:
        raise CrossFLError(
            f"dataset {unknown[0]} is none of {formats.NAMES}; nor a folder of them, nor one that "
            "was saved by datasets"
        )
    return Source(files, hold_out, None, _rows_of_file)


def _rows_of_file(file: Path) -> formats.Rows:
    kind = formats.format_of(file)
    assert kind is not None  # noqa: S101 (source_of has looked)
    return formats.read_file(file, kind)


def _sample(read_row: Callable[[], object]) -> Sample:
    return sample_of(read_row())


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _saved(path: Path, split: Split) -> Source:
    """The rows of a saved dataset."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # its text may quote the data
        raise CrossFLError(f"{path} is not a saved dataset ({type(error).__name__})") from None
    parts = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    valid = next((w for words in splits.VALIDATION for w in words if w in parts), None)
    name = "train" if split == "train" or valid is None else valid
    if name not in parts:
        raise CrossFLError(f"saved dataset {path} has no split {name!r}: save it with one")
    columns = formats.wanted(parts[name].column_names, path)
    table = parts[name].select_columns(columns).with_format("arrow")

    def batches() -> Iterator["RecordBatch"]:
        for part in table.iter(formats.BATCH):
            yield from part.to_batches()

    def rows(_: Path) -> formats.Rows:
        return formats.guarded(path, formats.table_rows(batches()), "a saved dataset")

    return Source([path], valid is None, "a row that can be read", rows)
