"""What a step hands back to the workflow engine: `cwl.output.json`."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crossfl.protocol.layout import CWL_OUTPUT
from crossfl.storage.files import check_vacant, write_json


@contextlib.contextmanager
def all_or_none(*directories: Path) -> Iterator[None]:
    """Leave none of these directories behind where what makes them fails.

    Raises:
        CrossFLError: one is there already, which is left as it is.
    """
    for directory in directories:
        check_vacant(directory)
    try:
        yield
    except BaseException:
        for directory in directories:
            shutil.rmtree(directory, ignore_errors=True)
        raise


def write(directory: Path, **values: Any) -> None:
    """Write `cwl.output.json`; paths become CWL directories or files, all else stays JSON."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / CWL_OUTPUT, {n: _cwl(value, directory) for n, value in values.items()})


def _cwl(value: Any, directory: Path) -> Any:
    if not isinstance(value, Path):
        return value
    return {
        "class": "Directory" if value.is_dir() else "File",
        "path": value.relative_to(directory).as_posix(),
    }
