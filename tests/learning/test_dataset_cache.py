"""The cache of encoded samples: written once, whole or not at all, mapped, and kept in bounds."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import datasets as hugging_face
import pytest

from crossfl.errors import CrossFLError
from crossfl.learning import datasets
from crossfl.learning.datasets import Encoded, cache, tables
from crossfl.learning.datasets.cache import TrainingSamples, training_samples
from crossfl.learning.models.loading import load_tokenizer
from crossfl.protocol import variables
from crossfl.protocol.manifest import UpdateManifest
from crossfl.protocol.records import Task, Training
from crossfl.steps.train import train
from crossfl.storage.model_folder import ModelFolder
from tests.support.datasets import write_rows
from tests.support.paths import ROUND

MODEL = ROUND / "global_model"
TRAINING = Training(batch_size=4, sequence_length=16, threads=1)
with ModelFolder.received(MODEL, only=()).view() as view:
    TOKENIZER = load_tokenizer(view, MODEL)
ROWS: list[dict[str, Any]] = [
    {"prompt": f"{i}=", "completion": "x" * (i % 9), "group": i % 3} for i in range(40)
]


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(variables.STATE, str(tmp_path / "state"))
    monkeypatch.setenv(variables.DATA, str(tmp_path / "data"))
    return tmp_path / "state" / "leonardo" / cache.FOLDER


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "leonardo" / "words"
    write_rows(folder / "train.jsonl", ROWS)
    write_rows(folder / "valid.jsonl", ROWS[:4])
    return folder


def _samples(data: Path, task: Task, training: Training = TRAINING) -> TrainingSamples:
    return training_samples(data, MODEL, TOKENIZER, None, task, training)


def _entries(state: Path) -> list[Path]:
    return sorted(path for path in state.iterdir() if path.is_dir())


def _all(samples: TrainingSamples) -> list[object]:
    return [samples[i] for i in range(len(samples))]


def test_a_dataset_is_encoded_once(
    state: Path, data: Path, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _all(_samples(data, task))
    assert first == [datasets.encode(s, TOKENIZER, 16) for s in datasets.read(data, "train")]
    (entry,) = _entries(state)
    assert len(hugging_face.Dataset.from_file(str(entry / tables.ROWS))) == len(ROWS)
    assert (entry.stat().st_mode & 0o777, (entry / tables.ROWS).stat().st_mode & 0o777) == (
        0o700,
        0o600,
    )

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("it was encoded again")

    monkeypatch.setattr(tables, "write", fail)
    assert _all(_samples(data, task)) == first
    os.utime(data / "train.jsonl")  # its times, and not what it says
    assert _all(_samples(data, task)) == first
    for changed in (
        lambda: _samples(data, task, TRAINING.replace(sequence_length=8)),
        lambda: _samples(data, task, TRAINING.replace(sampling="groups")),
        lambda: (write_rows(data / "train.jsonl", ROWS[1:]), _samples(data, task)),
    ):
        with pytest.raises(AssertionError, match="again"):
            changed()


def test_a_rewritten_file_of_the_same_size_is_seen(state: Path, data: Path, task: Task) -> None:
    before = _all(_samples(data, task))
    status = (data / "train.jsonl").stat()
    content = (data / "train.jsonl").read_text().replace("x", "y")
    (data / "train.jsonl").write_text(content)
    os.utime(data / "train.jsonl", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert _all(_samples(data, task)) != before


def _build(data: Path, task: Task, slow: bool, done: Any) -> None:
    if slow:
        write = tables.write

        def delayed(folder: Path, *args: Any, **more: Any) -> None:
            write(folder, *args, **more)
            done.put("written")
            time.sleep(60)

        tables.write = delayed
    done.put(_all(_samples(data, task)))


def test_two_ranks_and_a_killed_writer(state: Path, data: Path, task: Task) -> None:
    """The second waits for the first, which is killed before all is in place, and writes."""
    context = multiprocessing.get_context("fork")
    slow, fast = context.Queue(), context.Queue()
    writer = context.Process(target=_build, args=(data, task, True, slow))
    other = context.Process(target=_build, args=(data, task, False, fast))
    writer.start()
    assert slow.get(timeout=30) == "written"
    other.start()
    time.sleep(0.3)
    assert fast.empty(), "it waits"
    os.kill(writer.pid or 0, signal.SIGKILL)
    found = fast.get(timeout=30)
    for process in (writer, other):
        process.join(30)
    assert found == [datasets.encode(s, TOKENIZER, 16) for s in datasets.read(data, "train")]
    left = [path for path in _entries(state) if path.name.startswith(".")]
    assert len(left) == 1
    os.utime(left[0], (0, 0))
    for path in left[0].iterdir():
        os.utime(path, (0, 0))
    assert _all(_samples(data, task)) == found
    assert [path.name[0] == "." for path in _entries(state)] == [False]


def test_the_oldest_goes_beyond_the_quota(
    state: Path, data: Path, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [_samples(data, task, TRAINING.replace(sequence_length=n)) for n in (8, 9, 10)]
    before = _all(kept[0])
    oldest, *_ = sorted(_entries(state), key=lambda path: path.stat().st_mtime_ns)
    monkeypatch.setattr(cache, "quota", lambda: 1)
    _samples(data, task, TRAINING.replace(sequence_length=10))
    (left,) = _entries(state)
    assert left != oldest
    assert _all(kept[0]) == before, "who has mapped it keeps it"
    monkeypatch.undo()
    monkeypatch.setenv(variables.SAMPLES_GIB, "none")
    with pytest.raises(CrossFLError, match="CROSSFL_SAMPLES_GIB is 'none': give a whole number"):
        cache.quota()


def test_the_update_is_the_same_with_a_cache_and_without(
    state: Path, data: Path, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = tmp_path / "node"
    node.mkdir()
    updates: list[UpdateManifest | None] = []
    for name in ("new", "known", "staged", "none"):
        if name == "staged":
            monkeypatch.setenv(variables.STAGING, str(node))
        if name == "none":
            monkeypatch.delenv(variables.STATE)
        updates.append(train(MODEL, task, TRAINING, tmp_path / name))
    assert len({update.digest for update in updates if update}) == 1
    assert any("samples.arrow" in files for _, _, files in os.walk(node))


def test_groups_and_mixtures_train(state: Path, data: Path, task: Task, tmp_path: Path) -> None:
    part = data.parent / "mixed"
    for name in ("a", "b"):
        shutil.copytree(data, part / name)
    write_rows(part / "b" / "train.jsonl", [{"text": f"row {i}"} for i in range(30)])
    (part / "mixture.json").write_text(json.dumps({"a": 3, "b": 1}))
    samples = _samples(part, task)
    assert len(samples) == 40 + 30
    drawn = [samples.order[i] for i in range(1000)]
    assert sum(index >= 40 for index in drawn) == 250
    assert isinstance(samples[69], Encoded) and samples[69].ids == samples[69].labels
    update = train(MODEL, task.replace(dataset="mixed"), TRAINING, tmp_path / "mixture")
    assert update is not None and update.metrics.validation is not None
    assert update.metrics.validation.samples == 8
    grouped = TRAINING.replace(sampling="groups")
    update = train(MODEL, task, grouped, tmp_path / "groups")
    assert update is not None and update.samples == 8
    with pytest.raises(CrossFLError, match=r"it has no 'group', and training.sampling is groups"):
        _samples(part / "b", task, grouped)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "has to name 1 to 100 datasets"),
        ('{"a": 0}', "each with a positive number"),
        ('{"a": NaN}', "each with a positive number"),
        ('{"../a": 1}', "which is not in its folder"),
        ('{"c": 1}', "names 'c', which is not in its folder"),
    ],
)
def test_a_mixture_that_is_none(content: str, message: str, tmp_path: Path, task: Task) -> None:
    write_rows(tmp_path / "a" / "train.jsonl", ROWS)
    (tmp_path / "mixture.json").write_text(content)
    with pytest.raises(CrossFLError, match=message):
        _samples(tmp_path, task)
    with pytest.raises(CrossFLError, match=message):
        datasets.read(tmp_path, "valid")
