"""Compare, at equal samples: the federation, each facility alone, and all data in one place."""

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from crossfl import data, outputs, progress, site
from crossfl.errors import CrossFLError
from crossfl.evaluate import evaluate
from crossfl.job import Job
from crossfl.plan import plan
from crossfl.records import Facility, Task
from crossfl.simulate import playing_every_facility, rounds

FEDERATED, POOLED = "federated", "pooled"


def compare(job: Job, root: Path, out: Path, workers: int) -> dict[str, Any]:
    """Train every arm and measure each on every facility's validation data, after every round.

    Every arm sees as many samples in each round: an arm with one site takes the steps of all
    facilities together. All facilities take part in every round, and no arm stops early. The local
    optimizer starts anew in each round of every arm, as it does in a federation.

    Args:
        job: the federation.
        root: folder with one folder for each facility, which holds its datasets.
        out: folder for `comparison.json` and `comparison.md`.
        workers: arms that are trained at the same time.

    Returns:
        For each arm, `rounds` (mean loss by facility after each round) and `final` (metrics by
        facility).
    """
    with tempfile.TemporaryDirectory() as scratch:
        pool = Path(scratch, "data")
        for facility in job.facilities:
            (pool / facility.name).parent.mkdir(parents=True, exist_ok=True)
            (pool / facility.name).symlink_to((root / facility.name).resolve())
        _pool(job, root, pool / POOLED)
        job = _without_pauses(job)
        arms = {FEDERATED: job}
        steps = sum(f.local_steps or job.local_steps for f in job.facilities)
        for only in [*job.facilities, Facility(name=POOLED, dataset="all")]:
            one = dataclasses.replace(only, local_steps=None)
            arms[only.name] = dataclasses.replace(job, facilities=(one,), local_steps=steps)
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as executor:
            running = {
                name: executor.submit(_run, name, arm, job, pool, Path(scratch, name))
                for name, arm in arms.items()
            }
            result = {name: future.result() for name, future in running.items()}
    out.mkdir(parents=True, exist_ok=True)
    outputs.write_json(out / "comparison.json", result)
    (out / "comparison.md").write_text(table(result))
    return result


def _without_pauses(job: Job) -> Job:
    if taken := {f.name for f in job.facilities} & {FEDERATED, POOLED}:
        raise CrossFLError(f"facility {min(taken)!r}: the comparison has an arm of that name")
    return dataclasses.replace(
        job,
        facilities=tuple(
            dataclasses.replace(f, joins=1, leaves=None, skips=()) for f in job.facilities
        ),
        aggregation=dataclasses.replace(job.aggregation, target_loss=None, max_seconds=None),
    )


def table(result: Mapping[str, Any]) -> str:
    """The comparison in Markdown: final scores, and perplexity by round."""
    facilities = list(next(iter(result.values()))["final"])
    scores: list[list[str]] = []
    for arm, outcome in result.items():
        row = [arm]
        for metrics in outcome["final"].values():
            row.append(f"{metrics['perplexity']:.3f}")
            if "exact_match" in metrics:
                row.append(f"{metrics['exact_match']:.3f}")
        losses = [metrics["loss"] for metrics in outcome["final"].values()]
        scores.append([*row, f"{sum(losses) / len(losses):.4f}"])
    first = next(iter(result.values()))["final"]
    head = ["trained on"]
    for facility in facilities:
        head.append(f"perplexity at {facility}")
        if "exact_match" in first[facility]:
            head.append(f"exact match at {facility}")
    by_round = [
        [str(i + 1)]
        + [f"{outcome['rounds'][i][f]:.3f}" for outcome in result.values() for f in facilities]
        for i in range(min(len(outcome["rounds"]) for outcome in result.values()))
    ]
    return (
        _markdown([*head, "mean loss"], scores)
        + "\nValidation perplexity after each round:\n\n"
        + _markdown(["round"] + [f"{arm}, at {f}" for arm in result for f in facilities], by_round)
    )


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _pool(job: Job, root: Path, folder: Path) -> None:
    (folder / "all").mkdir(parents=True)
    splits: tuple[data.Split, ...] = ("train", "valid")
    for split in splits:
        with (folder / "all" / f"{split}.jsonl").open("w", encoding="utf-8") as stream:
            for facility in job.facilities:
                path = site.resolve(facility.dataset, root / facility.name)
                for sample in data.read(path, split):
                    stream.write(json.dumps(data.row(sample), ensure_ascii=False) + "\n")


def _run(name: str, arm: Job, job: Job, root: Path, scratch: Path) -> dict[str, Any]:
    os.environ[progress.VARIABLE] = os.devnull
    by_round: list[dict[str, float]] = []
    with playing_every_facility(root):
        for state, here in rounds(arm, scratch):
            final = state.round == state.rounds
            tasks = plan(state, job.facilities, job.local_steps, "evaluate")[1]
            metrics = {t.facility: _measure(here / "global_model", t, job, final) for t in tasks}
            by_round.append({facility: m["perplexity"] for facility, m in metrics.items()})
            shown = "  ".join(f"{f} {p:.3f}" for f, p in by_round[-1].items())
            print(
                f"{name}  round {state.round}/{state.rounds}  perplexity {shown}", file=sys.stderr
            )
    return {"rounds": by_round, "final": metrics}


def _measure(model: Path, task: Task, job: Job, final: bool) -> dict[str, Any]:
    metrics: dict[str, Any] = evaluate(model, task, job.training, [], match=final)["metrics"]
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
    """Print the tables and leave them in `comparison.md` and `comparison.json`."""
    print(table(compare(Job.load(args.job), args.data, args.outdir, args.workers)))
