"""Run a federation in this one process: the same functions as the workflow, in a plain loop.

With --data it trains, and leaves what the workflow leaves. With --sites nothing is trained: queues
and jobs are played in virtual time, and it says when the federation would end, at what cost.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crossfl.errors import CrossFLError
from crossfl.facility import place
from crossfl.protocol import decoding
from crossfl.protocol.layout import EVALUATION, FORECAST, GLOBAL_MODEL, STATE, UPDATE
from crossfl.protocol.state import ServerState
from crossfl.protocol.variables import DATA, FACILITY, PROMPTS
from crossfl.protocol.variables import STATE as STATE_FOLDER
from crossfl.server import state as server_state
from crossfl.server.planning.fixed import plan
from crossfl.server.quorum import BelowQuorumError
from crossfl.server.rounds import Waiting, aggregate
from crossfl.simulation import replay
from crossfl.simulation.virtual import forecast, sites
from crossfl.steps import failure
from crossfl.steps.aggregate import another_turn, conclude
from crossfl.steps.evaluate import absent as evaluation_absent
from crossfl.steps.evaluate import evaluate
from crossfl.steps.initialise import check_participation, initialise
from crossfl.steps.report import report
from crossfl.steps.train import absent as update_absent
from crossfl.steps.train import train
from crossfl.storage.files import check_vacant, write_bytes
from crossfl.storage.job import Job

MOST_WAITS = 3
"""Pauses of one round below its quorum: here mostly nobody is left who could come meanwhile."""


def simulate(job: Job, data: Path, out: Path, history: Path | None = None) -> None:
    """Leave in `out` what the workflow leaves: global_model, history, evaluation and report.

    Args:
        job: the federation.
        data: folder with one folder for each facility, which holds its datasets.
        out: folder to write into; rounds in progress are kept in a hidden folder there.
        history: history of a run to replay; unset, every facility delivers in every round.

    Raises:
        CrossFLError: the rounds of the job close by what queues do, and no history is given; or
            the replay does not end as the history does.
    """
    check_vacant(out / GLOBAL_MODEL)
    if history is None and not job.aggregation.waits_for_all:
        raise CrossFLError(
            f"aggregation.closes is {job.aggregation.closes}: who is in which round depends on "
            "queues, and there are none here. Use closes: all, or give a history to --replay"
        )
    past = None if history is None else replay.read(history)
    out.mkdir(parents=True, exist_ok=True)
    with (
        playing_every_facility(data),
        tempfile.TemporaryDirectory(prefix=".rounds-", dir=out) as scratch,
    ):
        turns = (
            rounds(job, Path(scratch)) if past is None else replay.rounds(job, past, Path(scratch))
        )
        folder = [folder for _, folder in turns][-1]
        state, evaluations = server_state.load(folder / STATE), []
        planned = plan(state, job.facilities, job.local_steps, job.training, "evaluate")
        for task in planned.tasks:
            facility = _folder(folder / "facilities" / task.facility)
            with failure.handled("absent", task, facility / EVALUATION, evaluation_absent):
                evaluate(folder / GLOBAL_MODEL, task, job.training, job.prompts, facility)
            evaluations.append(facility / EVALUATION)
        report(folder / STATE, evaluations, out, allowances=planned.allowances)
        (folder / GLOBAL_MODEL).rename(out / GLOBAL_MODEL)


def rounds(job: Job, scratch: Path) -> Iterator[tuple[ServerState, Path]]:
    """Run the rounds one by one; after each, the state and the folder with the state and the model.

    A facility that fails is absent from the round. What then follows from the quorum is what the
    workflow does, but that a round waits for `MOST_WAITS` pauses at most. The folder of a round is
    removed when the next one is done.

    Raises:
        CrossFLError: a round is below its quorum, and is not to be skipped.
    """
    folder, turn, more = _folder(scratch / "0"), 0, True
    check_participation(job.facilities, 0, job.rounds, job.aggregation)
    first = (job.model, job.config, job.tokenizer, job.seed, job.rounds, job.aggregation)
    initialise(*first, folder, job.lora)
    while more:
        before, state, begun = folder, server_state.load(folder / STATE), time.monotonic()
        planned = plan(
            state,
            job.facilities,
            job.local_steps,
            job.training,
            "train",
            more=state.more(time.time()),
        )
        turn += 1
        folder = _folder(scratch / str(turn))
        updates = []
        for task in planned.tasks:
            facility = _folder(folder / "facilities" / task.facility)
            with failure.handled("absent", task, facility / UPDATE, update_absent):
                train(before / GLOBAL_MODEL, task, job.training, facility)
            updates.append(facility / UPDATE)
        now = time.time()
        outcome = aggregate(
            before / GLOBAL_MODEL,
            before / STATE,
            updates,
            folder,
            now,
            allowances=planned.allowances,
        )
        shutil.rmtree(folder / "facilities", ignore_errors=True)
        shutil.rmtree(before)
        more = another_turn(outcome, now)
        if isinstance(outcome, Waiting) and outcome.state.waits > MOST_WAITS:
            raise BelowQuorumError(
                f"{outcome.reason}. Round {planned.round} has waited {MOST_WAITS} times"
            )
        conclude(outcome, more, time.monotonic() - begun)
        if not isinstance(outcome, Waiting):
            yield outcome.state, folder


@contextmanager
def playing_every_facility(data: Path) -> Iterator[None]:
    """Let this process train for any facility, with data in a folder of each facility's name."""
    before = {name: os.environ.get(name) for name in (FACILITY, DATA, STATE_FOLDER, PROMPTS)}
    with tempfile.TemporaryDirectory(prefix="crossfl-state-") as state:
        os.environ.update({FACILITY: place.ANY, DATA: str(data), STATE_FOLDER: state, PROMPTS: "1"})
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `crossfl simulate`."""
    parser.add_argument("job", type=Path, help="job file, as for workflows/federated.cwl")
    parser.add_argument(
        "--data", type=Path, help="train, on a folder with a folder of datasets per facility"
    )
    parser.add_argument(
        "--sites", type=Path, help="play times alone, on sites of these speeds and queues (YAML)"
    )
    parser.add_argument(
        "--draws", type=int, default=20, help="times that --sites plays; default: 20"
    )
    parser.add_argument(
        "--replay",
        type=Path,
        metavar="HISTORY",
        help="history.jsonl of a run: merge the same updates in the same rounds, and check that "
        "the models are the same",
    )


def main(args: argparse.Namespace) -> None:
    """Run the federation, or play it."""
    if (args.data is None) == (args.sites is None):
        raise CrossFLError("give --data to train, or --sites to play the times alone")
    job = Job.load(args.job)
    job.check(args.job)
    if args.sites is None:
        simulate(job, args.data, args.outdir, args.replay)
        return
    if args.replay is not None:
        raise CrossFLError("--replay trains: give it --data, and not --sites")
    told = forecast.forecast(job, sites.load(args.sites), args.draws)
    args.outdir.mkdir(parents=True, exist_ok=True)
    write_bytes(args.outdir / FORECAST, decoding.encode(told))
    print(forecast.table(told))
