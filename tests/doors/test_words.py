"""Words of others are shown on terminals and pages, and nothing in them acts."""

import base64
import io
import json
import logging
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from crossfl import cli
from crossfl.engine.archive import Limits, RefusedError, extract
from crossfl.engine.terminal import Printable
from crossfl.errors import CrossFLError
from crossfl.protocol.manifest import Completion, EvaluationManifest
from crossfl.protocol.measurements import Metrics
from crossfl.protocol.records import Task
from crossfl.protocol.variables import ABSENT
from crossfl.steps import failure
from crossfl.storage import manifest
from tests.support.federation import Federation, Values, facilities
from tests.support.page import Page
from tests.support.processes import flags

HOSTILE = "\x1b[2J\x1b]0;title\x07\u202egnp.exe\u202c\r\x9b31m\u2066"
ESCAPED = r"\x1b[2J\x1b]0;title\x07\u202egnp.exe\u202c\r\x9b31m\u2066"
MODEL: Values = {"a": torch.zeros(4, 3)}


def unprintable(text: str) -> set[str]:
    return {c for c in text if not c.isprintable() and c not in "\n\t"}


def test_what_a_verb_refuses_is_shown_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(args: object) -> None:
        raise CrossFLError(f"{HOSTILE}: first line\nsecond line")

    monkeypatch.setattr("crossfl.steps.plan.main", refuse)
    words = ["plan", "--state", str(tmp_path), "--local-steps", "1", "--facility", "name=a"]
    assert cli.main(words) == cli.BAD_INPUT
    printed = capsys.readouterr().err
    assert f"crossfl plan: {ESCAPED}: first line\nsecond line [CFL2]\n" in printed
    assert not unprintable(printed)


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "--state", HOSTILE, "--local-steps", "1", "--facility", f"name={HOSTILE}"],
        ["report", "--state", HOSTILE],
        ["digest", HOSTILE],
        ["simulate", HOSTILE, "--data", HOSTILE],
    ],
    ids=lambda words: str(words[0]),
)
def test_what_a_verb_was_given_is_shown_as_it_is(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == cli.BAD_INPUT
    printed = capsys.readouterr().err
    assert "gnp.exe" in printed
    assert not unprintable(printed)


@pytest.mark.parametrize(
    "words", [["plan", HOSTILE], [HOSTILE], ["train", "--precision", HOSTILE]], ids=len
)
def test_wrong_usage_is_shown_as_it_is(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(words)
    assert not unprintable(capsys.readouterr().err)


def test_a_reason_is_shown_as_it_is_on_terminal_and_page(tmp_path: Path) -> None:
    federation = Federation(tmp_path, MODEL, quorum=1)
    updates = [
        federation.update("absent", status="absent", reason=HOSTILE),
        federation.update("good", federation.deltas(0), status="partial", reason=HOSTILE),
    ]
    out = federation.run(updates)
    assert {e.reason for e in facilities(out).values()} == {ESCAPED}
    federation.go_on(out)
    stated = EvaluationManifest(
        facility="good",
        federation=federation.server.federation,
        dataset=HOSTILE,
        round=1,
        model=federation.server.model,
        status="complete",
        metrics=Metrics(loss=1.0, tokens=9),
        completions=(Completion(prompt=HOSTILE, completion=HOSTILE),),
    )
    path = tmp_path / "evaluation"
    path.mkdir()
    manifest.write(path, stated)
    script = (
        "import sys; from crossfl import cli\n"
        f"sys.exit(cli.main(['report', '--state', {str(out / 'state')!r}, '--evaluation', "
        f"{str(path)!r}, '--outdir', {str(out)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ESCAPED in done.stderr
    assert not unprintable(done.stderr)
    page = Page((out / "report.html").read_text("utf-8"))
    assert ESCAPED in page.text
    assert not unprintable((out / "history.jsonl").read_text())
    assert not unprintable((out / "evaluation.json").read_text())


@pytest.mark.parametrize(
    "metrics",
    [
        {"tasks": {HOSTILE: {"loss": 1.0}}},
        {HOSTILE: 1.0},
    ],
    ids=["task", "metric"],
)
def test_a_name_with_such_characters_is_refused(tmp_path: Path, metrics: dict[str, Any]) -> None:
    federation = Federation(tmp_path, MODEL, quorum=1)
    measured = {"validation": {"loss": 1.0, "tokens": 1} | metrics}
    updates = [
        federation.update("good", federation.deltas(0)),
        federation.update("evil", federation.deltas(1), metrics=measured),
        federation.update("meter", federation.deltas(1), metrics={"training": {"joules": metrics}}),
    ]
    refused = [e.reason or "" for e in facilities(federation.run(updates)).values() if not e.share]
    assert len(refused) == 2
    assert all(reason.isprintable() for reason in refused)


def test_the_names_of_an_archive_are_shown_as_they_are(tmp_path: Path) -> None:
    """Also in a log that has no filter."""
    stream = io.BytesIO()
    member = tarfile.TarInfo(f"it/{HOSTILE}")
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(member)
    stream.seek(0)
    with pytest.raises(RefusedError) as refused:
        extract(stream, "it", tmp_path / "it", Limits())
    assert "gnp.exe" in str(refused.value)
    assert not unprintable(str(refused.value))


def test_an_error_of_a_login_or_a_scheduler_is_shown_as_it_is() -> None:
    """What comes over ssh and from queues reaches the terminal through the log of the engine."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(Printable())
    record = logging.LogRecord("streamflow", logging.ERROR, "", 0, "%s", (HOSTILE,), None)
    handler.handle(record)
    assert stream.getvalue() == f"{ESCAPED}\n"


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_the_reason_of_a_scheduler_is_kept_as_it_is(
    verb: str, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in says in the facility's place what the engine was told of its job."""
    monkeypatch.setenv(ABSENT, base64.b64encode(HOSTILE.encode()).decode())
    words = [verb, "--global-model", str(tmp_path), "--outdir", str(tmp_path)]
    assert cli.main([*words, "--on-failure", "absent", *flags(task)]) == 0
    (document,) = tmp_path.glob("*/manifest.json")
    assert json.loads(document.read_text())["reason"] == ESCAPED


CANARY = "CANARY-7f3a"


def test_an_error_that_is_not_ours_leaves_as_its_class_and_place(
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        int(f"{CANARY} {HOSTILE}")
    except ValueError as error:
        reason = failure.reason_of(error, "absent")
    assert reason == "ValueError: the output of the job has the lines that led there"
    printed = capsys.readouterr().err  # which the engine brings to the VM
    assert "ValueError" in printed and "test_words.py" in printed
    assert CANARY not in printed + reason
    assert not unprintable(printed)
    assert failure.reason_of(CrossFLError("ours"), "absent") == "ours"
    assert os.sep not in reason
