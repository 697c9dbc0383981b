"""The workflow's loop in this process, to be cut off where a test wants it."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

from crossfl import cli
from crossfl.errors import CrossFLError
from crossfl.protocol.flags import flag
from crossfl.protocol.records import Facility, Task
from crossfl.protocol.variables import SIGNING_KEY
from tests.support.paths import CWL

TRAINING = ("--sequence-length", "24", "--batch-size", "2", "--threads", "1")
Words = tuple[str | Path, ...]
WEIGHTS = Path("global_model", "model.safetensors")
ROUNDS = 3


class Cut(Exception):  # noqa: N818 (it is no error of ours)
    """The engine was killed."""


class Federation:
    """The workflow's loop over the real verbs, as an engine runs them, but in this process.

    Attributes:
        rounds, local_steps, facilities, prompts: as in a job file.
        first: flags of `initialise` for the first model.
        rules: flags of `initialise` for the aggregation.
        training: flags of `plan`, `train` and `evaluate`.
        words: more flags of `plan`.
        keys: with which key a facility signs.
        trained: facility and round of each training that came to its end.
    """

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.folder = folder
        self.trained: list[tuple[str, int]] = []
        self.rounds = ROUNDS
        self.local_steps = 1
        self.first: Words = ("--config", CWL / "config.json", "--tokenizer", "bytes")
        self.rules: Words = ("--server-optimizer", "diloco")
        self.training: Words = TRAINING
        self.words: list[str] = []
        self.prompts: list[str] = []
        self.keys: dict[str, Path] = {}
        self.facilities = [
            Facility(name=name, dataset="words") for name in ("karolina", "leonardo")
        ]
        vars(self).update(changes)
        self.cut: str | None = None
        self.steps = 0
        self.calls: Counter[str] = Counter()

    def verb(self, name: str, *words: str | Path) -> Path:
        """Run one verb in a folder of its own, and be cut off before it or after it.

        A place to cut is that of the verb among all (`before 5`), or among its own kind
        (`after aggregate 1`).
        """
        self.steps += 1
        self.calls[name] += 1
        places = (str(self.steps), f"{name} {self.calls[name]}")
        if self.cut in [f"before {place}" for place in places]:
            raise Cut
        out = self.folder / f"{self.steps:03}-{name}"
        out.mkdir(parents=True)
        status = cli.main([name, "--outdir", str(out), *map(str, words)])
        if status:
            raise CrossFLError(f"{name} ended with {status}")
        if self.cut in [f"after {place}" for place in places]:
            raise Cut
        return out

    def at(self, name: str, task: Task, *words: str | Path) -> Path:
        """Run a verb for a task, at its facility."""
        flags = [f"{flag(k)}={v}" for k, v in task.asdict().items()]
        key = str(self.keys.get(task.facility, ""))
        with patch.dict(os.environ, {SIGNING_KEY: key}):
            policy = ("--on-failure", "absent")
            return self.verb(name, *words, *flags, *self.training, *policy)

    def run(self, cut: str | None = None) -> Path:
        """Run the federation, or up to where it is cut off; the folder with the last model."""
        self.cut, self.steps, self.calls = cut, 0, Counter()
        shutil.rmtree(self.folder, ignore_errors=True)
        facilities = [word for f in self.facilities for word in ("--facility", *_words(f.asdict()))]
        steps = ("--local-steps", str(self.local_steps))
        rules = ("--rounds", str(self.rounds), *self.rules)
        here = self.verb("initialise", *self.first, *rules, *facilities, *steps)
        more = True
        while more:
            model: Words = ("--global-model", here / "global_model")
            state: Words = ("--state", here / "state")
            how: Words = (*facilities, *steps, *self.training, *self.words)
            tasks, updates = self.plan(*state, *how)
            for task in tasks:
                out = self.at("train", task, *model)
                self.trained.append((task.facility, task.round))
                updates += ["--update", out / "update"]
            here = self.verb("aggregate", *model, *state, *updates)
            more = json.loads((here / "cwl.output.json").read_text())["more"]
        evaluations: list[str | Path] = []
        if self.prompts:
            prompts = [word for prompt in self.prompts for word in ("--prompt", prompt)]
            last = ("--state", here / "state")
            tasks, evaluations = self.plan(*last, *facilities, *steps, "--purpose", "evaluate")
            for task in tasks:
                out = self.at("evaluate", task, "--global-model", here / "global_model", *prompts)
                evaluations += ["--evaluation", out / "evaluation"]
        self.verb("report", "--state", here / "state", *evaluations)
        return here

    def plan(self, *words: str | Path) -> tuple[list[Task], list[str | Path]]:
        """The tasks of a plan, and its allowances as flags."""
        planned = json.loads((self.verb("plan", *words) / "cwl.output.json").read_text())
        allowances: list[str | Path] = [
            word for a in planned["allowances"] for word in ("--allowance", *_words(a))
        ]
        return [Task.parse(values) for values in planned["tasks"]], allowances


def _words(record: dict[str, Any]) -> list[str]:
    """A record as a step is told it."""
    lists = {k: ",".join(map(str, v)) for k, v in record.items() if isinstance(v, list)}
    return [f"{key}={value}" for key, value in {**record, **lists}.items()]
