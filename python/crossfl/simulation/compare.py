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

from crossfl.errors import CrossFLError
from crossfl.facility import place
from crossfl.learning import datasets
from crossfl.protocol import variables
from crossfl.protocol.records import Facility
from crossfl.simulation.simulate import playing_every_facility, rounds
from crossfl.steps.aggregate import STATE
from crossfl.steps.evaluate import evaluate
from crossfl.steps.plan import plan
from crossfl.steps.report import COMPARISON, FEDERATED, POOLED, report
from crossfl.storage import files
from crossfl.storage.job import Job

SCORES = ("loss", "perplexity", "bits_per_byte", "accuracy", "exact_match")
"""Metrics that have a table each, where there are any."""


def compare(job: Job, root: Path, out: Path, workers: int) -> dict[str, Any]:
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
        For each arm, `rounds` (loss by facility after each round) and `final` (metrics by
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
            arms[only.name] = dataclasses.replace(
                job,
                facilities=(one,),
                local_steps=steps,
                aggregation=dataclasses.replace(job.aggregation, combination="mean", quorum=None),
            )
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as executor:
            running = {
                name: executor.submit(_run, name, arm, job, pool, Path(scratch, name))
                for name, arm in arms.items()
            }
            result = {name: future.result() for name, future in running.items()}
        out.mkdir(parents=True, exist_ok=True)
        files.write_json(out / COMPARISON, result)
        (out / "comparison.md").write_text(table(result))
        here = Path(scratch, FEDERATED)
        evaluations = [here / f"{facility.name}.json" for facility in job.facilities]
        report(here / STATE, evaluations, out, out / COMPARISON)
    return result


def _without_pauses(job: Job) -> Job:
    if taken := {f.name for f in job.facilities} & {FEDERATED, POOLED}:
        raise CrossFLError(f"facility {min(taken)!r}: the comparison has an arm of that name")
    return dataclasses.replace(
        job,
        facilities=tuple(
            dataclasses.replace(f, joins=1, leaves=None, skips=()) for f in job.facilities
        ),
        aggregation=dataclasses.replace(job.aggregation, target_loss=None, budget_seconds=None),
    )


def table(result: Mapping[str, Any]) -> str:
    """The comparison in Markdown: the final scores, those of each task, and the loss by round."""
    final = {arm: outcome["final"] for arm, outcome in result.items()}
    sites = final[FEDERATED]
    parts = []
    for score in SCORES:
        if all(score in metrics for metrics in sites.values()):
            rows = []
            for arm, at in final.items():
                values = [at[site][score] for site in sites]
                rows.append([arm, *(f"{v:.3f}" for v in [*values, sum(values) / len(values)])])
            name = score.replace("_", " ") + (", nats" if score == "loss" else "")
            parts.append(_markdown([name, *(f"at {site}" for site in sites), "mean"], rows))
    rows = [
        [site, task, score.replace("_", " ")]
        + [
            f"{at[site]['tasks'][task][score]:.3f}" if _has(at, site, task, score) else "–"
            for at in final.values()
        ]
        for site, metrics in sites.items()
        for task in metrics.get("tasks", {})
        for score in dict.fromkeys(s for at in final.values() for s in at[site]["tasks"][task])
        if score not in ("tokens", "perplexity")
    ]
    if rows:
        parts.append(_markdown(["at", "task", "score", *final], rows))
    by_round = [
        [str(i + 1)] + [f"{sum(o['rounds'][i].values()) / len(sites):.3f}" for o in result.values()]
        for i in range(min(len(outcome["rounds"]) for outcome in result.values()))
    ]
    parts.append(
        "Mean validation loss after each round:\n\n" + _markdown(["round", *final], by_round)
    )
    return "\n".join(parts)


def _has(at: Mapping[str, Any], site: str, task: str, score: str) -> bool:
    return score in at[site].get("tasks", {}).get(task, {})


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


def _run(name: str, arm: Job, job: Job, root: Path, scratch: Path) -> dict[str, Any]:
    """Train one arm; leave in `scratch` its last state, and its evaluations by facility."""
    os.environ[variables.PROGRESS] = os.devnull
    by_round: list[dict[str, float]] = []
    with playing_every_facility(root):
        for state, here in rounds(arm, scratch):
            final = state.round == state.rounds
            tasks = plan(state, job.facilities, job.local_steps, "evaluate")[1]
            prompts = job.prompts if final and name == FEDERATED else ()
            found = {
                t.facility: evaluate(here / "global_model", t, job.training, prompts, match=final)
                for t in tasks
            }
            metrics = {facility: record["metrics"] for facility, record in found.items()}
            by_round.append({facility: m["loss"] for facility, m in metrics.items()})
            shown = "  ".join(f"{f} {loss:.3f}" for f, loss in by_round[-1].items())
            print(f"{name}  round {state.round}/{state.rounds}  loss {shown}", file=sys.stderr)
    (here / STATE).rename(scratch / STATE)
    for facility, record in found.items():
        files.write_json(scratch / f"{facility}.json", record)
    return {"rounds": by_round, "final": metrics}


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
    print(table(compare(Job.load(args.job), args.data, args.outdir, args.workers)))
