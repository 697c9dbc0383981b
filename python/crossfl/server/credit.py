"""Credit: the weight of an update that comes when it comes, in a federation without rounds.

Each facility gathers credit at the rate of its share, and an update is given all of it, up to a
cap. So a facility that delivers seldom counts more each time, and over many merges each counts by
its share. With equal rates and fresh models this is the weighting of FedAvg.

With N facilities, shares pᵢ (Σ = 1), credit βᵢ, cap W, half weight κ, guard g, and an update that
is τ merges old, one merge is

    for every k: βₖ ← βₖ + pₖ / N;   w = min(βᵢ, W) · min(1, g N / (1 + τ));   βᵢ ← 0
    for k with βₖ > W: sₖ = κ (βₖ − W), βₖ ← W       its last delta, if it is kept, speaks for it

After every merge 0 ≤ β ≤ W, and Σβ + what was given + what was discarded = 1 + merges / N.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple


class Rules(NamedTuple):
    """The constants of the credit; the defaults are those that were measured."""

    cap: float = 1.0
    """W: largest weight of one update."""
    half: float = 0.5
    """κ: weight of a cached delta, over the credit that is above the cap."""
    guard: float = 1.0
    """g: an update that is older than g N merges counts for less."""


class Arrival(NamedTuple):
    """An update that is merged."""

    facility: str
    version: int
    """Updates that had counted when its task was issued."""


class Merged(NamedTuple):
    """What a merge gives."""

    weights: dict[str, float]
    """w of each update that arrived, by facility."""
    cached: dict[str, float]
    """s of each last delta that stands in for a facility, by facility."""
    credit: dict[str, float]
    """The credit left, by facility."""
    discarded: float
    """Credit that was given to nobody."""


DEFAULTS = Rules()


def init(shares: Mapping[str, float]) -> dict[str, float]:
    """The credit before the first merge: of each facility, its share."""
    return dict(shares)


def apply(
    credit: Mapping[str, float],
    arrivals: Sequence[Arrival],
    version: int,
    shares: Mapping[str, float],
    cached: Collection[str] = (),
    rules: Rules = DEFAULTS,
) -> Merged:
    """Merge the updates that arrived, one after the other in the order of their facilities' names.

    Args:
        credit: the credit of each facility; of one that is new, its share.
        arrivals: the updates, at most one of a facility.
        version: updates that have counted before.
        shares: the share of each facility in the federation; they sum to 1.
        cached: facilities whose last deltas are kept.
        rules: cap, half weight and guard.
    """
    left = {name: credit.get(name, share) for name, share in sorted(shares.items())}
    weights: dict[str, float] = {}
    stand_ins: dict[str, float] = {}
    discarded, number = 0.0, len(shares)
    for merges, arrival in enumerate(sorted(arrivals), version):
        for name, share in shares.items():
            left[name] += share / number
        age = merges - arrival.version
        held, left[arrival.facility] = left[arrival.facility], 0.0
        given = min(held, rules.cap) * min(1.0, rules.guard * number / (1 + age))
        weights[arrival.facility] = given
        discarded += held - given
        for name, held in left.items():
            if (excess := held - rules.cap) > 0:
                spoken = rules.half * excess if name in cached else 0.0
                if spoken:
                    stand_ins[name] = stand_ins.get(name, 0.0) + spoken
                discarded += excess - spoken
                left[name] = rules.cap
    return Merged(weights, stand_ins, left, discarded)
