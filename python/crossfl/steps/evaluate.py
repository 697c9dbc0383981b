"""Measure the global model on a facility's validation data: losses, and what it writes."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crossfl.facility import place
from crossfl.learning import datasets, scoring
from crossfl.observe.events import Progress
from crossfl.protocol.records import Task, Training, add_flags, from_flags
from crossfl.steps.train import add_failure_flag, check_base, reason_of
from crossfl.storage import files

FILE = "evaluation.json"


def evaluate(
    model: Path, task: Task, training: Training, prompts: Sequence[str], match: bool = True
) -> dict[str, Any]:
    """The evaluation as one JSON-ready record. No sample of the facility is in it.

    Where samples have a prompt, the model completes it, greedily. Exact match is the share of
    completions that are, character by character, those in the data; each task has the scores of
    its own metric besides (`scoring`). Writing takes most of the time, and `match=False`
    leaves it out. The completions recorded are those of `prompts`, which the job file names.

    Raises:
        CrossFLError: this is not the task's facility, or model or dataset are unfit.
    """
    begun = time.monotonic()
    folder = place.resolve(task.dataset, place.data_root(task))
    with Progress(facility=task.facility) as progress:
        progress("load")
        check_base(model, task)
        samples = datasets.read(folder, "valid")[: training.validation_samples]
        kinds = scoring.metrics_of({s.task for s in samples}, scoring.declared(folder))

        # They build models: what is cheap to refuse has been refused before.
        from crossfl.learning.models.model import check_samples, complete, load, validate
        from crossfl.learning.ranks import Parallel

        network, tokenizer = load(model, training)
        network = Parallel(training).spread(network)
        check_samples(network, samples)
        measured = validate(network, tokenizer, samples, training)
        measured["samples"] = len(samples)
        texts = [s for s in samples if isinstance(s, datasets.Text)]
        prompted = [(s.prompt, s) for s in texts if s.prompt is not None]
        if match and prompted and tokenizer:
            written = complete(network, tokenizer, [p for p, _ in prompted], training)
            pairs = list(zip(written, [s for _, s in prompted], strict=True))
            right = sum(answer.strip() == sample.text.strip() for answer, sample in pairs)
            measured["exact_match"] = right / len(prompted)
            for name, metric in kinds.items():
                if own := [(answer, s.text) for answer, s in pairs if s.task == name]:
                    measured["tasks"][name] |= scoring.score(metric, own)
        completions = complete(network, tokenizer, prompts, training) if tokenizer else []
        seconds = time.monotonic() - begun
        shares = {n: measured[n] for n in ("exact_match", "accuracy") if n in measured}
        message = ", ".join(f"{n.replace('_', ' ')} {value:.3f}" for n, value in shares.items())
        progress("evaluated", loss=measured["loss"], seconds=seconds, message=message)
        return _record(task, "complete", None) | {
            "metrics": measured,
            "completions": [
                {"prompt": p, "completion": c} for p, c in zip(prompts, completions, strict=False)
            ],
            "seconds": round(seconds, 3),
        }


def _record(task: Task, status: str, reason: str | None) -> dict[str, Any]:
    return {
        "facility": task.facility,
        "dataset": task.dataset,
        "round": task.round,
        "model": task.base,
        "status": status,
        "reason": reason,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `crossfl evaluate`."""
    parser.add_argument(
        "--global-model", type=Path, required=True, help="model to evaluate (directory)"
    )
    parser.add_argument(
        "--prompt", action="append", default=[], help="prompt to complete (repeat for each)"
    )
    add_failure_flag(parser)
    add_flags(parser, Task)
    add_flags(parser, Training)


def main(args: argparse.Namespace) -> None:
    """Write `evaluation` for the engine."""
    task, training, here = from_flags(args, Task), from_flags(args, Training), args.outdir
    try:
        place.check_present()
        record = evaluate(args.global_model, task, training, args.prompt)
    except Exception as error:
        record = _record(task, "absent", reason_of(error, args.on_failure))
    files.write_json(here / FILE, record)
    files.write(here, evaluation=here / FILE)
