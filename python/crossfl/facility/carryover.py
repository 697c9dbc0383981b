"""What a facility keeps from one round to the next, and never sends.

It lies under `CROSSFL_STATE/<facility>/<name>-<data seed>/<federation>-<round>`, where the round is
that of the task, in whichever round its update counts. A task goes on from what the last one left
whose update counted: what was left by one that was refused, or skipped, or is tried again, is as if
it had never been.

One of these things is the residual of an encoding, for error feedback: Seide et al. 2014;
Karimireddy et al. 2019, https://arxiv.org/abs/1901.09847.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from crossfl.errors import CrossFLError
from crossfl.facility import place
from crossfl.protocol import variables
from crossfl.protocol.records import Task
from crossfl.storage.tensorfile import TensorFile


class CarriedState:
    """One thing that one facility keeps in one federation, as the task of a round meets it.

    A facility of which no update has counted yet has none; what an earlier federation left is
    removed.

    Args:
        task: the task of this round.
        name: what is kept.
        keeps: whether this round keeps it, too; if not, what is not its own is left alone.

    Raises:
        CrossFLError: the facility names no folder to keep it in, or another federation keeps its
            own there.
    """

    def __init__(self, task: Task, name: str, *, keeps: bool = True) -> None:
        self.folder = place.state_root(task) / f"{name}-{task.data_seed}"
        self._mark = f"{task.federation}-"
        self._round, self._counted = task.round, task.counted
        if not keeps:
            return
        if not task.counted:
            shutil.rmtree(self.folder, ignore_errors=True)
        for path in self.folder.glob("[!.]*"):
            if not path.name.startswith(self._mark):
                raise CrossFLError(
                    f"{self.folder} is another federation's of the same seed: give each a seed of "
                    f"its own, or its own {variables.STATE}"
                )

    @property
    def before(self) -> Path | None:
        """The folder that the last round that counted left; None where it left none here."""
        path = self._of(self._counted)
        return path if self._counted and path.is_dir() else None

    @property
    def lost(self) -> str | None:
        """What to say where the last round that counted should have left something."""
        if not self._counted or self.before:
            return None
        return f"nothing is left in {self.folder} of round {self._counted}: begins without"

    @contextlib.contextmanager
    def after(self) -> Iterator[Path]:
        """Give a folder for what this round leaves; at the end it stands beside the one before."""
        mine = self._of(self._round)
        shutil.rmtree(mine, ignore_errors=True)
        with place.publish_state(mine) as folder:
            yield folder
        for path in self.folder.iterdir():
            if path not in (mine, self.before):
                shutil.rmtree(path)

    def _of(self, number: int) -> Path:
        return self.folder / f"{self._mark}{number}"


class Residual:
    """What an encoding lost of a delta, kept for the facility's next delta.

    Residuals are fp32, in files named like the model's. An encoding that loses nothing worth
    keeping `keeps` none, and still sends what another lost.

    Raises:
        CrossFLError: the facility names no folder to keep them in, or another federation
            keeps its own there.
    """

    def __init__(self, task: Task, *, keeps: bool = True) -> None:
        self._carried = CarriedState(task, "residual", keeps=keeps)

    def before(self, base: TensorFile) -> TensorFile | None:
        """What earlier deltas lost of a file of the model; None before there were any.

        Raises:
            CrossFLError: it belongs to another model.
        """
        if self._carried.before is None:
            return None
        residual = TensorFile(self._carried.before / base.path.name)
        expected = {name: entry.shape for name, entry in base.parameters().items()}
        if {name: entry.shape for name, entry in residual.entries.items()} != expected:
            raise CrossFLError(
                f"{residual.path} is of another model: remove {self._carried.folder}"
            )
        return residual

    @property
    def lost(self) -> str | None:
        """What to say where earlier deltas should have left something."""
        return self._carried.lost

    def after(self) -> contextlib.AbstractContextManager[Path]:
        """Give a folder for what this delta loses."""
        return self._carried.after()
