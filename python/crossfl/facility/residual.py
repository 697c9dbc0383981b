"""Error feedback: what an encoding lost of a delta, kept at the facility for its next delta.

Seide et al. 2014; Karimireddy et al. 2019, https://arxiv.org/abs/1901.09847. Residuals never leave
the facility (`crossfl.facility.carryover`). They are fp32, in files named like the model's.
"""

import contextlib
from pathlib import Path

from crossfl.errors import CrossFLError
from crossfl.facility.carryover import Memory
from crossfl.protocol.records import Task
from crossfl.storage.tensorfile import TensorFile


class Residual:
    """The residuals of one facility in one federation, as the task of a round meets them.

    An encoding that loses nothing worth keeping `keeps` none, and still sends what another lost.

    Raises:
        CrossFLError: the facility names no folder to keep them in, or another federation
            keeps its own there.
    """

    def __init__(self, task: Task, *, keeps: bool = True) -> None:
        self._memory = Memory(task, "residual", keeps=keeps)

    def before(self, base: TensorFile) -> TensorFile | None:
        """What earlier deltas lost of a file of the model; None before there were any.

        Raises:
            CrossFLError: it belongs to another model.
        """
        if self._memory.before is None:
            return None
        found = TensorFile(self._memory.before / base.path.name)
        floats = {n: e.shape for n, e in base.entries.items() if e.dtype.is_floating_point}
        if {name: entry.shape for name, entry in found.entries.items()} != floats:
            raise CrossFLError(f"{found.path} is of another model: remove {self._memory.folder}")
        return found

    @property
    def lost(self) -> str | None:
        """What to say where earlier deltas should have left something."""
        return self._memory.lost

    def after(self) -> contextlib.AbstractContextManager[Path]:
        """Give a folder for what this delta loses."""
        return self._memory.after()
