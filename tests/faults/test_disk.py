"""A journal that cannot be written: a clear message, the last good round intact, and it goes on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from crossfl.errors import CrossFLError
from crossfl.protocol import variables
from crossfl.protocol.manifest import ModelManifest, StateManifest
from crossfl.server.journal import journal
from crossfl.simulation.simulate import playing_every_facility
from crossfl.storage import manifest
from tests.support.loop import WEIGHTS, Cut, Federation
from tests.support.paths import DATA


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own for the journal, so small that not all rounds fit."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], check=True)
    os.environ[variables.JOURNAL] = str(place / "journal")
    try:
        with playing_every_facility(DATA):
            yield place
    finally:
        os.environ.pop(variables.JOURNAL)
        subprocess.run(["umount", place], check=True)


def intact(place: Path) -> int:
    """The number of the last round, after every published round was checked."""
    (run,) = journal.runs(place / "journal")
    for path in run.rounds():
        manifest.verify(path / "global_model", ModelManifest)
        manifest.verify(path / "state", StateManifest)
    return int(run.rounds()[-1].name)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", place], check=True)


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_publishing_fails(
    tmp_path: Path,
    disk: Path,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    federation = Federation(tmp_path / "run")
    with pytest.raises(Cut):
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
    os.environ[variables.JOURNAL] = ""
    whole = Federation(tmp_path / "whole").run()
    assert (after / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
    os.environ[variables.JOURNAL] = str(disk / "journal")
    shutil.rmtree(tmp_path / "run")
