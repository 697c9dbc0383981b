"""Measure how close a federation comes to pooled data, by strategy, at equal samples and bytes.

    python benchmarks/quality.py --data data --results outcomes.jsonl --seeds 0 1 2

Each experiment is trained under each strategy and, as the measure of all, on pooled data, for each
seed. All arms of an experiment see the same number of samples; no strategy sends more bytes, up
and down together, than FedAvg in fp32 with the rounds of `REFERENCE`. The final model is measured
on the validation data of every site. Outcomes are kept, one JSON line each: what is there is not
run again. At the end a table is printed: the mean loss over that on pooled data of the same batch
size and rate, with the smallest and the largest of the seeds.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crossfl.protocol import variables
from crossfl.protocol.comparison import FEDERATED, POOLED
from crossfl.protocol.layout import GLOBAL_MODEL, STATE
from crossfl.server import state as server_state
from crossfl.simulation.compare import arms_of, measured, models_of
from crossfl.simulation.simulate import playing_every_facility
from crossfl.storage.job import Job

JOBS = {
    "numbers": (Path("workflows/numbers/job.yml"), "."),
    "bilingual": (Path("workflows/experiments/bilingual/job.yml"), "experiments/bilingual"),
    "chemistry": (Path("workflows/experiments/chemistry/job.yml"), "experiments/chemistry"),
    "vision": (Path("workflows/experiments/vision/job.yml"), "experiments/vision"),
    "smollm": (Path("workflows/experiments/smollm/job.yml"), "experiments/smollm"),
}
"""The job file of each experiment, and where its data are below `--data`."""
REFERENCE: dict[str, dict[str, Any]] = {
    "numbers": {"rounds": 12, "steps": 40, "batch": 64, "rate": 0.003, "warmup": 20},
    "bilingual": {"rounds": 10, "steps": 20, "batch": 16, "rate": 0.002, "warmup": 10},
    "chemistry": {"rounds": 8, "steps": 12, "batch": 8, "rate": 0.003, "warmup": 20},
    "vision": {"rounds": 20, "steps": 5, "batch": 32, "rate": 0.001, "warmup": 0},
}
"""FedAvg in fp32, from which the samples and the bytes of all strategies follow."""
NEVER = str(2**31 - 1)
"""A floor on validation samples that no dataset reaches: nothing is measured between rounds."""


def strategy(**changes: Any) -> Callable[[Job, str], Job]:
    """The reference of an experiment with changes, at the same number of samples.

    Args:
        **changes: `split` divides the batch size and multiplies the steps; `more` multiplies the
            rounds and divides the steps; `rate` multiplies the learning rate; other names are
            fields of the training or aggregation record.
    """

    def made(job: Job, name: str) -> Job:
        of = dict(changes)
        split, more, rate = of.pop("split", 1), of.pop("more", 1), of.pop("rate", 1.0)
        start = REFERENCE[name]
        total = start["rounds"] * start["steps"] * split
        rounds_ = nearest_divisor(total, start["rounds"] * more)
        training = {
            "batch_size": start["batch"] // split,
            "learning_rate": start["rate"] * rate,
            "warmup_steps": start["warmup"] * split,
            "local_optimizer": "reset",
            "encoding": "fp32",
        }
        aggregation = {
            "server_optimizer": "fedavg",
            "server_learning_rate": None,
            "model_dtype": "keep",
        }
        for field, value in of.items():
            (training if hasattr(job.training, field) else aggregation)[field] = value
        return dataclasses.replace(
            job,
            rounds=rounds_,
            local_steps=total // rounds_,
            training=job.training.replace(**training),
            aggregation=job.aggregation.replace(**aggregation),
        )

    return made


def nearest_divisor(total: int, wanted: float) -> int:
    """The divisor of a number of steps that comes nearest to a number of rounds, from below."""
    return max(n for n in range(1, total + 1) if total % n == 0 and n <= wanted)


SMALL = {"encoding": "int4", "model_dtype": "bf16"}
"""0.136 of fp32's bytes up and half of them down: 3.1 times the rounds at the same bytes."""
OUTER = {"server_optimizer": "diloco", "server_learning_rate": 1.0, "server_momentum": 0.5}
KEPT = {"local_optimizer": "keep"}
STRATEGIES: dict[str, Callable[[Job, str], Job]] = {
    "job file": lambda job, name: job,
    "fedavg": strategy(),
    "kept": strategy(**KEPT),
    "diloco 1.0/0.5": strategy(**OUTER),
    "fedprox 0.01": strategy(proximal_mu=0.01),
    "3x rounds": strategy(more=3.1, **SMALL),
    "3x rounds, kept": strategy(more=3.1, **SMALL, **KEPT),
    "3x rounds, diloco": strategy(more=3.1, **SMALL, **OUTER),
    "batch/2": strategy(split=2),
    "batch/2, 3x rounds": strategy(split=2, more=3.1, **SMALL),
    "batch/2, 3x rounds, kept": strategy(split=2, more=3.1, **SMALL, **KEPT),
    "batch/2, 3x rounds, diloco": strategy(split=2, more=3.1, **SMALL, **OUTER),
    "batch/4, 3x rounds": strategy(split=4, more=3.1, **SMALL),
    "batch/4, 3x rounds, kept": strategy(split=4, more=3.1, **SMALL, **KEPT),
    "batch/4, 3x rounds, diloco": strategy(split=4, more=3.1, **SMALL, **OUTER),
    "batch/4, 3x rounds, kept, diloco": strategy(split=4, more=3.1, **SMALL, **KEPT, **OUTER),
}


def measure(job: Job, arm: str, data: Path, match: bool) -> dict[str, Any]:
    """Train one arm of a job; final losses and matches by site, and bytes that travelled."""
    begun, up, down = time.monotonic(), 0, 0
    os.environ[variables.PROGRESS] = os.devnull
    with tempfile.TemporaryDirectory() as scratch:
        pool = Path(scratch, "data")
        chosen = arms_of(job, data, pool)[arm]
        with playing_every_facility(pool):
            os.environ[variables.MIN_VALIDATION_SAMPLES] = NEVER
            for state, folder in models_of(arm, chosen, Path(scratch)):
                size = sum(p.stat().st_size for p in (folder / GLOBAL_MODEL).iterdir())
                for entry in list(server_state.history(folder / STATE))[state.round - 1 :]:
                    up += sum(said.bytes for said in entry.facilities.values())
                    down += size * len(entry.facilities)
            os.environ[variables.MIN_VALIDATION_SAMPLES] = "1"
            os.environ[variables.MIN_VALIDATION_TOKENS] = "1"
            place = Path(scratch, "evaluations")
            final = measured(folder / GLOBAL_MODEL, state, job, place, match=match)
    return {
        "loss": {site: metrics.loss for site, metrics in final.items()},
        "match": {site: m.exact_match for site, m in final.items() if m.exact_match is not None},
        "up": up,
        "down": down,
        "rounds": job.rounds,
        "steps": chosen.local_steps,
        "batch": job.training.batch_size,
        "rate": job.training.learning_rate,
        "kept": job.training.local_optimizer,
        "seconds": round(time.monotonic() - begun, 1),
    }


def read(path: Path) -> list[dict[str, Any]]:
    """The outcomes so far."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def table(outcomes: Sequence[dict[str, Any]]) -> str:
    """Each experiment and strategy over its seeds, against pooled data trained alike."""
    lines = [
        "| experiment | strategy | rounds × steps, batch | seeds | MB a site | loss "
        "| / pooled alike | / pooled, reference | exact match |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    names = {(o["experiment"], o["strategy"]): None for o in outcomes if o["arm"] == FEDERATED}
    for experiment, name in names:
        of = [o for o in outcomes if o["experiment"] == experiment]
        mine = {o["seed"]: o for o in of if o["strategy"] == name and o["arm"] == FEDERATED}
        alike = {o["seed"]: o for o in of if o["strategy"] == name and o["arm"] == POOLED}
        plain = {o["seed"]: o for o in of if o["strategy"] == "fedavg" and o["arm"] == POOLED}
        first = next(iter(mine.values()))
        matches = [value for o in mine.values() for value in o["match"].values()]
        sites = len(first["loss"])
        mega = statistics.fmean((o["up"] + o["down"]) / sites for o in mine.values()) / 1e6
        lines.append(
            f"| {experiment} | {name} | {first['rounds']} × {first['steps']}, {first['batch']} "
            f"| {len(mine)} | {mega:.1f} | {statistics.fmean(map(_loss, mine.values())):.3f} "
            f"| {_ratios(mine, alike)} | {_ratios(mine, plain)} "
            f"| {f'{min(matches):.3f} to {max(matches):.3f}' if matches else '–'} |"
        )
    return "\n".join(lines)


def _loss(outcome: dict[str, Any]) -> float:
    return statistics.fmean(outcome["loss"].values())


def _ratios(mine: dict[int, dict[str, Any]], others: dict[int, dict[str, Any]]) -> str:
    found = [_loss(mine[seed]) / _loss(others[seed]) for seed in mine if seed in others]
    if not found:
        return "–"
    spread = f" ({min(found):.3f} to {max(found):.3f})" if len(found) > 1 else ""
    return f"{statistics.fmean(found):.3f}{spread}"


def main() -> None:
    """Run what is asked for and not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of all data")
    parser.add_argument("--results", type=Path, required=True, help="outcomes, one JSON line each")
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--strategies", nargs="*", default=list(STRATEGIES))
    parser.add_argument("--arms", nargs="*", default=[POOLED, FEDERATED], help="and base")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    args = parser.parse_args()
    keys = ("experiment", "strategy", "arm", "seed")
    for seed in args.seeds:
        for experiment in args.jobs:
            path, below = JOBS[experiment]
            for name in args.strategies:
                job = STRATEGIES[name](dataclasses.replace(Job.load(path), seed=seed), experiment)
                for arm in args.arms:
                    key = dict(zip(keys, (experiment, name, arm, seed), strict=True))
                    if any(key == {k: o[k] for k in keys} for o in read(args.results)):
                        continue
                    outcome = key | measure(job, arm, args.data / below, experiment == "numbers")
                    print(json.dumps(outcome), file=sys.stderr, flush=True)
                    with args.results.open("a", encoding="utf-8") as stream:
                        stream.write(json.dumps(outcome) + "\n")
    print(table(read(args.results)))


if __name__ == "__main__":
    main()
