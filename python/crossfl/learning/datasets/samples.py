"""Samples: what a row of a dataset holds, and the one place where a failure becomes a count."""

from array import array
from collections.abc import Callable, Iterable, Sequence
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


class Chat(NamedTuple):
    """A conversation, laid out by the chat template of the model's tokenizer."""

    turns: tuple[tuple[str, str], ...]
    """Role and content of each turn."""
    task: str | None = None


class Image(NamedTuple):
    """An image, as the model takes it, and the number of its class."""

    pixels: "np.ndarray[Any, np.dtype[np.float32]]"
    """fp32, [channels, height, width]."""
    label: int
    task: str | None = None


Sample = Text | Chat | Image


class Samples(list[Sample]):
    """The samples that could be read, where each is from, and why others are left out."""

    def __init__(self, bad: Iterable[str] = ()) -> None:
        super().__init__()
        self.bad = list(bad)
        """A reason for each row that is left out; it may leave the facility: it quotes none."""
        self._paths: list[Path] = []
        self._origins = (array("i"), array("q"))
        """The number of its path and the row of each sample."""

    def add(self, path: Path, row: int, noun: str, make: Callable[[], Sample]) -> None:
        """Add the sample of a row, or the reason why there is none, whatever was raised.

        Args:
            path: the file.
            row: number of the row in it, from 1 on.
            noun: what the row is not, if it fails otherwise than with a reason of our own.
            make: makes the sample.
        """
        try:
            sample = make()
        except CrossFLError as error:
            self.bad.append(f"{path}:{row}: {error}")
        except Exception as error:  # its text may quote the data
            self.bad.append(f"{path}:{row} is not {noun} ({type(error).__name__})")
        else:
            self.append(sample)
            self._place(path, row)

    def place(self, index: int) -> str:
        """File and row of a sample."""
        paths, rows = self._origins
        return f"{self._paths[paths[index]]}:{rows[index]}"

    def select(self, indices: Iterable[int]) -> Self:
        """Some of the samples, with the reasons of all rows that are left out."""
        selected = type(self)(self.bad)
        for i in indices:
            selected.append(self[i])
            selected._place(self._paths[self._origins[0][i]], self._origins[1][i])
        return selected

    def _place(self, path: Path, row: int) -> None:
        if not self._paths or self._paths[-1] is not path:
            self._paths.append(path)
        self._origins[0].append(len(self._paths) - 1)
        self._origins[1].append(row)


def left_out(bad: Sequence[str], what: str) -> list[str]:
    """What to say of the rows that are left out, if any."""
    return [f"rows of {what} that are left out: {len(bad):,}; the first: {bad[0]}"] if bad else []


def check_share(good: int, reasons: list[str], what: str) -> None:
    """Check that at least half of a dataset can be used.

    Raises:
        CrossFLError: it cannot; the first reason says why.
    """
    if len(reasons) > good:
        raise CrossFLError(
            f"{what}: {len(reasons)} of {good + len(reasons)} samples cannot be read, the first "
            f"because: {reasons[0]}"
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
    return fields if sample.task is None else fields | {"task": sample.task}
