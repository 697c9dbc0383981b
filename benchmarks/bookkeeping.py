"""Measure what the bookkeeping of a long federation costs: for now, its report.

    python benchmarks/bookkeeping.py --facilities 64 --rounds 2000 --repeats 3

Writes a history of that many facilities and rounds, one line a round, as the server state keeps it.
One facility in 97 is absent from a round. Each measurement runs in a process of its own:

* *decode*: read every line of the history and drop it. This is the part that no report can save.
* *report*: read every line and render the page from it.

Prints the machine, the versions, and of every repeat the wall-clock and processor seconds, the peak
resident memory over that of the imports, and the size of the page; then the medians.
"""

import argparse
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
import matplotlib
import msgspec

from crossfl import __version__
from crossfl.observe.page.evaluations import Evaluations
from crossfl.observe.page.render import render
from crossfl.protocol.history import FacilityEntry, RoundEntry, decode_line, encode_line
from crossfl.protocol.manifest import EvaluationManifest
from crossfl.protocol.measurements import Metrics, PhaseSeconds, TrainingMetrics, UpdateMetrics
from crossfl.protocol.records import Aggregation
from crossfl.protocol.state import ServerState

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


MEASUREMENTS: dict[str, Callable[[Path, int, int], int]] = {"decode": decode, "report": report}


def measure(name: str, path: Path, facilities: int, rounds: int) -> dict[str, float]:
    """One repeat: seconds, seconds of processor, peak memory in MiB, size of the page in MB."""
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
    args = parser.parse_args()
    versions = {m.__name__: m.__version__ for m in (jinja2, matplotlib, msgspec)}
    print(f"{platform.platform()}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    print(f"Python {sys.version.split()[0]}, crossfl {__version__}, {json.dumps(versions)}")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "history.jsonl")
        write_history(path, args.facilities, args.rounds)
        size = path.stat().st_size / 1e6
        print(f"{args.facilities} facilities x {args.rounds} rounds: history {size:.1f} MB")
        for name in MEASUREMENTS:
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
