"""What `crossfl compare` measures: the federation, each facility alone, pooled data, the base."""

from pathlib import Path
from typing import Annotated

from crossfl.errors import CrossFLError
from crossfl.protocol import decoding
from crossfl.protocol.fields import Loss, Name, Record, doc
from crossfl.protocol.measurements import Metrics

FEDERATED, POOLED, BASE = "federated", "pooled", "base"
"""Arms of a comparison; each other one is of the facility whose name it has, alone. The base is the
model that a job starts from, where that has been trained before."""
LARGEST = 256 << 20
"""Bytes of a comparison; more is refused unread."""


class Arm(Record, frozen=True, kw_only=True):
    """One way to train, measured at every facility."""

    rounds: Annotated[
        tuple[dict[Name, Loss], ...],
        doc("Loss by facility after each round, nats per token; the base has no round."),
    ]
    final: Annotated[dict[Name, Metrics], doc("Metrics of the last model by facility.")]


class Comparison(Record, frozen=True, kw_only=True):
    """All arms of a comparison."""

    arms: Annotated[dict[Name, Arm], doc("Each arm by its name.")]


def read_alone(path: Path) -> dict[str, dict[str, float]]:
    """The loss of each facility's model that was trained alone, at every facility.

    Raises:
        CrossFLError: the file is no comparison.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CrossFLError(f"{path} cannot be read: {error.strerror}") from None
    comparison = decoding.decode(content, Comparison, str(path), LARGEST)
    return {
        name: {at: metrics.loss for at, metrics in arm.final.items()}
        for name, arm in comparison.arms.items()
        if name not in (FEDERATED, POOLED, BASE)
    }
