"""A round at its end: updates in, the next global model and server state out."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from crossfl.errors import CrossFLError
from crossfl.protocol.fields import LONGEST_REASON
from crossfl.protocol.history import FacilityEntry, RoundEntry
from crossfl.protocol.layout import GLOBAL_MODEL, HELD_UPDATES, MANIFEST, SERVER_STATE, STATE
from crossfl.protocol.manifest import ModelManifest, StateManifest
from crossfl.protocol.records import Allowance
from crossfl.protocol.state import FacilityLedger, ServerState
from crossfl.protocol.text import printable
from crossfl.server import admission, entries, ledger, merging, serving
from crossfl.server import state as server_state
from crossfl.server.admission import Update, UpdatesRefused
from crossfl.server.averaging.average import Averaging
from crossfl.server.averaging.walk import PIECE
from crossfl.server.deliveries import Exclusion
from crossfl.server.quorum import BelowQuorumError, check_quorum
from crossfl.storage import manifest
from crossfl.storage.checkpoint import Tensors
from crossfl.storage.files import link, link_tree, publish
from crossfl.storage.model_folder import ModelFolder

MOST_BEST = 100
"""Rounds with the lowest losses that the state remembers for the journal."""


@dataclass(frozen=True)
class Averaged:
    """The round is finished, and what was delivered is in the model."""

    state: ServerState
    entry: RoundEntry


@dataclass(frozen=True)
class Skipped:
    """The round is finished below its quorum; the model is as it was."""

    state: ServerState
    entry: RoundEntry


@dataclass(frozen=True)
class Waiting:
    """The round is below its quorum; who is missing is to be asked again."""

    state: ServerState
    reason: str
    seconds: float
    """Seconds to wait before that; 0 where the jobs of all who are missing go on."""


@dataclass(frozen=True)
class PassedThrough:
    """There was nothing to do: the run was interrupted after its last round."""

    state: ServerState


Outcome = Averaged | Skipped | Waiting | PassedThrough


@dataclass(frozen=True, kw_only=True)
class Round:
    """What a round begins and ends with."""

    model: Path
    """Global model (directory)."""
    folder: Path
    """Server state (directory)."""
    state: ServerState
    allowances: Sequence[Allowance] | None
    """The members of the federation; None, all that are named."""
    out: Path
    """Where the next model and state are written."""
    now: float
    """Seconds since 1970."""

    @property
    def members(self) -> tuple[str, ...] | None:
        """Facilities of the federation; None, all that are named."""
        return None if self.allowances is None else tuple(a.facility for a in self.allowances)


def aggregate(
    model: Path,
    state: Path,
    updates: Sequence[Path],
    out: Path,
    now: float,
    *,
    allowances: Sequence[Allowance] | None = None,
    threads: int | None = None,
    piece: int = PIECE,
    admitted: Callable[[int, Sequence[str]], None] | None = None,
) -> Outcome:
    """Write the next `out/global_model` and `out/state`.

    The deltas are combined in fp32, facilities in sorted order, and applied to the fp32 master
    weights; the model is the master rounded to its own dtype. All of it is walked in pieces
    (`averaging`): memory does not grow with the model or the number of facilities. Numbers are
    averaged while they are checked; where a check then fails, what was written is thrown away, the
    update is refused, and the round begins again without it.

    Args:
        model: global model of this round (directory).
        state: server state of this round (directory).
        updates: one directory for each facility that was asked, in the order of the allowances.
        out: folder to write into.
        now: seconds since 1970.
        allowances: the members of the federation, with what each may claim; those with steps whose
            updates are not held were asked for one. Unset, an update may be anyone's.
        threads: threads to use, by default one for each core; the result does not depend on it.
        piece: elements walked at a time, a multiple of a cell; the result does not depend on it.
        admitted: is told the round, and the facilities whose updates are as they should be.

    Raises:
        CrossFLError: fewer good updates than the quorum, where the aggregation record says to
            stop, or model or state are damaged. Nothing was written.
    """
    server = server_state.load(state)
    synchronous = server.aggregation.waits_for_all
    round_ = Round(model=model, folder=state, state=server, allowances=allowances, out=out, now=now)
    if not updates and server.waits and server.out_of_time(now) and synchronous:
        raise BelowQuorumError(
            f"budget_seconds ran out while round {server.round + 1} waited for its quorum, with "
            f"{', '.join(server.held) or 'nobody'}. The global model stays as it was"
        )
    if not updates and not (server.held and synchronous):
        if server.more(now):
            raise CrossFLError("no update was given: name one directory for each facility")
        return _pass_through(round_)
    described = manifest.read(model, ModelManifest)
    if described.digest != server.model:
        raise CrossFLError(f"{model} is not the model that {state} belongs to")
    weights = Tensors(list(ModelFolder.received(model, only=()).weights))
    manifest.check(model, described, only=_copied(described, weights))
    held = server_state.held_updates(server, state)
    signers = server_state.signers(server, state)
    good, excluded = admission.admit(updates, server, weights, allowances, held, signers)
    if admitted:
        admitted(server.round + 1, [update.facility for update in good])
    asked = None if allowances is None else [a.facility for a in allowances if a.steps]
    while True:
        steps = merging.stepping(server, good, allowances)
        averaging = Averaging(state, weights, good, steps, threads, piece)
        try:
            check_quorum(good, excluded, server, averaging.least, asked)
        except BelowQuorumError as shortfall:
            return _below_quorum(round_, good, excluded, shortfall)
        try:
            return _publish(round_, described, averaging, excluded)
        except UpdatesRefused as refused:
            reasons = refused.reasons
        excluded += [
            Exclusion(u.facility, "refused", reasons[u.facility], u.manifest)
            for u in good
            if u.facility in reasons
        ]
        excluded.sort(key=lambda exclusion: exclusion.facility)
        good = [u for u in good if u.facility not in reasons]


def _copied(described: ModelManifest, weights: Tensors) -> set[str]:
    """Files of the model that go into the next one: all but those whose weights are all remade."""
    remade = {
        file.path.name
        for file in weights.files
        if all(entry.dtype.is_floating_point for entry in file.entries.values())
    }
    return set(described.files) - remade


def _pass_through(round_: Round) -> PassedThrough:
    """Hand on model and state as they are, at the end: the loop has to turn once."""
    with (
        publish(round_.out / GLOBAL_MODEL) as directory,
        publish(round_.out / STATE) as memory,
    ):
        link_tree(round_.model, directory)
        link_tree(round_.folder, memory)
        files = manifest.read(memory, StateManifest).files
        sums = {name: file.sha256 for name, file in files.items() if name != SERVER_STATE}
        model = serving.deliver(directory, memory, sums)
        if model == round_.state.model:
            return PassedThrough(round_.state)
        state = round_.state.replace(model=model)
        for name in (SERVER_STATE, MANIFEST):
            (memory / name).unlink()  # the journal may have it under this name, too
        server_state.save(state, memory, sums)
        return PassedThrough(state)


def _publish(
    round_: Round,
    described: ModelManifest,
    averaging: Averaging,
    excluded: Sequence[Exclusion],
) -> Averaged:
    state = round_.state
    number = state.round + 1
    with (
        publish(round_.out / GLOBAL_MODEL) as directory,
        publish(round_.out / STATE) as memory,
    ):
        weighed = merging.weigh(averaging.updates, state, round_.allowances)
        averaging.weigh(weighed.coefficients)
        sums = averaging.write(directory, memory)
        for name, file in described.files.items():
            if name not in sums:
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                link(round_.model / name, directory / name)
                sums[name] = file.sha256
        renewed = ledger.counted(weighed.ledger, averaging.updates, averaging.norms)
        facilities = entries.averaged(
            averaging.updates, averaging.coefficients, averaging.norms, number
        )
        entry = _entry(round_, state.model, renewed, facilities | entries.excluded(excluded))
        state = _finished(round_, entry, renewed)
        model = manifest.write(directory, ModelManifest(round=number), sums).digest
        if not state.more(round_.now):
            model = serving.deliver(directory, memory, sums)
        state, entry = state.replace(model=model), entry.replace(model=model)
        server_state.save(state, memory, sums, before=round_.folder, entry=entry)
    return Averaged(state, entry)


def _below_quorum(
    round_: Round,
    admitted: Sequence[Update],
    excluded: Sequence[Exclusion],
    shortfall: BelowQuorumError,
) -> Skipped | Waiting | PassedThrough:
    """Do what the aggregation record says where too few updates are left; the model stays.

    A round that is skipped counts, and what it brought is thrown away. One that waits is asked for
    again, of those that are missing; the state holds what the others delivered, if it is whole.
    Where rounds do not wait for everybody, one waits for those who are late, whatever the record
    says: their jobs go on.

    Raises:
        BelowQuorumError: the run is to stop, or it has waited for as long as it may.
    """
    state, rules = round_.state, round_.state.aggregation
    missing = {exclusion.status for exclusion in excluded}
    goes_on = "late" in missing and not rules.waits_for_all
    over = rules.below_quorum == "wait" and state.out_of_time(round_.now)
    if goes_on and state.out_of_time(round_.now):
        return _pass_through(round_)
    if (rules.below_quorum == "stop" or over) and not goes_on:
        raise shortfall
    with (
        publish(round_.out / GLOBAL_MODEL) as directory,
        publish(round_.out / STATE) as memory,
    ):
        link_tree(round_.model, directory)
        for path in round_.folder.glob("*.safetensors"):
            link(path, memory / path.name)
        files = manifest.read(round_.folder, StateManifest).files
        sums = {name: f.sha256 for name, f in files.items() if name.endswith(".safetensors")}
        if rules.below_quorum == "skip" and not goes_on:
            renewed = ledger.with_losses(state.ledger, admitted)
            unused = [
                Exclusion(u.facility, "unused", "the round was skipped", u.manifest)
                for u in admitted
            ]
            entry = _entry(
                round_,
                state.model,
                renewed,
                entries.excluded([*excluded, *unused]),
                skipped=printable(str(shortfall), longest=LONGEST_REASON),
            )
            state = _finished(round_, entry, renewed)
            if not state.more(round_.now):
                model = serving.deliver(directory, memory, sums)
                state, entry = state.replace(model=model), entry.replace(model=model)
            server_state.save(state, memory, sums, before=round_.folder, entry=entry)
            return Skipped(state, entry)
        whole = [update for update in admitted if admission.is_whole(update)]
        for update in whole:
            link_tree(update.path, memory / HELD_UPDATES / update.facility)
        held = tuple(sorted(update.facility for update in whole))
        waits = state.replace(held=held, waits=state.waits + 1)
        state = merging.advanced(waits, entries.excluded(excluded), state.ledger, round_.allowances)
        server_state.save(state, memory, sums, before=round_.folder)
        pause = 0.0 if goes_on and missing == {"late"} else rules.wait_seconds
        return Waiting(state, str(shortfall), pause)


def _finished(
    round_: Round, entry: RoundEntry, renewed: Mapping[str, FacilityLedger]
) -> ServerState:
    """The state after a round."""
    state, loss = round_.state, ledger.bounded_loss(renewed, round_.members)
    best = state.best
    if loss is not None:
        # The losses of a round are those of the model before it.
        best = tuple(sorted((*best, (state.round, loss)), key=lambda pair: (pair[1], pair[0])))
    advanced = merging.advanced(state, entry.facilities, renewed, round_.allowances)
    return advanced.replace(
        round=entry.round,
        model=entry.model,
        held=(),
        waits=0,
        loss=loss,
        skipped=entry.skipped,
        best=best[:MOST_BEST],
    )


def _entry(
    round_: Round,
    model: str,
    renewed: Mapping[str, FacilityLedger],
    facilities: Mapping[str, FacilityEntry],
    skipped: str | None = None,
) -> RoundEntry:
    losses = ledger.known_losses(renewed, round_.members)
    state = round_.state
    return RoundEntry(
        round=state.round + 1,
        finished=datetime.fromtimestamp(round_.now, UTC).isoformat(timespec="seconds"),
        seconds=round(max(0.0, round_.now - state.started), 3),
        loss=statistics.fmean(losses) if losses else None,
        facilities=dict(sorted(facilities.items())),
        model=model,
        skipped=skipped,
        waits=state.waits,
    )
