"""Where a step leaves its outputs: all of them or none, and one message where it cannot."""

import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from crossfl import cli
from crossfl.protocol import variables
from crossfl.server.journal import journal
from tests.support.paths import CWL, ROUND

STATE = ("--state", str(ROUND / "state"))
FACILITY = ("--facility", "name=leonardo", "dataset=words")
BEGIN = ("--config", str(CWL / "config.json"), "--tokenizer", "bytes", "--rounds", "1")
VERBS: dict[str, tuple[str, ...]] = {
    "initialise": (*BEGIN, *FACILITY),
    "plan": (*STATE, *FACILITY, "--local-steps", "1"),
    "aggregate": (
        *STATE,
        *("--global-model", str(ROUND / "global_model")),
        *(
            "--update",
            str(ROUND / "leonardo" / "update"),
            "--update",
            str(ROUND / "karolina" / "update"),
        ),
    ),
    "report": STATE,
}


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """As on a disk with so much room: what is written beyond it fails in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that cannot be written, not even by root."""
    place = tmp_path / "read-only"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """The only message."""
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("crossfl ")]
    return line


@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_that_is_not_there_is_made(verb: str, tmp_path: Path) -> None:
    out = tmp_path / "not" / "yet"
    assert cli.main([verb, "--outdir", str(out), *VERBS[verb]]) == 0
    assert (out / "cwl.output.json").is_file()


@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_that_cannot_be_written(
    verb: str, read_only: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([verb, "--outdir", str(read_only), *VERBS[verb]]) == cli.BAD_INPUT
    assert f"{read_only}" in (line := said(capsys)) and "nothing can be written there" in line
    assert cli.main([verb, "--outdir", str(read_only / "new"), *VERBS[verb]]) == cli.BAD_INPUT
    assert "nothing can be written there" in said(capsys)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("size", [64, 1 << 10, 20 << 10])
def test_a_disk_without_room_leaves_nothing(
    verb: str,
    size: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variables.JOURNAL, str(tmp_path / "journal"))
    out = tmp_path / "out"
    out.mkdir()
    with no_file_larger_than(size):
        status = cli.main([verb, "--outdir", str(out), *VERBS[verb]])
    if status == 0:
        assert verb in ("plan", "report")  # whose files are smaller than that
        assert (out / "cwl.output.json").is_file()
        return
    assert status == cli.BAD_INPUT
    line = said(capsys)
    assert (
        "no file may be so large here" in line
        or "no room for its" in line
        or ("the journal cannot be written" in line)
    )
    assert list(out.iterdir()) == []
    assert journal.runs(tmp_path / "journal") == []
    assert cli.main([verb, "--outdir", str(out), *VERBS[verb]]) == 0


def test_too_many_open_files_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        status = cli.main(["report", "--outdir", str(tmp_path), *STATE])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert status == cli.BAD_INPUT
    assert "too many files are open" in said(capsys)
