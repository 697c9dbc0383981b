"""Error feedback: what an encoding lost of a delta, kept at the facility for its next delta.

Seide et al. 2014; Karimireddy et al. 2019, https://arxiv.org/abs/1901.09847. Residuals never leave
the facility. They lie under `CROSSFL_STATE/<facility>/residual-<data seed>/<round>`, fp32, in
files named like the model's. A round that is tried again finds the residual of the round before,
which is kept until the next one has its own.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from crossfl import manifest, site
from crossfl.errors import CrossFLError
from crossfl.records import Task
from crossfl.tensorfile import TensorFile


class Residual:
    """The residuals of one facility in one federation, as the task of a round meets them.

    A facility that has trained on no sample yet has none; what an earlier federation left is
    removed.

    Raises:
        CrossFLError: the facility names no folder to keep them in.
    """

    def __init__(self, task: Task) -> None:
        self._folder = site.state_root(task) / f"residual-{task.data_seed}"
        self._round = task.round
        if task.samples_seen == 0:
            shutil.rmtree(self._folder, ignore_errors=True)
        rounds = [int(p.name) for p in self._folder.glob("*") if p.name.isdecimal()]
        self._before = max((r for r in rounds if r < task.round), default=None)

    def before(self, base: TensorFile) -> TensorFile | None:
        """What earlier deltas lost of a file of the model; None before there were any.

        Raises:
            CrossFLError: it belongs to another model.
        """
        if self._before is None:
            return None
        found = TensorFile(self._folder / str(self._before) / base.path.name)
        if any(entry.shape != base.entries[name].shape for name, entry in found.entries.items()):
            raise CrossFLError(f"{found.path} is of another model: remove {self._folder}")
        return found

    @contextlib.contextmanager
    def after(self) -> Iterator[Path]:
        """Give a folder for what this delta loses; at the end it stands beside the one before."""
        mine = self._folder / str(self._round)
        shutil.rmtree(mine, ignore_errors=True)
        with manifest.publish(mine) as folder:
            yield folder
        for path in self._folder.iterdir():
            if path.name not in (str(self._before), str(self._round)):
                shutil.rmtree(path)
