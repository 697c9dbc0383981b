"""Files and directories, written whole or not at all."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from crossfl.errors import CrossFLError


@contextlib.contextmanager
def publish(directory: Path) -> Iterator[Path]:
    """Give a temporary directory to write into; at the end it takes its name, whole or not at all.

    Before that its files are synced: after a crash or a kill the name is there with all its bytes,
    or is not there.

    Raises:
        CrossFLError: the name is already taken.
    """
    check_vacant(directory)
    partial = _partial(directory)
    shutil.rmtree(partial, ignore_errors=True)  # of one that was killed, and had the same number
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        partial.rename(directory)
        _sync(directory.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_vacant(directory: Path) -> None:
    """Refuse a name that is taken, before any work is done for it.

    Raises:
        CrossFLError: it is taken.
    """
    if directory.exists():
        raise CrossFLError(f"{directory} exists already: remove it or name another output")


def write_json(path: Path, document: Any, *, sync: bool = False) -> None:
    """Write a JSON file, whole or not at all."""
    write_files({path: (json.dumps(document, indent=1) + "\n").encode()}, sync=sync)


def write_bytes(path: Path, content: bytes, *, sync: bool = False) -> None:
    """Write a file, whole or not at all."""
    write_files({path: content}, sync=sync)


def write_files(files: Mapping[Path, bytes], *, sync: bool = False) -> None:
    """Write several files: none takes its name, in the order given, before all are written.

    With `sync`, they are on the disk by then: a crash of the machine leaves none of them empty.
    """
    partials = {path: _partial(path) for path in files}
    try:
        for path, partial in partials.items():
            with partial.open("wb") as stream:
                stream.write(files[path])
                if sync:
                    stream.flush()
                    os.fsync(stream.fileno())
        for path, partial in partials.items():
            partial.rename(path)
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)


def concatenate(sources: Iterable[Path], target: Path) -> None:
    """Write a file from the contents of others, whole or not at all."""
    partial = _partial(target)
    try:
        with partial.open("wb") as stream:
            for source in sources:
                with source.open("rb") as content:
                    shutil.copyfileobj(content, stream)
        partial.rename(target)
    finally:
        partial.unlink(missing_ok=True)


def link_tree(source: Path, target: Path) -> None:
    """Give a directory a second name, file by file; nothing may be changed in place after that."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            link(path, copy)


def link(source: Path, target: Path) -> None:
    """Give a file a second name, a hard link where the file system has them, or else a copy."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def break_hard_links(directory: Path) -> None:
    """Make the files of a directory its own, where they are another's too under a second name."""
    for path in directory.rglob("*"):
        if path.is_file() and path.stat().st_nlink > 1:
            copy = _partial(path)
            shutil.copyfile(path, copy)
            copy.rename(path)


def _partial(path: Path) -> Path:
    """The name of a file or directory while it is being written."""
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
