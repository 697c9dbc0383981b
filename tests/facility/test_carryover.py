"""What a facility keeps between rounds: of rounds that counted, and of this federation alone."""

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from crossfl.errors import CrossFLError
from crossfl.facility.carryover import CarriedState
from crossfl.facility.savepoint import Savepoint
from crossfl.protocol import variables
from crossfl.protocol.layout import UPDATE
from crossfl.protocol.records import Task, Training
from crossfl.steps.train import train
from tests.support.paths import ROUND

MODEL = ROUND / "global_model"
TRAINING = Training(batch_size=4, sequence_length=48, threads=1)


@dataclasses.dataclass
class Counts:
    """What a savepoint counts."""

    steps: int


Asked = Callable[[int, int], Task]


@pytest.fixture
def asked(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Tasks of a federation, by round and the last round that counted."""
    monkeypatch.setenv(variables.STATE, str(tmp_path / "state"))

    def make(round_: int, counted: int) -> Task:
        seen = 8 * counted
        return task.replace(round=round_, counted=counted, samples_seen=seen)

    return make


def _leave(task: Task, word: str) -> None:
    with CarriedState(task, "thing").after() as folder:
        (folder / "word").write_text(word)


def _found(task: Task) -> str | None:
    before = CarriedState(task, "thing").before
    return before and (before / "word").read_text()


def test_a_round_goes_on_from_the_last_that_counted(asked: Asked) -> None:
    assert _found(asked(1, 0)) is None
    _leave(asked(1, 0), "first")
    assert _found(asked(2, 1)) == "first"
    _leave(asked(2, 1), "refused")
    assert _found(asked(2, 1)) == "first"  # tried again
    assert _found(asked(3, 1)) == "first"  # the second was refused, or skipped
    _leave(asked(3, 1), "third")
    assert _found(asked(4, 3)) == "third"
    assert CarriedState(asked(4, 3), "thing").lost is None


def test_no_other_user_can_read_what_is_kept(asked: Asked, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        _leave(asked(1, 0), "mine")
        Savepoint(asked(1, 0), TRAINING, {}).write(
            {"model": partial(save_file, {"x": torch.ones(1)})}, Counts(7)
        )
    finally:
        os.umask(before)
    paths = [tmp_path / "state", *(tmp_path / "state").rglob("*")]
    assert {p.stat().st_mode & 0o777 for p in paths if p.is_dir()} == {0o700}
    assert {p.stat().st_mode & 0o777 for p in paths if p.is_file()} == {0o600}
    assert sum(p.is_file() for p in paths) == 3


def test_what_never_counted_is_nothing(asked: Asked) -> None:
    _leave(asked(1, 0), "refused")
    assert _found(asked(2, 0)) is None
    assert CarriedState(asked(2, 0), "thing").lost is None


def test_what_should_be_there_and_is_not_is_said(
    asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lossy = TRAINING.replace(encoding="int8")
    train(MODEL, asked(5, 3), lossy, tmp_path / "out")
    assert "of round 3: begins without" in capsys.readouterr().err.replace("\n", " ")


def test_another_federation_of_the_same_seed_is_told_apart(asked: Asked, tmp_path: Path) -> None:
    def other(round_: int, counted: int) -> Task:
        return asked(round_, counted).replace(federation="other")

    _leave(asked(1, 0), "mine")
    _leave(other(1, 0), "theirs")
    with pytest.raises(CrossFLError, match="another federation's of the same seed"):
        CarriedState(asked(2, 1), "thing")
    assert _found(other(2, 1)) == "theirs"
    # One that keeps nothing is not in its way.
    train(MODEL, asked(2, 1), TRAINING, tmp_path / "plain")
    assert _found(other(2, 1)) == "theirs"


def test_what_an_encoding_lost_is_sent_by_the_next_one_whatever_it_is(
    asked: Asked, tmp_path: Path
) -> None:
    lossy = TRAINING.replace(encoding="int4")
    train(MODEL, asked(1, 0), lossy, tmp_path / "first")
    (folder,) = (tmp_path / "state" / "leonardo").glob("residual-*/*-1")
    lost = load_file(folder / "model.safetensors")
    assert any(values.abs().max() > 0 for values in lost.values())
    train(MODEL, asked(2, 1), TRAINING, tmp_path / "second")
    alone = asked(2, 1).replace(federation="other")  # of which nothing is kept
    train(MODEL, alone, TRAINING, tmp_path / "alone")
    sent, local = (
        load_file(tmp_path / name / UPDATE / "delta.safetensors") for name in ("second", "alone")
    )
    for name, values in local.items():
        torch.testing.assert_close(sent[name], values + lost[name], rtol=0, atol=1e-7)


def test_a_residual_of_another_model_is_refused(asked: Asked, tmp_path: Path) -> None:
    with CarriedState(asked(1, 0), "residual").after() as folder:
        save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    lossy = TRAINING.replace(encoding="int8")
    with pytest.raises(CrossFLError, match="is of another model: remove"):
        train(MODEL, asked(2, 1), lossy, tmp_path / "out")
    assert not (tmp_path / "out" / UPDATE).exists()


def test_savepoints_of_rounds_that_ended_otherwise_go(asked: Asked) -> None:
    def savepoint(round_: int) -> Savepoint:
        return Savepoint(asked(round_, 0), TRAINING, {})

    for number in (1, 2, 4):
        savepoint(number).write({"model": partial(save_file, {"x": torch.ones(1)})}, Counts(7))
    savepoint(2).remove(own=True)
    assert [savepoint(n).read() is not None for n in (1, 2, 4)] == [False, False, True]
