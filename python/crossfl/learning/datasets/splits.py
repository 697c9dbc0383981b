"""Where the files of a split lie: as people lay them out by hand, and as the Hugging Face hub does.

The words of a split are those of `datasets` (https://huggingface.co/docs/hub/datasets-file-names-and-splits).
"""

import re
from collections import defaultdict
from pathlib import Path
from typing import Literal, NamedTuple

from crossfl.errors import CrossFLError
from crossfl.learning.datasets.formats import NAMES, format_of

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
        CrossFLError: there are none, in two places, or only some of the shards.
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
    places = [files for place in (folder, folder / "data") if (files := _in(place, words))]
    if len(places) > 1:
        raise CrossFLError(
            f"dataset {folder} has {words[0]} files in two places, {places[0][0].name} and "
            f"data/{places[1][0].name}: leave one of them out"
        )
    files = places[0] if places else []
    _check_shards(folder, files)
    return files


def _in(place: Path, words: tuple[str, ...]) -> list[Path]:
    if not place.is_dir():
        return []
    files: list[Path] = []
    named = re.compile(rf"({'|'.join(words)})(?![A-Za-z])")
    for entry in sorted(place.iterdir()):
        if entry.name in words and entry.is_dir():
            files += (f for f in sorted(entry.rglob("*")) if _is_data(f, entry))
        elif named.match(entry.name) and format_of(entry):
            files.append(entry)
    return files


def _is_data(path: Path, folder: Path) -> bool:
    """Whether it is a file of a known kind, and not hidden, as on the hub."""
    hidden = any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
    return not hidden and format_of(path) is not None and not path.is_dir()


def _check_shards(folder: Path, files: list[Path]) -> None:
    shards: dict[tuple[str, int], set[int]] = defaultdict(set)
    for file in files:
        if match := SHARD.match(file.name):
            shards[match[1], int(match[3])].add(int(match[2]))
    for (name, count), numbers in shards.items():
        if numbers != set(range(count)):
            raise CrossFLError(
                f"dataset {folder} has {len(numbers)} of {count} files {name}-…: bring the others"
            )
