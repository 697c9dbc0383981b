"""Manifests on disk: a directory that travels lists its files, and they are checked on arrival."""

import bisect
import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from crossfl.errors import CrossFLError
from crossfl.protocol import decoding
from crossfl.protocol.layout import MANIFEST, SIGNATURE
from crossfl.protocol.manifest import LIMITS, FileEntry, Manifest, an, decode, kind_of

M = TypeVar("M", bound=Manifest)


def write(directory: Path, manifest: M, sha256_of: Mapping[str, str] = MappingProxyType({})) -> M:
    """Write the manifest over all files of the directory; what is written, complete and sealed.

    Args:
        directory: the directory, with all its files.
        manifest: what the manifest states besides the files.
        sha256_of: digests that are known, by file; those files are not read again.
    """
    files = {
        (name := path.relative_to(directory).as_posix()): FileEntry(
            bytes=path.stat().st_size, sha256=sha256_of.get(name) or sha256(path)
        )
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / MANIFEST
    }
    complete = manifest.replace(files=files).sealed()
    (directory / MANIFEST).write_bytes(decoding.encode(complete))
    return complete


def read(directory: Path, kind: type[M]) -> M:
    """Read the manifest of a directory without checking its files.

    Raises:
        CrossFLError: there is none, or it is not one of this kind and format.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise CrossFLError(
            f"{directory} has no {MANIFEST}: it is incomplete, or not {an(kind_of(kind))} made by "
            "crossfl"
        )
    if (size := path.stat().st_size) > LIMITS[kind]:
        raise CrossFLError(f"{path} has {size} bytes: it is not a manifest")
    return decode(path.read_bytes(), kind, str(path))


def verify(directory: Path, kind: type[M], only: Collection[str] | None = None) -> M:
    """Read the manifest of a directory, and `check` the directory against it.

    Raises:
        CrossFLError: as `read` and `check`.
    """
    manifest = read(directory, kind)
    check(directory, manifest, only)
    return manifest


def check(directory: Path, manifest: Manifest, only: Collection[str] | None = None) -> None:
    """Check that a directory holds exactly the files of its manifest, byte for byte.

    With `only`, the contents of the named files alone are read and checked.

    Raises:
        CrossFLError: a file is missing, unlisted, a link, or differs in size or digest.
    """
    noun = kind_of(type(manifest))
    if not manifest.is_intact():
        raise CrossFLError(
            f"{directory / MANIFEST} is corrupt: its seal does not match its contents. Transfer "
            "the directory again"
        )
    present = _files(directory, manifest.files)
    if unlisted := sorted(present.keys() - manifest.files.keys() - {MANIFEST, SIGNATURE}):
        raise CrossFLError(f"{directory / unlisted[0]} is not in the manifest of this {noun}")
    for name, entry in manifest.files.items():
        path, size = directory / name, present.get(name)
        if size is None:
            raise CrossFLError(
                f"{path} is missing: the {noun} arrived incomplete, transfer it again"
            )
        if size != entry.bytes:
            raise CrossFLError(
                f"{path} has {size} bytes instead of {entry.bytes}: the {noun} was cut or changed "
                "on its way, transfer it again"
            )
        if (only is None or name in only) and sha256(path) != entry.sha256:
            raise CrossFLError(
                f"{path} does not match its sha256: the {noun} changed on its way, transfer it "
                "again"
            )


def _files(directory: Path, listed: Collection[str]) -> dict[str, int]:
    """The size of each file under a directory, by its path in there.

    Raises:
        CrossFLError: there is a link, a device, or a folder without a listed file.
    """
    names = sorted(listed)  # not their parents: of long paths those are many more

    def is_named(folder: str) -> bool:
        after = bisect.bisect(names, f"{folder}/")
        return after < len(names) and names[after].startswith(f"{folder}/")

    sizes: dict[str, int] = {}
    pending = [directory]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                path = Path(entry.path)
                name = path.relative_to(directory).as_posix()
                if entry.is_dir(follow_symlinks=False):
                    if not is_named(name):
                        raise CrossFLError(f"{path} is a folder that the manifest does not name")
                    pending.append(path)
                elif entry.is_file(follow_symlinks=False):
                    sizes[name] = entry.stat(follow_symlinks=False).st_size
                else:
                    raise CrossFLError(f"{path} is a link or a device: only files may travel")
    return sizes


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
