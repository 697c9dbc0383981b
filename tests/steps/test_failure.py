"""A failure at a facility: which of its words leave."""

import base64
import json
import re
from pathlib import Path

import pytest

from crossfl import cli
from crossfl.learning.datasets import reading
from crossfl.protocol.manifest import EvaluationManifest, UpdateManifest
from crossfl.protocol.records import Task, Training
from crossfl.protocol.variables import ABSENT, DATA, LATE
from crossfl.storage import manifest
from tests.support.paths import ROUND
from tests.support.processes import flags

CANARY = "Rossi-1961"
REASON = (
    r"ValueError in crossfl/learning/datasets/reading\.py:\d+: the output of the job has the lines "
    "that led there"
)
KINDS: dict[str, type[UpdateManifest] | type[EvaluationManifest]] = {
    "train": UpdateManifest,
    "evaluate": EvaluationManifest,
}


def _run(verb: str, task: Task, out: Path, policy: str = "absent") -> int:
    words = [verb, "--global-model", str(ROUND / "global_model"), "--outdir", str(out)]
    out.mkdir()
    return cli.main([*words, "--on-failure", policy, *flags(task, Training(threads=1))])


def _reason(verb: str, out: Path) -> str:
    """The reason that leaves; the rest of what leaves does not have the canary either."""
    (delivered,) = [path for path in out.iterdir() if path.is_dir()]
    for path in out.rglob("*"):
        assert path.is_dir() or CANARY.encode() not in path.read_bytes()
    stated = manifest.verify(delivered, KINDS[verb])
    assert stated.status == "absent"
    return stated.reason or ""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of leonardo's dataset `words`."""
    path = tmp_path / "data" / "leonardo" / "words"
    path.mkdir(parents=True)
    monkeypatch.setenv(DATA, str(tmp_path / "data"))
    return path


@pytest.fixture
def unforeseen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading raises an error that nobody has foreseen, and whose text quotes the data."""
    (folder / "train.jsonl").write_text('{"text": "a"}\n' * 20)

    def fail(*_: object) -> None:
        raise ValueError(f"cannot look at {CANARY}")

    monkeypatch.setattr(reading, "check_share", fail)


@pytest.mark.parametrize("verb", KINDS)
def test_of_an_error_of_others_only_class_and_place_leave(
    verb: str, task: Task, unforeseen: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(verb, task, tmp_path / "out") == 0
    assert re.fullmatch(REASON, _reason(verb, tmp_path / "out"))
    printed = capsys.readouterr().err
    assert CANARY not in printed  # the output of a job is brought to the engine, too
    assert re.search(r"reading\.py\", line \d+, in read\n", printed)
    assert "ValueError: its text may quote the data and is not shown here" in printed


@pytest.mark.parametrize("verb", KINDS)
@pytest.mark.parametrize(
    "line",
    [
        json.dumps({"text": [CANARY]}),
        json.dumps({"name": CANARY}),
        json.dumps(CANARY),
        f"{{{CANARY}",
        json.dumps({"text": "a", "task": f"{CANARY} {CANARY}"}),
        json.dumps({"pixels": [[[CANARY]]], "label": 1}),
    ],
)
def test_no_sample_is_quoted(
    verb: str, line: str, task: Task, folder: Path, tmp_path: Path
) -> None:
    for split in ("train", "valid"):
        (folder / f"{split}.jsonl").write_text(f"{line}\n" * 3)
    assert _run(verb, task, tmp_path / "out") == 0
    assert "jsonl:1" in _reason(verb, tmp_path / "out")


def test_where_failures_stop_the_step_the_error_goes_on(
    task: Task, unforeseen: None, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=CANARY):
        _run("train", task, tmp_path / "out", "stop")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("variable", "verb", "status"),
    [(ABSENT, "train", "absent"), (ABSENT, "evaluate", "absent"), (LATE, "train", "late")],
)
def test_a_stand_in_delivers_why_it_stands_in(
    task: Task,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    verb: str,
    status: str,
) -> None:
    reason = "Slurm job 7 waits in the queue (Priority)"
    monkeypatch.setenv(variable, base64.b64encode(reason.encode()).decode())
    assert _run(verb, task, tmp_path / "out") == 0
    (delivered,) = [path for path in (tmp_path / "out").iterdir() if path.is_dir()]
    stated = manifest.verify(delivered, KINDS[verb])
    assert (stated.status, stated.reason) == (status, reason)
