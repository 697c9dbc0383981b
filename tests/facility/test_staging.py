"""Copies on the node: one for all ranks, gone with the last of them, clear where there is none."""

import subprocess
import sys
from pathlib import Path

import pytest

from crossfl.errors import CrossFLError
from crossfl.facility.staging import STAGING, staged
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
        for each in path.iterdir():
            assert (copy / each.name).read_bytes() == each.read_bytes()
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
