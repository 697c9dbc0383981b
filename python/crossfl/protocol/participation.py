"""Which facilities take part in which round."""

from collections.abc import Sequence
from typing import Literal

from crossfl.errors import CrossFLError
from crossfl.protocol.records import Facility

Purpose = Literal["train", "evaluate"]


def takes_part(facility: Facility, number: int, purpose: Purpose) -> bool:
    """Whether a facility is asked in a round; a round it skips is one of training only."""
    member = facility.joins <= number <= (facility.leaves or number)
    return member and not (purpose == "train" and number in facility.skips)


def check_rounds(facilities: Sequence[Facility], rounds: range, least: int) -> None:
    """Check that at least so many facilities take part in each of these rounds.

    Raises:
        CrossFLError: they do not; the message names the first such round.
    """
    changes = [n for f in facilities for n in (f.joins, f.leaves or 0, *f.skips)]
    settled = 1 + max(changes, default=0)  # the first of the rounds that are all alike
    for number in rounds[: max(1, settled - rounds.start + 1)]:
        present = sum(takes_part(facility, number, "train") for facility in facilities)
        if present < least:
            raise CrossFLError(
                f"{present or 'no'} {'facilities take' if present > 1 else 'facility takes'} part "
                f"in round {number} of {rounds[-1]}, which needs {least}: see joins, leaves and "
                "skips of the facilities, and quorum, aggregation_rule and num_byzantine of the "
                "aggregation"
            )
