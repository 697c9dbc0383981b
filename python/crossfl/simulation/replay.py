"""Replay a run: who counted in which round, with which task, decides the weights, to the bit.

When an update arrives depends on queues and clocks. All that follows from it does not: a history
says whose update counted when, and how many rounds its task was behind. With the same job file and
data, the same updates are trained here, each from the model of its task, and merged in the same
rounds.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from crossfl.errors import CrossFLError
from crossfl.protocol.history import COUNTED, FacilityEntry, RoundEntry, decode_line
from crossfl.protocol.layout import GLOBAL_MODEL, SIGNATURE, STATE, UPDATE
from crossfl.protocol.manifest import UpdateManifest
from crossfl.protocol.records import Task
from crossfl.protocol.state import ServerState
from crossfl.server import state as server_state
from crossfl.server.planning.fixed import plan
from crossfl.server.rounds import aggregate
from crossfl.steps.initialise import initialise
from crossfl.steps.train import train
from crossfl.storage import manifest, signature
from crossfl.storage.files import publish
from crossfl.storage.job import Job


def read(path: Path) -> list[RoundEntry]:
    """The rounds of a history, `history.jsonl`.

    Raises:
        CrossFLError: it cannot be read, a line is not that of a round, or a round is missing.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise CrossFLError(f"{path} cannot be read: {error.strerror}") from None
    entries = [decode_line(line, f"{path}, line {n}") for n, line in enumerate(lines, 1)]
    for number, entry in enumerate(entries, 1):
        if entry.round != number:
            raise CrossFLError(f"{path}, line {number} is of round {entry.round}: give all rounds")
    if not entries:
        raise CrossFLError(f"{path} has no round")
    return entries


def rounds(
    job: Job, history: Sequence[RoundEntry], scratch: Path
) -> Iterator[tuple[ServerState, Path]]:
    """Replay the rounds one by one; after each, the state and the folder with state and model.

    The folder of a round is removed when the next one is done.

    Args:
        job: the job file of the run.
        history: what happened in it.
        scratch: folder to work in.

    Raises:
        CrossFLError: a round ends with another model than the history has.
    """
    counting = {
        (name, entry.round - said.staleness): said
        for entry in history
        for name, said in entry.facilities.items()
        if said.status in COUNTED
    }
    before = scratch / "0"
    before.mkdir()
    first = (job.model, job.config, job.tokenizer, job.seed, job.rounds, job.aggregation)
    initialise(*first, before, job.lora)
    for entry in history:
        state = server_state.load(before / STATE)
        planned = plan(state, job.facilities, job.local_steps, job.training, "train")
        folder, updates = scratch / str(entry.round), []
        for task in planned.tasks:
            outcome = entry.facilities.get(task.facility)
            if (said := counting.get((task.facility, task.round))) is not None:
                _train(before / GLOBAL_MODEL, task, job, said, scratch)
            if outcome is not None and outcome.status in COUNTED:
                path = _place(scratch, task.facility, entry.round - outcome.staleness)
            else:
                path = _place(scratch, task.facility, entry.round, "missing")
                _stand_in(task, outcome, path)
            updates.append(path / UPDATE)
        aggregate(
            before / GLOBAL_MODEL,
            before / STATE,
            updates,
            folder,
            state.started + entry.seconds,
            allowances=planned.allowances,
        )
        state = server_state.load(folder / STATE)
        if state.model != entry.model:
            raise CrossFLError(
                f"round {entry.round} ends with another model than in the history: job file, data "
                "and versions must be those of the run"
            )
        for update in updates:
            shutil.rmtree(update.parent)
        shutil.rmtree(before)
        before = folder
        yield state, folder


def _place(scratch: Path, facility: str, number: int, what: str = "trained") -> Path:
    return scratch / what / facility / str(number)


def _train(model: Path, task: Task, job: Job, said: FacilityEntry, scratch: Path) -> None:
    """Train the update of a task as it once was, with the seconds and the status it had."""
    place = _place(scratch, task.facility, task.round)
    place.mkdir(parents=True)
    train(model, task.replace(local_steps=said.steps), job.training, place)
    update = manifest.read(place / UPDATE, UpdateManifest)
    once = update.replace(status=said.status, reason=said.reason, seconds=said.seconds)
    (place / UPDATE / SIGNATURE).unlink(missing_ok=True)
    manifest.write(place / UPDATE, once)
    signature.sign(place / UPDATE)


def _stand_in(task: Task, outcome: FacilityEntry | None, place: Path) -> None:
    """Write an update that is late or absent."""
    late = outcome is not None and outcome.status == "late"
    why = (outcome and outcome.reason) or "it did not count in the run that is replayed"
    place.mkdir(parents=True, exist_ok=True)
    with publish(place / UPDATE) as directory:
        manifest.write(
            directory,
            UpdateManifest(
                facility=task.facility,
                federation=task.federation,
                round=task.round,
                base=task.base,
                status="late" if late else "absent",
                reason=why,
            ),
        )
