"""Reading one split of a dataset."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from crossfl.errors import CrossFLError
from crossfl.learning.datasets import formats, splits
from crossfl.learning.datasets.columns import sample_of
from crossfl.learning.datasets.samples import Image, Sample, Samples, check_share
from crossfl.learning.datasets.splits import Split

if TYPE_CHECKING:
    from pyarrow import RecordBatch

HELD_OUT = 10
"""Where a dataset has no validation split, every tenth sample is held out for it."""


def read(path: Path, split: Split) -> Samples:
    """Read one split of a dataset.

    The path is a file of one of the kinds in `formats`, a folder of them (`splits`), or a folder
    saved by Hugging Face `datasets`. Its rows have columns as in `columns`. A row that cannot be
    read, or an image of another shape than most, is left out and counted.

    Raises:
        CrossFLError: the dataset has no such split, is empty, or not even half of it can be read.
    """
    samples = Samples()
    try:
        hold_out = _add_split(path, split, samples)
    except OSError as error:
        raise CrossFLError(f"dataset {path} cannot be read ({error.strerror})") from None
    samples = _of_one_shape(samples)
    check_share(len(samples), samples.bad, f"dataset {path}")
    if hold_out:
        held = split == "valid"
        samples = samples.select(i for i in range(len(samples)) if (i % HELD_OUT == 0) == held)
    if not samples:
        because = f"; {samples.bad[0]}" if samples.bad else ""
        raise CrossFLError(f"dataset {path} is empty: it has no {split} sample{because}")
    return samples


def _add_split(path: Path, split: Split, samples: Samples) -> bool:
    """Add the samples of a split; whether validation samples are to be held out of them."""
    if path.is_dir() and _is_saved(path):
        return _add_saved(path, split, samples)
    if path.is_dir():
        files, hold_out = splits.source_of(path, split)
    else:
        files, hold_out = [path], True
    for file in files:
        kind = formats.format_of(file)
        if kind is None:
            raise CrossFLError(
                f"dataset {path} is none of {formats.NAMES}; nor a folder of them, nor one that "
                "was saved by datasets"
            )
        _add(samples, file, kind.noun, formats.read_file(file, kind))
    return hold_out


def _add(samples: Samples, path: Path, noun: str, rows: formats.Rows) -> None:
    for number, read_row in rows:
        samples.add(path, number, noun, partial(_sample, read_row))


def _sample(read_row: Callable[[], object]) -> Sample:
    return sample_of(read_row())


def _of_one_shape(samples: Samples) -> Samples:
    """The samples without images of another shape than most, which no batch could hold."""
    shapes = Counter(s.pixels.shape for s in samples if isinstance(s, Image))
    if len(shapes) < 2:
        return samples
    usual = shapes.most_common(1)[0][0]
    odd = [i for i, s in enumerate(samples) if isinstance(s, Image) and s.pixels.shape != usual]
    same = samples.select(sorted(set(range(len(samples))) - set(odd)))
    same.bad += [f"{samples.place(i)}: its image is of another shape than most" for i in odd]
    return same


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _add_saved(path: Path, split: Split, samples: Samples) -> bool:
    """Add the rows of a saved dataset; whether validation samples are to be held out of them."""
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

    rows = formats.guarded(path, formats.table_rows(batches()), "a saved dataset")
    _add(samples, path, "a row that can be read", rows)
    return valid is None
