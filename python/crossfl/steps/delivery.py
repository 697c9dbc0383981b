"""What `train` and `evaluate` share: a task is done by this process, or by ranks of a launcher."""

import argparse
from collections.abc import Callable
from pathlib import Path

from crossfl.facility import launcher, place
from crossfl.facility.time_budget import StopSignal
from crossfl.protocol.manifest import EvaluationManifest, UpdateManifest
from crossfl.protocol.records import Task
from crossfl.steps import failure, outputs, rerun


def deliver(
    args: argparse.Namespace,
    task: Task,
    name: str,
    kind: type[UpdateManifest] | type[EvaluationManifest],
    work: Callable[[], object],
    absent: Callable[[Task, str, Path], object],
    stop: StopSignal,
) -> None:
    """Do a task, unless an earlier run of this very job has, and write its output for the engine.

    Args:
        args: of the command.
        task: the task.
        name: of the output, and of its folder in `args.outdir`.
        kind: the manifest of that folder.
        work: does the task in this process, and leaves the folder.
        absent: leaves one that says that the facility is absent, and why.
        stop: what has ranks told to stop.
    """
    delivery = args.outdir / name
    if launcher.is_rank():
        launcher.join()
    elif rerun.is_done(delivery, kind, task):
        outputs.write(args.outdir, **{name: delivery})
        return
    with failure.handled(args.on_failure, task, delivery, absent):
        place.check_present()
        if launcher.is_wanted():
            launcher.ranks(args.words, stop)
        else:
            work()
        if launcher.is_rank():
            launcher.leave()
    if not launcher.is_rank():
        outputs.write(args.outdir, **{name: delivery})
