"""Run a federation in this one process: the same functions as the workflow, in a plain loop."""

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crossfl.facility import place
from crossfl.server.state import ServerState
from crossfl.steps.aggregate import aggregate
from crossfl.steps.evaluate import FILE, evaluate
from crossfl.steps.initialise import initialise
from crossfl.steps.plan import plan
from crossfl.steps.report import report
from crossfl.steps.train import UPDATE, train
from crossfl.storage import manifest
from crossfl.storage.files import write_json
from crossfl.storage.job import Job


def simulate(job: Job, data: Path, out: Path) -> None:
    """Leave in `out` what the workflow leaves: global_model, history, evaluation and report.

    Args:
        job: the federation.
        data: folder with one folder for each facility, which holds its datasets.
        out: folder to write into; rounds in progress are kept in a hidden folder there.
    """
    manifest.check_vacant(out / "global_model")
    out.mkdir(parents=True, exist_ok=True)
    with (
        playing_every_facility(data),
        tempfile.TemporaryDirectory(prefix=".rounds-", dir=out) as scratch,
    ):
        here = [here for _, here in rounds(job, Path(scratch))][-1]
        state, files = ServerState.load(here / "state"), []
        for task in plan(state, job.facilities, job.local_steps, "evaluate")[1]:
            files.append(_folder(here / "facilities" / task.facility) / FILE)
            record = evaluate(here / "global_model", task, job.training, job.prompts)
            write_json(files[-1], record)
        report(here / "state", files, out)
        (here / "global_model").rename(out / "global_model")


def rounds(job: Job, scratch: Path) -> Iterator[tuple[ServerState, Path]]:
    """Run the rounds one by one; after each, the state and the folder with the state and the model.

    The folder of a round is removed when the next one is done.
    """
    here = _folder(scratch / "0")
    start = (job.model, job.config, job.tokenizer, job.seed, job.rounds, job.aggregation)
    initialise(*start, here, job.lora)
    more = True
    while more:
        before, state = here, ServerState.load(here / "state")
        _, tasks = plan(state, job.facilities, job.local_steps, "train")
        here = _folder(scratch / str(int(before.name) + 1))
        updates = []
        for task in tasks:
            folder = _folder(here / "facilities" / task.facility)
            train(before / "global_model", task, job.training, folder)
            updates.append(folder / UPDATE)
        asked = {task.facility: task.local_steps for task in tasks}
        more = aggregate(before / "global_model", before / "state", updates, here, asked=asked)
        shutil.rmtree(here / "facilities")
        shutil.rmtree(before)
        yield ServerState.load(here / "state"), here


@contextmanager
def playing_every_facility(data: Path) -> Iterator[None]:
    """Let this process train for any facility, with data in a folder of each facility's name."""
    before = {name: os.environ.get(name) for name in (place.FACILITY, place.DATA, place.STATE)}
    with tempfile.TemporaryDirectory(prefix="crossfl-state-") as state:
        os.environ.update({place.FACILITY: place.ANY, place.DATA: str(data), place.STATE: state})
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
        "--data", type=Path, required=True, help="folder with a folder of datasets per facility"
    )


def main(args: argparse.Namespace) -> None:
    """Run the federation."""
    simulate(Job.load(args.job), args.data, args.outdir)
