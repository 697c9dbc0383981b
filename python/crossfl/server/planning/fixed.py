"""The tasks of a round: who is asked, for how many steps, and from where each goes on.

In the fixed plan every facility takes the steps that the job file gives it. With `equal_time` they
follow from how long its last jobs took, with `fedqueue` from how long they waited, too.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from crossfl.errors import CrossFLError
from crossfl.protocol.fields import LARGEST_COUNT, LARGEST_INT
from crossfl.protocol.participation import Purpose, check_rounds, takes_part
from crossfl.protocol.records import Allowance, Facility, Task, Training, allowance_of
from crossfl.protocol.seeds import derive_seed
from crossfl.protocol.state import ServerState
from crossfl.server.planning import equal_time, fedqueue


class Plan(NamedTuple):
    """What is asked of whom."""

    round: int
    """Number of the round; to evaluate, that of the one just finished."""
    tasks: list[Task]
    """By name, one for each facility that is asked and whose update the state does not hold."""
    allowances: list[Allowance]
    """By name, one for each member of the federation; of one that sits out, with 0 steps."""


def plan(
    state: ServerState,
    facilities: Sequence[Facility],
    local_steps: int,
    training: Training,
    purpose: Purpose,
    *,
    more: bool = True,
) -> Plan:
    """Plan the next round.

    Everything a facility needs to go on where it stopped follows from the state, so that nothing
    is held between rounds: the position on the learning-rate schedule, which spans the federation,
    and the samples it has already seen. To evaluate, every facility that has joined and not left
    is asked.

    Args:
        state: the server state.
        facilities: the facilities of the federation.
        local_steps: optimizer steps of a facility that has no number of its own.
        training: how they train, for what they may claim.
        purpose: what the tasks are for.
        more: whether another round is to be trained; if not, nothing is asked.

    Raises:
        CrossFLError: two facilities share a name, or a round of the federation has too few.
    """
    if twice := [name for name, n in Counter(f.name for f in facilities).items() if n > 1]:
        raise CrossFLError(f"facility {twice[0]!r} is named twice: give each facility once")
    if local_steps < 1:
        raise CrossFLError(f"local_steps is {local_steps}: it must be at least 1")
    left = range(state.finished + 1, state.rounds + 1)
    check_rounds(facilities, left, state.aggregation.quorum or 1)
    trains = purpose == "train"
    if trains and not more:
        return Plan(state.round, [], [])  # a run that was interrupted after its last round
    number = state.round + 1 if trains else state.round
    part = state.finished + 1 if trains else max(state.finished, 1)
    seconds = equal_time.seconds_of(state)
    closes = state.aggregation.closes
    tasks: list[Task] = []
    allowances: list[Allowance] = []
    for facility in sorted(facilities, key=lambda f: f.name):
        if not takes_part(facility, part, "evaluate"):
            continue
        steps = facility.local_steps or local_steps
        timings = state.ledger_of(facility.name).timings
        if seconds is not None:
            steps = equal_time.steps(timings, seconds, steps)
        elif state.aggregation.planner == "fedqueue" and isinstance(closes, int):
            steps = fedqueue.steps(timings, closes, steps)
        task = _task(state, facility, steps, number, trains)
        asked = takes_part(facility, part, purpose)
        if asked and not (trains and facility.name in state.held):
            tasks.append(task)
        allowances.append(allowance_of(task if asked else task.replace(local_steps=0), training))
    return Plan(number, tasks, allowances)


def _task(state: ServerState, facility: Facility, steps: int, number: int, trains: bool) -> Task:
    ledger, rules = state.ledger_of(facility.name), state.aggregation
    position, schedule = steps * state.round, steps * state.rounds
    if not rules.waits_for_all or rules.planner != "fixed":
        position = ledger.steps
        schedule = ledger.steps + steps * (state.rounds - state.finished)
    known = ledger.timings if rules.planner != "fixed" and trains else ()
    return Task(
        facility=facility.name,
        dataset=facility.dataset,
        round=number,
        local_steps=steps if trains else 0,
        seed=derive_seed(state.seed, facility.name, str(number)),
        schedule_step=min(position, LARGEST_INT),
        schedule_steps=min(max(schedule, 1), LARGEST_INT),
        samples_seen=min(ledger.samples, LARGEST_COUNT),
        data_seed=derive_seed(state.seed, facility.name),
        base=state.model,
        counted=ledger.counted,
        federation=state.federation,
        attempts=facility.attempts,
        queue_timeout=facility.queue_timeout,
        walltime_seconds=equal_time.walltime(known, steps) if known else None,
        closes=state.aggregation.closes,
        grace_seconds=state.aggregation.grace_seconds,
        quorum=state.aggregation.quorum or 1,
    )
