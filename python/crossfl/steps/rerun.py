"""A job that its scheduler runs again, in the folder where it ran before.

`qrerun`, `scontrol requeue` and a node that fails have the very same command run anew.
"""

import shutil
from pathlib import Path

from crossfl.errors import CrossFLError
from crossfl.protocol.manifest import EvaluationManifest, UpdateManifest
from crossfl.protocol.records import Task
from crossfl.storage import manifest
from crossfl.storage.files import check_vacant


def is_done(
    directory: Path, kind: type[UpdateManifest] | type[EvaluationManifest], task: Task
) -> bool:
    """Whether an earlier run of this very job has delivered all; what is not all is removed.

    A partial update is what a run delivers that is told to end. The run after it goes on from the
    savepoint.

    Raises:
        CrossFLError: the directory holds anything else.
    """
    if not directory.exists():
        return False
    try:
        left = manifest.verify(directory, kind)
    except CrossFLError:
        left = None
    mine = (task.facility, task.federation, task.round)
    if left is None or (left.facility, left.federation, left.round) != mine:
        check_vacant(directory)
        return False
    if left.status == "complete":
        return True
    shutil.rmtree(directory)
    return False
