"""Turn the updates of a round into the next global model and the next server state."""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from crossfl.errors import CrossFLError
from crossfl.observe.progress import Progress
from crossfl.protocol.records import Aggregation
from crossfl.server import admission
from crossfl.server.admission import BelowQuorumError, Excluded, Refused, Update
from crossfl.server.averaging.average import Averaging
from crossfl.server.averaging.walk import PIECE
from crossfl.server.journal import journal
from crossfl.server.state import UPDATES, ServerState
from crossfl.storage import files, manifest
from crossfl.storage.checkpoint import Tensors

MODEL, STATE = "global_model", "state"
COUNTS = ("tokens", "samples", "steps", "bytes", "seconds", "metrics")
"""What the history takes over from an update's manifest, besides status and reason."""


def aggregate(
    model: Path,
    state: Path,
    updates: Sequence[Path],
    out: Path,
    *,
    asked: Mapping[str, int] | None = None,
    threads: int | None = None,
    piece: int = PIECE,
) -> bool:
    """Write the next `out/global_model` and `out/state`; True if another round is to follow.

    The deltas are combined in fp32, facilities in sorted order, and applied to the fp32 master
    weights; the model is the master rounded to its own dtype. All of it is walked in pieces
    (`average`): memory does not grow with the model or the number of facilities. Numbers
    are averaged while they are checked; where a check then fails, what was written is thrown away,
    the update is refused, and the round begins again without it.

    Args:
        model: global model of this round (directory).
        state: server state of this round (directory).
        updates: one directory for each facility, in any order.
        out: folder to write into.
        asked: facilities that were asked for an update, each with the steps it was asked for;
            unset, an update may be anyone's.
        threads: threads to use, by default one for each core; the result does not depend on it.
        piece: elements walked at a time, a multiple of a cell; the result does not depend on it.

    Raises:
        CrossFLError: fewer good updates than the quorum, where the aggregation record says to
            stop, or model or state are damaged. Nothing was written.
    """
    server = ServerState.load(state)
    if not updates and server.waits and server.late():
        raise BelowQuorumError(
            f"budget_seconds ran out while round {server.round + 1} waited for its quorum, with "
            f"{', '.join(server.held) or 'nobody'}. The global model stays as it was"
        )
    if not updates and not server.held:
        if server.more():
            raise CrossFLError("no update was given: name one directory for each facility")
        # A run that was interrupted after its last round: the loop has to turn once.
        with manifest.publish(out / MODEL) as directory, manifest.publish(out / STATE) as memory:
            files.link_tree(model, directory)
            files.link_tree(state, memory)
        return False
    described = manifest.read(model, "model")
    if described["digest"] != server.model:
        raise CrossFLError(f"{model} is not the model that {state} belongs to")
    weights = Tensors.of_model(model)
    manifest.verify(model, "model", only=_copied(described, weights))
    held = server.held_updates(state)
    admitted, excluded = admission.admit(updates, server, weights, asked, held)
    while True:
        averaging = Averaging(state, weights, admitted, server.aggregation, threads, piece)
        try:
            admission.check_quorum(admitted, excluded, server, averaging.least, asked)
        except BelowQuorumError as shortfall:
            return _below_quorum(model, state, server, admitted, excluded, shortfall, out)
        try:
            return _publish(model, server, averaging, excluded, out)
        except Refused as refused:
            reasons = refused.reasons
        excluded += [
            Excluded(u.facility, "refused", reasons[u.facility], u.manifest)
            for u in admitted
            if u.facility in reasons
        ]
        excluded.sort(key=lambda e: e.facility)
        admitted = [u for u in admitted if u.facility not in reasons]


def shares(updates: Sequence[Update], aggregation: Aggregation) -> list[float]:
    """The share of each update in the mean: fp64, sums to 1, by the record's weighting.

    No share is above `largest_share`, unless there are too few updates to fill the mean with such
    shares; then all are equal.
    """
    amounts = [update.weight(aggregation) for update in updates]
    found = [amount / sum(amounts) for amount in amounts]
    cap = aggregation.largest_share
    if cap is None:
        return found
    if cap * len(found) <= 1:
        return [1 / len(found)] * len(found)
    capped: set[int] = set()
    while over := {i for i, share in enumerate(found) if share > cap and i not in capped}:
        capped |= over
        rest = sum(amount for i, amount in enumerate(amounts) if i not in capped)
        left = 1 - cap * len(capped)
        found = [cap if i in capped else left * a / rest for i, a in enumerate(amounts)]
    return found


def _copied(described: Mapping[str, Any], weights: Tensors) -> set[str]:
    """Files of the model that go into the next one: all but those whose weights are all remade."""
    remade = {
        file.path.name
        for file in weights.files
        if all(entry.dtype.is_floating_point for entry in file.entries.values())
    }
    return set(described["files"]) - remade


def _publish(
    model: Path,
    server: ServerState,
    averaging: Averaging,
    excluded: Sequence[Excluded],
    out: Path,
) -> bool:
    published = manifest.publish
    with published(out / MODEL) as directory, published(out / STATE) as memory:
        averaging.weigh(shares(averaging.updates, server.aggregation))
        sums = averaging.write(directory, memory)
        for name, entry in manifest.read(model, "model")["files"].items():
            if name not in sums:
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                files.link(model / name, directory / name)
                sums[name] = entry["sha256"]
        round_ = server.round + 1
        digest = manifest.write(directory, "model", {"round": round_}, sums)["digest"]
        entry = _history(server, averaging, excluded) | {"model": digest}
        history = [*server.history, entry]
        server = replace(server, round=round_, model=digest, held=[], waits=0, history=history)
        server.save(memory, sums)
    return server.more()


def _below_quorum(
    model: Path,
    state: Path,
    server: ServerState,
    admitted: Sequence[Update],
    excluded: Sequence[Excluded],
    shortfall: BelowQuorumError,
    out: Path,
) -> bool:
    """Do what the aggregation record says where too few updates are left; the model stays.

    A round that is skipped counts, and what it brought is thrown away. One that waits is asked for
    again, of those that are missing; the state holds what the others delivered, if it is whole.

    Raises:
        BelowQuorumError: the run is to stop, or it has waited for as long as it may.
    """
    rules = server.aggregation
    if rules.below_quorum == "stop" or (rules.below_quorum == "wait" and server.late()):
        raise shortfall
    with manifest.publish(out / MODEL) as directory, manifest.publish(out / STATE) as memory:
        files.link_tree(model, directory)
        for path in state.glob("*.safetensors"):
            files.link(path, memory / path.name)
        if rules.below_quorum == "skip":
            entry = _skipped(server, admitted, excluded, str(shortfall))
            server = replace(server, round=server.round + 1, history=[*server.history, entry])
            server = replace(server, held=[], waits=0)
        else:
            whole = [update for update in admitted if admission.is_whole(update)]
            for update in whole:
                files.link_tree(update.path, memory / UPDATES / update.facility)
            held = sorted(update.facility for update in whole)
            server = replace(server, held=held, waits=server.waits + 1)
        known = manifest.read(state, "state")["files"]
        server.save(memory, {n: e["sha256"] for n, e in known.items() if n.endswith("tensors")})
    return rules.below_quorum == "wait" or server.more()


def _skipped(
    server: ServerState, admitted: Sequence[Update], excluded: Sequence[Excluded], reason: str
) -> dict[str, Any]:
    """The history of a round that was skipped: what was trained in it does not count."""
    unused = [
        Excluded(u.facility, "unused", "the round was skipped", {"bytes": u.manifest["bytes"]})
        for u in admitted
    ]
    entry = _entry(server, [*excluded, *unused], {}, [u.loss() for u in admitted])
    return entry | {"skipped": reason, "model": server.model}


def _history(
    server: ServerState, averaging: Averaging, excluded: Sequence[Excluded]
) -> dict[str, Any]:
    counted = {}
    for update, share in zip(averaging.updates, averaging.coefficients, strict=True):
        said, name = update.manifest, update.facility
        counted[name] = {"share": share, "norm": averaging.norms[name]} | {
            key: said.get(key) for key in ("status", "reason", *COUNTS)
        }
    return _entry(server, excluded, counted, [u.loss() for u in averaging.updates])


def _entry(
    server: ServerState,
    excluded: Sequence[Excluded],
    counted: Mapping[str, Any],
    losses: Sequence[float | None],
) -> dict[str, Any]:
    nothing: dict[str, Any] = {"seconds": {}, "metrics": {}}
    facilities = {
        e.facility: {"share": 0.0, "norm": None, "status": e.status, "reason": e.reason}
        | {key: e.manifest.get(key, nothing.get(key, 0)) for key in COUNTS}
        for e in excluded
    } | dict(counted)
    known = [loss for loss in losses if loss is not None]
    return {
        "round": server.round + 1,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - server.started, 3),
        "loss": sum(known) / len(known) if known else None,
        "facilities": dict(sorted(facilities.items())),
    } | ({"waits": server.waits} if server.waits else {})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `crossfl aggregate`."""
    parser.add_argument("--global-model", type=Path, required=True, help="model of this round")
    parser.add_argument("--state", type=Path, required=True, help="server state of this round")
    parser.add_argument(
        "--update",
        type=Path,
        action="append",
        default=[],
        help="an update of this round (directory; repeat for each facility)",
    )
    parser.add_argument(
        "--asked",
        type=_asked,
        action="append",
        metavar="FACILITY=STEPS",
        help="a facility that was asked for an update, and for how many steps at most (repeat for "
        "each); unset, an update may be anyone's",
    )


def _asked(word: str) -> tuple[str, int]:
    facility, _, steps = word.partition("=")
    if not steps.isdecimal():
        raise argparse.ArgumentTypeError(f"{word!r} is not of the form facility=steps")
    return facility, int(steps)


def main(args: argparse.Namespace) -> None:
    """Write `next_model`, `next_state` and `more` for the engine."""
    here = args.outdir
    begun = time.monotonic()
    asked = dict(args.asked) if args.asked else None
    another = aggregate(args.global_model, args.state, args.update, here, asked=asked)
    state = ServerState.load(here / STATE)
    if state.run and (place := journal.here()):
        run = journal.Run.load(place / state.run)
        run.publish(here / MODEL, here / STATE, state.retention)
        if not another:
            files.break_hard_links(here / MODEL)  # the journal's files, until now
    with Progress(round=state.round + (state.waits > 0), rounds=state.rounds) as progress:
        if state.waits:
            wait = state.aggregation.wait_seconds
            held = ", ".join(state.held) or "nobody"
            progress("wait", message=f"below the quorum, with {held}; asking again in {wait:g} s")
            time.sleep(wait)
        else:
            last = state.history[-1]
            message = (
                "skipped: " + last["skipped"]
                if "skipped" in last
                else f"{len(args.update)} updates"
            )
            progress(
                "aggregate",
                loss=last["loss"],
                seconds=time.monotonic() - begun,
                message=message + ("" if another else ", last round"),
            )
    files.write(here, next_model=here / MODEL, next_state=here / STATE, more=another)
