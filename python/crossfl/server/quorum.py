"""The quorum: whether enough of a round's updates are left to average them."""

from collections.abc import Collection, Sequence
from typing import ClassVar

from crossfl.errors import Code, CrossFLError
from crossfl.protocol.state import ServerState
from crossfl.server.admission import Update
from crossfl.server.bounds import weight_of
from crossfl.server.deliveries import Exclusion


class BelowQuorumError(CrossFLError):
    """Too few updates are left; what then is for the aggregation record to say."""

    code: ClassVar[Code] = Code.QUORUM


def check_quorum(
    updates: Sequence[Update],
    excluded: Sequence[Exclusion],
    state: ServerState,
    least: int,
    asked: Collection[str] | None = None,
) -> None:
    """Check that enough updates are left, for the quorum and for the aggregation rule.

    Args:
        updates: those that are left.
        excluded: those that are not.
        state: server state of the round.
        least: fewest updates that the aggregation rule can work on.
        asked: facilities that were asked for an update; unset, all that are named.

    Raises:
        BelowQuorumError: they are not; the message names each facility that is missing, and why.
    """
    rules = state.aggregation
    others = [e for e in excluded if asked is None or e.facility in {*asked, *state.held}]
    everyone = len(updates) + len(others)
    all_of_them = everyone if rules.waits_for_all and rules.quorum_share is None else 1
    needed = rules.quorum or all_of_them
    share = share_present(updates, others, state)
    if len(updates) < needed:
        why = f"the quorum is {needed}"
    elif len(updates) < max(least, 1):
        why = f"{rules.aggregation_rule} with num_byzantine={rules.num_byzantine} needs {least}"
    elif rules.quorum_share is not None and share < rules.quorum_share:
        why = f"they have {share:.3g} of the weight, where the quorum is {rules.quorum_share:.3g}"
    else:
        return
    missing = "; ".join(f"{e.facility} is {e.status}: {e.reason}" for e in excluded)
    raise BelowQuorumError(
        f"{len(updates)} of {everyone} updates can be averaged, and {why}"
        + (f": {missing}" if missing else "")
        + ". The global model stays as it was"
    )


def share_present(
    updates: Sequence[Update], excluded: Sequence[Exclusion], state: ServerState
) -> float:
    """The share of the round's weight that its good updates have.

    What is missing is taken to weigh what its facility weighed last; one that never delivered, as
    much as the mean of the others.
    """
    present = [update.weight(state.aggregation) for update in updates]
    missing = [_last_weight(state, exclusion.facility) for exclusion in excluded]
    known = present + [weight for weight in missing if weight is not None]
    mean = sum(known) / len(known) if known else 1.0
    total = sum(present) + sum(mean if weight is None else weight for weight in missing)
    return sum(present) / total if total else 0.0


def _last_weight(state: ServerState, facility: str) -> int | None:
    ledger = state.ledger_of(facility)
    if not ledger.counted:
        return None
    last = (ledger.last_tokens, ledger.last_samples, ledger.last_steps)
    return weight_of(state.aggregation, *last)
