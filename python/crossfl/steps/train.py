"""Train the global model on a facility's own data; what leaves is a delta and its manifest."""

import argparse
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from crossfl.errors import CrossFLError
from crossfl.facility import place, scheduler
from crossfl.facility.staging import staged
from crossfl.facility.time_budget import StopSignal
from crossfl.observe.events import Progress
from crossfl.protocol.fields import LONGEST_REASON
from crossfl.protocol.flags import add_flags, from_flags
from crossfl.protocol.layout import UPDATE
from crossfl.protocol.manifest import UpdateManifest
from crossfl.protocol.measurements import PhaseSeconds, UpdateMetrics
from crossfl.protocol.records import Task, Training
from crossfl.protocol.text import printable
from crossfl.steps import failure
from crossfl.steps.delivery import deliver
from crossfl.storage import manifest, signature
from crossfl.storage.files import check_vacant, publish
from crossfl.storage.model_folder import ModelFolder


def train(
    model: Path, task: Task, training: Training, out: Path, stop: StopSignal | None = None
) -> UpdateManifest | None:
    """Write `out/update`: the delta (local minus global weights) and the manifest returned.

    The received model, and the local one it has become after training, are measured on the
    facility's validation split in the same job: on a queue, a job of its own would cost another
    wait. Of several ranks, the first one writes; the others return nothing. Where time runs out
    (`time_budget`), the update is partial, with the number of steps that were done, and the local
    model is not measured.

    Raises:
        CrossFLError: this is not the task's facility, model or dataset are unfit, or there was no
            time for a single step.
    """
    check_vacant(out / UPDATE)
    if task.local_steps < 1:
        raise CrossFLError(f"task.local_steps is {task.local_steps}: training takes at least 1")
    folder = place.resolve(task.dataset, place.data_root(task))
    rounds, clock = task.schedule_steps // task.local_steps, Clock()
    with Progress(facility=task.facility, round=task.round, rounds=rounds) as progress:
        progress("load")
        with clock("load"):
            ModelFolder.received(model, only=())  # before links in it would be copied
            model = staged(model)
            check_base(model, task)
            # It builds models: what is cheap to refuse has been refused before.
            from crossfl.learning.training import Trainer

            trainer = Trainer(model, folder, task, training)
            for notice in trainer.notices:
                progress("load", message=notice)
        with clock("evaluate"):
            validation = trainer.validate()
        with clock("train"):
            result = trainer.train(progress, stop or StopSignal(), sum(clock.seconds.values()))
        status: Literal["complete", "partial"] = "complete" if result.reason is None else "partial"
        reason = result.reason and f"{result.steps} of {task.local_steps} steps: {result.reason}"
        cost = trainer.account(result)
        local = None
        if reason is None:
            with clock("evaluate"):
                local = trainer.validate()
        if not trainer.leads:
            trainer.save_delta(model, out)
            trainer.keep()
            return None
        with publish(out / UPDATE) as directory:
            with clock("save"):
                trainer.save_delta(model, directory)
                trainer.keep()
            clock.seconds["queue"] = scheduler.seconds_in_queue()
            update = manifest.write(
                directory,
                UpdateManifest(
                    **_heading(task),
                    status=status,
                    reason=reason,
                    tokens=result.tokens,
                    samples=result.samples,
                    steps=result.steps,
                    seconds=clock.phases(),
                    metrics=UpdateMetrics(validation=validation, local=local, training=cost),
                ),
            )
            signature.sign(directory)
        trainer.forget(own=reason is None)
        progress(
            "trained",
            step=result.steps,
            steps=result.steps,
            loss=cost.last_loss,
            tokens_per_second=cost.tokens_per_second,
            seconds=sum(clock.seconds.values()),
            message=_message(update),
        )
        return update


def absent(task: Task, reason: str, out: Path) -> UpdateManifest:
    """Write `out/update` for a facility that is absent or late: a manifest with the reason."""
    with publish(out / UPDATE) as directory:
        update = manifest.write(
            directory,
            UpdateManifest(
                **_heading(task),
                status="late" if place.is_late() else "absent",
                reason=printable(reason, longest=LONGEST_REASON),
                seconds=PhaseSeconds(queue=scheduler.seconds_in_queue()),
            ),
        )
        return update


def _heading(task: Task) -> dict[str, Any]:
    """Whose update it is, and for what."""
    return {
        "facility": task.facility,
        "federation": task.federation,
        "round": task.round,
        "base": task.base,
    }


def _message(update: UpdateManifest) -> str:
    validation, local = update.metrics.validation, update.metrics.local
    message = f"validation loss {validation.loss:.4f}" if validation else "losses stay here"
    if local:
        message += f", then {local.loss:.4f}"
    return message + (f", partial: {update.reason}" if update.status == "partial" else "")


class Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time what is done inside."""
        begun = time.monotonic()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - begun

    def phases(self) -> PhaseSeconds:
        """The seconds so far, as a manifest has them."""
        return PhaseSeconds(**{phase: round(s, 3) for phase, s in self.seconds.items()})


def check_base(model: Path, task: Task) -> ModelFolder:
    """Check that the model arrived whole and is the one the task starts from.

    Raises:
        CrossFLError: it is not.
    """
    folder = ModelFolder.received(model)
    if folder.digest != task.base:
        raise CrossFLError(
            f"{model} is not the model that round {task.round} of {task.facility} starts from"
        )
    return folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `crossfl train`."""
    parser.add_argument(
        "--global-model", type=Path, required=True, help="model to start from (directory)"
    )
    failure.add_flag(parser)
    add_flags(parser, Task)
    add_flags(parser, Training)


def main(args: argparse.Namespace) -> None:
    """Write `update` for the engine."""
    task, training = from_flags(args, Task), from_flags(args, Training)
    stop = StopSignal().listen()

    def work() -> None:
        train(args.global_model, task, training, args.outdir, stop)

    deliver(args, task, UPDATE, UpdateManifest, work, absent, stop)
