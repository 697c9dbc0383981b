"""What a step hands back to the workflow engine: `cwl.output.json`."""

from pathlib import Path
from typing import Any

from crossfl.protocol.layout import CWL_OUTPUT
from crossfl.storage.files import write_json


def write(directory: Path, **values: Any) -> None:
    """Write `cwl.output.json`; paths become CWL directories or files, all else stays JSON."""
    write_json(directory / CWL_OUTPUT, {n: _cwl(value, directory) for n, value in values.items()})


def _cwl(value: Any, directory: Path) -> Any:
    if not isinstance(value, Path):
        return value
    return {
        "class": "Directory" if value.is_dir() else "File",
        "path": value.relative_to(directory).as_posix(),
    }
