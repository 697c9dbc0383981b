"""The engine as the parent of the steps on its machine: when it ends, they end.

Every `crossfl` command imports this module, so it imports next to nothing.
"""

import os
import sys
import threading
import time
from pathlib import Path

from crossfl.protocol import variables

POLL_SECONDS = 0.5
JOBS = ("SLURM_JOB_ID", "PBS_JOBID")
"""Where one is set, this may be another machine, on which the engine is not to be seen."""


def end_with_engine() -> None:
    """End this process soon after the engine's, which may be killed before it can end its steps.

    Called before anything slow is imported. Where the engine has ended already, this process does.
    """
    engine = os.environ.get(variables.ENGINE)
    if not engine:
        return

    def watch() -> None:
        while Path("/proc", engine).exists():
            time.sleep(POLL_SECONDS)
        os._exit(1)

    if Path("/proc", engine).exists():
        threading.Thread(target=watch, daemon=True).start()
    elif not any(job in os.environ for job in JOBS):
        sys.exit(f"crossfl: process {engine}, the engine of this step, has ended")
