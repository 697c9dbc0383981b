"""Where a step runs: which facility this is, where its data lies, how long its job queued."""

import base64
import contextlib
import json
import os
import re
import subprocess
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from crossfl.errors import CrossFLError
from crossfl.protocol.records import Task

FACILITY = "CROSSFL_FACILITY"
DATA = "CROSSFL_DATA"
STATE = "CROSSFL_STATE"
MODELS = "CROSSFL_MODELS"
ABSENT = "CROSSFL_ABSENT"
"""Why this machine stands in for the task's facility, in base64, which no shell reads as anything
else; unset at the facility itself."""
ANY = "*"


def data_root(task: Task) -> Path:
    """The folder under which this facility's datasets lie, if this is the task's facility.

    `CROSSFL_FACILITY` names the facility this is. `*` stands for a machine that plays several of
    them, each with its data in a folder of its own: `CROSSFL_DATA/<facility>`.

    Raises:
        CrossFLError: this is another facility, or it does not say which one it is.
    """
    here, root = os.environ.get(FACILITY), os.environ.get(DATA)
    if not here:
        raise CrossFLError(
            f"{FACILITY} is not set, so this is not known to be {task.facility}: set it in the "
            "deployment of the facility (crossfl.local) or in its job template"
        )
    if here not in (task.facility, ANY):
        raise CrossFLError(
            f"this is {here} ({FACILITY}), but the task is for {task.facility}: "
            "the step is bound to the wrong deployment"
        )
    if not root:
        raise CrossFLError(f"{DATA} is not set at {task.facility}: point it at the data folder")
    folder = Path(root, task.facility) if here == ANY else Path(root)
    if not folder.is_dir():
        raise CrossFLError(f"{DATA} at {task.facility} is {folder}, which is not a folder")
    return folder


def check_present() -> None:
    """Check that this is no stand-in for a facility that could not do its task.

    Raises:
        CrossFLError: it is one; the message is the reason.
    """
    if reason := os.environ.get(ABSENT):
        raise CrossFLError(base64.b64decode(reason).decode())


def state_root(task: Task) -> Path:
    """The folder in which this facility keeps what it must remember between rounds.

    It is `CROSSFL_STATE/<facility>`, on a file system that all its jobs share; nothing in it leaves
    the facility.

    Raises:
        CrossFLError: the facility names none.
    """
    root = os.environ.get(STATE)
    if not root:
        raise CrossFLError(
            f"{STATE} is not set at {task.facility}: point it at a folder that outlives a job, "
            "for what is kept there: residuals (int8, int4, topk), optimizer state, checkpoints"
        )
    return Path(root, task.facility)


def model_root() -> Path:
    """The folder under which the base models of adapters lie here.

    Raises:
        CrossFLError: there is none.
    """
    root = os.environ.get(MODELS)
    if not root or not Path(root).is_dir():
        raise CrossFLError(
            f"{MODELS} is {root or 'not set'}: point it at the folder of the base models here"
        )
    return Path(root)


def resolve(name: str, root: Path, variable: str = DATA) -> Path:
    """The path of a dataset or base model; it and all it holds must lie inside the root.

    That is so after links; `variable` is the one that names the root.

    Raises:
        CrossFLError: the name is absolute, climbs out, leaves by a link, or nothing is there.
    """
    what = "base model" if variable == MODELS else "dataset"
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise CrossFLError(
            f"{what} {name!r}: give a name inside {variable}, without '..' and not absolute"
        )
    top, path = root.resolve(), (root / name).resolve()
    if not path.exists() and path.is_relative_to(top):
        raise CrossFLError(f"{what} {name!r} is not in {root}: check the name and {variable}")
    for each in (path, *(path.rglob("*") if path.is_relative_to(top) and path.is_dir() else ())):
        if not each.resolve().is_relative_to(top):
            raise CrossFLError(f"{what} {name!r} leads out of {variable} through a link")
    return path


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
    if job := os.environ.get("SLURM_JOB_ID"):
        shown = _output("scontrol", "show", "job", "--oneliner", job)
        said = dict(re.findall(r"(SubmitTime|StartTime|EndTime)=(\S+)", shown))
        return Times(*(_date(said.get(k)) for k in ("SubmitTime", "StartTime", "EndTime")))
    if job := os.environ.get("PBS_JOBID"):
        try:
            entry = json.loads(_output("qstat", "-f", "-F", "json", job))["Jobs"][job]
        except (KeyError, ValueError):
            return Times()
        submitted, started = _date(entry.get("ctime")), _date(entry.get("stime"))
        limit = re.fullmatch(
            r"(\d+):(\d+):(\d+)", str(entry.get("Resource_List", {}).get("walltime"))
        )
        if started is None or limit is None:
            return Times(submitted, started)
        hours, minutes, seconds = map(int, limit.groups())
        length = timedelta(hours=hours, minutes=minutes, seconds=seconds)
        return Times(submitted, started, started + length)
    return Times()


def _date(text: object) -> datetime | None:
    """A date as Slurm (ISO 8601) or PBS (like `date`) writes it; None for any other word."""
    for pattern in ("%Y-%m-%dT%H:%M:%S", "%a %b %d %H:%M:%S %Y"):
        with contextlib.suppress(ValueError):
            return datetime.strptime(str(text), pattern)
    return None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
