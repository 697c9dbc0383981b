"""Measure what the bookkeeping of a long federation costs: its rounds and its report.

    python benchmarks/bookkeeping.py --facilities 64 --rounds 2000 --repeats 3

Writes a history of that many facilities and rounds, one line a round, as the server state keeps it.
One facility in 97 is absent from a round. Each measurement runs in a process of its own:

* *decode*: read every line of the history and drop it. This is the part that no report can save.
* *report*: read every line and render the page from it.
* *first aggregate*, *last aggregate*: finish the first and the last round, with a model of 16
  weights, so that nearly all of it is bookkeeping: manifests, ledger, history, state.
* *first plan*, *last plan*: load the state and plan the round after it.

Prints the machine, the versions, and of every repeat the wall-clock and processor seconds, the peak
resident memory over that of the imports, and the size of the page; then the medians.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jinja2
import msgspec
import torch
from safetensors.torch import save_file

from crossfl import __version__
from crossfl.observe.page.evaluations import Evaluations
from crossfl.observe.page.render import render
from crossfl.protocol.history import FacilityEntry, RoundEntry, decode_line, encode_line
from crossfl.protocol.manifest import EvaluationManifest, ModelManifest, UpdateManifest
from crossfl.protocol.measurements import Metrics, PhaseSeconds, TrainingMetrics, UpdateMetrics
from crossfl.protocol.records import Aggregation, Allowance, Facility, Training
from crossfl.protocol.state import FacilityLedger, PastNorm, ServerState
from crossfl.server import first_state
from crossfl.server import state as server_state
from crossfl.server.planning.fixed import plan
from crossfl.server.rounds import aggregate
from crossfl.storage import delta, encodings, manifest
from crossfl.storage.checkpoint import Tensors

MODEL = "ab" * 32
ABSENT_EVERY = 97
MIB = 1 << 20


def write_history(path: Path, facilities: int, rounds: int) -> None:
    """Write the lines of a federation whose losses fall."""
    with path.open("wb") as stream:
        for number in range(1, rounds + 1):
            entries = {
                name: _entry(1 + 3 / number + 0.02 * i, (number * 7 + i * 13) % ABSENT_EVERY == 0)
                for i, name in enumerate(_names(facilities))
            }
            entry = RoundEntry(
                round=number,
                finished="2026-01-01T00:00:00+00:00",
                seconds=60.0 * number,
                loss=round(1 + 3 / number, 4),
                facilities=entries,
                model=MODEL,
            )
            stream.write(encode_line(entry))


def read_history(path: Path) -> Iterator[RoundEntry]:
    """The rounds, one at a time."""
    with path.open("rb") as stream:
        for line in stream:
            yield decode_line(line, path.name)


def decode(path: Path, facilities: int, rounds: int) -> int:
    """Read every line; no page."""
    for _ in read_history(path):
        pass
    return 0


def report(path: Path, facilities: int, rounds: int) -> int:
    """Render the page; its size in bytes."""
    state = ServerState(
        rounds=rounds, aggregation=Aggregation(), started=0.0, model=MODEL, round=rounds
    )
    evaluations: Evaluations = {
        name: EvaluationManifest(
            facility=name,
            federation="benchmark",
            dataset="numbers",
            round=rounds,
            model=MODEL,
            status="complete",
            metrics=Metrics(loss=round(1 + 0.02 * i, 4), tokens=12345),
        )
        for i, name in enumerate(_names(facilities))
    }
    return len(render(state, read_history(path), evaluations).encode())


def write_federation(folder: Path, history: Path, facilities: int, finished: int) -> None:
    """A model, a state after so many rounds of the history, and the updates of the next one."""
    model, state = folder / "model", folder / "state"
    for directory in (model, state):
        directory.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    weights = {"w": torch.zeros(16)}
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    digest = manifest.write(model, ModelManifest(round=finished)).digest
    first_state.write_tensors(Tensors.of_model(model), Aggregation(), state)
    if finished:
        (state / "history").mkdir()
        with history.open("rb") as lines:
            for number, line in enumerate(itertools.islice(lines, finished)):
                segment = number // server_state.SEGMENT * server_state.SEGMENT + 1
                with (state / "history" / f"{segment:06}.jsonl").open("ab") as stream:
                    stream.write(line)
    past = tuple(PastNorm(norm=1.0, effective_steps=40.0) for _ in range(5))
    ledger = FacilityLedger(
        samples=1280 * finished, counted=finished, last_tokens=1, loss=1.0, recent=past
    )
    server = ServerState(
        rounds=finished + 2,
        aggregation=Aggregation(),
        started=0.0,
        model=digest,
        round=finished,
        ledger=dict.fromkeys(_names(facilities), ledger) if finished else {},
        best=tuple((number, 1.0) for number in range(min(finished, 100))),
    )
    server_state.save(server, state)
    metrics = Metrics(loss=1.5, tokens=12345)
    for name in _names(facilities):
        update = folder / "updates" / name
        update.mkdir(parents=True)
        delta.write(update / "delta.safetensors", {"w": torch.ones(16)}, encodings.of("fp32", 0.05))
        stated = UpdateManifest(
            facility=name,
            federation=server.federation,
            round=finished + 1,
            base=digest,
            status="complete",
            tokens=123456,
            samples=1280,
            steps=40,
            metrics=UpdateMetrics(validation=metrics, local=metrics),
        )
        manifest.write(update, stated)


def _aggregate(folder: Path, facilities: int) -> int:
    allowances = [
        Allowance(facility=name, steps=40, samples=1280, tokens=200_000)
        for name in _names(facilities)
    ]
    updates = [folder / "updates" / name for name in _names(facilities)]
    with tempfile.TemporaryDirectory(dir=folder) as out:
        aggregate(
            folder / "model", folder / "state", updates, Path(out), 60.0, allowances=allowances
        )
    return 0


def _plan(folder: Path, facilities: int) -> int:
    members = [Facility(name=name, dataset="numbers") for name in _names(facilities)]
    plan(server_state.load(folder / "state"), members, 40, Training(), "train")
    return 0


def first_aggregate(path: Path, facilities: int, rounds: int) -> int:
    """The end of the first round."""
    return _aggregate(path.with_name("first"), facilities)


def last_aggregate(path: Path, facilities: int, rounds: int) -> int:
    """The end of the last round."""
    return _aggregate(path.with_name("last"), facilities)


def first_plan(path: Path, facilities: int, rounds: int) -> int:
    """The plan of the first round."""
    return _plan(path.with_name("first"), facilities)


def last_plan(path: Path, facilities: int, rounds: int) -> int:
    """The plan of the last round."""
    return _plan(path.with_name("last"), facilities)


MEASUREMENTS: dict[str, Callable[[Path, int, int], int]] = {
    "decode": decode,
    "report": report,
    "first aggregate": first_aggregate,
    "last aggregate": last_aggregate,
    "first plan": first_plan,
    "last plan": last_plan,
}


def measure(name: str, path: Path, facilities: int, rounds: int) -> dict[str, float]:
    """One repeat: seconds, seconds of processor, peak memory in MiB, size of the page in MB."""
    if "aggregate" in name:
        MEASUREMENTS[name](path, facilities, rounds)  # what is compiled and loaded once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, processor = time.perf_counter(), time.process_time()
    size = MEASUREMENTS[name](path, facilities, rounds)
    return {
        "seconds": time.perf_counter() - wall,
        "processor": time.process_time() - processor,
        "memory_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / MIB,
        "page_mb": size / 1e6,
    }


def _names(facilities: int) -> list[str]:
    return [f"facility{i:03}" for i in range(facilities)]


def _entry(loss: float, absent: bool) -> FacilityEntry:
    if absent:
        return FacilityEntry(status="absent", reason="the job was cancelled: node failure")
    metrics = Metrics(loss=round(loss, 4), tokens=12345, perplexity=10.4, bits_per_byte=0.987654)
    training = TrainingMetrics(first_loss=2.4, last_loss=2.3, tokens_per_second=1234.5)
    return FacilityEntry(
        share=0.015625,
        norm=1.234567,
        status="complete",
        tokens=123456,
        samples=1280,
        steps=40,
        bytes=123456789,
        seconds=PhaseSeconds(queue=12.0, load=1.2, evaluate=2.3, train=345.7, save=1.2),
        metrics=UpdateMetrics(validation=metrics, local=metrics, training=training),
    )


def main() -> None:
    """Measure, and print every repeat and the medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--facilities", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measurements", nargs="+", choices=MEASUREMENTS, default=MEASUREMENTS)
    args = parser.parse_args()
    versions = {m.__name__: m.__version__ for m in (jinja2, msgspec)}
    print(f"{platform.platform()}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    print(f"Python {sys.version.split()[0]}, crossfl {__version__}, {json.dumps(versions)}")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "history.jsonl")
        write_history(path, args.facilities, args.rounds)
        size = path.stat().st_size / 1e6
        print(f"{args.facilities} facilities x {args.rounds} rounds: history {size:.1f} MB")
        for name, finished in (("first", 0), ("last", args.rounds - 1)):
            write_federation(path.with_name(name), path, args.facilities, finished)
        for name in args.measurements:
            repeats = []
            for _ in range(args.repeats):
                context = multiprocessing.get_context("spawn")
                with ProcessPoolExecutor(1, context) as executor:
                    task = executor.submit(measure, name, path, args.facilities, args.rounds)
                    repeats.append(task.result())
                print(name, _shown(repeats[-1]), flush=True)
            medians = {key: statistics.median(r[key] for r in repeats) for key in repeats[0]}
            print(name, "median", _shown(medians))


def _shown(values: dict[str, float]) -> str:
    return "  ".join(f"{key} {value:.2f}" for key, value in values.items())


if __name__ == "__main__":
    main()
