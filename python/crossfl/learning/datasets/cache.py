"""The cache of encoded samples: a dataset is tokenized once at a facility, and mapped by each rank.

It lies under `CROSSFL_STATE/<facility>/samples/<key>`, where the key follows from all that decides
on the samples: the files of the split, the tokenizer's files, the sequence length, the versions. An
entry is written aside and renamed, under a lock, so that of many ranks one writes and the others
wait, and a writer that is killed leaves nothing that counts. Beyond the quota
(`CROSSFL_SAMPLES_GIB`) the entries that were used longest ago go. Without `CROSSFL_STATE` each rank
encodes for itself, into a temporary file.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from crossfl.facility import place
from crossfl.facility.staging import staged
from crossfl.learning.datasets import mixtures, reading, tables
from crossfl.learning.datasets.drawing import Drawn, Mixture, shares
from crossfl.learning.datasets.encoding import Encoded
from crossfl.learning.datasets.samples import Image
from crossfl.learning.datasets.tables import EncodedSamples
from crossfl.protocol import variables
from crossfl.protocol.records import Task, Training
from crossfl.storage.files import write_json
from crossfl.storage.manifest import sha256
from crossfl.storage.model_folder import ModelFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
"""Of an entry; another one is another key."""
FOLDER, DIGESTS, LOCK = "samples", "digests.json", ".lock"
FRESH = 2.0
"""Seconds after its last change in which a file may change again without another time."""
ABANDONED = 3600.0
"""Seconds after which what is written aside is taken for that of a writer that was killed."""


class TrainingSamples:
    """What a facility trains on: the samples of a dataset, or of the parts of a mixture.

    Args:
        parts: encoded samples by the name of the part; one without a name of any other dataset.
        weights: of each part, if it is a mixture.
        seed: decides on the order.
    """

    def __init__(
        self, parts: Mapping[str, EncodedSamples], weights: Mapping[str, float] | None, seed: int
    ) -> None:
        self._parts = list(parts.values())
        self._ends = list(accumulate(len(part) for part in self._parts))
        self.cut = sum(part.cut for part in self._parts)
        """Samples of which the end is left out."""
        self.bad_samples = sum(part.bad_samples for part in self._parts)
        """How many rows are left out."""
        self.notices = [notice for part in self._parts for notice in part.notices]
        """What is not learnt from, in words that may leave the facility."""
        self.order: Drawn
        """The order in which samples are drawn."""
        if weights is None:
            self.order = self._parts[0].order(str(seed))
        else:
            orders = [part.order(f"{seed}/{name}") for name, part in parts.items()]
            self.order = Mixture(orders, shares(weights), [0, *self._ends], str(seed))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Encoded | Image:
        part = bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]


def training_samples(
    dataset: Path,
    model: Path,
    tokenizer: "PreTrainedTokenizerBase | None",
    classes: int | None,
    task: Task,
    training: Training,
) -> TrainingSamples:
    """The samples that a task trains on, from the cache, where they are put if they are not there.

    Args:
        dataset: the facility's dataset, or a mixture.
        model: the verified folder of the model.
        tokenizer: the model's; of an image classifier, None.
        classes: how many an image classifier tells apart.
        task: the task.
        training: how it is trained.

    Raises:
        CrossFLError: the dataset has no sample to train on, or most of it cannot be used.
    """
    grouped = training.sampling == "groups"
    weights = mixtures.weights_of(dataset)
    length = training.sequence_length
    scans = {name: reading.Scan(dataset / name, "train") for name in weights or [""]}
    parts: dict[str, EncodedSamples] = {}
    if not os.environ.get(variables.STATE):
        for name, scan in scans.items():
            parts[name] = EncodedSamples(scan, tokenizer, length, classes, grouped=grouped)
        return TrainingSamples(parts, weights, task.data_seed)
    root = place.state_root(task) / FOLDER
    place.make_private(root)
    facts = {
        "format": FORMAT,
        "tokenizer": _tokenizer_digests(model),
        "versions": [version(p) for p in ("crossfl", "transformers", "tokenizers")],
        "length": length,
        "classes": classes,
        "grouped": grouped,
    }
    for name, scan in scans.items():
        with _locked(root / LOCK):
            key = _key(facts | {"data": _digests(dataset / name, root / DIGESTS)})
        entry = root / key
        with _locked(root / f"{key}{LOCK}"):
            if not (entry / tables.FACTS).is_file():
                with place.publish_state(entry) as folder:
                    tables.write(folder, scan, tokenizer, length, classes, grouped=grouped)
            os.utime(entry)
        parts[name] = EncodedSamples.mapped(staged(entry))
        with _locked(root / LOCK):
            _sweep(root, entry, quota())
    return TrainingSamples(parts, weights, task.data_seed)


def quota() -> int:
    """Bytes that the cache may have.

    Raises:
        CrossFLError: the variable is no whole number from 1 on.
    """
    return place.least(variables.SAMPLES_GIB, variables.DEFAULT_SAMPLES_GIB) << 30


def _key(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _tokenizer_digests(model: Path) -> dict[str, str]:
    """The digests of all files that decide on the tokenizer."""
    folder = ModelFolder.received(model, only=())
    files = folder.manifest.files if folder.manifest else {}
    return {name: files[name].sha256 for name in folder.others}


def _digests(dataset: Path, known: Path) -> list[Any]:
    """The digests of the files that training samples are read from, and how they are read.

    A file that is as it was, by size, times and number, is not read again.
    """
    source = reading.source_of(dataset, "train")
    files = [
        file
        for path in source.files
        for file in (sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path])
    ]
    try:
        before = json.loads(known.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    found: list[Any] = [source.hold_out, source.noun]
    changed = False
    for file in files:
        if not file.is_file():  # to open a pipe would wait for ever; reading tells what it is
            return [*found, str(file), time.time_ns()]
        state = file.stat()
        mark = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
        name = str(file.resolve())
        if before.get(name, [None])[:-1] != mark:
            try:
                before[name] = [*mark, sha256(file)]
            except OSError:
                return [*found, str(file), time.time_ns()]
            changed = changed or time.time() - state.st_mtime > FRESH
        found.append([file.relative_to(dataset.parent).as_posix(), before[name][-1]])
    if changed:
        write_json(known, before)
    return found


def _sweep(root: Path, mine: Path, most: int) -> None:
    """Remove what killed writers have left, and the entries used longest ago beyond the quota."""
    now = time.time()
    entries: list[tuple[float, int, Path]] = []
    for path in root.iterdir():
        if not path.is_dir():
            continue
        files = [f.stat() for f in path.iterdir()]
        if path.name.startswith("."):
            if now - max([path.stat().st_mtime, *(f.st_mtime for f in files)]) > ABANDONED:
                shutil.rmtree(path, ignore_errors=True)
        else:
            entries.append((path.stat().st_mtime, sum(f.st_size for f in files), path))
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total > most and path != mine:
            shutil.rmtree(path, ignore_errors=True)  # who has mapped it keeps it
            (root / f"{path.name}{LOCK}").unlink(missing_ok=True)
            total -= size


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[IO[bytes]]:
    """Keep other ranks and jobs out; the kernel lets go of the lock of a process that ends."""
    with path.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
