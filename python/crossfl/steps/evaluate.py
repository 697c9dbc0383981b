"""Measure the global model on a facility's validation data: losses, and what it writes."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crossfl.facility import launcher, place
from crossfl.facility.staging import staged
from crossfl.facility.time_budget import StopSignal
from crossfl.learning import datasets, scoring
from crossfl.observe.events import Progress
from crossfl.protocol.fields import LONGEST_REASON
from crossfl.protocol.flags import add_flags, from_flags
from crossfl.protocol.layout import EVALUATION
from crossfl.protocol.manifest import Completion, EvaluationManifest
from crossfl.protocol.measurements import Metrics
from crossfl.protocol.records import ANY_MODEL, Task, Training
from crossfl.protocol.text import printable
from crossfl.steps import failure
from crossfl.steps.delivery import deliver
from crossfl.steps.train import check_base
from crossfl.storage import manifest, signature
from crossfl.storage.files import publish
from crossfl.storage.model_folder import ModelFolder


def evaluate(
    model: Path,
    task: Task,
    training: Training,
    prompts: Sequence[str],
    out: Path,
    match: bool = True,
) -> EvaluationManifest:
    """Write `out/evaluation`, a manifest with the metrics, and return it.

    Where samples have a prompt, the model completes it, greedily. Exact match is the share of
    completions that are, character by character, those in the data; each task has the scores of
    its own metric besides (`scoring`). Writing takes most of the time, and `match=False` leaves it
    out. The completions recorded are those of `prompts`, which the job file names. Where writing or
    scoring fails, its scores are missing, with a reason, and what was measured is delivered. Of
    several ranks, each has its share of the samples, and the first one writes.

    Raises:
        CrossFLError: this is not the task's facility, or model or dataset are unfit.
    """
    begun = time.monotonic()
    folder = place.resolve(task.dataset, place.data_root(task))
    with Progress(facility=task.facility) as progress:
        progress("load")
        ModelFolder.received(model, only=())  # before links in it would be copied
        model = staged(model)
        if task.base == ANY_MODEL:
            task = task.replace(base=ModelFolder.received(model).digest)
        check_base(model, task)
        metrics, completions, notices, failures = _measure(model, folder, training, prompts, match)
        for notice in (*notices, *failures):
            progress("load", message=notice)
        reason = notices[0] if metrics is None else "; ".join(failures)
        seconds = time.monotonic() - begun
        progress(
            "evaluated",
            loss=metrics.loss if metrics else None,
            seconds=seconds,
            message=_message(metrics),
        )
    evaluation = EvaluationManifest(
        **_heading(task),
        status="complete",
        reason=printable(reason, longest=LONGEST_REASON) if reason else None,
        metrics=metrics,
        completions=completions,
        seconds=round(seconds, 3),
    )
    if launcher.is_follower():
        return evaluation
    with publish(out / EVALUATION) as directory:
        evaluation = manifest.write(directory, evaluation)
        signature.sign(directory)
    return evaluation


def absent(task: Task, reason: str, out: Path) -> EvaluationManifest:
    """Write `out/evaluation` for a facility that did not evaluate: a manifest with the reason."""
    with publish(out / EVALUATION) as directory:
        shown = printable(reason, longest=LONGEST_REASON)
        return manifest.write(
            directory, EvaluationManifest(**_heading(task), status="absent", reason=shown)
        )


def _message(metrics: Metrics | None) -> str:
    if metrics is None:
        return "metrics stay here"
    shares = {"exact match": metrics.exact_match, "accuracy": metrics.accuracy}
    return ", ".join(f"{n} {value:.3f}" for n, value in shares.items() if value is not None)


def _heading(task: Task) -> dict[str, Any]:
    """Whose evaluation it is, and of what."""
    return {
        "facility": task.facility,
        "federation": task.federation,
        "dataset": task.dataset,
        "round": task.round,
        "model": task.base,
    }


def _measure(
    model: Path, folder: Path, training: Training, prompts: Sequence[str], match: bool
) -> tuple[Metrics | None, tuple[Completion, ...], list[str], list[str]]:
    """The metrics of a model, what it writes behind the prompts, why either is not given, and what
    has failed.
    """
    disclosure = place.disclosure()

    # They build models: what is cheap to refuse has been refused before.
    from crossfl.learning import evaluation
    from crossfl.learning.models.loading import classes_of, load
    from crossfl.learning.ranks import Parallel

    samples = evaluation.validation_samples(folder, training, disclosure)
    kinds = scoring.metrics_of({s.task for s in samples}, scoring.declared(folder))
    network, tokenizer = load(model, training)
    parallel, classes = Parallel(training), classes_of(network)
    network = parallel.wrap(network)
    validation = evaluation.Validation(samples, tokenizer, training, disclosure, classes)
    metrics = validation.measure(network, parallel)
    failures: list[str] = []
    usable = validation.usable
    prompted = [s for s in usable if isinstance(s, datasets.Text) and s.prompt is not None]
    if match and metrics and prompted and tokenizer:
        asked = [s.prompt or "" for s in prompted]
        try:
            written = evaluation.complete(network, tokenizer, asked, training, parallel)
            least = disclosure.min_samples
            metrics = scoring.score_completions(metrics, written, prompted, kinds, least)
        except Exception as error:  # of a library, or for want of memory: the loss is measured
            failures.append(f"what the model writes has no score: {failure.reason_of(error)}")
    completions: Sequence[Completion] = ()
    refusal: str | None = None
    try:
        completions, refusal = evaluation.complete_prompts(
            network, tokenizer, prompts, training, disclosure, parallel
        )
    except Exception as error:
        failures.append(f"the job's prompts are not completed: {failure.reason_of(error)}")
    notices = [notice for notice in (validation.withheld, refusal) if notice]
    notices += datasets.left_out(samples.reasons, "the dataset")
    return metrics, tuple(completions), notices, failures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `crossfl evaluate`."""
    parser.add_argument(
        "--global-model", type=Path, required=True, help="model to evaluate (directory)"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], help="prompt to complete (repeat for each)"
    )
    failure.add_flag(parser)
    add_flags(parser, Task)
    add_flags(parser, Training)


def main(args: argparse.Namespace) -> None:
    """Write `evaluation` for the engine."""
    task, training = from_flags(args, Task), from_flags(args, Training)

    def work() -> None:
        evaluate(args.global_model, task, training, args.prompt, args.outdir)

    deliver(args, task, EVALUATION, EvaluationManifest, work, absent, StopSignal())
