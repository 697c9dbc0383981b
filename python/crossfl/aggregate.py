"""Turn the updates of a round into the next global model and the next server state."""

import argparse
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from crossfl import gate, manifest, outputs
from crossfl.average import Averaging
from crossfl.checkpoint import Tensors
from crossfl.errors import CrossFLError
from crossfl.gate import Excluded, Refused, Update
from crossfl.progress import Progress
from crossfl.records import Aggregation
from crossfl.state import ServerState
from crossfl.stream import PIECE

MODEL, STATE = "global_model", "state"


def aggregate(
    model: Path,
    state: Path,
    updates: Sequence[Path],
    out: Path,
    *,
    threads: int | None = None,
    piece: int = PIECE,
) -> bool:
    """Write the next `out/global_model` and `out/state`; True if another round is to follow.

    The deltas are combined in fp32, facilities in sorted order, and applied to the fp32 master
    weights; the model is the master rounded to its own dtype. All of it is walked in pieces
    (`crossfl.average`): memory does not grow with the model or the number of facilities. Numbers
    are averaged while they are checked; where a check then fails, what was written is thrown away,
    the update is refused, and the round begins again without it.

    Args:
        model: global model of this round (directory).
        state: server state of this round (directory).
        updates: one directory for each facility, in any order.
        out: folder to write into.
        threads: threads to use, by default one for each core; the result does not depend on it.
        piece: elements walked at a time, a multiple of a cell; the result does not depend on it.

    Raises:
        CrossFLError: fewer good updates than the quorum, or model or state are damaged. Nothing
            was written.
    """
    if not updates:
        raise CrossFLError("no update was given: name one directory for each facility")
    server = ServerState.load(state)
    described = manifest.read(model, "model")
    if described["digest"] != server.model:
        raise CrossFLError(f"{model} is not the model that {state} belongs to")
    weights = Tensors.of_model(model)
    manifest.verify(model, "model", only=_copied(described, weights))
    admitted, excluded = gate.admit(updates, server, weights.floats())
    while True:
        averaging = Averaging(state, weights, admitted, server.aggregation, threads, piece)
        gate.check_quorum(admitted, excluded, server.aggregation, averaging.least)
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


def more(state: ServerState) -> bool:
    """Whether another round is to follow: rounds left, target loss not met, time left."""
    rules = state.aggregation
    loss = state.history[-1]["loss"]
    met = rules.target_loss is not None and loss is not None and loss <= rules.target_loss
    late = rules.max_seconds is not None and time.time() - state.started >= rules.max_seconds
    return state.round < state.rounds and not met and not late


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
        for name in manifest.read(model, "model")["files"]:
            if not name.endswith(".safetensors"):
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(model / name, directory / name)
        averaging.weigh(shares(averaging.updates, server.aggregation))
        sums = averaging.write(directory, memory)
        round_ = server.round + 1
        digest = manifest.write(directory, "model", {"round": round_}, sums)["digest"]
        entry = _history(server, averaging, excluded) | {"model": digest}
        server = replace(server, round=round_, model=digest, history=[*server.history, entry])
        server.save(memory, sums)
    return more(server)


def _history(
    server: ServerState, averaging: Averaging, excluded: Sequence[Excluded]
) -> dict[str, Any]:
    counts = ("tokens", "samples", "steps", "bytes", "seconds", "metrics")
    nothing: dict[str, Any] = {"seconds": {}, "metrics": {}}
    facilities = {
        e.facility: {"share": 0.0, "norm": None, "status": e.status, "reason": e.reason}
        | {key: e.manifest.get(key, nothing.get(key, 0)) for key in counts}
        for e in excluded
    }
    for update, share in zip(averaging.updates, averaging.coefficients, strict=True):
        said, name = update.manifest, update.facility
        facilities[name] = {"share": share, "norm": averaging.norms[name]} | {
            key: said[key] for key in ("status", "reason", *counts)
        }
    losses = [loss for u in averaging.updates if (loss := u.loss()) is not None]
    return {
        "round": server.round + 1,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - server.started, 3),
        "loss": sum(losses) / len(losses) if losses else None,
        "facilities": dict(sorted(facilities.items())),
    }


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


def main(args: argparse.Namespace) -> None:
    """Write `next_model`, `next_state` and `more` for the engine."""
    here = args.outdir
    begun = time.monotonic()
    another = aggregate(args.global_model, args.state, args.update, here)
    state = ServerState.load(here / STATE)
    with Progress(round=state.round, rounds=state.rounds) as progress:
        progress(
            "aggregate",
            loss=state.history[-1]["loss"],
            seconds=time.monotonic() - begun,
            message=f"{len(args.update)} updates" + ("" if another else ", last round"),
        )
    outputs.write(here, next_model=here / MODEL, next_state=here / STATE, more=another)
