"""What a facility keeps from one round to the next, and never sends.

It lies under `CROSSFL_STATE/<facility>/<name>-<data seed>/<round>`. A round that is tried again
finds what the round before has left, which is kept until the next one has left its own.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from crossfl import manifest, site
from crossfl.records import Task


class Memory:
    """One thing that one facility keeps in one federation, as the task of a round meets it.

    A facility that has trained on no sample yet has none; what an earlier federation left is
    removed.

    Args:
        task: the task of this round.
        name: what is kept.

    Raises:
        CrossFLError: the facility names no folder to keep it in.
    """

    def __init__(self, task: Task, name: str) -> None:
        self.folder = site.state_root(task) / f"{name}-{task.data_seed}"
        self._round = task.round
        if task.samples_seen == 0:
            shutil.rmtree(self.folder, ignore_errors=True)
        rounds = [int(p.name) for p in self.folder.glob("*") if p.name.isdecimal()]
        earlier = [r for r in rounds if r < task.round and task.samples_seen > 0]
        self._last = max(earlier, default=None)

    @property
    def before(self) -> Path | None:
        """The folder with what an earlier round left; None where there was none."""
        return None if self._last is None else self.folder / str(self._last)

    @contextlib.contextmanager
    def after(self) -> Iterator[Path]:
        """Give a folder for what this round leaves; at the end it stands beside the one before."""
        mine = self.folder / str(self._round)
        shutil.rmtree(mine, ignore_errors=True)
        with manifest.publish(mine) as folder:
            yield folder
        for path in self.folder.iterdir():
            if path.name not in (str(self._last), str(self._round)):
                shutil.rmtree(path)
