"""Turn the updates of a round into the next global model and the next server state."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from crossfl.observe.events import Progress, is_followed
from crossfl.protocol.events import ADMITTED, MERGED
from crossfl.protocol.flags import from_words
from crossfl.protocol.history import COUNTED
from crossfl.protocol.layout import GLOBAL_MODEL, STATE
from crossfl.protocol.records import Allowance
from crossfl.protocol.text import printable
from crossfl.server.journal import journal
from crossfl.server.rounds import Averaged, Outcome, Skipped, Waiting, aggregate
from crossfl.steps import outputs
from crossfl.storage.files import break_hard_links


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `crossfl aggregate`."""
    parser.add_argument("--global-model", type=Path, required=True, help="model of this round")
    parser.add_argument("--state", type=Path, required=True, help="server state of this round")
    parser.add_argument(
        "--update",
        type=Path,
        action="append",
        default=[],
        help="an update of this round (directory; repeat for each, in the order of --allowance)",
    )
    parser.add_argument(
        "--allowance",
        action="append",
        nargs="+",
        metavar="FIELD=VALUE",
        help="what a member of the federation was asked for and may claim, as plan says (repeat "
        "for each); unset, an update may be anyone's",
    )


def main(args: argparse.Namespace) -> None:
    """Write `next_model`, `next_state` and `more` for the engine."""
    folder, begun = args.outdir, time.monotonic()
    allowances = args.allowance and [from_words(words, Allowance) for words in args.allowance]
    with outputs.all_or_none(folder / GLOBAL_MODEL, folder / STATE):
        now = time.time()
        outcome = aggregate(
            args.global_model,
            args.state,
            args.update,
            folder,
            now,
            allowances=allowances,
            admitted=_tell_admitted if is_followed() else None,
        )
        state, more = outcome.state, another_turn(outcome, now)
        if state.run and (place := journal.here()):
            run = journal.Run.load(place / state.run)
            run.publish(folder / GLOBAL_MODEL, folder / STATE, state.retention)
            if not more:
                break_hard_links(folder / GLOBAL_MODEL)  # the journal's files, until now
        conclude(outcome, more, time.monotonic() - begun)
        made = {"next_model": folder / GLOBAL_MODEL, "next_state": folder / STATE}
        outputs.write(folder, **made, more=more)


def another_turn(outcome: Outcome, now: float) -> bool:
    """Whether the loop turns again: for another round, or for the one that waits.

    Args:
        outcome: of the round.
        now: the moment it was aggregated at, in seconds since 1970.
    """
    return isinstance(outcome, Waiting) or outcome.state.more(now)


def conclude(outcome: Outcome, more: bool, seconds: float) -> None:
    """Say how a round ended, and pause where it waits for its quorum."""
    state, waits = outcome.state, isinstance(outcome, Waiting)
    with Progress(round=state.round + waits, rounds=state.rounds) as progress:
        if isinstance(outcome, Waiting):
            held = ", ".join(state.held) or "nobody"
            progress(
                "wait",
                message=f"below the quorum, with {held}; asking again in {outcome.seconds:g} s: "
                f"{printable(outcome.reason)}",
            )
            time.sleep(outcome.seconds)
        else:
            if isinstance(outcome, Averaged | Skipped) and is_followed():
                _tell_fates(outcome)
            last = "" if more else ", last round"
            progress(
                "aggregate",
                loss=_loss(outcome),
                seconds=seconds,
                message=_message(outcome) + last,
            )


def _tell_admitted(round_: int, facilities: Sequence[str]) -> None:
    """Say whose updates are as they should be, before they are averaged."""
    for name in facilities:
        with Progress(facility=name, round=round_) as progress:
            progress(ADMITTED)


def _tell_fates(outcome: Averaged | Skipped) -> None:
    """Say what became of each facility's update; a log has no line for it."""
    for name, entry in outcome.entry.facilities.items():
        with Progress(facility=name, round=outcome.entry.round) as progress:
            fate = MERGED if entry.status in COUNTED else entry.status
            progress(fate, message=entry.reason, bytes=entry.bytes)


def _loss(outcome: Outcome) -> float | None:
    return outcome.entry.loss if isinstance(outcome, Averaged | Skipped) else None


def _message(outcome: Outcome) -> str:
    if isinstance(outcome, Skipped):
        return printable(f"skipped: {outcome.entry.skipped}")
    if isinstance(outcome, Averaged):
        counted = [e for e in outcome.entry.facilities.values() if e.status in COUNTED]
        return f"{len(counted)} of {len(outcome.entry.facilities)} updates"
    return "nothing left to average"
