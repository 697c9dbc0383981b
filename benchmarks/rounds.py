"""Measure what a round costs that trains next to nothing, with both facilities on this machine.

    python benchmarks/rounds.py --work /tmp/rounds

`streamflow run` with steps that are forked from one process, and with steps that start by
themselves. After the first run of each it is checked that their models are the same. Seconds are of
whole commands, with their start-up; a marginal round is the difference of two runs by the
difference of their rounds.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from crossfl.protocol.layout import GLOBAL_MODEL
from crossfl.protocol.variables import FORKSERVER

ROOT = Path(__file__).resolve().parents[1]
CASES = {"warm": (2, 20), "cold": (2, 5)}
"""Rounds of the two runs that tell a marginal round, by how steps start."""
FACILITIES = ("karolina", "leonardo")
TRAINING = {"batch_size": 4, "sequence_length": 48, "learning_rate": 0.01, "threads": 1}
STEPS = 2


def make(folder: Path) -> None:
    """Write data, job and StreamFlow files."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(ROOT / "tests" / "cwl" / "config.json", folder / "config.json")
    for number, name in enumerate(FACILITIES):
        words = folder / "data" / name / "words"
        words.mkdir(parents=True, exist_ok=True)
        for split, size in (("train", 64), ("valid", 32)):
            rows = [
                {"prompt": f"{i:04} = ", "completion": f"{i * (number + 3):05} and no more"}
                for i in range(size)
            ]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (words / f"{split}.jsonl").write_text(text, "utf-8")
    for rounds in {rounds for case in CASES.values() for rounds in case}:
        (folder / f"job-{rounds}.json").write_text(json.dumps(job_of(rounds)), "utf-8")
        (folder / f"streamflow-{rounds}.json").write_text(
            json.dumps(streamflow_file(rounds)), "utf-8"
        )


def job_of(rounds: int) -> dict[str, object]:
    """The federation as a job file."""
    return {
        "config": {"class": "File", "path": "config.json"},
        "tokenizer": "bytes",
        "seed": 1,
        "facilities": [{"name": name, "dataset": "words"} for name in FACILITIES],
        "rounds": rounds,
        "local_steps": STEPS,
        "training": TRAINING,
        "aggregation": {"server_optimizer": "fedavg", "weighting": "equal"},
    }


def streamflow_file(rounds: int) -> dict[str, object]:
    """Both facilities and the aggregation VM on this machine."""
    targets = [{"deployment": name} for name in (*FACILITIES, "vm")]
    configs = {name: {"facility": name, "data": f"data/{name}"} for name in FACILITIES}
    return {
        "version": "v1.0",
        "workflows": {
            "federation": {
                "type": "cwl",
                "config": {
                    "file": str(ROOT / "workflows" / "federated.cwl"),
                    "settings": f"job-{rounds}.json",
                },
                "bindings": [
                    {"step": "/", "target": {"deployment": "vm"}},
                    *(
                        {"step": step, "target": targets, "filters": ["by_facility"]}
                        for step in ("/federate/train", "/evaluate")
                    ),
                ],
            }
        },
        "bindingFilters": {"by_facility": {"type": "crossfl.facility", "config": {}}},
        "failureManager": {"type": "crossfl.facility", "config": {}},
        "deployments": {
            name: {"type": "crossfl.local", "config": config}
            for name, config in {"vm": {}, **configs}.items()
        },
        "database": {"type": "default", "config": {"connection": ":memory:"}},
    }


def run(folder: Path, rounds: int, kind: str) -> float:
    """Run the federation under StreamFlow, its steps warm or cold; seconds.

    Raises:
        SystemExit: it fails.
    """
    out, log = folder / f"{kind}-{rounds}", folder / f"{kind}-{rounds}.log"
    shutil.rmtree(out, ignore_errors=True)
    streamflow = str(Path(sys.executable).with_name("streamflow"))
    words = [streamflow, "run", "--quiet", "--outdir", str(out), f"streamflow-{rounds}.json"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("CROSSFL_")}
    if kind == "cold":
        environment[FORKSERVER] = ""
    begun = time.monotonic()
    with log.open("w") as stream:
        done = subprocess.run(words, stdout=stream, stderr=stream, env=environment, cwd=folder)
    if done.returncode:
        sys.exit(f"streamflow ended with {done.returncode}: see {log}")
    return time.monotonic() - begun


def main() -> None:
    """Make the files, measure, check that the answers agree, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for files, new")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    folder = args.work.resolve()
    make(folder)
    print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f},", end=" ")
    print(f"Linux {platform.release()}, Python {platform.python_version()},", end=" ")
    print(f"StreamFlow {version('streamflow')}\n", flush=True)
    seconds: dict[tuple[str, int], list[float]] = {}
    for repeat in range(args.repeats):
        for kind, case in CASES.items():
            for rounds in case:
                taken = run(folder, rounds, kind)
                seconds.setdefault((kind, rounds), []).append(taken)
                print(f"{kind}, {rounds} rounds: {taken:.1f} s, load {os.getloadavg()[0]:.1f}")
        name = Path(GLOBAL_MODEL, "model.safetensors")
        warm, cold = (folder / f"{kind}-2" / name for kind in CASES)
        if warm.read_bytes() != cold.read_bytes():
            sys.exit("warm and cold steps give different models")
        if repeat == 0:
            print("warm and cold steps: the same model, to the byte", flush=True)
    columns = ("steps", "rounds", "median s", "rounds", "median s", "marginal round s")
    print(f"\n| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for kind, (few, many) in CASES.items():
        low, high = (statistics.median(seconds[kind, rounds]) for rounds in (few, many))
        marginal = (high - low) / (many - few)
        print(f"| {kind} | {few} | {low:.1f} | {many} | {high:.1f} | {marginal:.2f} |")


if __name__ == "__main__":
    main()
