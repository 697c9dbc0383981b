"""Deliveries: whose a directory is that came from a facility, and the evaluations among them.

Updates and evaluations are matched to what was asked by position: number i is of the facility that
was asked at position i, so nobody speaks for another.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from crossfl.errors import CrossFLError
from crossfl.protocol.manifest import EvaluationManifest, UpdateManifest
from crossfl.protocol.state import ServerState
from crossfl.protocol.text import printable
from crossfl.storage import manifest, signature

LONGEST_REASON = 500
"""Characters of a reason that the history keeps."""

M = TypeVar("M", UpdateManifest, EvaluationManifest)


@dataclass(frozen=True)
class Exclusion:
    """An update that does not count in this round: whose it is, and why."""

    facility: str
    status: Literal["absent", "late", "refused", "unused"]
    reason: str
    manifest: UpdateManifest | None = None
    """What it states of itself, where that may be shown."""


def admit_evaluation(
    path: Path, facility: str | None, state: ServerState, signers: Path | None = None
) -> EvaluationManifest | Exclusion:
    """The evaluation that a facility delivered, or why it does not count.

    Args:
        path: what was delivered (directory).
        facility: who was asked for it; None, where it may be anyone's.
        state: server state whose model was to be evaluated.
        signers: allowed-signers file; None, where no signature is asked for.
    """
    stated: EvaluationManifest | None = None
    try:
        stated = identified(path, EvaluationManifest, facility, state)
        manifest.check(path, stated)
        if stated.status == "complete":
            signature.check(path, stated.facility, signers)
        if (stated.round, stated.model) != (state.round, state.model):
            raise CrossFLError("it does not evaluate the model of this state: evaluate again")
        return stated
    except (CrossFLError, OSError, RuntimeError, ValueError) as error:
        name = facility or (stated.facility if stated else "")
        return Exclusion(name, "refused", refusal(error, path, "evaluation"))


def identified(path: Path, kind: type[M], facility: str | None, state: ServerState) -> M:
    """What a directory states, made by the facility that was asked, in this federation.

    Its files, and whether the manifest is intact, are not looked at (`storage.manifest.check`).

    Raises:
        CrossFLError: it is damaged, another facility's, or another federation's.
    """
    stated = manifest.read(path, kind)
    if facility is not None and stated.facility != facility:
        raise CrossFLError(
            f"it is made in the name of {stated.facility}, and {facility} was asked for it"
        )
    if stated.federation != state.federation:
        raise CrossFLError(f"it is of federation {stated.federation}, this is {state.federation}")
    return stated


def shown_reason(reason: str) -> str:
    """A reason as the history has it, which may be read on a terminal."""
    return printable(reason, longest=LONGEST_REASON)


def refusal(error: Exception, path: Path, noun: str) -> str:
    """Why a delivery is refused, without the place where it lies here."""
    return shown_reason(str(error).replace(f"{path}/", "").replace(str(path), f"the {noun}"))
