"""Ranks: one update from several processes, equal to that of one; and launchers that cannot run."""

import os
import socket
import sys
from pathlib import Path

import pytest
import torch

from crossfl.errors import CrossFLError
from crossfl.facility import launcher as launching
from crossfl.facility.time_budget import StopSignal
from crossfl.protocol import variables
from crossfl.protocol.records import Task
from crossfl.storage.checkpoint import Tensors
from tests.support.paths import DATA, ROUND
from tests.support.processes import Run


def _words(task: Task) -> list[str]:
    flags = [w for k, v in task.asdict().items() for w in (f"--{k.replace('_', '-')}", str(v))]
    training = [
        "--batch-size",
        "4",
        "--sequence-length",
        "48",
        "--learning-rate",
        "0.01",
        "--threads",
        "1",
    ]
    return ["train", "--global-model", str(ROUND / "global_model"), *flags, *training]


@pytest.mark.slow
def test_two_ranks_train_the_update_of_one(task: Task, run: Run, tmp_path: Path) -> None:
    words = _words(task.replace(local_steps=5, schedule_steps=10))
    site = {"CROSSFL_FACILITY": "leonardo", "CROSSFL_DATA": str(DATA / "leonardo")}
    launchers = {"one": {}, "two": {variables.LAUNCHER: "torchrun --nproc-per-node=2"}}
    deltas = []
    (tmp_path / "tmp").mkdir()
    for name, launcher in launchers.items():
        out = tmp_path / name
        out.mkdir()
        command = [sys.executable, "-m", "crossfl", *words, "--outdir", str(out)]
        result = run(*command, cwd=tmp_path, **site, **launcher, TMPDIR=str(tmp_path / "tmp"))
        assert result.returncode == 0, result.stderr
        assert list((tmp_path / "tmp").iterdir()) == []
        deltas.append(Tensors([out / "update" / "delta.safetensors"]))
        assert {p.name for p in out.iterdir()} == {"update", "cwl.output.json"}
    for name in deltas[0]:
        torch.testing.assert_close(deltas[0][name], deltas[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_rank_that_fails_is_a_reason(task: Task, run: Run, tmp_path: Path) -> None:
    site = {"CROSSFL_FACILITY": "karolina", "CROSSFL_DATA": str(DATA / "leonardo")}
    command = [sys.executable, "-m", "crossfl", *_words(task)]
    launcher = {variables.LAUNCHER: "torchrun --nproc-per-node=2"}
    result = run(*command, cwd=tmp_path, **site, **launcher)
    assert result.returncode == 4
    assert "this is karolina (CROSSFL_FACILITY), but the task is for leonardo" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_launcher_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variables.LAUNCHER, "no-such-launcher -n 2")
    with pytest.raises(CrossFLError, match="no-such-launcher cannot be started"):
        launching.ranks(["train"], StopSignal())


@pytest.mark.parametrize("names", launching.RANKS)
def test_every_launcher_is_understood(
    names: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for others in launching.RANKS:
        for name in others:
            monkeypatch.delenv(name, raising=False)
    for name in (*launching.RANKS[0], "CROSSFL_PROGRESS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with pytest.raises(CrossFLError, match="which rank"):
        launching.join()
    for name, value in zip(names, ("1", "8", "3"), strict=True):
        monkeypatch.setenv(name, value)
    launching.join()
    assert [os.environ[name] for name in launching.RANKS[0]] == ["1", "8", "3"]
    assert os.environ["CROSSFL_PROGRESS"] == os.devnull


def test_where_the_ranks_meet(tmp_path: Path) -> None:
    nodes = tmp_path / "nodes"
    nodes.write_text("x1000\nx1000\nx1001\n")
    assert launching.first_node({"PBS_NODEFILE": str(nodes)}) == "x1000"
    assert launching.first_node({}) == "127.0.0.1"
    nodes.write_text("x1000\nx1000\n")
    assert launching.first_node({"PBS_NODEFILE": str(nodes)}) == "127.0.0.1"
    # In a container, what would say more may be absent.
    assert launching.first_node({"PBS_NODEFILE": str(tmp_path / "absent")}) == "127.0.0.1"
    one = {"SLURM_JOB_NODELIST": "lrdn0001", "SLURM_JOB_NUM_NODES": "1"}
    assert launching.first_node(one | {"PATH": "/nowhere"}) == "127.0.0.1"


def test_ranks_of_two_clusters_on_one_node_do_not_meet() -> None:
    with socket.socket() as listener:
        listener.bind(("", port := launching.free_port()))
        listener.listen()
        assert launching.free_port() != port
