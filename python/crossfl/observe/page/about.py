"""What the page says of a run besides its history: settings, time line, whether it goes on."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from crossfl.observe.live import read
from crossfl.observe.page.timeline import Timeline
from crossfl.protocol.layout import EVENTS, MASTER
from crossfl.protocol.text import printable

MOST_SETTINGS = 600
"""Rows of the table of settings."""
LARGEST_HEADER = 100 << 20
"""Bytes of the header of a safetensors file."""
LONGEST_VALUE = 200
"""Characters of a value in it."""


@dataclass(frozen=True)
class About:
    """One run of a federation."""

    timeline: Timeline = field(default_factory=Timeline)
    configuration: Mapping[str, Any] = field(default_factory=dict)
    """As the journal keeps it."""
    parameters: int | None = None
    """Of the global model, or of the adapter that is trained."""
    run: str | None = None
    """Name of the run in the journal."""
    written: str | None = None
    """When the page of a run that had not ended was written, in ISO 8601; None of one that has."""

    @property
    def is_adapter(self) -> bool:
        """Whether an adapter is trained, and not the whole model."""
        return bool(self.configuration.get("lora"))

    def settings(self) -> list[tuple[str, str]]:
        """Each setting by its path, records opened, as far as there is room."""
        return list(islice(_flat(self.configuration), MOST_SETTINGS))


def about_run(run: Path, configuration: Mapping[str, Any], state: Path) -> About:
    """What the journal knows of a run.

    Args:
        run: folder of the run in the journal.
        configuration: of the run.
        state: server state of its last round (directory).
    """
    return About(
        timeline=Timeline(read(run / EVENTS)),
        configuration=configuration,
        parameters=_parameters(sorted(state.glob(f"{MASTER}.*.safetensors"))),
        run=run.name,
    )


def _parameters(files: list[Path]) -> int | None:
    """Numbers in safetensors files, by their headers; None where one cannot be read."""
    total = 0
    try:
        for path in files:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, LARGEST_HEADER)))
            header.pop("__metadata__", None)
            total += sum(math.prod(entry["shape"]) for entry in header.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return total or None


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key in value:
            yield from _flat(value[key], f"{name}.{key}" if name else str(key))
    elif value is not None and value != () and value != []:
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        yield printable(name, longest=LONGEST_VALUE), printable(shown, longest=LONGEST_VALUE)
