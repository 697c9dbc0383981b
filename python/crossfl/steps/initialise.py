"""Make the first global model and the server state, from a model folder or from a configuration."""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crossfl.errors import CrossFLError
from crossfl.learning.first_model import write_first_model
from crossfl.observe.events import Progress
from crossfl.protocol.flags import add_flags, from_flags, from_flags_if_any, from_words
from crossfl.protocol.layout import GLOBAL_MODEL, STATE
from crossfl.protocol.manifest import ModelManifest
from crossfl.protocol.participation import check_rounds
from crossfl.protocol.records import BYTES, Aggregation, Facility, Lora, Retention
from crossfl.protocol.state import ServerState
from crossfl.server import aggregation_rules, first_state
from crossfl.server import state as server_state
from crossfl.server.journal import journal
from crossfl.server.resume import resume
from crossfl.steps import outputs
from crossfl.storage import manifest
from crossfl.storage.checkpoint import Tensors
from crossfl.storage.files import publish
from crossfl.storage.model_folder import ModelFolder


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
    run: str | None = None,
    retention: Retention | None = None,
) -> None:
    """Write `out/global_model` and `out/state`.

    Args:
        model: Hugging Face model directory to start from, or
        config: its `config.json` alone; the weights are then random, drawn from the seed.
        tokenizer: directory of a tokenizer, or `bytes`; unset, the one in the model directory.
        seed: seed of the weights and, through `plan`, of all that follows.
        rounds: rounds to run.
        aggregation: the server optimizer and its parameters, kept in the state.
        out: folder to write into.
        lora: adapter to train on the model, of which only the configuration is then read, and its
            weights for their digest; unset, the whole model.
        run: name of the run in the journal, kept in the state.
        retention: which rounds the journal keeps.

    Raises:
        CrossFLError: nothing was written, for the reason given.
    """
    with publish(out / GLOBAL_MODEL) as directory, publish(out / STATE) as memory:
        write_first_model(model, config, tokenizer, lora, seed, directory)
        sums = first_state.write_tensors(Tensors.of_model(directory), aggregation, memory)
        server_state.write_signers(aggregation, memory)
        if aggregation.model_dtype != "keep":
            first_state.convert(directory, first_state.DTYPES[aggregation.model_dtype])
        digest = manifest.write(directory, ModelManifest(round=0)).digest
        ModelFolder.received(directory, only=())  # what a facility would refuse is told now
        state = ServerState(
            rounds=rounds,
            seed=seed,
            aggregation=server_state.without_path(aggregation),
            started=time.time(),
            model=digest,
            run=run,
            retention=retention or Retention(),
        )
        server_state.save(state, memory, sums)


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
    folder, place = args.outdir, journal.here()
    lora = from_flags_if_any(args, Lora)
    aggregation, retention = from_flags(args, Aggregation), from_flags(args, Retention)
    facilities = [from_words(words, Facility) for words in args.facility]
    configuration = _configuration(args, facilities, aggregation, lora) if place else {}
    run = journal.find(place, configuration) if place else None
    last = run.last() if run else None
    finished = server_state.load(last / STATE).finished if last else 0
    check_participation(facilities, finished, args.rounds, aggregation)
    with outputs.all_or_none(folder / GLOBAL_MODEL, folder / STATE):
        if run and last:
            resume(last, args.rounds, aggregation, retention, folder)
            run.go_on(configuration)
            _say(f"{run.path} goes on after round {finished}", run.path.name)
        else:
            name = run.path.name if run else journal.new_name() if place else None
            initialise(
                args.model,
                args.config,
                args.tokenizer,
                args.seed,
                args.rounds,
                aggregation,
                folder,
                lora,
                run=name,
                retention=retention,
            )
            if run:
                run.publish(folder / GLOBAL_MODEL, folder / STATE, retention)
                _say(f"{run.path} begins again: no round of it is whole", run.path.name)
            elif place and name:
                made = folder / GLOBAL_MODEL, folder / STATE
                replaced = journal.begin(place, name, configuration, *made)
                names = ", ".join(path.name for path in replaced)
                _say(
                    f"{place / name} begins"
                    + (f", in place of {names}, which had finished no round" if names else ""),
                    name,
                )
        outputs.write(folder, global_model=folder / GLOBAL_MODEL, state=folder / STATE, more=True)


def check_participation(
    facilities: Sequence[Facility], finished: int, rounds: int, aggregation: Aggregation
) -> None:
    """Check that enough facilities take part in each round left, for the quorum and the rule.

    Raises:
        CrossFLError: they do not, or there is no round.
    """
    if rounds < 1:
        raise CrossFLError(f"rounds is {rounds}: a federation has at least 1")
    if facilities:
        least = aggregation_rules.of(aggregation).least(aggregation.num_byzantine)
        left = range(finished + 1, rounds + 1)
        check_rounds(facilities, left, max(least, aggregation.quorum or 1))


def _configuration(
    args: argparse.Namespace,
    facilities: Sequence[Facility],
    aggregation: Aggregation,
    lora: Lora | None,
) -> dict[str, Any]:
    """What a run is known by in the journal."""
    named = args.tokenizer in (None, BYTES)
    rules = aggregation.asdict()
    if aggregation.signers:
        signers = server_state.read_signers(Path(aggregation.signers))
        rules["signers"] = signers.decode(errors="backslashreplace")
    return {
        "model": _inventory(args.model),
        "config": _inventory(args.config),
        "tokenizer": args.tokenizer if named else _inventory(Path(args.tokenizer)),
        "seed": args.seed,
        "rounds": args.rounds,
        "local_steps": args.local_steps,
        "facilities": {f.name: f.asdict() for f in facilities},
        "aggregation": rules,
        "lora": lora.asdict() if lora else None,
    }


def _inventory(path: Path | None) -> Any:
    """What a file or folder is known by in a configuration: its contents, or sizes of its files."""
    if path is None:
        return None
    if path.is_file():
        try:
            return json.loads(path.read_bytes())
        except ValueError as error:
            raise CrossFLError(f"{path} is not JSON: {error}") from None
    paths = [file for file in path.rglob("*") if file.is_file()]
    return {file.relative_to(path).as_posix(): file.stat().st_size for file in paths}


def _say(message: str, run: str) -> None:
    with Progress() as progress:
        progress("journal", message=message, run=run)
