"""The ledger: what the server remembers of each facility, so that no round reads the history."""

import statistics
from collections.abc import Mapping, Sequence

from crossfl.protocol.fields import LARGEST_COUNT, LONGEST_SECONDS
from crossfl.protocol.state import FacilityLedger, PastNorm, Timing
from crossfl.server.admission import Update


def counted(
    ledger: Mapping[str, FacilityLedger],
    updates: Sequence[Update],
    norms: Mapping[str, float],
) -> dict[str, FacilityLedger]:
    """The ledger after updates have counted, each of which closes its task."""
    renewed = with_losses(ledger, updates)
    for update in updates:
        before, stated = renewed.get(update.facility, FacilityLedger()), update.manifest
        past = PastNorm(norm=norms[update.facility], effective_steps=update.effective_steps)
        took = stated.seconds
        other = min(took.load + took.evaluate + took.save, LONGEST_SECONDS)
        timing = Timing(steps=stated.steps, train=took.train, load=other, queue=took.queue)
        renewed[update.facility] = (
            before.with_norm(past)
            .with_timing(timing)
            .replace(
                samples=min(before.samples + stated.samples, LARGEST_COUNT),
                steps=min(before.steps + stated.steps, LARGEST_COUNT),
                counted=stated.round,
                last_tokens=stated.tokens,
                last_samples=stated.samples,
                last_steps=stated.steps,
                open=tuple(task for task in before.open if task.round != stated.round),
            )
        )
    return renewed


def with_losses(
    ledger: Mapping[str, FacilityLedger], updates: Sequence[Update]
) -> dict[str, FacilityLedger]:
    """The ledger with the losses that updates bring; of who brings none, the last one stays."""
    renewed = dict(ledger)
    for update in updates:
        if (loss := update.loss()) is not None:
            before = renewed.get(update.facility, FacilityLedger())
            renewed[update.facility] = before.replace(loss=loss)
    return renewed


def known_losses(
    ledger: Mapping[str, FacilityLedger], members: Sequence[str] | None
) -> list[float]:
    """The last loss of each member that has given one; without members, of everybody."""
    names = sorted(ledger) if members is None else members
    return [loss for name in names if (loss := ledger.get(name, FacilityLedger()).loss) is not None]


def bounded_loss(
    ledger: Mapping[str, FacilityLedger], members: Sequence[str] | None
) -> float | None:
    """The mean loss that decides: over all members, none of them below half of their median.

    An absent member counts with its last loss. While a member has given neither an update nor a
    loss, nothing is known. One whose losses do not leave it is left out.
    """
    for name in members or ():
        before = ledger.get(name, FacilityLedger())
        if before.loss is None and not before.counted:
            return None
    losses = known_losses(ledger, members)
    if not losses:
        return None
    floor = statistics.median(losses) / 2
    return statistics.fmean(max(loss, floor) for loss in losses)
