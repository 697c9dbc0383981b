"""The scheduler's clock: how long this job queued, and when it will be ended."""

import contextlib
import os
import subprocess
from datetime import datetime, timedelta
from typing import NamedTuple

from crossfl.errors import CrossFLError
from crossfl.protocol.schedulers import pbs, slurm


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


def _times() -> Times:
    with contextlib.suppress(CrossFLError):  # an answer that cannot be read says nothing
        if job := os.environ.get("SLURM_JOB_ID"):
            return _slurm_times(job)
        if job := os.environ.get("PBS_JOBID"):
            return _pbs_times(job)
    return Times()


def _slurm_times(job: str) -> Times:
    record = slurm.record_of(_output("scontrol", "show", "job", job), job)
    if record is None:
        return Times()
    return Times(_date(record.SubmitTime), _date(record.StartTime), _date(record.EndTime))


def _pbs_times(job: str) -> Times:
    try:
        jobs = pbs.jobs_of(_output("qstat", "-f", "-F", "json", job))
    except CrossFLError:
        jobs = pbs.jobs_of(_output("qstat", "-f", job))
    if job not in jobs:
        return Times()
    submitted, started = _date(jobs[job].ctime), _date(jobs[job].stime)
    limit = jobs[job].Resource_List.walltime
    if started is None or not limit:
        return Times(submitted, started)
    return Times(submitted, started, started + timedelta(seconds=pbs.seconds(limit)))


def _date(text: str) -> datetime | None:
    """A date as Slurm (ISO 8601) or PBS (like `date`) writes it; None for any other word."""
    for pattern in ("%Y-%m-%dT%H:%M:%S", "%a %b %d %H:%M:%S %Y"):
        with contextlib.suppress(ValueError):
            return datetime.strptime(text, pattern)
    return None


def _output(*command: str) -> str:
    """What a command prints, with dates in its scheduler's own form, whatever the user prefers."""
    environment = {k: v for k, v in os.environ.items() if k != "SLURM_TIME_FORMAT"}
    try:
        done = subprocess.run(
            command, capture_output=True, timeout=60, env=environment | {"LC_ALL": "C"}
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")  # users name their jobs in any encoding
