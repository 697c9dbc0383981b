"""The workflow's loop in this process, to be cut off where a test wants it."""

import json
import shutil
from pathlib import Path
from typing import Any

from crossfl import cli
from crossfl.errors import CrossFLError
from crossfl.protocol.flags import flag
from crossfl.protocol.records import Facility, Task
from tests.support.paths import CWL

TRAINING = ("--sequence-length", "24", "--batch-size", "2", "--threads", "1")
Words = tuple[str | Path, ...]
WEIGHTS = Path("global_model", "model.safetensors")
ROUNDS = 3


class Cut(Exception):  # noqa: N818 (it is no error of ours)
    """The engine was killed."""


class Federation:
    """The workflow's loop over the real verbs, as an engine runs them, but in this process."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder = folder
        self.trained: list[tuple[str, int]] = []
        self.rounds = ROUNDS
        self.local_steps = 1
        self.words: list[str] = []
        vars(self).update(changes)
        self.facilities = [
            Facility(name=name, dataset="words") for name in ("karolina", "leonardo")
        ]
        self.cut: str | None = None
        self.steps = 0

    def verb(self, name: str, *words: str | Path) -> Path:
        """Run one verb in a folder of its own, and be cut off before it or after it."""
        self.steps += 1
        if self.cut == f"before {self.steps}":
            raise Cut
        out = self.folder / f"{self.steps:03}-{name}"
        out.mkdir(parents=True)
        status = cli.main([name, "--outdir", str(out), *map(str, words)])
        if status:
            raise CrossFLError(f"{name} ended with {status}")
        if self.cut == f"after {self.steps}":
            raise Cut
        return out

    def run(self, cut: str | None = None) -> Path:
        self.cut, self.steps = cut, 0
        shutil.rmtree(self.folder, ignore_errors=True)
        facilities = [
            word
            for f in self.facilities
            for word in ("--facility", f"name={f.name}", f"dataset={f.dataset}")
        ]
        steps = ("--local-steps", str(self.local_steps))
        config: Words = ("--config", CWL / "config.json", "--tokenizer", "bytes")
        rules = ("--rounds", str(self.rounds), "--server-optimizer", "diloco")
        here = self.verb("initialise", *config, *rules, *facilities, *steps)
        more = True
        while more:
            model: Words = ("--global-model", here / "global_model")
            state: Words = ("--state", here / "state")
            planned = self.verb("plan", *state, *facilities, *steps, *TRAINING, *self.words)
            plan = json.loads((planned / "cwl.output.json").read_text())
            updates: list[str | Path] = [
                word
                for allowance in plan["allowances"]
                for word in ("--allowance", *(f"{k}={v}" for k, v in allowance.items()))
            ]
            for values in plan["tasks"]:
                task = Task.parse(values)
                words = [f"{flag(k)}={v}" for k, v in task.asdict().items()]
                out = self.verb("train", *model, *words, *TRAINING)
                self.trained.append((task.facility, task.round))
                updates += ["--update", out / "update"]
            here = self.verb("aggregate", *model, *state, *updates)
            more = json.loads((here / "cwl.output.json").read_text())["more"]
        self.verb("report", "--state", here / "state")
        return here
