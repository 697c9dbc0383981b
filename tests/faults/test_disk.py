"""A journal that cannot be written: a clear message, the last good round intact, and it goes on."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT
from crossfl.errors import CrossFLError
from crossfl.server.journal import journal
from crossfl.simulation.simulate import playing_every_facility
from crossfl.storage import manifest

spec = importlib.util.spec_from_file_location("journals", ROOT / "tests" / "test_journal.py")
assert spec is not None and spec.loader is not None


@pytest.fixture(scope="module")
def journals() -> Any:
    """`tests/test_journal.py`, with its federation that runs in one process."""
    import conftest

    conftest.CWL = ROOT / "tests" / "cwl"  # type: ignore[attr-defined]
    assert spec is not None and spec.loader is not None
    sys.modules["journals"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["journals"])
    return sys.modules["journals"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own for the journal, so small that not all rounds fit."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], check=True)
    os.environ[journal.VARIABLE] = str(place / "journal")
    try:
        with playing_every_facility(ROOT / "tests" / "cwl" / "data"):
            yield place
    finally:
        os.environ.pop(journal.VARIABLE)
        subprocess.run(["umount", place], check=True)


def intact(place: Path) -> int:
    """The number of the last round, after every published round was checked."""
    (run,) = journal.runs(place / "journal")
    for path in run.rounds():
        manifest.verify(path / "global_model", "model")
        manifest.verify(path / "state", "state")
    return int(run.rounds()[-1].name)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", place], check=True)


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_publishing_fails(
    journals: Any,
    tmp_path: Path,
    disk: Path,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    federation = journals.Federation(tmp_path / "run")
    with pytest.raises(journals.Cut):
        federation.run("after 5")
    filler = disk / "filler"
    # It was enough when the round began, and somebody else then took it.
    monkeypatch.setattr(journal, "check_space", lambda *_: None)
    if fault == "full":
        with filler.open("wb", buffering=0) as stream:
            while stream.write(bytes(1 << 12)) == 1 << 12:
                if not os.statvfs(disk).f_bavail:
                    break
        said = "the journal cannot be written: .*No space left on device"
    else:
        remount(disk, "ro")
        said = "the journal cannot be written: .*Read-only file system"
    with pytest.raises(CrossFLError):
        federation.run()
    assert re.search(said, capsys.readouterr().err)
    remount(disk, "rw")
    assert intact(disk) == 1
    filler.unlink(missing_ok=True)

    after = federation.run()
    assert federation.trained.count(("leonardo", 1)) == 1
    assert federation.trained.count(("leonardo", 2)) == 2
    monkeypatch.undo()
    os.environ[journal.VARIABLE] = ""
    whole = journals.Federation(tmp_path / "whole").run()
    assert (after / journals.WEIGHTS).read_bytes() == (whole / journals.WEIGHTS).read_bytes()
    os.environ[journal.VARIABLE] = str(disk / "journal")
    shutil.rmtree(tmp_path / "run")
