"""What of a facility's measurements may leave it: enough samples, enough tokens, few digits.

The server chooses model and settings, and sees the metrics of each choice. A metric of few samples
would let it read them: with one sample, the difference of two losses at sequence lengths 10 and 11
is the loss of one token, and a model whose logits are all different turns that into the token.
So whatever two settings differ in, their metrics differ by `min_samples` samples or by none. A
model made to react to one text alone can still betray whether that text is among many: against
that only noise helps.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from crossfl.facility.place import Disclosure
from crossfl.protocol import variables

T = TypeVar("T")
DIGITS = 4
"""Decimals of a loss or score; significant digits of a perplexity."""


class Span(NamedTuple):
    """Positions in a sample whose tokens are predicted: from `begin` to before `end`."""

    begin: int
    end: int
    gaps: tuple[int, ...] = ()
    """Positions between the two that are not predicted, in ascending order."""

    def until(self, length: int) -> int:
        """Predicted tokens within a sequence length."""
        return max(0, min(self.end, length) - self.begin) - bisect_left(self.gaps, length)

    def reaches(self, length: int) -> bool:
        """Whether the last token within a sequence length is predicted."""
        return self.begin < length <= self.end and length - 1 not in self.gaps


def usable(size: int, wanted: int | None, floor: int) -> int:
    """How many of `size` validation samples are used: a multiple of the floor, and never fewer.

    Two evaluations thus differ by no sample or by as many as the floor. Where there are fewer than
    the floor, all are named: their metrics do not leave.
    """
    count = size if wanted is None else min(size, wanted)
    return min(size, max(floor, count - count % floor))


def measured_length(spans: Sequence[Span], length: int, floor: int) -> int:
    """The sequence length to measure at: `length`, or the next shorter one that isolates nobody.

    At a length that counts, at least `floor` samples have their last token predicted there, and as
    many, or none, have more behind it. Two such lengths differ in the tokens of `floor` samples.

    Args:
        spans: the predicted positions of each sample.
        length: the sequence length that was asked for, in tokens.
        floor: samples.
    """
    longest = max((span.end for span in spans), default=0)
    if length >= longest:
        return length
    for shorter in range(length, 0, -1):
        reaching = sum(span.reaches(shorter) for span in spans)
        behind = sum(span.end > shorter for span in spans)
        if reaching >= floor and behind >= floor:
            return shorter
    return 0


def whole_blocks(group: Sequence[T], floor: int, is_usable: Callable[[T], bool]) -> list[T]:
    """The items of a group without every block of `floor` in a row that has an unusable one.

    Whether a sample can be used may depend on the tokenizer, which the server chooses. Leaving out
    that sample alone would tell it by the difference to another choice.
    """
    last = max(len(group) // floor, 1) - 1

    def block_of(i: int) -> int:
        return min(i // floor, last)

    dropped = {block_of(i) for i, item in enumerate(group) if not is_usable(item)}
    return [item for i, item in enumerate(group) if block_of(i) not in dropped]


def groups_of(
    items: Iterable[tuple[str | None, T]], is_large: Callable[[Sequence[T]], bool]
) -> dict[str | None, list[T]]:
    """Items by task, and under None the rest: those of no task, and those of tasks too small.

    The rest can be worked out from the whole and the tasks, so it takes in further tasks, the
    smallest first, until it is large enough or there are none.
    """
    tasks: dict[str, list[T]] = {}
    rest: list[T] = []
    for task, item in items:
        (rest if task is None else tasks.setdefault(task, [])).append(item)
    for name in [name for name, group in tasks.items() if not is_large(group)]:
        rest += tasks.pop(name)
    while rest and tasks and not is_large(rest):
        rest += tasks.pop(min(tasks, key=lambda name: (len(tasks[name]), name)))
    groups: dict[str | None, list[T]] = {None: rest} if rest else {}
    groups.update(tasks)
    return groups


def edge_losses(
    losses: Sequence[float], batch_size: int, floor: int
) -> tuple[float | None, float | None]:
    """Mean loss of the first and of the last steps that together hold `floor` samples.

    Args:
        losses: mean loss of each step in nats per token.
        batch_size: samples of a step.
        floor: samples.

    Returns:
        Both rounded; None where the steps hold fewer.
    """
    steps = math.ceil(floor / batch_size)
    if len(losses) < steps:
        return None, None
    first, last = (sum(part) / steps for part in (losses[:steps], losses[-steps:]))
    return round(first, DIGITS), round(last, DIGITS)


def rounded(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics, and those of tasks in them, with the digits that a reader needs."""
    return {name: _rounded(name, value) for name, value in metrics.items()}


def _rounded(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return rounded(value)
    if not isinstance(value, float):
        return value
    return float(f"{value:.{DIGITS}g}") if name == "perplexity" else round(value, DIGITS)


def withheld(disclosure: Disclosure) -> str:
    """Why no metric leaves."""
    return (
        f"metrics stay here: fewer than {disclosure.min_samples} samples "
        f"({variables.MIN_VALIDATION_SAMPLES}) or {disclosure.min_tokens} predicted tokens "
        f"({variables.MIN_VALIDATION_TOKENS}) would be measured; add validation samples, or raise "
        "training.validation_samples and training.sequence_length"
    )
