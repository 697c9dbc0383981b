"""Decide the next round: which facilities take part, and what each is asked to do."""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from crossfl.errors import CrossFLError
from crossfl.observe.progress import Progress
from crossfl.protocol.records import Facility, Task, Training, add_flags, from_flags, from_words
from crossfl.protocol.seeds import derive_seed
from crossfl.server.journal import journal
from crossfl.server.state import ServerState
from crossfl.storage import files

Purpose = Literal["train", "evaluate"]
LARGEST_INT = 2**31 - 1
"""Of CWL: only a facility that claims what it never did comes to more samples."""


def plan(
    state: ServerState, facilities: Sequence[Facility], local_steps: int, purpose: Purpose
) -> tuple[int, list[Task]]:
    """The number of the round and its tasks, one for each facility that takes part, by name.

    Everything a facility needs to go on where it stopped follows from the state, so that nothing
    is held between rounds: the position on the learning-rate schedule, which spans the federation,
    and the samples it has already seen. For `evaluate`, the round is the one just finished, and
    every facility that has joined and not left is asked.

    Raises:
        CrossFLError: two facilities share a name, or a round of the federation has too few.
    """
    if twice := [name for name, n in Counter(f.name for f in facilities).items() if n > 1]:
        raise CrossFLError(f"facility {twice[0]!r} is named twice: give each facility once")
    if local_steps < 1:
        raise CrossFLError(f"local_steps is {local_steps}: it must be at least 1")
    left = range(state.round + 1, state.rounds + 1)
    check_rounds(facilities, left, state.aggregation.quorum or 1)
    training = purpose == "train"
    if training and not state.more():
        return state.round, []  # a run that was interrupted after its last round
    number = state.round + 1 if training else state.round
    tasks = []
    for facility in sorted(facilities, key=lambda f: f.name):
        if not _takes_part(facility, number, purpose):
            continue
        if training and facility.name in state.held:
            continue  # its update of this round waits for those of the others
        steps = facility.local_steps or local_steps
        counted = state.counted(facility.name)
        seen = sum(entry["samples"] for entry in counted.values())
        tasks.append(
            Task(
                facility=facility.name,
                dataset=facility.dataset,
                round=number,
                local_steps=steps if training else 0,
                seed=derive_seed(state.seed, facility.name, str(number)),
                schedule_step=steps * state.round,
                schedule_steps=steps * state.rounds,
                samples_seen=min(seen, LARGEST_INT),
                data_seed=derive_seed(state.seed, facility.name),
                base=state.model,
                counted=max(counted, default=0),
                federation=f"{derive_seed(state.seed, repr(state.started)):08x}",
                attempts=facility.attempts,
                queue_timeout=facility.queue_timeout,
            )
        )
    return number, tasks


def check_rounds(facilities: Sequence[Facility], rounds: range, least: int) -> None:
    """Check that in each of these rounds at least so many facilities take part.

    Raises:
        CrossFLError: they do not; the message names the first such round.
    """
    for number in rounds:
        there = sum(_takes_part(facility, number, "train") for facility in facilities)
        if there < least:
            raise CrossFLError(
                f"{there or 'no'} {'facilities take' if there > 1 else 'facility takes'} part in "
                f"round {number} of {rounds[-1]}, which needs {least}: see joins, leaves and skips "
                "of the facilities, and quorum, combination and dishonest of the aggregation"
            )


def _takes_part(facility: Facility, number: int, purpose: Purpose) -> bool:
    here = facility.joins <= number <= (facility.leaves or number)
    return here and not (purpose == "train" and number in facility.skips)


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
    """Write `round`, `tasks` and `asked` to `cwl.output.json`."""
    state = ServerState.load(args.state)
    if state.run and (place := journal.here()):
        journal.check_space(place, args.state)
        if args.purpose == "train":
            journal.check_training(place / state.run, from_flags(args, Training).asdict())
    facilities = [from_words(words, Facility) for words in args.facility]
    number, tasks = plan(state, facilities, args.local_steps, args.purpose)
    with Progress(round=number, rounds=state.rounds) as progress:
        where = ", ".join(t.facility for t in tasks)
        progress("plan", message=f"{args.purpose} at {where}" if tasks else "nothing left to train")
    asked = [f"{task.facility}={task.local_steps}" for task in tasks]
    files.write(args.outdir, round=number, tasks=[task.asdict() for task in tasks], asked=asked)
