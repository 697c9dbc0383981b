"""Hand the history of a run to a tracker: TensorBoard, MLflow, Weights & Biases, or a CSV file.

It reads the history that a run has left, so a tracker that is slow or away costs the run nothing.
"""

import argparse
import csv
import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from crossfl.errors import CrossFLError
from crossfl.protocol.history import RoundEntry
from crossfl.storage.history import flat, read_history


class Value(NamedTuple):
    """One number of one round."""

    round: int
    name: str
    value: float


def values(entries: Sequence[RoundEntry]) -> Iterator[Value]:
    """The numbers of a history, named `loss`, `leonardo/share`, `leonardo/seconds/train` …"""
    for entry in entries:
        yield Value(entry.round, "seconds", entry.seconds)
        if entry.loss is not None:
            yield Value(entry.round, "loss", entry.loss)
        for facility, told in sorted(entry.facilities.items()):
            for name, value in flat(told.asdict(), "/"):
                if isinstance(value, int | float) and not isinstance(value, bool):
                    yield Value(entry.round, f"{facility}/{name}", float(value))


def to_csv(entries: Sequence[RoundEntry], target: Path) -> None:
    """Write one line for each number: round, name, value."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(Value._fields)
        writer.writerows(values(entries))


def to_tensorboard(entries: Sequence[RoundEntry], folder: Path) -> None:
    """Write an event file that TensorBoard reads.

    Raises:
        CrossFLError: tensorboardX is not installed.
    """
    with _module("tensorboardX").SummaryWriter(str(folder), flush_secs=3600) as writer:
        for round_, name, value in values(entries):
            writer.add_scalar(name, value, round_)


def to_mlflow(entries: Sequence[RoundEntry], name: str) -> None:
    """Log a run to the MLflow server that its own variables name.

    Raises:
        CrossFLError: mlflow is not installed.
    """
    mlflow = _module("mlflow")
    with mlflow.start_run(run_name=name):
        for round_, key, value in values(entries):
            mlflow.log_metric(key, value, step=round_)


def to_wandb(entries: Sequence[RoundEntry], name: str) -> None:
    """Log a run to Weights & Biases, as its own variables say.

    Raises:
        CrossFLError: wandb is not installed.
    """
    run = _module("wandb").init(project="crossfl", name=name)
    for entry in entries:
        run.log({key: value for _, key, value in values([entry])}, step=entry.round)
    run.finish()


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise CrossFLError(f"{name} is not installed: pip install {name}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `crossfl track`."""
    parser.add_argument("history", type=Path, help="history.jsonl, or a folder of results")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a table of numbers")
    parser.add_argument(
        "--tensorboard", type=Path, metavar="FOLDER", help="write events for TensorBoard"
    )
    parser.add_argument("--mlflow", action="store_true", help="log to MLflow")
    parser.add_argument("--wandb", action="store_true", help="log to Weights & Biases")
    parser.add_argument("--name", default="federation", help="name of the run at a tracker")


def main(args: argparse.Namespace) -> None:
    """Hand the history to each tracker that was named.

    Raises:
        CrossFLError: none was named, one is not installed, or the history cannot be read.
    """
    wanted: list[tuple[str, Callable[..., None], Any]] = []
    if args.csv:
        wanted.append(("csv", to_csv, args.outdir / args.csv))
    if args.tensorboard:
        wanted.append(("tensorboard", to_tensorboard, args.outdir / args.tensorboard))
    if args.mlflow:
        wanted.append(("mlflow", to_mlflow, args.name))
    if args.wandb:
        wanted.append(("wandb", to_wandb, args.name))
    if not wanted:
        raise CrossFLError("name a tracker: --csv, --tensorboard, --mlflow or --wandb")
    entries = read_history(args.history)
    for tracker, write, target in wanted:
        write(entries, target)
        print(f"{tracker}  {len(entries)} rounds, {target}")
