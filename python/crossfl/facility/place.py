"""Where a step runs: which facility this is, and where its data, models and state lie."""

import base64
import os
import threading
import time
from pathlib import Path

from crossfl.errors import CrossFLError
from crossfl.protocol.records import Task

FACILITY = "CROSSFL_FACILITY"
DATA = "CROSSFL_DATA"
STATE = "CROSSFL_STATE"
MODELS = "CROSSFL_MODELS"
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
    facility, root = os.environ.get(FACILITY), os.environ.get(DATA)
    if not facility:
        raise CrossFLError(
            f"{FACILITY} is not set, so this is not known to be {task.facility}: set it in the "
            "deployment of the facility (crossfl.local) or in its job template"
        )
    if facility not in (task.facility, ANY):
        raise CrossFLError(
            f"this is {facility} ({FACILITY}), but the task is for {task.facility}: "
            "the step is bound to the wrong deployment"
        )
    if not root:
        raise CrossFLError(f"{DATA} is not set at {task.facility}: point it at the data folder")
    folder = Path(root, task.facility) if facility == ANY else Path(root)
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
    for entry in (path, *(path.rglob("*") if path.is_relative_to(top) and path.is_dir() else ())):
        if not entry.resolve().is_relative_to(top):
            raise CrossFLError(f"{what} {name!r} leads out of {variable} through a link")
    return path
