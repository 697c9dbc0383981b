"""On a GPU: the same learning as on the CPU, but for rounding. Skipped where there is none."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from crossfl.protocol import variables
from crossfl.protocol.manifest import UpdateManifest
from crossfl.protocol.records import Task, Training
from crossfl.storage import manifest
from crossfl.storage.delta import file_name
from tests.support.processes import GPUS, NO_GPU, Run, losses, train_there

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path("/dev/nvidiactl").exists(), reason="this machine has no NVIDIA GPU"
    ),
]
TRAINING = Training(batch_size=8, sequence_length=48, learning_rate=0.01, schedule="cosine")


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({}, 1e-3),
        ({"packing": True, "micro_batch": 3}, 1e-3),
        ({"compile": True, "activation_checkpointing": True}, 1e-3),
        ({"precision": "bf16"}, 2e-2),
    ],
    ids=str,
)
def test_the_losses_are_those_of_the_cpu(
    task: Task, run: Run, changes: dict[str, Any], tolerance: float
) -> None:
    long = task.replace(local_steps=30, schedule_steps=60)
    measured = losses(run, long, TRAINING.replace(**changes), **GPUS)["losses"]
    expected = losses(run, long, TRAINING, **NO_GPU)["losses"]
    assert measured == pytest.approx(expected, rel=tolerance)
    assert measured != expected, "it ran on the CPU"
    assert expected[-1] < 0.8 * expected[0]


def test_rounds_on_a_gpu_go_on_and_say_what_they_cost(task: Task, run: Run, tmp_path: Path) -> None:
    """Two rounds with the optimizer kept: deltas near those of the CPU, account of the GPU."""
    training = TRAINING.replace(local_optimizer="keep", checkpoint_steps=2)
    deltas = []
    for name, where in (("gpu", GPUS), ("cpu", NO_GPU)):
        for number in (1, 2):
            asked = task.replace(round=number, samples_seen=24 * (number - 1), counted=number - 1,
                local_steps=3, schedule_steps=8,
            )  # fmt: skip
            out = tmp_path / name / str(number)
            state = {variables.STATE: str(tmp_path / name / "state")}
            train_there(run, asked, training, out, **where, **state)
        cost = manifest.verify(out / "update", UpdateManifest).metrics.training
        assert cost is not None
        assert ("gpu" in cost.joules) == (name == "gpu" and find_spec("pynvml") is not None)
        deltas.append(load_file(out / "update" / file_name("model.safetensors")))
    found, expected = deltas
    for name in expected:
        error = (found[name] - expected[name]).norm() / expected[name].norm()
        assert error < 1e-2, name
