"""Make the first global model and the server state, from a model folder or from a configuration."""

import argparse
import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from crossfl.errors import CrossFLError
from crossfl.learning.first_model import write_first_model
from crossfl.observe.progress import Progress
from crossfl.protocol.records import (
    BYTES,
    Aggregation,
    Facility,
    Lora,
    Retention,
    add_flags,
    from_flags,
    from_flags_if_any,
    from_words,
)
from crossfl.server import aggregation_rules, optimizers
from crossfl.server.averaging.walk import pieces
from crossfl.server.journal import journal
from crossfl.server.state import HISTORY, MASTER, ServerState
from crossfl.server.state import STATE as STATE_FILE
from crossfl.steps.plan import check_rounds
from crossfl.storage import files, manifest
from crossfl.storage.checkpoint import INDEX, Tensors
from crossfl.storage.tensorfile import Writer

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def initialise(
    model: Path | None,
    config: Path | None,
    tokenizer: str | None,
    seed: int,
    rounds: int,
    aggregation: Aggregation,
    out: Path,
    lora: Lora | None = None,
    *,
    run: str = "",
    retention: Retention | None = None,
) -> None:
    """Write `out/global_model` and `out/state`.

    Args:
        model: Hugging Face model directory to start from, or
        config: its `config.json` alone; the weights are then random, drawn from the seed.
        tokenizer: directory of a tokenizer, or `bytes`; unset, the one in the model directory.
        seed: seed of the weights and, through `plan`, of all that follows.
        rounds: rounds to run.
        aggregation: the strategy and its parameters, kept in the state.
        out: folder to write into.
        lora: adapter to train on the model, of which only the configuration is then read, and its
            weights for their digest; unset, the whole model.
        run: name of the run in the journal, kept in the state.
        retention: which rounds the journal keeps.

    Raises:
        CrossFLError: nothing was written, for the reason given.
    """
    if rounds < 1:
        raise CrossFLError(f"rounds is {rounds}: a federation has at least 1")
    if (model is None) == (config is None):
        raise CrossFLError("give either a model directory (--model) or a --config, not both")
    published = manifest.publish
    with published(out / "global_model") as directory, published(out / "state") as memory:
        write_first_model(model, config, tokenizer, lora, seed, directory)
        sums = start(Tensors.of_model(directory), aggregation, memory)
        if aggregation.broadcast != "own":
            convert(directory, FORMATS[aggregation.broadcast])
        described = manifest.write(directory, "model", {"round": 0})
        ServerState(
            rounds=rounds,
            seed=seed,
            aggregation=aggregation,
            started=time.time(),
            model=described["digest"],
            run=run,
            retention=retention or Retention(),
        ).save(memory, sums)


def start(weights: Tensors, aggregation: Aggregation, state: Path) -> dict[str, str]:
    """Write the master weights and the strategy's slots before the first round; their sha256."""
    strategy = optimizers.of(aggregation)
    sums: dict[str, str] = {}
    for file in weights.files:
        floats = {n: e.shape for n, e in file.entries.items() if e.dtype.is_floating_point}
        layout = {name: (torch.float32, shape) for name, shape in floats.items()}
        slots = [MASTER, *strategy.init(torch.zeros(0), aggregation)]
        with contextlib.ExitStack() as stack:
            writers = {
                slot: stack.enter_context(Writer(state / f"{slot}.{file.path.name}", layout))
                for slot in slots
            }
            for name in floats:
                master = file.tensor(name).float()
                for slot, tensor in {MASTER: master, **strategy.init(master, aggregation)}.items():
                    writers[slot].write(tensor)
        sums |= {writer.path.name: writer.sha256 for writer in writers.values()}
    return sums


def convert(directory: Path, dtype: torch.dtype) -> None:
    """Round the floating-point weights of a model directory to a dtype, and say so in its files."""
    total = 0
    for file in Tensors.of_model(directory).files:
        layout = {
            name: (dtype if entry.dtype.is_floating_point else entry.dtype, entry.shape)
            for name, entry in file.entries.items()
        }
        partial = file.path.with_suffix(".partial")
        with Writer(partial, layout) as writer:
            for piece in pieces(file):
                values = file.span(piece.name, piece.start, piece.count)
                writer.write(values.to(layout[piece.name][0]))
        partial.rename(file.path)
        total += sum(torch.Size(shape).numel() * kind.itemsize for kind, shape in layout.values())
    for name, key, value in (
        ("config.json", "dtype", str(dtype).removeprefix("torch.")),
        (INDEX, "metadata", {"total_size": total}),
    ):
        if (directory / name).is_file():
            files.write_json(
                directory / name, json.loads((directory / name).read_text()) | {key: value}
            )


def resume(
    last: Path, rounds: int, aggregation: Aggregation, retention: Retention, out: Path
) -> None:
    """Write `out/global_model` and `out/state` as the last published round left them.

    Args:
        last: that round in the journal.
        rounds: rounds to run; another number than before in a run that was forked alone.
        aggregation: the same, of the aggregation.
        retention: which rounds the journal keeps from now on.
        out: folder to write into.

    Raises:
        CrossFLError: the round cannot be gone on with.
    """
    state = ServerState.load(last / "state")
    if state.aggregation.strategy != aggregation.strategy:
        raise CrossFLError(
            f"a run of {state.aggregation.strategy} cannot go on with {aggregation.strategy}, "
            "which remembers other things: begin anew, from its model"
        )
    wanted = replace(state, rounds=rounds, aggregation=aggregation, retention=retention)
    with manifest.publish(out / "global_model") as directory:
        files.link_tree(last / "global_model", directory)
    with manifest.publish(out / "state") as memory:
        files.link_tree(last / "state", memory)
        if wanted != state:
            for name in (STATE_FILE, HISTORY, manifest.FILE):
                (memory / name).unlink()  # never written in place: they are the journal's too
            wanted.save(memory)


def _inventory(path: Path | None) -> Any:
    """What a file or folder is known by in a configuration: its contents, or sizes of its files."""
    if path is None or path.is_file():
        return path and json.loads(path.read_text())
    files = [each for each in path.rglob("*") if each.is_file()]
    return {each.relative_to(path).as_posix(): each.stat().st_size for each in files}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `crossfl initialise`."""
    parser.add_argument("--model", type=Path, help="Hugging Face model directory to start from")
    parser.add_argument("--config", type=Path, help="config.json of a model with random weights")
    parser.add_argument("--tokenizer", help="tokenizer directory, or 'bytes'")
    parser.add_argument("--seed", type=int, default=0, help="seed of the federation; default 0")
    parser.add_argument("--rounds", type=int, required=True, help="rounds to run")
    add_flags(parser, Lora, optional=True)
    add_flags(parser, Aggregation)
    add_flags(parser, Retention)
    parser.add_argument(
        "--facility",
        action="append",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="a facility, as for plan: is every round large enough, and is this the journal's run",
    )
    parser.add_argument(
        "--local-steps",
        type=int,
        help="optimizer steps per facility and round; compared with the journal only",
    )


def main(args: argparse.Namespace) -> None:
    """Write `global_model`, `state` and `more` for the engine; from the journal, where it can."""
    here, place = args.outdir, journal.here()
    lora = from_flags_if_any(args, Lora)
    aggregation, retention = from_flags(args, Aggregation), from_flags(args, Retention)
    facilities = [from_words(words, Facility) for words in args.facility]
    configuration = _configuration(args, facilities, aggregation, lora)
    run = journal.find(place, configuration) if place else None
    last = run.last() if run else None
    finished = ServerState.load(last / "state").round if last else 0
    if facilities:
        least = aggregation_rules.of(aggregation).least(aggregation.dishonest)
        left = range(finished + 1, args.rounds + 1)
        check_rounds(facilities, left, max(least, aggregation.quorum or 1))
    if place and run is None:
        run = journal.begin(place, configuration)
    if run is not None:
        _say(f"{run.path} goes on after round {finished}" if last else f"{run.path} begins")
    if last is not None:
        resume(last, args.rounds, aggregation, retention, here)
    else:
        initialise(
            args.model,
            args.config,
            args.tokenizer,
            args.seed,
            args.rounds,
            aggregation,
            here,
            lora,
            run=run.path.name if run else "",
            retention=retention,
        )
        if run is not None:
            run.publish(here / "global_model", here / "state", retention)
    files.write(here, global_model=here / "global_model", state=here / "state", more=True)


def _configuration(
    args: argparse.Namespace,
    facilities: Sequence[Facility],
    aggregation: Aggregation,
    lora: Lora | None,
) -> dict[str, Any]:
    """What a run is known by in the journal."""
    named = args.tokenizer in (None, BYTES)
    return {
        "model": _inventory(args.model),
        "config": _inventory(args.config),
        "tokenizer": args.tokenizer if named else _inventory(Path(args.tokenizer)),
        "seed": args.seed,
        "rounds": args.rounds,
        "local_steps": args.local_steps,
        "facilities": {f.name: f.asdict() | {"skips": list(f.skips)} for f in facilities},
        "aggregation": aggregation.asdict(),
        "lora": lora.asdict() if lora else None,
    }


def _say(message: str) -> None:
    with Progress() as progress:
        progress("journal", message=message)
