"""Training in processes of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crossfl.protocol.fields import Record
from crossfl.protocol.flags import flag
from crossfl.protocol.records import Task, Training
from crossfl.protocol.variables import DATA as DATA_ROOT
from crossfl.protocol.variables import (
    FACILITY,
    FORKSERVER,
    MIN_VALIDATION_SAMPLES,
    MIN_VALIDATION_TOKENS,
    PROMPTS,
)
from tests.support.paths import DATA, ROUND

GPUS = {"CUDA_VISIBLE_DEVICES": os.getenv("CUDA_VISIBLE_DEVICES", "0")}
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}

PRESERVE = tuple(
    f"--preserve-environment={name}"
    for name in (
        FACILITY,
        DATA_ROOT,
        PROMPTS,
        MIN_VALIDATION_SAMPLES,
        MIN_VALIDATION_TOKENS,
        FORKSERVER,
    )
)
"""What lets cwltool's steps see which facility this machine is, what may leave it, who forks."""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def flags(*records: Record) -> list[str]:
    """Records as a step is told them on its command line."""
    return [w for r in records for k, v in r.asdict().items() for w in (flag(k), str(v))]


def train_there(run: Run, task: Task, training: Training, out: Path, **variables: str) -> None:
    """Run `crossfl train` at leonardo, which leaves its update in `out`."""
    out.mkdir(parents=True)
    result = run(
        sys.executable, "-m", "crossfl", "train", "--global-model", ROUND / "global_model",
        "--outdir", out, *flags(task, training), cwd=out, CROSSFL_FACILITY="leonardo",
        CROSSFL_DATA=str(DATA / "leonardo"), **variables,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def losses(
    run: Run, task: Task, training: Training, launcher: Sequence[str | Path] = (), **variables: str
) -> dict[str, Any]:
    """What `losses.py` prints of a task at leonardo, in its own process or under a launcher."""
    script = Path(__file__).with_name("losses.py")
    result = run(
        *(launcher or [sys.executable]), script,
        *(json.dumps(record.asdict()) for record in (task, training)), cwd=ROUND,
        CROSSFL_FACILITY="leonardo", CROSSFL_DATA=str(DATA / "leonardo"),
        CROSSFL_PROGRESS=os.devnull, **variables,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    printed: dict[str, Any] = json.loads(result.stdout)
    return printed
