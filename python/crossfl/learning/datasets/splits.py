"""Where the files of a split lie: as people lay them out by hand, and as the Hugging Face hub does.

The words of a split are those of `datasets` (https://huggingface.co/docs/hub/datasets-file-names-and-splits).
"""

import re
from collections import defaultdict
from pathlib import Path
from typing import Literal, NamedTuple

from crossfl.errors import CrossFLError
from crossfl.learning.datasets.formats import GZIP, NAMES, format_of

Split = Literal["train", "valid"]
TRAIN = ("train", "training")
VALID = ("valid", "validation", "val", "dev")
TEST = ("test", "testing", "eval", "evaluation")
VALIDATION = (VALID, TEST)
"""The first that a dataset has is its validation split."""
SHARD = re.compile(r"(.*)-([0-9]{5,})-of-([0-9]{5,})")


class Source(NamedTuple):
    """The files to read, and whether validation samples are to be held out of them."""

    files: list[Path]
    hold_out: bool


def source_of(folder: Path, split: Split) -> Source:
    """The files of a split in a folder.

    They are named after it (`train.jsonl`, `train-00000-of-00002.parquet`) or lie in a folder that
    is, here or in `data`. Where there are none for validation, those for training are held out of.

    Raises:
        CrossFLError: there are none, some that may hold the same, or only some of the shards.
    """
    train = _files(folder, TRAIN)
    valid = next((files for words in VALIDATION if (files := _files(folder, words))), [])
    files = train if split == "train" or not valid else valid
    if not files:
        raise CrossFLError(
            f"dataset {folder} has no {split} file: name files by their split, such as "
            f"{split}.jsonl ({NAMES})"
        )
    return Source(files, hold_out=not valid)


def _files(folder: Path, words: tuple[str, ...]) -> list[Path]:
    """The files of the split with these words, none of which may be there twice."""
    places = [
        files
        for place in (folder, folder / "data")
        for files in (_named(place, words), _inside(place, words))
        if files
    ]
    files = places[0] if places else []
    if len(places) > 1:
        raise _alike(folder, places[0][0], places[1][0])
    by_stem: dict[str, Path] = {}
    for file in files:
        if (other := by_stem.setdefault(_stem(file), file)) != file:
            raise _alike(folder, other, file)
    _check_shards(folder, files)
    return files


def _alike(folder: Path, one: Path, other: Path) -> CrossFLError:
    return CrossFLError(
        f"dataset {folder} has files of a split that may hold the same, "
        f"{one.relative_to(folder)} and {other.relative_to(folder)}: leave one of them out"
    )


def _named(place: Path, words: tuple[str, ...]) -> list[Path]:
    """Files in a place that are named after a split."""
    begins = re.compile(rf"({'|'.join(words)})(?![A-Za-z])")
    entries = sorted(place.iterdir()) if place.is_dir() else []
    return [entry for entry in entries if begins.match(entry.name) and format_of(entry)]


def _inside(place: Path, words: tuple[str, ...]) -> list[Path]:
    """Files in folders of a place that are named after a split; hidden ones are none of it."""
    files = (f for word in words for f in sorted((place / word).rglob("*")) if not f.is_dir())
    return [
        file
        for file in files
        if format_of(file) and not any(p[0] in "._" for p in file.relative_to(place).parts)
    ]


def _stem(path: Path) -> str:
    """The path without what tells its kind."""
    kind = format_of(path)
    name = path.as_posix()[: -len(GZIP)] if path.name.lower().endswith(GZIP) else path.as_posix()
    return name[: -len(kind.ending)] if kind else name


def _check_shards(folder: Path, files: list[Path]) -> None:
    shards: dict[tuple[str, int], set[str]] = defaultdict(set)
    for file in files:
        if match := SHARD.match(file.name):
            shards[match[1], int(match[3])].add(match[2])
    for (name, count), numbers in shards.items():
        if len(numbers) < count:
            raise CrossFLError(
                f"dataset {folder} has {len(numbers)} of {count} files {name}-…: bring the others"
            )
