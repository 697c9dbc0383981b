"""Copies on storage of the node, made once for all ranks there, and removed with the last of them.

Many ranks that read many small files burden the file system that a whole site shares; the job
script may name a folder of the node itself (`CROSSFL_STAGING`).
"""

import atexit
import fcntl
import hashlib
import os
import shutil
from pathlib import Path
from typing import TextIO

from crossfl.errors import CrossFLError

STAGING = "CROSSFL_STAGING"
JOBS = ("SLURM_JOB_ID", "PBS_JOBID")
"""A copy belongs to one job: what changed since is copied anew by the next."""


def staged(path: Path) -> Path:
    """The copy of a file or folder on this node; where no folder is named for it, `path` itself.

    The first rank that asks makes the copy, the others of the node wait for it.

    Raises:
        CrossFLError: the folder is not there, or has no room.
    """
    if not (root := os.environ.get(STAGING)):
        return path
    if not Path(root).is_absolute() or not Path(root).is_dir():
        raise CrossFLError(
            f"{STAGING} is {root!r}, which is no folder of this node: name one that the site has "
            "on compute nodes, or leave the setting `staging` out"
        )
    job = next((os.environ[name] for name in JOBS if name in os.environ), "")
    name = hashlib.sha256(f"{job} {path.resolve()}".encode()).hexdigest()[:16]
    folder = Path(root, f"crossfl-{name}")
    copy = folder / path.name
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        held = (folder / "held").open("w")
        fcntl.flock(held, fcntl.LOCK_SH)  # for as long as this rank lives
        with (folder / "making").open("w") as making:
            fcntl.flock(making, fcntl.LOCK_EX)
            if not copy.exists():
                _copy(path, folder / "partial")
                (folder / "partial").rename(copy)
    except OSError as error:
        shutil.rmtree(folder / "partial", ignore_errors=True)
        raise CrossFLError(
            f"{path.name} cannot be copied to {root} ({STAGING}): {error}; make room there, or "
            "leave the setting `staging` out"
        ) from None
    atexit.register(_remove, folder, held)
    return copy


def _copy(source: Path, target: Path) -> None:
    """Copy a file or folder; what links lead to is copied in their place."""
    shutil.rmtree(target, ignore_errors=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)


def _remove(folder: Path, held: TextIO) -> None:
    """Remove a copy, unless another rank of this node still holds it."""
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    shutil.rmtree(folder, ignore_errors=True)
