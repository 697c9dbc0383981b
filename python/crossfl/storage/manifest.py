"""Manifests: a directory that travels lists its files with size and sha256, checked on arrival."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from crossfl.errors import CrossFLError

FILE = "manifest.json"
SIGNATURE = f"{FILE}.sig"
"""Who made the directory, signed over its manifest; see `crossfl.storage.signature`."""
FORMAT = 1
LARGEST = 1 << 20
"""Bytes of the manifest of an update; more is refused unread."""
Kind = Literal["model", "state", "update"]


@contextlib.contextmanager
def publish(directory: Path) -> Iterator[Path]:
    """Give a temporary directory to write into; at the end it takes its name, whole or not at all.

    Before that its files are synced: after a crash or a kill the name is there with all its bytes,
    or is not there.

    Raises:
        CrossFLError: the name is already taken.
    """
    check_vacant(directory)
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)  # of one that was killed, and had the same number
    partial.mkdir(parents=True)
    try:
        yield partial
        _sync(partial)
        partial.rename(directory)
        _sync_one(directory.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_vacant(directory: Path) -> None:
    """Refuse a name that is taken, before any work is done for it."""
    if directory.exists():
        raise CrossFLError(f"{directory} exists already: remove it or name another output")


def write(
    directory: Path,
    kind: Kind,
    fields: dict[str, Any],
    known: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Write `manifest.json` over all files of the directory, together with the given fields.

    Files whose sha256 is known, by name, are not read again.
    """
    files = {
        (name := path.relative_to(directory).as_posix()): {
            "bytes": path.stat().st_size,
            "sha256": known.get(name) or sha256(path),
        }
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / FILE
    }
    manifest = {"kind": kind, "format": FORMAT, **fields, "digest": digest(files), "files": files}
    manifest["seal"] = seal(manifest)
    (directory / FILE).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def read(directory: Path, kind: Kind) -> dict[str, Any]:
    """Read the manifest of a directory without checking its files.

    Raises:
        CrossFLError: there is none, or it is not one of this kind and format.
    """
    path = directory / FILE
    if not path.is_file():
        raise CrossFLError(
            f"{directory} has no {FILE}: it is incomplete, or not a {kind} made by crossfl"
        )
    if kind == "update" and path.stat().st_size > LARGEST:
        raise CrossFLError(f"{path} has {path.stat().st_size} bytes: it is not a manifest")
    try:
        manifest = json.loads(path.read_text())
        found, version, files = manifest["kind"], manifest["format"], manifest["files"]
        complete = all({"bytes", "sha256"} <= entry.keys() for entry in files.values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CrossFLError(f"{path} is not a manifest: it is damaged, send it again") from None
    if found != kind or not complete:
        raise CrossFLError(f"{path} describes a {found}, where a {kind} was expected")
    if version != FORMAT:
        raise CrossFLError(f"{path} has format {version}; this crossfl reads format {FORMAT}")
    return dict(manifest)


def verify(directory: Path, kind: Kind, only: Collection[str] | None = None) -> dict[str, Any]:
    """Check that a directory holds exactly the files of its manifest, byte for byte.

    With `only`, the contents of the named files alone are read and checked.

    Raises:
        CrossFLError: a file is missing, unlisted, or differs in size or digest.
    """
    manifest = read(directory, kind)
    files = manifest["files"]
    if (manifest.get("digest"), manifest.get("seal")) != (digest(files), seal(manifest)):
        raise CrossFLError(f"{directory / FILE} does not agree with itself: send it again")
    found = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if not p.is_dir()}
    if unlisted := sorted(found - set(files) - {FILE, SIGNATURE}):
        raise CrossFLError(f"{directory / unlisted[0]} is not in the manifest of this {kind}")
    for name, entry in files.items():
        path = directory / name
        if name not in found or not path.is_file():
            raise CrossFLError(f"{path} is missing: the {kind} arrived incomplete, send it again")
        if path.stat().st_size != entry["bytes"]:
            raise CrossFLError(
                f"{path} has {path.stat().st_size} bytes instead of {entry['bytes']}: "
                f"the {kind} was cut or changed on its way, send it again"
            )
        if (only is None or name in only) and sha256(path) != entry["sha256"]:
            raise CrossFLError(
                f"{path} does not match its sha256: the {kind} changed on its way, send it again"
            )
    return manifest


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(directory: Path) -> None:
    """Have everything in a directory on the disk, before a crash finds a name without its bytes."""
    for path in directory.rglob("*"):
        _sync_one(path)
    _sync_one(directory)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """One sha256 over those of several files and their names."""
    lines = "".join(f"{files[name]['sha256']}  {name}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode(errors="surrogatepass")).hexdigest()


def seal(manifest: Mapping[str, Any]) -> str:
    """One sha256 over all else that a manifest says: counts, round, base and the files' own."""
    rest = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
