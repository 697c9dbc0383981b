"""Merging what has arrived, where rounds close before everybody has delivered.

The updates are weighed by credit (`server.credit`). A delta is scaled by the mean number of steps
that facilities are asked for over the number that its own task asked: AdamW's delta grows with the
steps, and a slow facility would hardly be heard. A merge is one of N in a full participation, so
the server optimizer takes that part of its step.

Where rounds wait for everybody, each function here does what a round of all does.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from crossfl.protocol.history import COUNTED, FacilityEntry
from crossfl.protocol.records import Allowance
from crossfl.protocol.state import FacilityLedger, OpenTask, ServerState
from crossfl.server import credit, optimizers
from crossfl.server.admission import Update
from crossfl.server.bounds import weight_of
from crossfl.server.shares import shares

MOST_STALE = 8
"""Full participations after which a task is given up; its facility keeps the credit."""
SHORTEST_MEAN = 9
"""The served mean is of as many updates as have counted, over this, until it is of 1 / rate."""
WITH_MOMENTUM = ("fedavgm", "diloco")


class Weighed(NamedTuple):
    """The weights of the updates of a round."""

    coefficients: list[float]
    """Of each update, in their order."""
    weights: list[float]
    """The same before deltas are scaled by their steps: how much each facility is heard."""
    ledger: dict[str, FacilityLedger]
    """With the credit that is left."""


def weigh(
    updates: Sequence[Update], state: ServerState, allowances: Sequence[Allowance] | None
) -> Weighed:
    """Weigh the updates of a round.

    Args:
        updates: the updates, at most one of a facility.
        state: server state of the round.
        allowances: the members of the federation, with the steps each was asked for; None where an
            update may be anyone's, and everybody who has delivered is a member.
    """
    if state.aggregation.waits_for_all:
        portions = shares(updates, state.aggregation)
        return Weighed(portions, portions, dict(state.ledger))
    members = shares_of(state, _members([u.facility for u in updates], state, allowances))
    known = {n: held for n in members if (held := state.ledger_of(n).credit) is not None}
    arrivals = [credit.Arrival(update.facility, update.version) for update in updates]
    merged = credit.apply(known, arrivals, state.updates, members)
    asked = [float(a.steps) for a in allowances or () if a.steps]
    mean = statistics.fmean(asked or [update.normalising_steps for update in updates])
    ledger = dict(state.ledger)
    for name, left in merged.credit.items():
        ledger[name] = state.ledger_of(name).replace(credit=left)
    weights = [merged.weights[update.facility] for update in updates]
    scales = [mean / update.normalising_steps for update in updates]
    coefficients = [weight * scale for weight, scale in zip(weights, scales, strict=True)]
    return Weighed(coefficients, weights, ledger)


def shares_of(state: ServerState, members: Sequence[str]) -> dict[str, float]:
    """The share of each member in the federation, by the record's weighting; they sum to 1.

    A member weighs what its last update weighed, and one that has none, as much as the mean of the
    others.
    """
    rules, amounts = state.aggregation, {}
    for name in members:
        last = state.ledger_of(name)
        if last.counted:
            amounts[name] = weight_of(rules, last.last_tokens, last.last_samples, last.last_steps)
    mean = statistics.fmean(amounts.values()) if amounts else 1.0
    total = sum(amounts.get(name, mean) for name in members)
    return {name: amounts.get(name, mean) / total for name in members}


def stepping(
    state: ServerState, updates: Sequence[Update], allowances: Sequence[Allowance] | None
) -> ServerState:
    """The state with the server optimizer's parameters for the updates that have arrived.

    With momentum μ and server learning rate r, and b = μ^(1/N), n updates of N members have
    momentum b^n and rate r (1 − b) / (1 − μ): N merges of one update each move the model as far as
    a round of all.
    """
    rules = state.aggregation
    if rules.waits_for_all or not updates:
        return state
    members = len(_members([u.facility for u in updates], state, allowances))
    if rules.mean_rate:
        rate = mean_rate(rules.mean_rate, members, state.updates, len(updates))
        rules = rules.replace(served_mean=rate)
    if rules.server_optimizer not in WITH_MOMENTUM:
        return state.replace(aggregation=rules)
    whole, rate = rules.server_momentum, rules.learning_rate(optimizers.of(rules).LEARNING_RATE)
    part = whole ** (1 / max(members, 1))
    return state.replace(
        aggregation=rules.replace(
            server_momentum=part ** len(updates),
            server_learning_rate=rate * (1 - part) / (1 - whole),
        )
    )


def mean_rate(rate: float, members: int, before: int, arrived: int) -> float:
    """The part of the way to the newest model that the served mean goes in a merge.

    For each update that is `rate` / N. A mean is never of more than the last ninth of the
    updates, or so: in a short federation it would be of the first model for the most part.

    Args:
        rate: the same in a full participation.
        members: N, members of the federation.
        before: updates that have counted before the merge.
        arrived: updates in the merge.
    """
    left = 1.0
    for number in range(before, before + arrived):
        left *= 1 - max(rate / max(members, 1), SHORTEST_MEAN / (SHORTEST_MEAN + number))
    return 1 - left


def advanced(
    state: ServerState,
    facilities: Mapping[str, FacilityEntry],
    ledger: Mapping[str, FacilityLedger],
    allowances: Sequence[Allowance] | None,
) -> ServerState:
    """The state after the updates of a round have counted, or could not.

    The task of this round stays open where its facility is late, or delivered for an older one.

    Args:
        state: server state of the round.
        facilities: what became of each facility's update.
        ledger: what is remembered of each facility then.
        allowances: the members of the federation; None, all that are named.
    """
    members = len(_members(facilities, state, allowances))
    counted = {name for name, entry in facilities.items() if entry.status in COUNTED}
    full, towards = divmod(state.towards + len(counted), max(members, 1))
    updates = state.updates + len(counted)
    asked = {allowance.facility: allowance for allowance in allowances or ()}
    renewed = dict(ledger)
    for name in {*ledger, *facilities}:
        before, entry = renewed.get(name, FacilityLedger()), facilities.get(name)
        tasks = {task.round: task for task in before.open}
        if entry and (entry.status == "late" or entry.staleness):
            task = OpenTask(
                round=state.round + 1,
                base=state.model,
                version=state.updates,
                allowance=asked.get(name),
            )
            tasks[task.round] = task
        kept = [t for t in tasks.values() if updates - t.version <= MOST_STALE * members]
        if kept or before.open:
            renewed[name] = before.replace(open=tuple(sorted(kept, key=lambda t: t.round)))
    return state.replace(
        updates=updates,
        participations=state.participations + full,
        towards=towards,
        ledger=renewed,
    )


def _members(
    named: Iterable[str], state: ServerState, allowances: Sequence[Allowance] | None
) -> list[str]:
    if allowances is not None:
        return sorted(allowance.facility for allowance in allowances)
    return sorted({*state.ledger, *named})
