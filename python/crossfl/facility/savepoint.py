"""Savepoints: from where a job that was cut short goes on, to the bit as if it had not been.

A savepoint lies at the facility under `CROSSFL_STATE/<facility>/savepoint-<data seed>/<round>/`,
one folder for each number of steps, of which all but the last are removed. It holds the weights
that learn, the optimizer's state and the counts; the order of samples and the random numbers of a
step follow from the task. It carries a key of all that decides the outcome, so that another run, or
the same one under other options, does not take it up. A complete update removes it, and those of
the rounds before. A partial one leaves it: its job may be run again.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import crossfl
from crossfl.errors import CrossFLError
from crossfl.facility import place
from crossfl.protocol.records import Task, Training
from crossfl.storage.checkpoint import Tensors
from crossfl.storage.files import write_json

COUNTS = "counts.json"
OUTCOME_FREE = ("checkpoint_steps", "max_seconds", "reserve_seconds")
"""Options that may change between attempts: when to save and to stop."""


class Savepoint:
    """The savepoint of one facility in one round.

    Args:
        task: the task of the round.
        training: how it is trained.
        facts: what else decides the outcome.

    Raises:
        CrossFLError: the facility names no folder to keep it in.
    """

    def __init__(self, task: Task, training: Training, facts: Mapping[str, Any]) -> None:
        run = place.state_root(task) / f"savepoint-{task.data_seed}"
        self._folder = run / str(task.round)
        options = {k: v for k, v in training.asdict().items() if k not in OUTCOME_FREE}
        decisive = {**task.asdict(), **options, **facts, "crossfl": crossfl.__version__}
        words = json.dumps(decisive, sort_keys=True)
        self._key = hashlib.sha256(words.encode()).hexdigest()

    def write(self, families: Mapping[str, Callable[[Path], None]], counts: Any) -> None:
        """Save families of tensors, each by a function that writes its file, and the counts.

        The counts are a dataclass with `steps`.
        """
        values = dataclasses.asdict(counts)
        mine = self._folder / str(counts.steps)
        shutil.rmtree(mine, ignore_errors=True)
        with place.publish_state(mine) as folder:
            for family, save in families.items():
                save(folder / f"{family}.safetensors")
            write_json(folder / COUNTS, {"key": self._key, "counts": values})
        for path in self._folder.iterdir():
            if path != mine:
                shutil.rmtree(path, ignore_errors=True)

    def read(self) -> tuple[dict[str, Tensors], dict[str, Any]] | None:
        """The latest savepoint of this very task, if there is one."""
        steps = [int(p.name) for p in self._folder.glob("*") if p.name.isdecimal()]
        for number in sorted(steps, reverse=True):
            folder = self._folder / str(number)
            try:
                document = json.loads((folder / COUNTS).read_text(encoding="utf-8"))
                families = {p.stem: Tensors([p]) for p in sorted(folder.glob("*.safetensors"))}
            except (OSError, ValueError, CrossFLError):
                continue  # a disk that lost what it had synced: the round begins anew
            if document.get("key") == self._key:
                return families, document["counts"]
        return None

    def remove(self, own: bool) -> None:
        """Forget those of rounds before, which ended otherwise, and with `own` this one as well."""
        last = int(self._folder.name) - (not own)
        for path in self._folder.parent.glob("*"):
            if path.name.isdecimal() and int(path.name) <= last:
                shutil.rmtree(path, ignore_errors=True)
