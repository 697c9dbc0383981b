"""Measure what a report costs: the time to make it, and the size of the page.

    python benchmarks/report.py --facilities 16 --rounds 200
    python benchmarks/report.py --facilities 64 --rounds 2000 --event-rounds 200

Makes a history and the events of a run, as the journal keeps them: every facility waits, is sent
the model, trains with ten step counts a round, and delivers; one in 97 updates is absent. Then a
process of its own reads both and renders the page. Prints the machine, the sizes, and for each
repeat the wall-clock and processor seconds of reading and rendering, without Python's start.
"""

import argparse
import itertools
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from crossfl.observe.live import read
from crossfl.observe.page.about import About
from crossfl.observe.page.render import render
from crossfl.observe.page.timeline import Timeline
from crossfl.protocol.events import Event
from crossfl.protocol.events import encode_line as encode_event
from crossfl.protocol.history import FacilityEntry, RoundEntry, decode_line, encode_line
from crossfl.protocol.measurements import Metrics, PhaseSeconds, TrainingMetrics, UpdateMetrics
from crossfl.protocol.records import Aggregation
from crossfl.protocol.state import ServerState

MODEL = "ab" * 32
ABSENT_EVERY = 97
ROUND_SECONDS = 3600.0
STEPS = 10
STARTED = 1.8e9


def entries(facilities: int, rounds: int) -> Iterator[RoundEntry]:
    """A federation whose losses fall."""
    numbers = itertools.count(1)
    for number in range(1, rounds + 1):
        updates = {}
        for i in range(facilities):
            name = f"facility-{i:03}"
            if next(numbers) % ABSENT_EVERY == 0:
                updates[name] = FacilityEntry(status="absent", reason="PBS job 7 was held")
                continue
            loss = 1.5 + 4 / number + 0.1 * (i % 7) + 0.01 * ((number * 31 + i) % 11)
            metrics = Metrics(loss=loss, tokens=4096, samples=64, perplexity=10.0)
            updates[name] = FacilityEntry(
                share=1 / facilities,
                norm=1.25 + 1 / number,
                status="complete",
                tokens=81920,
                samples=320,
                steps=40,
                bytes=1_627_840,
                seconds=PhaseSeconds(
                    queue=300.0 + 13 * (i % 17), load=31.5, evaluate=12.25, train=2400.0, save=3.125
                ),
                metrics=UpdateMetrics(
                    validation=metrics,
                    local=metrics,
                    training=TrainingMetrics(
                        first_loss=loss,
                        last_loss=loss * 0.9,
                        tokens_per_second=12345.6 + i,
                        peak_memory=30 << 30,
                        flops_utilisation=0.41,
                        joules={"gpu": 1.5e6, "cpu": 2e5},
                        ranks=4,
                        device="NVIDIA A100-SXM4-64GB",
                    ),
                ),
            )
        yield RoundEntry(
            round=number,
            finished="2026-01-02T03:04:05+00:00",
            seconds=number * ROUND_SECONDS,
            loss=1.5 + 4 / number,
            facilities=updates,
            model=MODEL,
        )


def happenings(facilities: int, rounds: range, total: int) -> Iterator[Event]:
    """The events of these rounds."""
    for number in rounds:
        begun = STARTED + (number - 1) * ROUND_SECONDS
        yield Event(time=begun, phase="plan", round=number, rounds=total)
        for i in range(facilities):
            yield from job(f"facility-{i:03}", number, begun, i)
        yield Event(time=begun + 3600, phase="aggregate", round=number, rounds=total, seconds=8.0)


def job(name: str, number: int, begun: float, i: int) -> Iterator[Event]:
    """The events of one job."""
    wait, own = 300.0 + 13 * (i % 17), f"{number * 1000 + i}"

    def event(at: float, phase: str, **facts: object) -> Event:
        base = Event(time=begun + at, phase=phase, facility=name, round=number)
        return base.replace(**facts)

    yield event(1, "sending", bytes=0, size=1_627_840)
    yield event(20 + i % 5, "sent", bytes=1_627_840)
    yield event(30, "queued", job=own, message="Priority", since=begun + 30)
    yield event(30 + wait, "running", job=own, nodes=4, since=begun + 30 + wait)
    for step in range(1, STEPS + 1):
        loss = 1.5 + 4 / (number + step / STEPS)
        yield event(80 + wait + step * 240, "train", step=step * 4, steps=STEPS * 4, loss=loss)
    yield event(2500 + wait, "ended", job=own, nodes=4, seconds=2470.0)
    yield event(2510 + wait, "fetching", bytes=0)
    yield event(2530 + wait, "fetched", bytes=1_627_840)
    yield event(3590, "merged")


def state_of(rounds: int) -> ServerState:
    """The state after the last round."""
    return ServerState(
        rounds=rounds, seed=7, aggregation=Aggregation(), started=STARTED, model=MODEL, round=rounds
    )


def measure(folder: Path, rounds: int) -> None:
    """Read and render in this process, and print what it took."""
    render(state_of(1), entries(2, 1), {})  # imports, and the template's first compilation
    wall, used = time.perf_counter(), time.process_time()
    with (folder / "history.jsonl").open("rb") as file:
        history = (decode_line(line, "the history") for line in file)
        about = About(timeline=Timeline(read(folder / "events.jsonl")), parameters=8_000_000_000)
        page = render(state_of(rounds), history, {}, about=about)
    wall, used = time.perf_counter() - wall, time.process_time() - used
    size, peak = len(page.encode()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (folder / "report.html").write_text(page, "utf-8")
    print(f"{wall:8.2f} s  {used:8.2f} s CPU  {size / 1e6:6.2f} MB  {peak / 1024:7.0f} MiB peak")


def main() -> None:
    """Make the files, and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--facilities", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--event-rounds", type=int, help="rounds with events; default: all")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="folder for the files and the page")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure, args.rounds)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "history.jsonl").open("wb") as file:
            file.writelines(map(encode_line, entries(args.facilities, args.rounds)))
        first = args.rounds - (args.event_rounds or args.rounds) + 1
        with (folder / "events.jsonl").open("wb") as file:
            told = happenings(args.facilities, range(first, args.rounds + 1), args.rounds)
            file.writelines(map(encode_event, told))
        sizes = {p.name: p.stat().st_size / 1e6 for p in sorted(folder.glob("*.jsonl"))}
        print(f"{platform.platform()}, {os.cpu_count()} CPUs, Python {platform.python_version()}")
        print(f"{args.facilities} facilities, {args.rounds} rounds", end=": ")
        print(", ".join(f"{name} {size:.1f} MB" for name, size in sizes.items()), flush=True)
        words = [sys.executable, __file__, "--measure", str(folder), "--rounds", str(args.rounds)]
        for _ in range(args.repeats):
            subprocess.run(words, check=True)


if __name__ == "__main__":
    main()
