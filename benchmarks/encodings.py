"""Measure what an encoding of the deltas costs in final loss, against chance.

    python benchmarks/encodings.py workflows/numbers/job.yml --data data --seeds 0 1 2 3

Two answers for each seed and encoding, and fp32 as the measure of both:

* *run*: the federation with deltas in that encoding. Two runs of a seed differ in the encoding
  alone, but any difference, however small, sends training another way: only means over seeds tell.
* *replayed*: the run in fp32, with what the encoding would have lost of its deltas, error feedback
  and all, taken off the final model. Training goes the same way, so chance is out of it.

How far chance alone goes, *control* tells: a run in fp32 with each batch in two halves, whose
gradients are added. It is the same training but for the last bits. How fast harm grows with what is
rounded, *rough3* and *rough1* tell: codes from -3 to 3 and from -1 to 1 in place of int4's -7 to 7,
so that the square of what is rounded away is 5 and 49 times as large.

Prints every final loss, the bytes of the updates, and the ratio of the mean losses with its
standard error, paired by seed. Outcomes are kept, one JSON line each: what is there is not run
again.
"""

import argparse
import dataclasses
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from crossfl.protocol import variables
from crossfl.protocol.fields import fields_of
from crossfl.protocol.layout import GLOBAL_MODEL, STATE, UPDATE
from crossfl.protocol.manifest import ModelManifest
from crossfl.protocol.records import Aggregation, Training
from crossfl.protocol.state import ServerState
from crossfl.server import state as server_state
from crossfl.server.planning.fixed import plan
from crossfl.server.rounds import Averaged, aggregate
from crossfl.simulation.simulate import playing_every_facility
from crossfl.steps.evaluate import evaluate
from crossfl.steps.initialise import initialise
from crossfl.steps.train import train
from crossfl.storage import encodings, manifest
from crossfl.storage.delta import Delta
from crossfl.storage.encodings import CELL
from crossfl.storage.encodings.integer import Quantised
from crossfl.storage.job import Job

ENCODINGS = next(f.choices for f in fields_of(Training) if f.name == "encoding")
CONTROL = "control"
ROUGH = {"rough3": 3, "rough1": 1}
"""Largest codes of what is int4 but for them; the files are of the same bytes."""
INT4 = encodings.ENCODINGS["int4"]
RULES = Aggregation()
"""Weighted mean, applied as it is: then what is lost of a delta is lost of the model."""


class Rough(Quantised):
    """int4 with fewer codes."""

    def __init__(self, top: int) -> None:
        super().__init__(4)
        self._top = top


class Replay:
    """What an encoding would have lost of the deltas of a run in fp32, all rounds together."""

    def __init__(self, name: str, topk_fraction: float) -> None:
        self._coding = encodings.of(name, topk_fraction)
        self._carried: dict[tuple[str, str], torch.Tensor] = {}
        self.lost: dict[str, torch.Tensor] = {}
        self.bytes = 0

    def take(self, facility: str, share: float, delta: dict[str, torch.Tensor]) -> None:
        """One delta, in fp32."""
        for name, values in delta.items():
            carried = self._carried.get((facility, name), torch.zeros(()))
            meant = (values + carried).reshape(-1)
            got = []
            for cell in torch.split(meant, CELL):
                parts = self._coding.encode(cell)
                self.bytes += sum(part.nbytes for part in parts)
                got.append(self._coding.decode(parts, len(cell)))
            sent = torch.cat(got).reshape(values.shape)
            if self._coding.lossy:
                self._carried[facility, name] = meant.reshape(values.shape) - sent
            self.lost[name] = self.lost.get(name, torch.zeros(())) + share * (values - sent)


def run(job: Job, data: Path, replayed: Sequence[str]) -> dict[str, Any]:
    """Loss of the final model (mean over facilities, nats per token), bytes of all updates.

    The same for each encoding that is to be replayed.
    """
    replays = {name: Replay(name, job.training.topk_fraction) for name in replayed}
    with playing_every_facility(data), tempfile.TemporaryDirectory() as scratch:
        here, more, received = Path(scratch, "0"), True, 0
        initialise(job.model, job.config, job.tokenizer, job.seed, job.rounds, RULES, here)
        while more:
            before, state = here, server_state.load(here / STATE)
            planned = plan(state, job.facilities, job.local_steps, job.training, "train")
            tasks = planned.tasks
            here = Path(scratch, str(planned.round))
            for task in tasks:
                train(before / "global_model", task, job.training, here / task.facility)
            updates = [here / task.facility / UPDATE for task in tasks]
            outcome_of_round = aggregate(
                before / GLOBAL_MODEL, before / STATE, updates, here, time.time()
            )
            if not isinstance(outcome_of_round, Averaged):
                raise SystemExit(f"round {planned.round} was not averaged")
            state, entries = outcome_of_round.state, outcome_of_round.entry.facilities
            more = state.more(time.time())
            received += sum(entry.bytes for entry in entries.values())
            shutil.rmtree(before)
            for task, update in zip(tasks, updates, strict=True):
                delta = dict(Delta(update).tensors) if replays else {}
                for replay in replays.values():
                    replay.take(task.facility, entries[task.facility].share, delta)
        outcome: dict[str, Any] = {"seed": job.seed}
        outcome["loss"] = _loss(job, state, here / "global_model")
        outcome["bytes"] = received
        outcome["replayed"] = {}
        for name, replay in replays.items():
            file = here / "global_model" / "model.safetensors"
            weights = load_file(file)
            one = shutil.copytree(here / "global_model", Path(scratch, name))
            changed = {n: w - replay.lost[n] if n in replay.lost else w for n, w in weights.items()}
            save_file(changed, one / file.name, metadata={"format": "pt"})
            digest = manifest.write(one, ModelManifest(round=state.round)).digest
            loss = _loss(job, state.replace(model=digest), one)
            outcome["replayed"][name] = {"loss": loss, "bytes": replay.bytes}
    return outcome


def _loss(job: Job, state: ServerState, model: Path) -> float:
    losses = []
    for task in plan(state, job.facilities, job.local_steps, job.training, "evaluate").tasks:
        with tempfile.TemporaryDirectory() as out:
            metrics = evaluate(model, task, job.training, [], Path(out), match=False).metrics
        if metrics is None:
            raise SystemExit(f"{task.facility} has too few validation samples for a loss")
        losses.append(metrics.loss)
    return statistics.fmean(losses)


def ratio(losses: Sequence[float], base: Sequence[float]) -> str:
    """Ratio of the mean losses, and its standard error from the differences seed by seed."""
    found = statistics.fmean(losses) / statistics.fmean(base)
    if len(base) < 2:
        return f"{found:.4f}"
    left = [x - found * b for x, b in zip(losses, base, strict=True)]
    error = statistics.stdev(left) / math.sqrt(len(base)) / statistics.fmean(base)
    return f"{found:.4f} ± {error:.4f}"


def tables(outcomes: Sequence[dict[str, Any]]) -> str:
    """In Markdown: the losses of all runs, and ratios over the seeds that have both losses."""
    runs = {(o["encoding"], o["seed"]): o for o in outcomes}
    base = {seed: o for (name, seed), o in runs.items() if name == "fp32"}
    kinds: dict[str, dict[int, dict[str, Any]]] = {}
    for name in (*ENCODINGS, CONTROL, *ROUGH):
        kinds[f"{name}, run"] = {s: o for (n, s), o in runs.items() if n == name}
        kinds[f"{name}, replayed"] = {
            s: o["replayed"][name] for s, o in base.items() if name in o["replayed"]
        }
    kinds = {kind: found for kind, found in kinds.items() if found}
    shown = [kind for kind in kinds if kind.endswith("run")]
    each = [["seed", *shown]]
    for seed in sorted({seed for _, seed in runs}):
        found = [kinds[kind].get(seed) for kind in shown]
        each.append([str(seed), *(f"{o['loss']:.5f}" if o else "–" for o in found)])
    means = [["", "mean ± deviation", "seeds", "loss / fp32", "single seeds", "bytes / fp32"]]
    for kind, of_kind in kinds.items():
        losses = [o["loss"] for o in of_kind.values()]
        spread = f" ± {statistics.stdev(losses):.5f}" if len(losses) > 1 else ""
        row = [kind, f"{statistics.fmean(losses):.5f}{spread}"]
        if both := sorted(of_kind.keys() & base.keys()):
            pairs = [(of_kind[s]["loss"], base[s]["loss"]) for s in both]
            single = [a / b for a, b in pairs]
            row += [str(len(both)), ratio([a for a, _ in pairs], [b for _, b in pairs])]
            row.append(f"{min(single):.4f} to {max(single):.4f}")
            row.append(f"{100 * of_kind[both[0]]['bytes'] / base[both[0]]['bytes']:.1f} %")
        means.append(row)
    return f"{_markdown(each)}\n{_markdown(means)}"


def _markdown(rows: list[list[str]]) -> str:
    ruled = [rows[0], ["---"] + ["---:"] * (len(rows[0]) - 1), *rows[1:]]
    return "".join("| " + " | ".join(row) + " |\n" for row in ruled)


def main() -> None:
    """Run what has not been run, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", type=Path, help="job file; its aggregation is taken to be plain")
    parser.add_argument("--data", type=Path, required=True, help="folder of the facilities' data")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(8)))
    parser.add_argument(
        "--encodings",
        nargs="+",
        choices=(*ENCODINGS, CONTROL, *ROUGH),
        default=["fp32", CONTROL, "bf16", "int8", "int4"],
    )
    parser.add_argument("--results", type=Path, default=Path("results/encodings.jsonl"))
    args = parser.parse_args()
    os.environ[variables.PROGRESS] = os.devnull
    job, outcomes = Job.load(args.job), []
    args.results.parent.mkdir(parents=True, exist_ok=True)
    if args.results.exists():
        outcomes = [json.loads(line) for line in args.results.read_text().splitlines()]
    done = {(o["seed"], o["encoding"]) for o in outcomes}
    wanted = [(seed, name) for seed in args.seeds for name in args.encodings]
    for seed, name in wanted:
        if (seed, name) in done:
            continue
        begun = time.monotonic()
        sent = {CONTROL: "fp32", **dict.fromkeys(ROUGH, "int4")}.get(name, name)
        training = job.training.replace(encoding=sent)
        if name == CONTROL:
            training = training.replace(micro_batch=training.batch_size // 2)
        encodings.ENCODINGS["int4"] = Rough(ROUGH[name]) if name in ROUGH else INT4
        one = dataclasses.replace(job, seed=seed, training=training)
        outcome = run(one, args.data, ENCODINGS if name == "fp32" else ())
        outcomes.append({"encoding": name, **outcome})
        with args.results.open("a") as stream:
            stream.write(json.dumps(outcomes[-1]) + "\n")
        seconds = time.monotonic() - begun
        print(f"seed {seed} {name}: {outcomes[-1]['loss']:.5f}, {seconds:.0f} s", file=sys.stderr)
    print(tables(outcomes))


if __name__ == "__main__":
    main()
