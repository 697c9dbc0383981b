"""The scheduler's clock: how long this job queued, and when it will be ended."""

import contextlib
import os
import re
import subprocess
from datetime import datetime, timedelta
from typing import NamedTuple

import msgspec


def seconds_in_queue() -> float:
    """Seconds between submission and start of this job by its scheduler's clock; 0 without one."""
    times = _times()
    if times.submitted is None or times.started is None:
        return 0.0
    return max(0.0, (times.started - times.submitted).total_seconds())


def job_end() -> float | None:
    """When the scheduler will end this job, in seconds since 1970; None if it does not say."""
    if stated := os.environ.get("SLURM_JOB_END_TIME"):
        return float(stated) if stated.isdecimal() else None
    end = _times().end
    return None if end is None else end.timestamp()


class Times(NamedTuple):
    """What a scheduler says of a job, on its own clock and in its own time zone."""

    submitted: datetime | None = None
    started: datetime | None = None
    end: datetime | None = None


class _Resources(msgspec.Struct):
    walltime: str = ""


class _Job(msgspec.Struct):
    ctime: str = ""
    stime: str = ""
    Resource_List: _Resources = msgspec.field(default_factory=_Resources)


class _Answer(msgspec.Struct):
    """What is read of the answer of PBS, by its names."""

    Jobs: dict[str, _Job] = {}


def _times() -> Times:
    if job := os.environ.get("SLURM_JOB_ID"):
        shown = _output("scontrol", "show", "job", "--oneliner", job)
        dates = dict(re.findall(r"(SubmitTime|StartTime|EndTime)=(\S+)", shown))
        return Times(*(_date(dates.get(k)) for k in ("SubmitTime", "StartTime", "EndTime")))
    if job := os.environ.get("PBS_JOBID"):
        answer = _output("qstat", "-f", "-F", "json", job)
        try:
            entry = msgspec.json.decode(answer, type=_Answer).Jobs[job]
        except (KeyError, msgspec.DecodeError):
            return Times()
        submitted, started = _date(entry.ctime), _date(entry.stime)
        limit = re.fullmatch(r"(\d{1,5}):(\d\d):(\d\d)", entry.Resource_List.walltime)
        if started is None or limit is None:
            return Times(submitted, started)
        hours, minutes, seconds = map(int, limit.groups())
        length = timedelta(hours=hours, minutes=minutes, seconds=seconds)
        return Times(submitted, started, started + length)
    return Times()


def _date(text: str | None) -> datetime | None:
    """A date as Slurm (ISO 8601) or PBS (like `date`) writes it; None for any other word."""
    for pattern in ("%Y-%m-%dT%H:%M:%S", "%a %b %d %H:%M:%S %Y"):
        with contextlib.suppress(ValueError):
            return datetime.strptime(text or "", pattern)
    return None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")  # users name their jobs in any encoding
