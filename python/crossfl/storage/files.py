"""What a step hands back to the workflow engine: `cwl.output.json`."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILE = "cwl.output.json"


def write(directory: Path, **values: Any) -> None:
    """Write `cwl.output.json`; paths become CWL directories or files, all else stays JSON."""
    document = {name: _cwl(value, directory) for name, value in values.items()}
    write_json(directory / FILE, document)


def write_json(path: Path, document: Any, *, sync: bool = False) -> None:
    """Write a JSON file, whole or not at all."""
    write_files({path: (json.dumps(document, indent=1) + "\n").encode()}, sync=sync)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    write_files({path: content})


def write_files(files: Mapping[Path, bytes], *, sync: bool = False) -> None:
    """Write several files: none takes its name, in the order given, before all are written.

    With `sync`, they are on the disk by then: a crash of the machine leaves none of them empty.
    """
    partials = {path: path.with_name(f".{path.name}.partial-{os.getpid()}") for path in files}
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


def link_tree(source: Path, target: Path) -> None:
    """Give a directory a second name, file by file; nothing may be changed in place after that."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            link(path, target / path.relative_to(source))


def break_hard_links(directory: Path) -> None:
    """Make the files of a directory its own, where they are another's too under a second name."""
    for path in directory.rglob("*"):
        if path.is_file() and path.stat().st_nlink > 1:
            copy = path.with_name(f".{path.name}.partial-{os.getpid()}")
            shutil.copyfile(path, copy)
            copy.rename(path)


def link(source: Path, target: Path) -> None:
    """Give a file a second name, a hard link where the file system has them, or else a copy."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _cwl(value: Any, directory: Path) -> Any:
    if not isinstance(value, Path):
        return value
    return {
        "class": "Directory" if value.is_dir() else "File",
        "path": value.relative_to(directory).as_posix(),
    }
