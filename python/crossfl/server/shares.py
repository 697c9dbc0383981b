"""The shares of facilities in the mean."""

from collections.abc import Sequence

from crossfl.protocol.records import Aggregation
from crossfl.server.admission import Update


def shares(updates: Sequence[Update], aggregation: Aggregation) -> list[float]:
    """The share of each update in the mean: fp64, sums to 1, by the record's weighting.

    No share is above `max_share`, unless there are too few updates to fill the mean with such
    shares; then all are equal.
    """
    amounts = [update.weight(aggregation) for update in updates]
    total = sum(amounts)
    portions = [amount / total for amount in amounts]
    cap = aggregation.max_share
    if cap is None:
        return portions
    if cap * len(portions) <= 1:
        return [1 / len(portions)] * len(portions)
    capped: set[int] = set()
    while over := {i for i, share in enumerate(portions) if share > cap and i not in capped}:
        capped |= over
        rest = sum(amount for i, amount in enumerate(amounts) if i not in capped)
        left = 1 - cap * len(capped)
        portions = [cap if i in capped else left * a / rest for i, a in enumerate(amounts)]
    return portions
