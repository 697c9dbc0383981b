"""Where a step runs: which facility this is, where its data lies, how long its job queued."""

import base64
import json
import os
import re
import subprocess
import threading
import time
from datetime import datetime
from pathlib import Path

from crossfl.errors import CrossFLError
from crossfl.records import Task

FACILITY = "CROSSFL_FACILITY"
DATA = "CROSSFL_DATA"
STATE = "CROSSFL_STATE"
ABSENT = "CROSSFL_ABSENT"
"""Why this machine stands in for the task's facility, in base64, which no shell reads as anything
else; unset at the facility itself."""
ENGINE = "CROSSFL_ENGINE"
"""Process id of the engine, where it runs on this machine."""
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


def end_with_engine() -> None:
    """End this process soon after the engine's, which may be killed before it can end its steps."""
    engine = os.environ.get(ENGINE)
    if not engine:
        return

    def watch() -> None:
        while Path("/proc", engine).exists():
            time.sleep(0.5)
        os._exit(1)

    if Path("/proc", engine).exists():
        threading.Thread(target=watch, daemon=True).start()


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
            "for what an encoding with error feedback (int8, int4, topk) has to keep"
        )
    return Path(root, task.facility)


def resolve(name: str, root: Path) -> Path:
    """The path of a dataset; it and all it holds must lie inside the root, after links.

    Raises:
        CrossFLError: the name is absolute, climbs out, leaves by a link, or nothing is there.
    """
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise CrossFLError(
            f"dataset {name!r}: give a name inside {DATA}, without '..' and not absolute"
        )
    top, path = root.resolve(), (root / name).resolve()
    if not path.exists() and path.is_relative_to(top):
        raise CrossFLError(f"dataset {name!r} is not in {root}: check the name and {DATA}")
    for each in (path, *(path.rglob("*") if path.is_relative_to(top) and path.is_dir() else ())):
        if not each.resolve().is_relative_to(top):
            raise CrossFLError(f"dataset {name!r} leads out of {DATA} through a link")
    return path


def seconds_in_queue() -> float:
    """Seconds between submission and start of this job by its scheduler's clock; 0 without one."""
    if job := os.environ.get("SLURM_JOB_ID"):
        shown = _output("scontrol", "show", "job", "--oneliner", job)
        times = dict(re.findall(r"(SubmitTime|StartTime)=(\S+)", shown))
        try:
            submit, start = (datetime.fromisoformat(times[k]) for k in ("SubmitTime", "StartTime"))
        except (KeyError, ValueError):
            return 0.0
        return max(0.0, (start - submit).total_seconds())
    if job := os.environ.get("PBS_JOBID"):
        try:
            entry = json.loads(_output("qstat", "-f", "-F", "json", job))["Jobs"][job]
            submit, start = (
                datetime.strptime(entry[k], "%a %b %d %H:%M:%S %Y") for k in ("ctime", "stime")
            )
        except (KeyError, ValueError):
            return 0.0
        return max(0.0, (start - submit).total_seconds())
    return 0.0


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
