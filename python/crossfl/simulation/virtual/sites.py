"""The sites file: how fast each facility is, and what its queue is like."""

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from msgspec import Meta
from numpy.random import default_rng

from crossfl.errors import CrossFLError
from crossfl.protocol import decoding
from crossfl.protocol.fields import File, Name, Positive, Record, Seconds, Share, doc
from crossfl.protocol.history import COUNTED, decode_line
from crossfl.protocol.seeds import derive_seed
from crossfl.simulation.virtual import queues
from crossfl.simulation.virtual.clock import Clock
from crossfl.simulation.virtual.queues import Queue, Spell, TraceJob

LARGEST_SITES = 1 << 20
LARGEST_TRACE = 1 << 30
"""Bytes of a trace; more is refused."""
Above0 = Annotated[float, Meta(gt=0, le=1e9)]
"""A number above 0."""
Load = Annotated[float, Meta(gt=0, le=0.99)]


class Lognormal(Record, frozen=True, kw_only=True, tag="lognormal", tag_field="kind"):
    """Waits of a lognormal distribution."""

    median: Annotated[Above0, doc("Median wait in seconds.")]
    sigma: Annotated[Above0, doc("Standard deviation of its logarithm.")] = 0.8


class Bursty(Record, frozen=True, kw_only=True, tag="bursty", tag_field="kind"):
    """A queue that is calm and busy in turns."""

    calm: Annotated[Above0, doc("Median wait in calm spells, in seconds.")] = 120.0
    busy: Annotated[Above0, doc("Median wait in busy spells, in seconds.")] = 7200.0
    sigma: Annotated[Above0, doc("Standard deviation of the logarithm of a wait.")] = 0.8
    calm_lasts: Annotated[Above0, doc("Mean length of a calm spell, in seconds.")] = 21_600.0
    busy_lasts: Annotated[Above0, doc("Mean length of a busy spell, in seconds.")] = 10_800.0


class Backfill(Record, frozen=True, kw_only=True, tag="backfill", tag_field="kind"):
    """A machine with other users and EASY backfilling."""

    machine: Annotated[Positive, doc("Nodes of the machine.")] = 64
    load: Annotated[Load, doc("Part of them that other users keep busy.")] = 0.85
    trace: Annotated[File | None, doc("Their jobs, in SWF; unset, drawn at random.")] = None


class Recorded(Record, frozen=True, kw_only=True, tag="recorded", tag_field="kind"):
    """Waits as an earlier run had them."""

    history: Annotated[File, doc("Its history.jsonl.")]


class Site(Record, frozen=True, kw_only=True):
    """One facility."""

    seconds_per_step: Annotated[Above0, doc("Seconds of an optimizer step.")]
    queue: Annotated[Lognormal | Bursty | Backfill | Recorded, doc("Where its jobs wait.")]
    nodes: Annotated[Positive, doc("Nodes of a job.")] = 1
    load_seconds: Annotated[Seconds, doc("What a job does besides training.")] = 60.0
    transfer_seconds: Annotated[Seconds, doc("To send a model, or an update.")] = 30.0
    noise: Annotated[Share, doc("Standard deviation of the logarithm of a job's speed.")] = 0.05
    failures: Annotated[Share, doc("Part of the jobs that fail.")] = 0.0
    preemptions: Annotated[Share, doc("Part of the jobs that are cut short and queued anew.")] = 0.0


class Sites(Record, frozen=True, kw_only=True):
    """The sites file."""

    sites: Annotated[dict[Name, Site], Meta(min_length=1, max_length=10_000), doc("By name.")]


def load(path: Path) -> dict[str, Site]:
    """Read a sites file, whose paths are relative to it.

    Raises:
        CrossFLError: it cannot be read, or a value is not as its field demands.
    """
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
        content = json.dumps(values).encode()
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise CrossFLError(f"{path} cannot be read as a sites file: {error}") from None
    sites = decoding.decode(content, Sites, str(path), LARGEST_SITES).sites
    return {name: _beside(site, path.parent) for name, site in sorted(sites.items())}


def queue_of(site: Site, name: str, clock: Clock, seed: int) -> Queue:
    """The queue of a site, seeded by its name.

    Raises:
        CrossFLError: the trace or the history it names is of no use.
    """
    draw = default_rng(derive_seed(seed, name, "queue"))
    match site.queue:
        case Lognormal(median=median, sigma=sigma):
            return queues.Drawn(clock, queues.lognormal(draw, median, sigma))
        case Bursty() as bursty:
            calm = Spell(bursty.calm, bursty.sigma, bursty.calm_lasts)
            busy = Spell(bursty.busy, bursty.sigma, bursty.busy_lasts)
            return queues.Drawn(clock, queues.modulated(draw, calm, busy))
        case Recorded(history=history):
            return queues.Drawn(clock, queues.recorded(draw, recorded_waits(Path(history), name)))
        case Backfill(machine=machine, load=part, trace=trace):
            if machine < site.nodes:
                raise CrossFLError(
                    f"{name}: a job of {site.nodes} nodes never starts on a machine of {machine}"
                )
            others = queues.synthetic(draw, machine, part)
            if trace is not None:
                others = queues.replayed(draw, read_swf(Path(trace)), machine, part)
            return queues.Backfill(clock, machine, others)


def recorded_waits(history: Path, facility: str) -> list[float]:
    """Seconds in the queue of the jobs of a facility whose updates counted.

    Raises:
        CrossFLError: the history cannot be read, or has none.
    """
    try:
        lines = history.read_bytes().splitlines()
    except OSError as error:
        raise CrossFLError(f"{history} cannot be read: {error.strerror}") from None
    entries = [decode_line(line, f"{history}, line {n}") for n, line in enumerate(lines, 1)]
    updates = [entry.facilities[facility] for entry in entries if facility in entry.facilities]
    waits = [update.seconds.queue for update in updates if update.status in COUNTED]
    if not waits:
        raise CrossFLError(f"{history} has no job of {facility}: describe its queue otherwise")
    return waits


def read_swf(path: Path) -> Sequence[TraceJob]:
    """Read a trace in the standard workload format, `.swf` or `.swf.gz`.

    Of each job are used: submit time (field 2), run time (4), processors (5, or those asked for,
    8), walltime asked for (9). Jobs that never ran are left out.

    Source: https://www.cs.huji.ac.il/labs/parallel/workload/swf.html

    Raises:
        CrossFLError: it cannot be read, or a line is no job.
    """
    jobs: list[TraceJob] = []
    last = None
    try:
        if path.stat().st_size > LARGEST_TRACE:
            raise CrossFLError(f"{path} has more than {LARGEST_TRACE} bytes")
        opened: Any = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="ascii", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip() or line.startswith(";"):
                    continue
                try:
                    words = [float(word) for word in line.split()]
                    submitted, ran, used, asked, limit = (words[i] for i in (1, 3, 4, 7, 8))
                except (ValueError, IndexError):
                    raise CrossFLError(f"{path}, line {number} is no job in SWF") from None
                nodes = int(used if used > 0 else asked)
                if ran > 0 and nodes > 0:
                    gap = 0.0 if last is None else max(submitted - last, 0.0)
                    jobs.append(TraceJob(gap, nodes, ran, max(limit, ran)))
                    last = submitted
    except OSError as error:
        raise CrossFLError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(jobs) < 2:
        raise CrossFLError(f"{path} has fewer than two jobs that ran")
    return jobs


def check_members(sites: Mapping[str, Site], facilities: Sequence[str]) -> None:
    """Check that each facility of a job is described.

    Raises:
        CrossFLError: one is not.
    """
    if missing := sorted(set(facilities) - set(sites)):
        raise CrossFLError(f"the sites file does not describe {', '.join(missing)}")


def _beside(site: Site, folder: Path) -> Site:
    queue = site.queue
    if isinstance(queue, Recorded):
        queue = queue.replace(history=str(folder / queue.history))
    elif isinstance(queue, Backfill) and queue.trace is not None:
        queue = queue.replace(trace=str(folder / queue.trace))
    return site.replace(queue=queue)
