"""Where a step runs: which facility this is, and where its data, models and state lie."""

import base64
import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from crossfl.errors import CrossFLError
from crossfl.protocol.records import Task
from crossfl.protocol.text import quoted
from crossfl.protocol.variables import (
    ABSENT,
    DATA,
    DEFAULT_MIN_VALIDATION_SAMPLES,
    DEFAULT_MIN_VALIDATION_TOKENS,
    FACILITY,
    LATE,
    MIN_VALIDATION_SAMPLES,
    MIN_VALIDATION_TOKENS,
    MODELS,
    PROMPTS,
    STATE,
)
from crossfl.storage.files import publish

ANY = "*"


@dataclass(frozen=True)
class Disclosure:
    """What the metrics and completions that leave a facility may tell of its data.

    Attributes:
        min_samples: samples that a metric is of at least.
        min_tokens: predicted tokens that a metric of text is of at least.
        prompts: whether the model completes the job's prompts here.
    """

    min_samples: int = DEFAULT_MIN_VALIDATION_SAMPLES
    min_tokens: int = DEFAULT_MIN_VALIDATION_TOKENS
    prompts: bool = False


def disclosure() -> Disclosure:
    """What this facility allows, by its variables.

    Raises:
        CrossFLError: one of them is no whole number from 1 on.
    """
    return Disclosure(
        least(MIN_VALIDATION_SAMPLES, DEFAULT_MIN_VALIDATION_SAMPLES),
        least(MIN_VALIDATION_TOKENS, DEFAULT_MIN_VALIDATION_TOKENS),
        os.environ.get(PROMPTS) == "1",
    )


def least(variable: str, default: int) -> int:
    """The whole number from 1 on that a variable holds, or the default.

    Raises:
        CrossFLError: it holds anything else.
    """
    value = os.environ.get(variable) or str(default)
    if not value.isascii() or not value.isdecimal() or int(value) < 1:
        raise CrossFLError(f"{variable} is {value!r}: give a whole number from 1 on")
    return int(value)


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


def check_present() -> None:
    """Check that this is no stand-in for a facility that is absent or late.

    Raises:
        CrossFLError: it is one; the message is the reason.
    """
    if reason := os.environ.get(ABSENT) or os.environ.get(LATE):
        raise CrossFLError(base64.b64decode(reason).decode())


def is_late() -> bool:
    """Whether this stands in for a facility whose job goes on."""
    return LATE in os.environ


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


def make_private(directory: Path) -> None:
    """Make a folder, and those above it that are missing, that no other user can enter."""
    for folder in (*reversed(directory.parents), directory):
        folder.mkdir(mode=0o700, exist_ok=True)


@contextlib.contextmanager
def publish_state(directory: Path) -> Iterator[Path]:
    """Write a folder of what stays here, as `publish` does, that no other user can read."""
    make_private(directory.parent)
    with publish(directory) as folder:
        folder.chmod(0o700)
        yield folder
        for path in folder.iterdir():
            path.chmod(0o600)


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
    try:
        top, path = root.resolve(), (root / name).resolve()
        if not path.exists() and path.is_relative_to(top):
            raise CrossFLError(f"{what} {name!r} is not in {root}: check the name and {variable}")
        inside = path.rglob("*") if path.is_relative_to(top) and path.is_dir() else ()
        for entry in (path, *inside):
            if not entry.resolve().is_relative_to(top):
                raise CrossFLError(f"{what} {name!r} leads out of {variable} through a link")
    except (OSError, RuntimeError, ValueError) as error:  # no name of a file; links in a circle
        raise CrossFLError(
            f"{what} {quoted(name)} cannot be looked up in {root} ({type(error).__name__}): check "
            "the name, and the links in that folder"
        ) from None
    return path
