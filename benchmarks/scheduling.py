"""Time to a sustained target where queues differ: ours, synchronous rounds, and the peers.

    python benchmarks/scheduling.py --results outcomes.jsonl --seeds 4 --minutes 10
    python benchmarks/scheduling.py --results outcomes.jsonl --table

Four sites (24, 24, 48, 96 s a step) learn handwritten digits with SGD in virtual time: training is
real, waiting is not. Each line of the results is one run; what is there is not run again. Needs
scikit-learn and scipy.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import FedAsync, FedBuff, FedBuffCode, FedCompass, FedQueue, FedQueueRepaired, Peer
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor

from crossfl.protocol.records import Aggregation, Facility, Task, Training
from crossfl.simulation.virtual.federation import Federation
from crossfl.simulation.virtual.machines import Machines
from crossfl.simulation.virtual.sites import Backfill, Bursty, Lognormal, Site
from crossfl.storage.job import Job

HIDDEN, BATCH, RATE, STEPS = 32, 16, 0.06, 25
NAMES = ("a", "b", "c", "d")
SPEEDS = (24.0, 24.0, 48.0, 96.0)
GRID, SUSTAINED = 600.0, 7200.0
"""Seconds between two measurements, and for which the target must hold in the mean."""
HORIZON = {
    "congested": 250e3,
    "calm": 100e3,
    "failures": 250e3,
    "bursty": 200e3,
    "backfill": 200e3,
}
TARGET = {"iid": 0.93, "dirichlet": 0.90}
SYNC: dict[str, Any] = {"weighting": "equal"}
CREDIT = SYNC | {
    "closes": "first",
    "grace_seconds": 0.0,
    "planner": "equal_time",
    "server_optimizer": "diloco",
    "server_momentum": 0.5,
}
ARMS: dict[str, dict[str, Any] | type[Peer]] = {
    "sync FedAvg": SYNC,
    "sync DiLoCo": SYNC | {"server_optimizer": "diloco"},
    "credit, r 1": CREDIT | {"server_learning_rate": 1.0},
    "credit, r 1.5": CREDIT | {"server_learning_rate": 1.5},
    "credit, r 1, newest": CREDIT | {"server_learning_rate": 1.0, "served_mean": 0.0},
    "credit, r 1.5, newest": CREDIT | {"server_learning_rate": 1.5, "served_mean": 0.0},
    "FedQueue's plan, ours": CREDIT
    | {"server_learning_rate": 1.0, "planner": "fedqueue", "closes": 4140},
    "FedAsync": FedAsync,
    "FedBuff (code)": FedBuffCode,
    "FedBuff (paper)": FedBuff,
    "FedCompass": FedCompass,
    "FedQueue (code)": FedQueue,
    "FedQueue repaired": FedQueueRepaired,
}


class Digits:
    """Handwritten digits on four sites, and a perceptron with one hidden layer on a flat vector."""

    def __init__(self, data: str, seed: int) -> None:
        draw = np.random.default_rng([seed, 1])
        images, labels = load_digits(return_X_y=True)
        images = (images / 16 - 0.3).astype(np.float32)
        while True:
            order = draw.permutation(len(labels))
            if data == "iid":
                parts = np.array_split(order, len(NAMES))
            else:
                parts = self._skewed(draw, order, labels)
            if min(map(len, parts)) >= 100:
                break
        self.train, self.valid = {}, {}
        for name, part in zip(NAMES, parts, strict=True):
            held = max(20, len(part) // 5)
            part = draw.permutation(part)
            self.valid[name] = (images[part[:held]], labels[part[:held]])
            self.train[name] = (images[part[held:]], labels[part[held:]])
        self.shapes = [(64, HIDDEN), (HIDDEN,), (HIDDEN, 10), (10,)]
        self.seed = seed

    @staticmethod
    def _skewed(draw: np.random.Generator, order: np.ndarray, labels: np.ndarray) -> list[Any]:
        """Each digit is spread over the sites by a Dirichlet distribution of 0.1."""
        parts: list[list[int]] = [[] for _ in NAMES]
        for digit in range(10):
            mine = order[labels[order] == digit]
            cuts = np.cumsum(draw.dirichlet([0.1] * len(NAMES)))[:-1] * len(mine)
            for part, piece in zip(parts, np.split(mine, cuts.astype(int)), strict=True):
                part.extend(piece)
        return [np.array(part, int) for part in parts]

    def first(self) -> Tensor:
        """The first model."""
        draw = np.random.default_rng([self.seed, 2])
        pieces = [
            (draw.standard_normal(shape) / shape[0] ** 0.5 if len(shape) > 1 else np.zeros(shape))
            for shape in self.shapes
        ]
        flat = np.concatenate([piece.ravel() for piece in pieces])
        return torch.from_numpy(flat.astype(np.float32))

    def delta(self, task: Task, model: Tensor) -> Tensor:
        """Local minus global weights."""
        return self.trained(task.facility, task.seed, task.local_steps, 1.0, model)

    def trained(self, site: str, seed: int, steps: int, factor: float, model: Tensor) -> Tensor:
        """Local minus global weights after so many steps of SGD."""
        draw = np.random.default_rng([self.seed, seed])
        images, labels = self.train[site]
        weights = model.numpy().copy()
        w1, b1, w2, b2 = self._views(weights)
        rounds = -(-steps * BATCH // (len(labels) - len(labels) % BATCH)) if steps else 0
        whole = len(labels) - len(labels) % BATCH
        order = np.concatenate([draw.permutation(len(labels))[:whole] for _ in range(rounds)])
        targets = np.eye(10, dtype=np.float32)[labels]
        rate = np.float32(RATE * factor / BATCH)
        for step in range(steps):
            batch = order[step * BATCH : (step + 1) * BATCH]
            x = images[batch]
            hidden = np.maximum(x @ w1 + b1, 0)
            scores = hidden @ w2 + b2
            scores = np.exp(scores - scores.max(1, keepdims=True))
            wrong = (scores / scores.sum(1, keepdims=True) - targets[batch]) * rate
            back = (wrong @ w2.T) * (hidden > 0)
            w2 -= hidden.T @ wrong
            b2 -= wrong.sum(0)
            w1 -= x.T @ back
            b1 -= back.sum(0)
        return torch.from_numpy(weights) - model

    def accuracies(self, model: Tensor) -> list[float]:
        """The share of right answers at each site."""
        w1, b1, w2, b2 = self._views(model.numpy())
        return [
            float(((np.maximum(x @ w1 + b1, 0) @ w2 + b2).argmax(1) == y).mean())
            for x, y in self.valid.values()
        ]

    def _views(self, flat: np.ndarray) -> list[np.ndarray]:
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes])
        pieces = np.split(flat, ends[:-1])
        return [piece.reshape(shape) for piece, shape in zip(pieces, self.shapes, strict=True)]


def sites_of(setting: str) -> dict[str, Site]:
    """The four sites of a setting."""
    loads = dict(zip(NAMES, (0.7, 0.95, 0.85, 0.75), strict=True))
    sites = {}
    for name, speed in zip(NAMES, SPEEDS, strict=True):
        queue: Any = Lognormal(median=120.0, sigma=0.8)
        if setting == "backfill":
            queue = Backfill(machine=64, load=loads[name])
        elif setting == "bursty":
            queue = Bursty()
        elif setting in ("congested", "failures") and name == "b":
            queue = Lognormal(median=6000.0, sigma=1.0)
        failures = 0.05 if setting == "failures" else 0.0
        sites[name] = Site(seconds_per_step=speed, nodes=8, queue=queue, failures=failures)
    return sites


def run(setting: str, data: str, seed: int, arm: str) -> dict[str, Any]:
    """One run up to the horizon of its setting."""
    begun, learner, sites = time.process_time(), Digits(data, seed), sites_of(setting)
    rules = ARMS[arm]
    curve: list[tuple[float, float, float]] = []
    if isinstance(rules, dict):
        job = Job(
            facilities=tuple(Facility(name=name, dataset="digits") for name in NAMES),
            rounds=400,  # more than come before the horizon
            local_steps=STEPS,
            seed=seed,
            training=Training(batch_size=BATCH),
            aggregation=Aggregation(**rules),
        )
        federation = Federation(job, sites, seed, learner)
        machines, model = federation.machines, lambda: federation.served
    else:
        machines = Machines(sites, seed)
        peer = rules(machines, learner.trained, learner.first())
        model = lambda: peer.model  # noqa: E731

    def measure() -> None:
        scores = learner.accuracies(model())
        hours = machines.node_seconds / 3600
        curve.append((float(np.mean(scores)), min(scores), hours))
        machines.clock.after(GRID, measure)

    measure()
    machines.clock.run(lambda: False, HORIZON[setting])
    last = curve[-int(SUSTAINED / GRID) :]
    weight = [account.weight for account in machines.accounts.values()]
    at = _reached([c[0] for c in curve], TARGET[data])
    return {
        "setting": setting,
        "data": data,
        "seed": seed,
        "arm": arm,
        "seconds": None if at is None else at * GRID,
        "node_hours": None if at is None else curve[at][2],
        "worst": float(np.mean([c[1] for c in last])),
        "final": float(np.mean([c[0] for c in last])),
        "weight": [w / (sum(weight) or 1) for w in weight],
        "merged": [account.merged for account in machines.accounts.values()],
        "cpu": round(time.process_time() - begun, 2),
    }


def _reached(scores: Sequence[float], target: float) -> int | None:
    """The first measurement at the target that holds in the mean of the two hours after it."""
    window = int(SUSTAINED / GRID)
    for place, score in enumerate(scores):
        if score >= target and np.mean(scores[place : place + window]) >= target:
            return place
    return None


def tables(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Time to target, and over that of synchronous rounds, by setting, with 95 % intervals."""
    found = {(r["setting"], r["data"], r["seed"], r["arm"]): r for r in rows}
    for data in TARGET:
        for setting in HORIZON:
            seeds = sorted(
                {r["seed"] for r in rows if (r["setting"], r["data"]) == (setting, data)}
            )
            if not seeds:
                continue
            yield f"\n{setting}, {data}\n"
            yield (
                "| | n | ks to target | / sync FedAvg | / sync DiLoCo | never | worst site "
                "| node-h | weight |\n|---|---:|---:|---:|---:|---:|---:|---:|---|"
            )
            for arm in ARMS:
                mine = [found.get((setting, data, s, arm)) for s in seeds]
                runs = [r for r in mine if r]
                if not runs:
                    continue
                horizon = HORIZON[setting]
                times = [r["seconds"] or horizon for r in runs]
                hours = [r["node_hours"] for r in runs if r["node_hours"] is not None]
                weight = np.mean([r["weight"] for r in runs if "weight" in r], 0)
                yield (
                    f"| {arm} | {len(runs)} | {np.median(times) / 1e3:.1f} "
                    + "".join(
                        f"| {_ratio(found, setting, data, seeds, arm, base)} "
                        for base in ("sync FedAvg", "sync DiLoCo")
                    )
                    + f"| {sum(r['seconds'] is None for r in runs)} "
                    + f"| {_interval([r['worst'] for r in runs])} "
                    + f"| {np.median(hours) if hours else float('nan'):.0f} "
                    + f"| {' '.join(f'{w:.2f}' for w in weight)} |"
                )


def ratio(
    found: dict[Any, Any], setting: str, data: str, seeds: Sequence[int], arm: str, base: str
) -> tuple[float, float, float, int]:
    """Geometric mean of paired ratios, its 95 % interval, and the pairs there are.

    Who never arrives is counted at the horizon.
    """
    logs = []
    for seed in seeds:
        pair = [found.get((setting, data, seed, name)) for name in (arm, base)]
        if all(pair):
            one, other = (max(r["seconds"] or HORIZON[setting], GRID) for r in pair if r)
            logs.append(np.log(one / other))
    if not logs:
        return float("nan"), float("nan"), float("nan"), 0
    mean, half = _mean(logs)
    low, middle, high = (float(np.exp(mean + side * half)) for side in (-1, 0, 1))
    return middle, low, high, len(logs)


def _ratio(
    found: dict[Any, Any], setting: str, data: str, seeds: Sequence[int], arm: str, base: str
) -> str:
    mean, low, high, pairs = ratio(found, setting, data, seeds, arm, base)
    if arm == base:
        return "1"
    return "–" if not pairs else f"{mean:.2f}" + (f" [{low:.2f}, {high:.2f}]" if pairs > 1 else "")


def _interval(values: Sequence[float]) -> str:
    mean, half = _mean(values)
    return f"{mean:.3f} ± {half:.3f}"


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half of its 95 % interval."""
    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    spread = np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values)), float(stats.t.ppf(0.975, len(values) - 1) * spread)


def main() -> None:
    """Add runs to the results, or print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, one a run")
    parser.add_argument("--seeds", type=int, default=4, help="seeds of each arm; default: 4")
    parser.add_argument("--minutes", type=float, default=10, help="begin no run after that")
    parser.add_argument("--settings", default=",".join(HORIZON), help="some of them, with commas")
    parser.add_argument("--arms", default=";".join(ARMS), help="some of them, with semicolons")
    parser.add_argument("--table", action="store_true", help="run nothing, print the tables")
    args = parser.parse_args()
    torch.set_num_threads(1)
    text = args.results.read_text() if args.results.exists() else ""
    rows = [json.loads(line) for line in text.splitlines()]
    if args.table:
        print("\n".join(tables(rows)))
        return
    key: Callable[[dict[str, Any]], Any] = lambda r: (r["setting"], r["data"], r["seed"], r["arm"])  # noqa: E731
    done, begun = {key(row) for row in rows}, time.monotonic()
    for seed in range(args.seeds):
        for setting in args.settings.split(","):
            for data in TARGET:
                for arm in args.arms.split(";"):
                    if (setting, data, seed, arm) in done:
                        continue
                    if time.monotonic() - begun > 60 * args.minutes:
                        return
                    row = run(setting, data, seed, arm)
                    with args.results.open("a") as file:
                        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
