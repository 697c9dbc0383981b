"""On a GPU: the same learning as on the CPU, but for rounding. Skipped where there is none."""

import dataclasses
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from conftest import DATA, GPUS, NO_GPU, ROUND, Run
from crossfl import manifest
from crossfl.delta import file_name
from crossfl.records import Task, Training, flag

pytestmark = pytest.mark.skipif(
    not Path("/dev/nvidiactl").exists(), reason="this machine has no NVIDIA GPU"
)
TRAINING = Training(batch_size=8, sequence_length=48, learning_rate=0.01, schedule="cosine")
HERE = {"CROSSFL_FACILITY": "leonardo", "CROSSFL_DATA": str(DATA / "leonardo")}


def _losses(run: Run, task: Task, training: Training, **variables: str) -> list[float]:
    words = [json.dumps(record.asdict()) for record in (task, training)]
    script = Path(__file__).with_name("losses.py")
    quiet = {"CROSSFL_PROGRESS": os.devnull, **HERE, **variables}
    result = run(sys.executable, script, *words, cwd=ROUND, **quiet)
    assert result.returncode == 0, result.stderr
    losses: list[float] = json.loads(result.stdout)["losses"]
    return losses


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({}, 1e-3),
        ({"batching": "packed", "micro_batch": 3}, 1e-3),
        ({"execution": "compiled", "activations": "recompute"}, 1e-3),
        ({"precision": "bf16"}, 2e-2),
    ],
    ids=str,
)
def test_the_losses_are_those_of_the_cpu(
    task: Task, run: Run, changes: dict[str, Any], tolerance: float
) -> None:
    long = dataclasses.replace(task, local_steps=30, schedule_steps=60)
    found = _losses(run, long, dataclasses.replace(TRAINING, **changes), **GPUS)
    expected = _losses(run, long, TRAINING, **NO_GPU)
    assert found == pytest.approx(expected, rel=tolerance)
    assert found != expected, "it ran on the CPU"
    assert expected[-1] < 0.8 * expected[0]


def test_rounds_on_a_gpu_go_on_and_say_what_they_cost(task: Task, run: Run, tmp_path: Path) -> None:
    """Two rounds with the optimizer kept: deltas near those of the CPU, account of the GPU."""
    training = dataclasses.replace(TRAINING, local_optimizer="keep", checkpoint_steps=2)
    deltas = []
    for name, where in (("gpu", GPUS), ("cpu", NO_GPU)):
        for number in (1, 2):
            asked = dataclasses.replace(
                task, round=number, samples_seen=24 * (number - 1), counted=number - 1,
                local_steps=3, schedule_steps=8,
            )  # fmt: skip
            out = tmp_path / name / str(number)
            out.mkdir(parents=True)
            words = [
                w for r in (asked, training) for k, v in r.asdict().items() for w in (flag(k), v)
            ]
            result = run(
                sys.executable, "-m", "crossfl", "train", "--global-model", ROUND / "global_model",
                "--outdir", out, *map(str, words), cwd=out, **HERE, **where,
                CROSSFL_STATE=str(tmp_path / name / "state"),
            )  # fmt: skip
            assert result.returncode == 0, result.stderr
        said = manifest.verify(out / "update", "update")["metrics"]["training"]
        told = name == "gpu" and find_spec("pynvml") is not None
        assert ("gpu" in said["joules"]) == told
        deltas.append(load_file(out / "update" / file_name("model.safetensors")))
    found, expected = deltas
    for name in expected:
        error = (found[name] - expected[name]).norm() / expected[name].norm()
        assert error < 1e-2, name
