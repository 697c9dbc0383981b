"""Samples: what a row of a dataset holds, and the one place where a failure becomes a count."""

from array import array
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from crossfl.errors import CrossFLError

if TYPE_CHECKING:
    import numpy as np


class Text(NamedTuple):
    """A text to learn, or a prompt and the completion to learn; and the task it is of, if named."""

    prompt: str | None
    text: str
    task: str | None = None
    group: str | None = None
    """What it is of besides, such as a user or an instrument."""


class Chat(NamedTuple):
    """A conversation, laid out by the chat template of the model's tokenizer."""

    turns: tuple[tuple[str, str], ...]
    """Role and content of each turn."""
    task: str | None = None
    group: str | None = None


class Image(NamedTuple):
    """An image, as the model takes it, and the number of its class."""

    pixels: "np.ndarray[Any, np.dtype[np.float32]]"
    """fp32, [channels, height, width]."""
    label: int
    task: str | None = None
    group: str | None = None


Sample = Text | Chat | Image
MOST_REASONS = 1000
"""Reasons that are kept."""


class Placed(NamedTuple):
    """A sample and where it is from."""

    path: Path
    row: int
    """Number of the row in the file, from 1 on."""
    sample: Sample

    @property
    def place(self) -> str:
        """File and row."""
        return f"{self.path}:{self.row}"


class Reasons:
    """Why rows are left out: how many are, and the reasons of the first ones.

    A reason may leave the facility: it quotes no value.
    """

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, reason: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.first) < MOST_REASONS:
            self.first.append(reason)

    def extend(self, others: "Reasons") -> None:
        """Count those of others as well."""
        self.count += others.count
        self.first += others.first[: MOST_REASONS - len(self.first)]


class Samples(list[Sample]):
    """Samples that are in memory, where each is from, and why others are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons = Reasons()
        self._paths: list[Path] = []
        self._origins = (array("i"), array("q"))
        """The number of its path and the row of each sample."""

    @property
    def bad(self) -> list[str]:
        """A reason for each row that is left out, or the first ones."""
        return self.reasons.first

    def add(self, placed: Placed) -> None:
        """Add a sample."""
        self.append(placed.sample)
        if not self._paths or self._paths[-1] is not placed.path:
            self._paths.append(placed.path)
        self._origins[0].append(len(self._paths) - 1)
        self._origins[1].append(placed.row)

    def placed(self) -> Iterator[Placed]:
        """The samples, each with its place."""
        for sample, path, number in zip(self, *self._origins, strict=True):
            yield Placed(self._paths[path], number, sample)

    def place(self, index: int) -> str:
        """File and row of a sample."""
        paths, rows = self._origins
        return f"{self._paths[paths[index]]}:{rows[index]}"

    def begin(self, count: int) -> Self:
        """The first ones, with the reasons of all rows that are left out."""
        selected = type(self)()
        selected.reasons = self.reasons
        for placed in islice(self.placed(), count):
            selected.add(placed)
        return selected


def attempt(path: Path, row: int, noun: str, make: Callable[[], Sample]) -> Placed | str:
    """The sample of a row, or the reason why there is none, whatever was raised.

    Args:
        path: the file.
        row: number of the row in it, from 1 on.
        noun: what the row is not, if it fails otherwise than with a reason of our own.
        make: makes the sample.
    """
    try:
        return Placed(path, row, make())
    except CrossFLError as error:
        return f"{path}:{row}: {error}"
    except Exception as error:  # its text may quote the data
        return f"{path}:{row} is not {noun} ({type(error).__name__})"


def left_out(reasons: Reasons, what: str) -> list[str]:
    """What to say of the rows that are left out, if any."""
    if not reasons.count:
        return []
    return [f"rows of {what} that are left out: {reasons.count:,}; the first: {reasons.first[0]}"]


def check_share(good: int, reasons: Reasons, what: str) -> None:
    """Check that at least half of a dataset can be used.

    Raises:
        CrossFLError: it cannot; the first reason says why.
    """
    if reasons.count > good:
        raise CrossFLError(
            f"{what}: {reasons.count} of {good + reasons.count} samples cannot be read, the first "
            f"because: {reasons.first[0]}"
        )


def row(sample: Sample) -> dict[str, Any]:
    """The sample as a row of a `.jsonl` file, which `read` reads as the same sample."""
    if isinstance(sample, Image):
        fields: dict[str, Any] = {"pixels": sample.pixels.tolist(), "label": sample.label}
    elif isinstance(sample, Chat):
        fields = {"messages": [{"role": r, "content": c} for r, c in sample.turns]}
    elif sample.prompt is None:
        fields = {"text": sample.text}
    else:
        fields = {"prompt": sample.prompt, "completion": sample.text}
    named = {"task": sample.task, "group": sample.group}
    return fields | {name: value for name, value in named.items() if value is not None}
