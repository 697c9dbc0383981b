"""Decide the next round: which facilities take part, and what each is asked to do."""

import argparse
import time
from collections.abc import Mapping
from pathlib import Path

from crossfl.observe.events import Progress
from crossfl.protocol.flags import add_flags, from_flags, from_words
from crossfl.protocol.records import Facility, Training
from crossfl.server import state as server_state
from crossfl.server.journal import journal
from crossfl.server.planning.fixed import plan
from crossfl.steps import outputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `crossfl plan`."""
    parser.add_argument("--state", type=Path, required=True, help="server state (directory)")
    parser.add_argument(
        "--facility",
        action="append",
        nargs="+",
        required=True,
        metavar="FIELD=VALUE",
        help="a facility, for example: --facility name=leonardo dataset=it (repeat for each)",
    )
    parser.add_argument(
        "--local-steps", type=int, required=True, help="optimizer steps per facility and round"
    )
    parser.add_argument("--purpose", choices=("train", "evaluate"), default="train")
    add_flags(parser, Training)


def main(args: argparse.Namespace) -> None:
    """Write `round`, `tasks` and `allowances` to `cwl.output.json`."""
    state, training = server_state.load(args.state), from_flags(args, Training)
    changes: Mapping[str, str] = {}
    if state.run and (place := journal.here()):
        journal.check_space(place, args.state)
        if args.purpose == "train":
            changes = journal.check_training(place / state.run, training.asdict())
    facilities = [from_words(words, Facility) for words in args.facility]
    more = state.more(time.time())
    planned = plan(state, facilities, args.local_steps, training, args.purpose, more=more)
    with Progress(round=planned.round, rounds=state.rounds) as progress:
        if changes:
            listing = ", ".join(f"{name}: {change}" for name, change in changes.items())
            progress("journal", message=f"no round is finished, so the run takes on {listing}")
        names = ", ".join(task.facility for task in planned.tasks)
        message = f"{args.purpose} at {names}" if names else "nothing left to train"
        progress("plan", message=message)
    outputs.write(
        args.outdir,
        round=planned.round,
        tasks=[task.asdict() for task in planned.tasks],
        allowances=[allowance.asdict() for allowance in planned.allowances],
    )
