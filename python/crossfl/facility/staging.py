"""Copies on storage of the node, made once for all ranks there, and removed with the last of them.

Many ranks that read many small files burden the file system that a whole site shares; the job
script may name a folder of the node itself (`CROSSFL_STAGING`). Other users may write to that
folder, so copies lie in one below it that only we can enter.
"""

import atexit
import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from crossfl.errors import CrossFLError
from crossfl.protocol.variables import STAGING

JOBS = ("SLURM_JOB_ID", "PBS_JOBID")
"""A copy belongs to one job: what changed since is copied anew by the next."""


def staged(path: Path) -> Path:
    """The copy of a file or folder on this node; where no folder is named for it, `path` itself.

    The first rank that asks makes the copy, the others of the node wait for it.

    Raises:
        CrossFLError: the folder does not exist, has no room, or somebody else prepared it.
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
    copy, partial = folder / path.name, folder / "partial"
    try:
        with _private_folder(folder) as descriptor:
            held = _lock_file("held", descriptor)
            fcntl.flock(held, fcntl.LOCK_SH)  # for as long as this rank lives
            making = _lock_file("making", descriptor)
        try:
            fcntl.flock(making, fcntl.LOCK_EX)
            if not copy.exists():
                _copy(path, partial)
                partial.rename(copy)
        finally:
            os.close(making)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CrossFLError(
            f"{path.name} cannot be copied to {root} ({STAGING}): {error}; make room there, or "
            "leave the setting `staging` out"
        ) from None
    atexit.register(_remove, folder, held)
    return copy


@contextlib.contextmanager
def _private_folder(folder: Path) -> Iterator[int]:
    """Make a folder that only this user can enter, or open the one that another rank has made.

    Raises:
        CrossFLError: somebody else may have made it, or put links into it.
    """
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (NotADirectoryError, PermissionError):  # a link is no directory, either
        raise _prepared(folder) from None
    try:
        status = os.fstat(descriptor)
        # Below a folder with the set-group-ID bit, the new one has it, too.
        private = (status.st_uid, status.st_mode & 0o777) == (os.getuid(), 0o700)
        with os.scandir(descriptor) as entries:
            if not private or any(entry.is_symlink() for entry in entries):
                raise _prepared(folder)
        yield descriptor
    finally:
        os.close(descriptor)


def _prepared(folder: Path) -> CrossFLError:
    return CrossFLError(
        f"{folder} ({STAGING}) is not a folder that only this user can enter, or it holds links: "
        "somebody else may have prepared it. Remove it, or name another staging folder"
    )


def _lock_file(name: str, folder: int) -> int:
    """A file to lock in a folder, by their descriptors; a link in its place is an error."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, 0o600, dir_fd=folder)


def _copy(source: Path, target: Path) -> None:
    """Copy a file or folder; what links lead to is copied in their place."""
    if target.is_dir():  # of a rank that was killed
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)


def _remove(folder: Path, held: int) -> None:
    """Remove a copy, unless another rank of this node still holds it."""
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    shutil.rmtree(folder, ignore_errors=True)
