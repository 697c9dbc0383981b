"""Compare, at equal samples: the federation, each facility alone, all data in one place.

Where the job starts from a model, the scores of that model as it was stand beside them.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from crossfl.errors import CrossFLError
from crossfl.facility import place
from crossfl.learning import datasets
from crossfl.protocol import decoding, variables
from crossfl.protocol.comparison import BASE, FEDERATED, POOLED, Arm, Comparison
from crossfl.protocol.layout import COMPARISON, EVALUATION, GLOBAL_MODEL, STATE
from crossfl.protocol.measurements import Metrics, TaskMetrics
from crossfl.protocol.records import Facility
from crossfl.protocol.state import ServerState
from crossfl.server import state as server_state
from crossfl.server.planning.fixed import plan
from crossfl.simulation.simulate import playing_every_facility, rounds
from crossfl.steps.evaluate import evaluate
from crossfl.steps.initialise import initialise
from crossfl.steps.report import report
from crossfl.storage.files import write_bytes
from crossfl.storage.job import Job

SCORES = ("loss", "perplexity", "bits_per_byte", "accuracy", "exact_match")
"""Metrics that have a table each, where there are any."""


def compare(job: Job, root: Path, out: Path, workers: int) -> Comparison:
    """Train every arm and measure each on every facility's validation data, after every round.

    Every arm sees as many samples in each round: an arm with one site takes the steps of all
    facilities together. All facilities take part in every round, and no arm stops early. The local
    optimizer starts anew in each round of every arm, as it does in a federation.

    Args:
        job: the federation.
        root: folder with one folder for each facility, which holds its datasets.
        out: folder for `comparison.json`, `comparison.md` and the `report.html` of the federation.
        workers: arms that are trained at the same time.

    Returns:
        What was measured.
    """
    with tempfile.TemporaryDirectory() as scratch:
        pool = Path(scratch, "data")
        job = _without_pauses(job)
        arms = arms_of(job, root, pool)
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as executor:
            running = {
                name: executor.submit(_run, name, arm, job, pool, Path(scratch, name))
                for name, arm in arms.items()
            }
            comparison = Comparison(arms={n: future.result() for n, future in running.items()})
        out.mkdir(parents=True, exist_ok=True)
        write_bytes(out / COMPARISON, decoding.encode(comparison))
        write_bytes(out / "comparison.md", table(comparison).encode())
        folder = Path(scratch, FEDERATED)
        evaluations = [folder / facility.name / EVALUATION for facility in job.facilities]
        report(folder / STATE, evaluations, out, out / COMPARISON)
    return comparison


def arms_of(job: Job, root: Path, pool: Path) -> dict[str, Job]:
    """The arms of a comparison by name, each a job that sees as many samples as the federation.

    An arm with one site is plain training: no server optimizer, and nothing lost on a journey.

    Args:
        job: the federation.
        root: folder with one folder for each facility, which holds its datasets.
        pool: folder to lay out: links to the same folders, and one with all data.
    """
    for facility in job.facilities:
        (pool / facility.name).parent.mkdir(parents=True, exist_ok=True)
        (pool / facility.name).symlink_to((root / facility.name).resolve())
    _pool(job, root, pool / POOLED)
    arms = {FEDERATED: job} if job.model is None else {FEDERATED: job, BASE: job}
    steps = sum(f.local_steps or job.local_steps for f in job.facilities)
    plain = {"aggregation_rule": "mean", "server_optimizer": "fedavg", "quorum": None}
    plain |= {"server_learning_rate": None, "model_dtype": "keep"}
    for only in [*job.facilities, Facility(name=POOLED, dataset="all")]:
        arms[only.name] = dataclasses.replace(
            job,
            facilities=(only.replace(local_steps=None),),
            local_steps=steps,
            training=job.training.replace(encoding="fp32"),
            aggregation=job.aggregation.replace(**plain),
        )
    return arms


def _without_pauses(job: Job) -> Job:
    if taken := {f.name for f in job.facilities} & {FEDERATED, POOLED, BASE}:
        raise CrossFLError(f"facility {min(taken)!r}: the comparison has an arm of that name")
    return dataclasses.replace(
        job,
        facilities=tuple(f.replace(joins=1, leaves=None, skips=()) for f in job.facilities),
        aggregation=job.aggregation.replace(
            target_loss=None,
            budget_seconds=None,
            quorum=None,
            quorum_share=None,
            below_quorum="stop",
            closes="all",
        ),
    )


def table(comparison: Comparison) -> str:
    """The comparison in Markdown: the final scores, those of each task, and the loss by round."""
    final = {name: arm.final for name, arm in comparison.arms.items()}
    sites = final[FEDERATED]
    parts = []
    for score in SCORES:
        if all(_score(metrics, score) is not None for metrics in sites.values()):
            rows = []
            for name, at in final.items():
                values = [_score(at[site], score) or 0.0 for site in sites]
                rows.append([name, *(f"{v:.3f}" for v in [*values, sum(values) / len(values)])])
            title = score.replace("_", " ") + (", nats" if score == "loss" else "")
            parts.append(_markdown([title, *(f"at {site}" for site in sites), "mean"], rows))
    rows = [
        [site, task, score.replace("_", " ")]
        + [
            "–" if (value := _task_score(at[site], task, score)) is None else f"{value:.3f}"
            for at in final.values()
        ]
        for site, metrics in sites.items()
        for task in metrics.tasks
        for score in TaskMetrics.__struct_fields__
        if score not in ("tokens", "samples", "perplexity")
        and any(_task_score(at[site], task, score) is not None for at in final.values())
    ]
    if rows:
        parts.append(_markdown(["at", "task", "score", *final], rows))
    trained = {name: arm for name, arm in comparison.arms.items() if name != BASE}
    by_round = [
        [str(i + 1)]
        + [f"{sum(arm.rounds[i].values()) / len(sites):.3f}" for arm in trained.values()]
        for i in range(min(len(arm.rounds) for arm in trained.values()))
    ]
    parts.append(
        "Mean validation loss after each round:\n\n" + _markdown(["round", *trained], by_round)
    )
    return "\n".join(parts)


def _score(metrics: Metrics, name: str) -> float | None:
    score: float | None = getattr(metrics, name)
    return score


def _task_score(metrics: Metrics, task: str, name: str) -> float | None:
    if task not in metrics.tasks:
        return None
    score: float | None = getattr(metrics.tasks[task], name)
    return score


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _pool(job: Job, root: Path, folder: Path) -> None:
    (folder / "all").mkdir(parents=True)
    splits: tuple[datasets.Split, ...] = ("train", "valid")
    for split in splits:
        with (folder / "all" / f"{split}.jsonl").open("w", encoding="utf-8") as stream:
            for facility in job.facilities:
                path = place.resolve(facility.dataset, root / facility.name)
                for sample in datasets.read(path, split):
                    stream.write(json.dumps(datasets.row(sample), ensure_ascii=False) + "\n")


def _run(name: str, arm: Job, job: Job, root: Path, scratch: Path) -> Arm:
    """Train one arm; leave in `scratch` its last state, and its evaluations by facility."""
    os.environ[variables.PROGRESS] = os.devnull
    # All data is on this machine, and so is what is measured on it.
    os.environ[variables.MIN_VALIDATION_SAMPLES] = os.environ[variables.MIN_VALIDATION_TOKENS] = "1"
    by_round: list[dict[str, float]] = []
    final: dict[str, Metrics] = {}
    with playing_every_facility(root):
        for state, folder in models_of(name, arm, scratch):
            last = name == BASE or state.round == state.rounds
            prompts = job.prompts if last and name == FEDERATED else ()
            model = folder / GLOBAL_MODEL
            final = measured(model, state, job, scratch, prompts, match=last)
            if name != BASE:
                by_round.append({facility: metrics.loss for facility, metrics in final.items()})
            losses = "  ".join(f"{f} {metrics.loss:.3f}" for f, metrics in final.items())
            print(f"{name}  round {state.round}/{state.rounds}  loss {losses}", file=sys.stderr)
    (folder / STATE).rename(scratch / STATE)
    return Arm(rounds=tuple(by_round), final=final)


def models_of(name: str, arm: Job, scratch: Path) -> Iterator[tuple[ServerState, Path]]:
    """The models of an arm: one after each round; of the base, the one before the first."""
    if name != BASE:
        yield from rounds(arm, scratch)
        return
    first = (arm.model, arm.config, arm.tokenizer, arm.seed, arm.rounds, arm.aggregation)
    initialise(*first, scratch / "0", arm.lora)
    yield server_state.load(scratch / "0" / STATE), scratch / "0"


def measured(
    model: Path,
    state: ServerState,
    job: Job,
    scratch: Path,
    prompts: Sequence[str] = (),
    *,
    match: bool,
) -> dict[str, Metrics]:
    """The metrics of a model at every facility; evaluations stay in `scratch`, by facility.

    Raises:
        CrossFLError: a facility gives none.
    """
    metrics = {}
    for task in plan(state, job.facilities, job.local_steps, job.training, "evaluate").tasks:
        folder = scratch / task.facility
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        evaluation = evaluate(model, task, job.training, prompts, folder, match=match)
        if evaluation.metrics is None:
            raise CrossFLError(f"{task.facility} has no metrics: {evaluation.reason}")
        metrics[task.facility] = evaluation.metrics
    return metrics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `crossfl compare`."""
    parser.add_argument("job", type=Path, help="job file, as for workflows/federated.cwl")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with a folder of datasets per facility"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="arms trained at the same time; default: the cores of this machine",
    )


def main(args: argparse.Namespace) -> None:
    """Print the tables and leave them in `comparison.md`, with `comparison.json` and the report."""
    job = Job.load(args.job)
    job.check(args.job)
    print(table(compare(job, args.data, args.outdir, args.workers)))
