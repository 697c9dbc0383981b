"""Train on and evaluate model folders under an audit hook; print what each attempt opened.

It reads a JSON object on its standard input: the folders, the task and the training. Of each
folder it prints one JSON line: the errors, the outside places that were opened, listed or run, and
by how many bytes the peak memory rose.
"""

import json
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import Any

import peft  # noqa: F401 (what libraries import and open once is none of the folders' doing)
import torch

import crossfl.learning.training  # noqa: F401
from crossfl.errors import CrossFLError
from crossfl.protocol.manifest import ModelManifest
from crossfl.protocol.records import Task, Training
from crossfl.protocol.variables import STATE
from crossfl.steps.evaluate import evaluate
from crossfl.steps.train import train
from crossfl.storage import manifest
from tests.support.paths import DATA, ROOT

EVENTS = ("open", "os.listdir", "os.scandir", "os.chdir", "exec", "import", "subprocess.Popen")
INSIDE = tuple(
    str(Path(place))
    for place in (ROOT, DATA, sys.prefix, sys.base_prefix, "/proc", "/sys", "/dev", "/usr", "/lib")
)


class Watch:
    """The audit hook, which cannot be removed, and so is switched on and off."""

    def __init__(self) -> None:
        self.on, self.inside, self.outside = False, INSIDE, set[str]()
        sys.addaudithook(self)

    def __call__(self, event: str, details: tuple[Any, ...]) -> None:
        if not self.on or event not in EVENTS:
            return
        self.on = False  # what is asked for here raises events of its own
        place = details[0]
        if event == "exec":
            place = place.co_filename
        elif event == "import":
            place = details[1]
        if isinstance(place, str | bytes | os.PathLike):
            text = os.fsdecode(place)
            if text and not text.startswith("<") and event != "subprocess.Popen":
                text = os.path.realpath(text)
            if text and not text.startswith(("<", *self.inside)):
                self.outside.add(f"{event} {text}")
        self.on = True


def attempt(watch: Watch, folder: Path, task: Task, training: Training) -> dict[str, Any]:
    errors = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        view = str(Path(tempfile.gettempdir(), "crossfl-model-"))
        kept = str(Path(os.environ[STATE]).resolve())  # samples as token ids
        watch.outside, watch.inside = set(), (*INSIDE, str(folder.resolve()), out, view, kept)
        for action in (
            lambda: train(folder, task, training, Path(out)),
            lambda: evaluate(folder, task, training, ["it "], Path(out)),
        ):
            watch.on = True
            try:
                action()
                errors.append("")
            except CrossFLError as error:
                errors.append(str(error))
            except Exception as error:
                errors.append(f"UNEXPECTED {type(error).__name__}: {error}")
            watch.on = False
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"errors": errors, "outside": sorted(watch.outside), "rise": (after - before) * 1024}


def main() -> None:
    asked = json.load(sys.stdin)
    task, training = Task.parse(asked["task"]), Training.parse(asked["training"])
    torch.set_num_threads(1)
    watch = Watch()
    with tempfile.NamedTemporaryFile() as file:
        watch.on = True
        Path(file.name).read_bytes()
        watch.on = False
        assert watch.outside == {f"open {file.name}"}, "the hook sees nothing"
    for folder in map(Path, asked["folders"]):
        try:
            base = manifest.read(folder, ModelManifest).digest
        except (CrossFLError, OSError):
            base = task.base
        line = attempt(watch, folder, task.replace(base=base), training)
        print(json.dumps({"folder": folder.parent.name, **line}), flush=True)


if __name__ == "__main__":
    main()
