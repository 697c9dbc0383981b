"""Killed at any moment, nothing is half; memory does not grow; rounding is that of fp64."""

import contextlib
import multiprocessing
import os
import random
import subprocess
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from crossfl.errors import CrossFLError
from crossfl.protocol.layout import GLOBAL_MODEL, STATE
from crossfl.protocol.manifest import ModelManifest, StateManifest
from crossfl.server import state as server_state
from crossfl.server.rounds import aggregate
from crossfl.storage import manifest
from crossfl.storage.tensorfile import TensorFile
from tests.support.federation import Federation, Values, master, weights

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["crossfl.server.rounds"])
KILLS = 50
MEBI = 1 << 20


def _again_and_again(started: Connection, folder: Path, updates: list[Path]) -> None:
    for number in range(1000):
        started.send(number)
        aggregate(folder / "model", folder / "state", updates, folder / f"out{number}", 0.0)


@pytest.mark.slow
def test_killed_at_any_moment_the_old_or_the_new_is_whole(tmp_path: Path) -> None:
    model: Values = {f"w{i}": torch.randn(100, 1000) for i in range(4)}
    federation = Federation(tmp_path, model, server_optimizer="diloco")
    updates = [federation.update(f"s{i}", federation.deltas(i)) for i in range(3)]
    begun = time.monotonic()
    federation.run(updates, "trial")
    duration = time.monotonic() - begun
    chance, halves, wholes = random.Random(0), 0, 0
    for _ in range(KILLS):
        here, there = SERVER.Pipe(duplex=False)
        process = SERVER.Process(target=_again_and_again, args=(there, tmp_path, updates))
        process.start()
        there.close()
        assert here.recv() == 0
        time.sleep(chance.uniform(0, min(2 * duration, 1.0)))
        process.kill()
        process.join()
        manifest.verify(federation.model, ModelManifest)
        manifest.verify(federation.state, StateManifest)
        for out in tmp_path.glob("out*"):
            halves += len(list(out.glob(".*")))
            if (out / GLOBAL_MODEL).exists():
                manifest.verify(out / GLOBAL_MODEL, ModelManifest)
            if (out / STATE).exists():
                manifest.verify(out / STATE, StateManifest)
                assert server_state.load(out / STATE).round == 1
                wholes += 1
            out.rename(tmp_path / f"seen{time.monotonic_ns()}")
    assert halves > KILLS / 4, "the kills did not land in the middle"
    assert wholes > 0, "no kill landed after the end"


def _watched(answer: Connection, folder: Path, updates: list[Path]) -> None:
    """Send by how many bytes anonymous memory grew at most during an aggregation."""
    threading.stack_size(1 << 18)
    aggregate(folder / "model", folder / "state", updates[:3], folder / "warm", 0.0)
    before, peak, done = _anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    aggregate(folder / "model", folder / "state", updates, folder / "out", 0.0)
    done.set()
    watcher.join()
    answer.send(peak - before)


def _anonymous() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("aggregation_rule", ["mean", "median", "krum"])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, aggregation_rule: str) -> None:
    size = 32 * MEBI // 4
    federation = Federation(
        tmp_path,
        {"w": torch.zeros(size)},
        aggregation_rule=aggregation_rule,
        num_byzantine=0,
        quorum=2,
    )
    values = {"w": torch.linspace(-1, 1, size)}
    updates = [federation.update(f"s{i:02}", values, "bf16") for i in range(12)]
    del values
    here, there = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=_watched, args=(there, tmp_path, updates))
    process.start()
    there.close()
    grown = here.recv()
    process.join()
    # A few pieces for each thread and update, and what the allocator keeps of them.
    assert grown < 96 * MEBI, f"{grown / MEBI:.0f} MiB, and the updates have 192"


def test_bf16_is_rounded_as_fp64_would_be(tmp_path: Path) -> None:
    model: Values = {"w": torch.randn(200_000).bfloat16()}
    federation = Federation(tmp_path, model)
    deltas = [federation.deltas(i, 1e-2) for i in range(4)]
    tokens = (100, 50, 7, 31)
    updates = [
        federation.update(f"s{i}", d, "bf16", tokens=n)
        for i, (d, n) in enumerate(zip(deltas, tokens, strict=True))
    ]
    out = federation.run(updates)
    exact = model["w"].double()
    for delta, count in zip(deltas, tokens, strict=True):
        exact = exact + delta["w"].bfloat16().double() * (count / sum(tokens))
    right = (weights(out)["w"] == exact.bfloat16()).double().mean()
    assert right >= 0.99
    torch.testing.assert_close(master(out)["w"].double(), exact, rtol=1e-6, atol=1e-7)


def test_an_output_that_exists_is_left_alone(tmp_path: Path) -> None:
    federation = Federation(tmp_path, {"w": torch.zeros(3)})
    update = federation.update("a", federation.deltas(0))
    before = federation.run([update])
    with contextlib.suppress(Exception):
        federation.run([update])
    manifest.verify(before / GLOBAL_MODEL, ModelManifest)
    assert not list(before.glob(".*"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_too_small_is_known_before_any_work(tmp_path: Path) -> None:
    federation = Federation(tmp_path, {"w": torch.zeros(MEBI)}, server_optimizer="fedadam")
    update = federation.update("a", federation.deltas(0))
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", out], check=True)
    try:
        with pytest.raises(CrossFLError, match=r"no room for its 41.* bytes \(No space left"):
            federation.run([update])
        assert list(out.iterdir()) == []
        manifest.verify(federation.model, ModelManifest)
        manifest.verify(federation.state, StateManifest)
        subprocess.run(["mount", "-o", "remount,size=20m", out], check=True)
        federation.run([update])
        manifest.verify(out / STATE, StateManifest)
    finally:
        subprocess.run(["umount", out], check=True)


def test_an_adapter_is_averaged_and_its_settings_are_passed_on(tmp_path: Path) -> None:
    adapter: Values = {"q.lora_A.weight": torch.randn(4, 30), "q.lora_B.weight": torch.zeros(30, 4)}
    federation = Federation(tmp_path, adapter, adapted=True)
    deltas = [federation.deltas(i) for i in range(2)]
    out = federation.run([federation.update(f"s{i}", d) for i, d in enumerate(deltas)])
    manifest.verify(out / GLOBAL_MODEL, ModelManifest)
    for name, start in adapter.items():
        expected = start + (deltas[0][name] + deltas[1][name]) / 2
        torch.testing.assert_close(weights(out)[name], expected)
    for name in ("config.json", "adapter_config.json", "lora.json"):
        assert (out / GLOBAL_MODEL / name).read_bytes() == (federation.model / name).read_bytes()
    assert {p.name for p in (out / STATE).glob("*.safetensors")} == {
        "master.adapter_model.safetensors"
    }


def test_alike_files_share_what_their_headers_say(tmp_path: Path) -> None:
    federation = Federation(tmp_path, {"w": torch.zeros(3)})
    coded = [federation.update(f"s{i}", federation.deltas(i), "bf16") for i in range(2)]
    whole = federation.update("s2", federation.deltas(2))
    one, other, third = (TensorFile(path / "delta.safetensors") for path in [*coded, whole])
    assert one.entries is other.entries
    assert third.entries["w"] != one.entries["w"]
    assert not torch.equal(one.tensor("w"), other.tensor("w"))


def test_weights_in_fp32_are_on_the_disk_once(tmp_path: Path) -> None:
    federation = Federation(tmp_path, {"w": torch.zeros(3), "v": torch.ones(2, 2)})
    out = federation.run([federation.update("a", federation.deltas(0))])
    written = out / GLOBAL_MODEL / "model.safetensors"
    assert written.samefile(out / STATE / "master.model.safetensors")
    assert {n: t.tolist() for n, t in master(out).items()} == {
        n: t.tolist() for n, t in weights(out).items()
    }
