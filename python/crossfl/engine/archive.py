"""What comes back from a site is not trusted: it may write in the place it was asked for, no other.

The engine asks a site for a path and unpacks the tar stream that answers. A hostile or broken site
may name other members than those, climb out with ``..``, go through a link, send devices, a
million files, a file of an exabyte, or half a stream. `extract` unpacks regular files and
folders below the path that was asked for, and refuses everything else; a refused or cut stream
leaves nothing behind. `copy` holds what a job leaves on this machine to the same rules.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol, Self, cast

MAX_MEMBERS = 100_000
MAX_BYTES = 2**40
MAX_HEADER = 2**16
"""Bytes in one extended header: a long name and a few attributes need far fewer."""
MAX_TAIL = 2**20
"""Bytes after the end of an archive: tar fills its last record, of 10 KiB, with zeros."""
BUFFER = 2**21
"""Bytes read and written at a time: those of a huge page, as which they are mapped where read."""

END = b"crossfl: end of archive\n"
"""Printed by the site after a `tar` that succeeded: without it the stream was cut."""

KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a FIFO",
}
EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class RefusedError(Exception):
    """What came is not what was asked for; the message says in what way."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much one transfer may bring."""

    members: int = MAX_MEMBERS
    bytes: int = MAX_BYTES


@dataclass
class Inbox:
    """The place that was asked for: counts what comes, and forgets it all when it is refused."""

    limits: Limits
    members: int = 0
    size: int = 0
    created: dict[Path, None] = field(default_factory=dict)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            for path in reversed(self.created):
                with contextlib.suppress(OSError):
                    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()

    def count(self, name: str, size: int, place: Path) -> None:
        """Take note of one more member, before anything is written."""
        self.members += 1
        self.size += size
        if self.members > self.limits.members:
            raise RefusedError(f"more than {self.limits.members} members (`maxArchiveMembers`)")
        if self.size > self.limits.bytes:
            raise RefusedError(
                f"{name} makes it more than {self.limits.bytes} bytes (`maxArchiveBytes`)"
            )
        if size > shutil.disk_usage(nearest(place)).free:
            raise RefusedError(f"{name} has {size} bytes, more than {place.parent} has free")

    def make_folder(self, path: Path, mode: int = 0o755) -> None:
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise RefusedError(f"{path} is in the way: a folder was to be there")
        if not path.exists():
            path.mkdir(mode=mode & 0o777 | 0o700)
            self.created[path] = None

    def make_file(self, path: Path, mode: int) -> IO[bytes]:
        """Open a new file, in place of one that was there; never what a link points to."""
        if path.is_dir() and not path.is_symlink():
            raise RefusedError(f"{path} is in the way: a file was to be there")
        path.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        handle = os.fdopen(os.open(path, flags, mode & 0o777 | 0o600), "wb")
        self.created[path] = None
        return handle


def nearest(path: Path) -> Path:
    """The closest folder above a path that exists."""
    return next(parent for parent in path.parents if parent.is_dir())


# --- from a tar stream ---------------------------------------------------------------------------


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class Archive(tarfile.TarFile):
    """A tar stream that knows whether its end was there: :mod:`tarfile` does not ask for it."""

    complete = False


class Member(tarfile.TarInfo):
    """A header that is checked before it makes :mod:`tarfile` read anything into memory."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            cast(Archive, archive).complete = True
            raise

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        member = super().frombuf(buf, encoding, errors)
        if member.size < 0 or (member.type in EXTENDED and member.size > MAX_HEADER):
            raise RefusedError(f"{member.name!r} has a header of {member.size} bytes")
        return member

    def _refuse_sparse(self, *_: object) -> Self:
        raise RefusedError(f"{self.name!r} is a sparse file")

    _proc_sparse = _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


class Ending:
    """A stream that remembers how it ended."""

    def __init__(self, stream: Readable) -> None:
        self.stream = stream
        self.last = b""

    def read(self, size: int) -> bytes:
        if chunk := self.stream.read(size):
            self.last = (self.last + chunk)[-len(END) :]
        return chunk

    def drain(self) -> bytes:
        """Read what follows the archive, and give its last bytes."""
        after = 0
        while chunk := self.read(BUFFER):
            after += len(chunk)
            if after > MAX_TAIL:
                raise RefusedError("the archive has ended, and the stream goes on")
        return self.last


def relative(member: str, root: str) -> Path:
    """Where a member lies below what was asked for; refuses a name that is not there."""
    if member.startswith("/"):
        raise RefusedError(f"{member!r} is absolute")
    first, *parts = member.rstrip("/").split("/")
    if ".." in (first, *parts):
        raise RefusedError(f"{member!r} climbs out")
    if first != root:
        raise RefusedError(f"{member!r} was not asked for, {root!r} was")
    return Path(*parts)


def extract(stream: Readable, root: str, destination: Path, limits: Limits) -> None:
    """Unpack a tar stream of one file or folder, named `root`, to a destination.

    A folder's contents go into the destination; a file becomes the destination, or goes into it
    where that is a folder. Owners, times and special permissions are not taken over.

    Raises:
        RefusedError: it is not such a stream, or not all of it came. Nothing of it is left.
    """
    ending = Ending(stream)
    with Inbox(limits) as inbox:
        try:
            with Archive.open(
                fileobj=cast(IO[bytes], ending), mode="r|", bufsize=BUFFER, tarinfo=Member
            ) as archive:
                for member in archive:
                    unpack(member, archive, root, destination, inbox)
        except (tarfile.TarError, RecursionError, ValueError) as error:
            raise RefusedError(f"not a whole archive: {error}") from error
        except OSError as error:
            raise RefusedError(f"it cannot be written: {error}") from error
        if not archive.complete or ending.drain() != END:
            raise RefusedError("the stream was cut short: its end did not come")


def unpack(
    member: tarfile.TarInfo, archive: tarfile.TarFile, root: str, destination: Path, inbox: Inbox
) -> None:
    below = relative(member.name, root)
    path = destination / below
    if below == Path() and not member.isdir() and destination.is_dir():
        path = destination / root
    twin: Path | None = None
    if member.islnk():
        # tar's way to send one file under two names: the first must have come before.
        twin = destination / relative(member.linkname, root)
        if twin not in inbox.created:
            raise RefusedError(f"{member.name!r} is a hard link to {member.linkname!r}")
    elif not member.isdir() and member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise RefusedError(f"{member.name!r} is {KINDS.get(member.type, 'of an unknown kind')}")
    inbox.count(member.name, twin.stat().st_size if twin else member.size, path)
    for parent in reversed([p for p in path.parents if p.is_relative_to(destination)]):
        inbox.make_folder(parent)
    if member.isdir():
        inbox.make_folder(path, member.mode)
        return
    with inbox.make_file(path, member.mode) as target:
        contents = twin.open("rb") if twin else archive.extractfile(member)
        assert contents is not None  # a regular file has contents
        with contents:
            shutil.copyfileobj(contents, target, BUFFER)
        if not twin and target.tell() != member.size:
            raise RefusedError(f"the stream was cut short in {member.name!r}")


def copy(source: Path, destination: Path, limits: Limits) -> None:
    """Copy a file or folder under the rules of `extract`.

    Links are followed, as a job may well leave one to another of its files, but not out of the
    folder that is copied.
    """
    top = source.resolve(strict=True)
    with Inbox(limits) as inbox:
        try:
            if not top.is_dir() and destination.is_dir():
                destination = destination / source.name
            copy_below(top, destination, (top,), inbox)
        except RecursionError as error:
            raise RefusedError("its folders are nested too deeply") from error
        except OSError as error:
            raise RefusedError(f"it cannot be copied: {error}") from error


def copy_below(source: Path, destination: Path, above: tuple[Path, ...], inbox: Inbox) -> None:
    """Copy what lies at a resolved path; `above` holds the folders on the way to it."""
    facts = source.stat()
    is_folder = stat.S_ISDIR(facts.st_mode)
    if not is_folder and not stat.S_ISREG(facts.st_mode):
        raise RefusedError(f"{str(source)!r} is neither a file nor a folder")
    inbox.count(str(source), 0 if is_folder else facts.st_size, destination)
    if not is_folder:
        with source.open("rb") as contents, inbox.make_file(destination, facts.st_mode) as target:
            shutil.copyfileobj(contents, target, BUFFER)
        return
    inbox.make_folder(destination, facts.st_mode)
    for entry in source.iterdir():
        real = entry.resolve(strict=True)
        if not real.is_relative_to(above[0]):
            raise RefusedError(f"{str(entry)!r} is a link out of {str(above[0])!r}")
        if real in above:
            raise RefusedError(f"{str(entry)!r} is a link to a folder that holds it")
        copy_below(real, destination / entry.name, (*above, real), inbox)
