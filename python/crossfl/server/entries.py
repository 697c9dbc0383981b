"""What the history says of the update of each facility in a round."""

from collections.abc import Mapping, Sequence

from crossfl.protocol.history import FacilityEntry
from crossfl.protocol.manifest import UpdateManifest
from crossfl.server.admission import Update
from crossfl.server.deliveries import Exclusion, shown_reason


def averaged(
    updates: Sequence[Update],
    coefficients: Sequence[float],
    norms: Mapping[str, float],
    number: int,
) -> dict[str, FacilityEntry]:
    """The entries of updates that counted in a round.

    Args:
        updates: the updates.
        coefficients: of each, in the combined delta.
        norms: L2 norm of each delta, by facility.
        number: the round.
    """
    return {
        update.facility: _stated(update.manifest).replace(
            share=share,
            norm=norms[update.facility],
            staleness=number - update.manifest.round,
        )
        for update, share in zip(updates, coefficients, strict=True)
    }


def excluded(exclusions: Sequence[Exclusion]) -> dict[str, FacilityEntry]:
    """The entries of updates that did not count."""
    return {
        e.facility: (
            _stated(e.manifest).replace(status=e.status, reason=e.reason)
            if e.manifest
            else FacilityEntry(status=e.status, reason=e.reason)
        )
        for e in exclusions
    }


def _stated(update: UpdateManifest) -> FacilityEntry:
    """What an update states of itself, as the history has it."""
    return FacilityEntry(
        status=update.status,
        reason=None if update.reason is None else shown_reason(update.reason),
        tokens=update.tokens,
        samples=update.samples,
        steps=update.steps,
        bytes=update.bytes,
        seconds=update.seconds,
        metrics=update.metrics,
    )
