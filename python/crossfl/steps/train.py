"""Train the global model on a facility's own data; what leaves is a delta and its manifest."""

import argparse
import contextlib
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crossfl.errors import CrossFLError
from crossfl.facility import launcher, place, scheduler
from crossfl.facility.staging import staged
from crossfl.facility.time_budget import StopSignal
from crossfl.observe.progress import Progress
from crossfl.protocol.records import Task, Training, add_flags, from_flags
from crossfl.storage import files, manifest, signature

UPDATE = "update"


def train(
    model: Path, task: Task, training: Training, out: Path, stop: StopSignal | None = None
) -> dict[str, Any]:
    """Write `out/update`: the delta (local minus global weights) and the manifest returned.

    The received model, and the local one it has become after training, are measured on the
    facility's validation split in the same job: on a queue, a job of its own would cost another
    wait. Of several ranks, the first one writes; the others return nothing. Where time runs out
    (`time_budget`), the update is partial, with the number of steps that were done, and the
    local model is not measured.

    Raises:
        CrossFLError: this is not the task's facility, model or dataset are unfit, or there was no
            time for a single step.
    """
    manifest.check_vacant(out / UPDATE)
    if task.local_steps < 1:
        raise CrossFLError(f"task.local_steps is {task.local_steps}: training takes at least 1")
    folder = place.resolve(task.dataset, place.data_root(task))
    rounds, clock = task.schedule_steps // task.local_steps, Clock()
    with Progress(facility=task.facility, round=task.round, rounds=rounds) as progress:
        progress("load")
        with clock("load"):
            model, folder = staged(model), staged(folder)
            check_base(model, task)
            # It builds models: what is cheap to refuse has been refused before.
            from crossfl.learning.training import Trainer

            trainer = Trainer(model, folder, task, training)
            if trainer.lost:
                progress("load", message=trainer.lost)
        with clock("evaluate"):
            validation = trainer.validate()
        with clock("train"):
            trained = trainer.train(progress, stop or StopSignal(), sum(clock.seconds.values()))
        status = "complete" if trained.reason is None else "partial"
        reason = trained.reason and f"{trained.steps} of {task.local_steps} steps: {trained.reason}"
        cost = trainer.account(trained)
        local: dict[str, Any] = {}
        if reason is None:
            with clock("evaluate"):
                local = trainer.validate()
        if not trainer.leads:
            trainer.save_delta(model, out)
            trainer.keep()
            return {}
        with manifest.publish(out / UPDATE) as directory:
            with clock("save"):
                size = trainer.save_delta(model, directory)
                trainer.keep()
            clock.seconds["queue"] = scheduler.seconds_in_queue()
            written = manifest.write(
                directory,
                "update",
                {
                    **_heading(task, status, reason),
                    "tokens": trained.tokens,
                    "samples": trained.samples,
                    "steps": trained.steps,
                    "bytes": size,
                    "seconds": {phase: round(s, 3) for phase, s in clock.seconds.items()},
                    "metrics": {
                        "validation": validation,
                        "local": local,
                        "training": {
                            "first_loss": trained.losses[0],
                            "last_loss": trained.losses[-1],
                            **cost,
                        },
                    },
                },
            )
            signature.sign(directory)
        trainer.forget()
        progress(
            "trained",
            step=trained.steps,
            steps=trained.steps,
            loss=trained.losses[-1],
            tokens_per_second=cost["tokens_per_second"],
            seconds=sum(clock.seconds.values()),
            message=f"validation loss {validation['loss']:.4f}"
            + (f", then {local['loss']:.4f}" if reason is None else f", partial: {reason}"),
        )
        return written


def absent(task: Task, reason: str, out: Path) -> dict[str, Any]:
    """Write `out/update` for a facility that did not train: a manifest with the reason."""
    with manifest.publish(out / UPDATE) as directory:
        return manifest.write(
            directory,
            "update",
            {
                **_heading(task, "absent", reason),
                "tokens": 0,
                "samples": 0,
                "steps": 0,
                "bytes": 0,
                "seconds": {"queue": scheduler.seconds_in_queue()},
                "metrics": {},
            },
        )


def _heading(task: Task, status: str, reason: str | None) -> dict[str, Any]:
    """Whose update it is, for what, and whether there is one."""
    return {
        "facility": task.facility,
        "round": task.round,
        "base": task.base,
        "status": status,
        "reason": reason,
    }


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


def check_base(model: Path, task: Task) -> None:
    """Check that the model arrived whole and is the one the task starts from."""
    digest = manifest.verify(model, "model")["digest"]
    if digest != task.base:
        raise CrossFLError(
            f"{model} is not the model that round {task.round} of {task.facility} starts from"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `crossfl train`."""
    parser.add_argument(
        "--global-model", type=Path, required=True, help="model to start from (directory)"
    )
    add_failure_flag(parser)
    add_flags(parser, Task)
    add_flags(parser, Training)


def add_failure_flag(parser: argparse.ArgumentParser) -> None:
    """Declare `--on-failure`."""
    parser.add_argument(
        "--on-failure",
        choices=("stop", "absent"),
        default="stop",
        help="what a failure does: stop this step, or count the facility as absent; default stop",
    )


def reason_of(error: Exception, policy: str) -> str:
    """Why the facility is absent; where failures stop the step, the error goes on instead."""
    if policy == "stop":
        raise error
    if isinstance(error, CrossFLError):
        return str(error)
    traceback.print_exception(error)
    return f"{type(error).__name__}: {error}"


def main(args: argparse.Namespace) -> None:
    """Write `update` for the engine."""
    task, training = from_flags(args, Task), from_flags(args, Training)
    stop = StopSignal().listen()
    if launcher.is_rank():
        launcher.join()
    try:
        place.check_present()
        if launcher.is_wanted():
            launcher.ranks(args.words, stop)
        else:
            train(args.global_model, task, training, args.outdir, stop)
        if launcher.is_rank():
            launcher.leave()
    except Exception as error:
        # A launcher may fail, for a signal or a rank that ends badly, after all was delivered.
        if not (args.outdir / UPDATE).exists():
            reason = reason_of(error, args.on_failure)
            if launcher.is_follower():
                raise
            absent(task, reason, args.outdir)
    if not launcher.is_rank():
        files.write(args.outdir, update=args.outdir / UPDATE)
