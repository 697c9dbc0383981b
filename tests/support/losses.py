"""Print, from the first rank, the loss of every step of a task: for tests that start processes.

It runs in the folder of the round, and on the devices its environment shows it: importing what the
tests share would hide the GPUs.
"""

import json
import os
import sys
from pathlib import Path

from crossfl.facility import launcher
from crossfl.facility.time_budget import StopSignal
from crossfl.learning.training import Trainer
from crossfl.observe.events import Progress
from crossfl.protocol.records import Task, Training
from crossfl.protocol.variables import DATA

if __name__ == "__main__":
    task, training = Task.parse(json.loads(sys.argv[1])), Training.parse(json.loads(sys.argv[2]))
    if "RANK" in os.environ:
        launcher.join()
    trainer = Trainer(Path("global_model"), Path(os.environ[DATA], "words"), task, training)
    validation = trainer.validate()
    with Progress() as progress:
        trained = trainer.train(progress, StopSignal())
    if trainer.leads:
        print(json.dumps({"losses": trained.losses, "validation": validation and validation.loss}))
    launcher.leave()
