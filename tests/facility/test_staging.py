"""Copies on the node: one for all ranks, gone with the last of them, clear where there is none."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from crossfl.errors import CrossFLError
from crossfl.facility.staging import staged
from crossfl.protocol.variables import STAGING
from tests.support.paths import DATA

WORDS = DATA / "leonardo" / "words"
RANK = """
import sys
from pathlib import Path
from crossfl.facility.staging import staged
print(staged(Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


def rank(root: Path, path: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", RANK, path],
        env={STAGING: str(root), "SLURM_JOB_ID": "7"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_nothing_is_copied_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STAGING, raising=False)
    assert staged(WORDS) == WORDS


@pytest.mark.parametrize("path", [WORDS, WORDS / "train.jsonl"])
def test_one_copy_for_all_ranks(path: Path, tmp_path: Path) -> None:
    ranks = [rank(tmp_path, path) for _ in range(3)]
    copies = {Path(process.stdout.readline().strip()) for process in ranks if process.stdout}
    assert len(copies) == 1
    copy = copies.pop()
    assert copy.name == path.name and copy.is_relative_to(tmp_path)
    if path.is_dir():
        for file in path.iterdir():
            assert (copy / file.name).read_bytes() == file.read_bytes()
    else:
        assert copy.read_bytes() == path.read_bytes()
    assert len(list(tmp_path.iterdir())) == 1
    for process in ranks:
        assert copy.exists(), "a rank that is over takes nothing from the others"
        process.communicate()
    assert list(tmp_path.iterdir()) == []


def test_a_copy_that_was_cut_off_is_made_anew(tmp_path: Path) -> None:
    first = rank(tmp_path, WORDS)
    assert first.stdout
    copy = Path(first.stdout.readline().strip())
    first.kill()
    first.communicate()
    copy.rename(copy.with_name("partial"))
    (copy.with_name("partial") / "train.jsonl").write_text("half")
    second = rank(tmp_path, WORDS)
    assert second.stdout
    assert Path(second.stdout.readline().strip()) == copy
    assert (copy / "train.jsonl").read_bytes() == (WORDS / "train.jsonl").read_bytes()
    second.communicate()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("root", ["TMPDIR", "/nowhere"])
def test_no_such_folder(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STAGING, root)
    with pytest.raises(CrossFLError, match="is no folder of this node"):
        staged(WORDS)


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STAGING, str(tmp_path))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(
        CrossFLError, match=r"train.jsonl cannot be copied.*No space left on device"
    ):
        staged(WORDS / "train.jsonl")


def _folder(root: Path) -> Path:
    """Where the copy will lie: known to everybody on the node."""
    name = hashlib.sha256(f"7 {WORDS.resolve()}".encode()).hexdigest()[:16]
    return root / f"crossfl-{name}"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the node in which everybody may write."""
    monkeypatch.setenv(STAGING, str(tmp_path / "scratch"))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch").chmod(0o1777)
    return tmp_path / "scratch"


def _open_to_all(folder: Path, victim: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def _with_a_link(name: str) -> Callable[[Path, Path], None]:
    def prepare(folder: Path, victim: Path) -> None:
        folder.mkdir(0o700)
        (folder / name).symlink_to(victim)

    return prepare


def _a_link(folder: Path, victim: Path) -> None:
    (folder.parent / "elsewhere").mkdir(0o700)
    folder.symlink_to("elsewhere")


def _a_file(folder: Path, victim: Path) -> None:
    folder.write_text("")


@pytest.mark.parametrize(
    "prepare",
    [
        _open_to_all,
        _with_a_link("held"),
        _with_a_link("making"),
        _with_a_link("partial"),
        _with_a_link(WORDS.name),
        _a_link,
        _a_file,
    ],
    ids=["open", "held", "making", "partial", "copy", "link", "file"],
)
def test_a_folder_that_somebody_prepared_is_refused(
    prepare: Callable[[Path, Path], None], root: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "precious"
    victim.write_text("precious")
    prepare(_folder(root), victim)
    before = sorted(root.rglob("*"))
    with pytest.raises(CrossFLError, match="somebody else may have prepared it"):
        staged(WORDS)
    assert victim.read_text() == "precious"
    assert sorted(root.rglob("*")) == before


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(root: Path) -> None:
    _folder(root).mkdir(0o700)
    os.chown(_folder(root), 65534, 65534)
    with pytest.raises(CrossFLError, match="somebody else may have prepared it"):
        staged(WORDS)
    assert list(_folder(root).iterdir()) == []


@pytest.mark.parametrize("mode", [0o1777, 0o2777], ids=["sticky", "set-group-ID"])
def test_only_this_user_can_enter_the_folder(mode: int, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch").chmod(mode)
    process = rank(tmp_path / "scratch", WORDS)
    assert process.stdout
    copy = Path(process.stdout.readline().strip())
    assert copy.parent == _folder(tmp_path / "scratch")
    assert copy.parent.stat().st_mode & 0o777 == 0o700
    process.communicate()
