"""Admission: what an update must be before it counts, and the reason if it is not."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crossfl.errors import CrossFLError
from crossfl.protocol.manifest import UpdateManifest
from crossfl.protocol.records import Aggregation, Allowance
from crossfl.protocol.schedule import effective_steps
from crossfl.protocol.state import OpenTask, ServerState
from crossfl.server import bounds
from crossfl.server.deliveries import Exclusion, identified, refusal, shown_reason
from crossfl.storage import delta, manifest, signature
from crossfl.storage.checkpoint import Tensors
from crossfl.storage.delta import Delta


class UpdatesRefused(Exception):  # noqa: N818 (it is no error of ours)
    """Updates that turned out, while they were read, not to be what they should be.

    `reasons` has the reason for each facility.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__(", ".join(reasons))
        self.reasons = dict(reasons)


@dataclass(frozen=True)
class Update:
    """An update that has passed all checks but those for which its numbers must be read."""

    path: Path
    manifest: UpdateManifest
    delta: Delta
    allowance: Allowance | None
    """What its facility was asked for; None where an update may be anyone's."""
    version: int = 0
    """Updates that had counted when its task was issued."""

    @property
    def facility(self) -> str:
        """Who made it."""
        return self.manifest.facility

    @property
    def effective_steps(self) -> float:
        """Its steps, each weighted by its learning rate over the peak."""
        return self._effective(self.manifest.steps)

    @property
    def effective_steps_of_task(self) -> float:
        """The same of all steps that its facility was asked for."""
        asked = self.allowance.steps if self.allowance else 0
        return self._effective(max(self.manifest.steps, asked))

    @property
    def normalising_steps(self) -> float:
        """The steps that FedNova divides its delta by: of those asked, a quarter at least."""
        asked = self.allowance.steps if self.allowance else 0
        return max(self.manifest.steps, asked / 4)

    def weight(self, aggregation: Aggregation) -> int:
        """What the facility's share is proportional to."""
        return bounds.weight(self.manifest, aggregation)

    def _effective(self, steps: int) -> float:
        return effective_steps(self.allowance, steps) if self.allowance else float(steps)

    def loss(self) -> float | None:
        """Validation loss of the task's base at the facility, in nats per token, if it gave it."""
        validation = self.manifest.metrics.validation
        return None if validation is None else validation.loss


def admit(
    paths: Sequence[Path],
    state: ServerState,
    weights: Tensors,
    allowances: Sequence[Allowance] | None = None,
    held: Sequence[Path] = (),
    signers: Path | None = None,
) -> tuple[list[Update], list[Exclusion]]:
    """Sort the updates of a round into those to average and those that do not count, by name.

    Only manifests and headers are read: sha256, finiteness and norms follow while the numbers are
    walked (`UpdatesRefused`). A facility that delivered twice is refused whole.

    Args:
        paths: what was delivered (directories).
        state: server state of the round.
        weights: the global model of the round.
        allowances: the members of the federation, with what each may claim; those with steps whose
            updates are not held were asked for one, in the order of `paths`. Unset, an update may
            be anyone's.
        held: updates of the round that came before, and were admitted.
        signers: allowed-signers file; None, where no signature is asked for.

    Raises:
        CrossFLError: there are more or fewer updates than facilities that were asked.
    """
    admitted: list[Update] = []
    excluded: list[Exclusion] = []
    members = {allowance.facility: allowance for allowance in allowances or ()}
    asked = [a for a in allowances or () if a.steps and a.facility not in state.held]
    if allowances is not None and len(asked) != len(paths):
        raise CrossFLError(
            f"{len(paths)} updates were given, and {len(asked)} facilities were asked for one: "
            "give one for each, in the order of the allowances"
        )
    expected: list[tuple[Path, str | None, Allowance | None]] = [
        (path, None, None) for path in (paths if allowances is None else ())
    ]
    expected += [(path, a.facility, a) for path, a in zip(paths, asked, strict=False)]
    expected += [(path, path.name, None) for path in held]
    for path, facility, allowance in expected:
        stated: UpdateManifest | None = None
        try:
            stated = identified(path, UpdateManifest, facility, state)
            manifest.check(path, stated, only=())
            late = open_task(stated, state)
            asked_for = late.allowance if late else allowance
            bounds.check_claims(stated, asked_for, state.aggregation)
            if stated.status == "absent" or stated.status == "late":
                reason = shown_reason(stated.reason or "")
                excluded.append(Exclusion(stated.facility, stated.status, reason))
                continue
            signature.check(path, stated.facility, signers)
            check_base(stated, state, late)
            _check_files(stated, weights)
            delivered = Delta(path, weights.buffers)
            delivered.check(weights.travelling())
            known = asked_for or members.get(stated.facility)
            version = late.version if late else state.updates
            admitted.append(Update(path, stated, delivered, known, version))
        except (CrossFLError, OSError, RuntimeError, ValueError) as error:
            # Also what a directory of odd names, depths or sizes makes of reading it.
            name = facility or (stated.facility if stated else "")
            excluded.append(Exclusion(name, "refused", refusal(error, path, "update")))
    return _once_each(admitted, excluded)


def open_task(stated: UpdateManifest, state: ServerState) -> OpenTask | None:
    """The task of an earlier round that an update is for; None where it is for none."""
    tasks = state.ledger_of(stated.facility).open
    return next((task for task in tasks if task.round == stated.round), None)


def is_whole(update: Update) -> bool:
    """Whether every file of an update is, byte for byte, the one of its manifest."""
    try:
        manifest.verify(update.path, UpdateManifest)
    except CrossFLError:
        return False
    return True


def check_sums(updates: Sequence[Update], sums: Mapping[Path, str]) -> dict[str, str]:
    """Reasons to refuse updates of whose files the sums found are not those of the manifest."""
    reasons = {}
    for update in updates:
        for name, entry in update.manifest.files.items():
            if sums.get(update.path / name, entry.sha256) != entry.sha256:
                reasons[update.facility] = f"{name} does not match its sha256"
    return reasons


def check_base(stated: UpdateManifest, state: ServerState, late: OpenTask | None) -> None:
    """Check that an update is for this round and its model, or for those of a task that is open.

    Raises:
        CrossFLError: it is for another one.
    """
    if late is None and stated.round != state.round + 1:
        raise CrossFLError(f"it is for round {stated.round}, this is {state.round + 1}")
    if stated.base != (late.base if late else state.model):
        raise CrossFLError("it starts from another model than its round's")


def _check_files(stated: UpdateManifest, weights: Tensors) -> None:
    """Check that an update has no files but deltas of the model's.

    Raises:
        CrossFLError: it lists another file.
    """
    names = {delta.file_name(file.path.name) for file in weights.files}
    if unknown := sorted(stated.files.keys() - names):
        raise CrossFLError(f"it lists {unknown[0]!r}, which is no delta of a file of the model")


def _once_each(
    admitted: list[Update], excluded: list[Exclusion]
) -> tuple[list[Update], list[Exclusion]]:
    """By name, with a name for those that gave none, and without facilities that came twice.

    What brings nothing to average has no claim to the name of an update that was admitted.
    """
    taken = {update.facility for update in admitted}
    named = [e for e in excluded if e.facility and e.facility not in taken]
    unnamed = sorted((e for e in excluded if e not in named), key=lambda e: e.reason)
    taken |= {e.facility for e in named}
    free = (n for i in itertools.count(1) if (n := f"unknown-{i}") not in taken)
    named += [Exclusion(next(free), e.status, e.reason, e.manifest) for e in unnamed]
    times = Counter([u.facility for u in admitted] + [e.facility for e in named])
    once = [u for u in admitted if times[u.facility] == 1]
    others = [e for e in named if times[e.facility] == 1]
    others += [
        Exclusion(facility, "refused", f"it delivered {n} updates for one round")
        for facility, n in times.items()
        if n > 1
    ]
    return sorted(once, key=lambda u: u.facility), sorted(others, key=lambda e: e.facility)
