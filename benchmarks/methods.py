"""One way to average K model files into one, timed in a process and an environment of its own.

    python benchmarks/methods.py METHOD FOLDER SITES OUTPUT warm|cold

FOLDER has `site<i>/model.safetensors`, and what `benchmarks/aggregation.py` laid beside them.
Prints one JSON object: seconds from file to file, and memory in bytes. Imports are not timed.
"""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from itertools import repeat
from pathlib import Path
from typing import Any

MEBI = 1 << 20
Method = Callable[[], None]


def copy(files: list[Path], output: Path, threads: int) -> Method:
    """Read every file, write one: what the machine can do."""

    def read(path: Path, target: Any) -> None:
        block = memoryview(bytearray(MEBI))
        with path.open("rb", buffering=0) as stream:
            while count := stream.readinto(block):
                if target:
                    target.write(block[:count])

    def work() -> None:
        with output.open("wb", buffering=0) as target:
            if threads == 1:
                for path in files:
                    read(path, target if path is files[0] else None)
                return
            other = threading.Thread(target=lambda: list(map(read, files[1:], repeat(None))))
            other.start()
            read(files[0], target)
            other.join()

    return work


def crossfl_core(files: list[Path], output: Path) -> Method:
    """The walk alone: mean of K files to one, nothing checked, hashed or synced, no state."""
    from crossfl.server.averaging import kernel, walk
    from crossfl.storage import tensorfile

    def work() -> None:
        inputs = [tensorfile.TensorFile(path) for path in files]
        entries, share = inputs[0].entries, [1 / len(files)] * len(files)
        buffers = walk.Buffers()

        def step(piece: walk.Piece) -> None:
            deltas = [i.span(piece.name, piece.start, piece.count) for i in inputs]
            mean = kernel.WeightedSum(deltas, share)
            with buffers.lent([entries[piece.name].dtype]) as (result,):
                for start, count in piece.spans(walk.SPAN):
                    mean.into(result[:count], start - piece.start)
                    writer.put(piece.name, start, result[:count])

        layout = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
        with (
            tensorfile.Writer(output, layout, reserve=True) as writer,
            walk.workers(None) as pool,
        ):
            for _ in walk.walk(pool, walk.pieces(inputs[0]), step):
                pass

    return work


def crossfl_step(files: list[Path], output: Path) -> Method:
    """All of `crossfl aggregate`: admission, sha256 of what is read and written, state, sync."""
    from crossfl.protocol.layout import GLOBAL_MODEL
    from crossfl.server.rounds import aggregate

    folder = files[0].parent.parent

    def work() -> None:
        out = folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        begun = time.perf_counter()
        updates = [f.parent / "update" for f in files]
        aggregate(folder / "model", folder / "state", updates, out, 60.0)
        work.seconds = time.perf_counter() - begun  # type: ignore[attr-defined]
        output.unlink(missing_ok=True)
        os.link(out / GLOBAL_MODEL / "model.safetensors", output)

    return work


def xffl(files: list[Path], output: Path) -> Method:
    """XFFL's method, written anew: all models through from_pretrained, plain sum, half."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    def work() -> None:
        load = AutoModelForCausalLM.from_pretrained
        models = [load(path.parent, dtype="auto") for path in files]
        states = [model.state_dict() for model in models]
        total = {
            name: sum(state[name] for state in states) / len(states)  # type: ignore[arg-type]
            for name in states[0]
        }
        models[0].load_state_dict(total)
        torch.save(models[0].half().state_dict(), output)

    return work


def nvflare(files: list[Path], output: Path, lazy: bool) -> Method:
    """NVFlare's WeightedAggregationHelper; all files held, or one after another."""
    from nvflare.app_common.aggregators.weighted_aggregation_helper import (
        WeightedAggregationHelper,
    )
    from safetensors.torch import load_file, save_file

    def work() -> None:
        helper = WeightedAggregationHelper()
        held = [] if lazy else [load_file(path) for path in files]
        for number, path in enumerate(files):
            data = load_file(path) if lazy else held[number]
            helper.add(data, 1.0, f"site{number}", 0)
            del data
        save_file(dict(helper.get_result()), output)

    return work


def appfl(files: list[Path], output: Path) -> Method:
    """APPFL's FedAvgAggregator, equal weights."""
    import torch
    from appfl.algorithm.aggregator import FedAvgAggregator
    from omegaconf import OmegaConf
    from safetensors.torch import load_file, save_file

    def work() -> None:
        states = {f"site{i}": load_file(path) for i, path in enumerate(files)}
        first = next(iter(states.values()))
        model = torch.nn.Module()
        for name, tensor in first.items():
            module, *_, leaf = model, *name.split(".")
            for part in name.split(".")[:-1]:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_parameter(leaf, torch.nn.Parameter(torch.zeros_like(tensor)))
        options = OmegaConf.create({"client_weights_mode": "equal"})
        aggregator = FedAvgAggregator(model, options, None)
        save_file(dict(aggregator.aggregate(states)), output)

    return work


def flwr(files: list[Path], output: Path) -> Method:
    """Flower's aggregate_arrayrecords, equal weights."""
    from flwr.common import ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
    from safetensors.torch import load_file, save_file

    def work() -> None:
        records = []
        for path in files:
            arrays = ArrayRecord(torch_state_dict=load_file(path))
            metrics = MetricRecord({"num-examples": 1})
            records.append(RecordDict({"arrays": arrays, "metrics": metrics}))
        result = aggregate_arrayrecords(records, "num-examples")
        save_file(dict(result.to_torch_state_dict()), output)

    return work


METHODS: dict[str, Callable[[list[Path], Path], Method]] = {
    "copy": lambda files, output: copy(files, output, 1),
    "copy, two threads": lambda files, output: copy(files, output, 2),
    "crossfl, walk alone": crossfl_core,
    "crossfl aggregate": crossfl_step,
    "nvflare, held": lambda files, output: nvflare(files, output, False),
    "nvflare, one by one": lambda files, output: nvflare(files, output, True),
    "xffl's method": xffl,
    "appfl": appfl,
    "flwr": flwr,
}


def memory(key: str) -> int:
    """One line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


def forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    os.sync()
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def settle(output: Path, size: int) -> None:
    """Write the output's size in zeros and remove it: every method finds memory just become free.

    A virtual machine's host takes back what lies free for seconds, and gives it anew slower than it
    is written: each method would pay for how long ago the one before it ended.
    """
    output.unlink(missing_ok=True)
    with output.open("wb", buffering=0) as stream:
        for _ in range(-(-size // MEBI)):
            stream.write(bytes(MEBI))
    output.unlink()


def measured(work: Method) -> dict[str, float]:
    """Seconds by the clock and of processor, peak of anonymous memory, its growth, and RSS."""
    before, done = memory("RssAnon"), threading.Event()
    peak = before

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    begun, processor = time.perf_counter(), time.process_time()
    try:
        work()
    finally:
        seconds = getattr(work, "seconds", time.perf_counter() - begun)
        done.set()
        watcher.join()
    return {
        "seconds": seconds,
        "processor": time.process_time() - processor,
        "anonymous": peak,
        "grown": peak - before,
        "resident": memory("VmHWM"),
    }


if __name__ == "__main__":
    method, folder, sites, target, kind = sys.argv[1:]
    paths = [Path(folder, f"site{i:02}", "model.safetensors") for i in range(int(sites))]
    work = METHODS[method](paths, Path(target))
    if kind == "cold":  # not before the imports: the host would take the memory back
        forget(Path(folder))
    settle(Path(target), paths[0].stat().st_size)
    print(json.dumps(measured(work)))
