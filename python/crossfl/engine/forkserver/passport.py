"""What a process has from its start: two that agree in it can run each other's steps."""

import json
import os
import resource
import sys
from pathlib import Path

import crossfl

FREE = {"HOME", "TMPDIR", "PWD", "OLDPWD", "SHLVL", "_"}
"""Variables that no library reads while it is loaded, or that name folders of a job."""
FREE_PREFIX = "CROSSFL_"
"""Ours are read when a step asks for them."""
LIMITS = [number for name, number in vars(resource).items() if name.startswith("RLIMIT_")]


def passport() -> bytes:
    """Python, package, user, environment and limits of this process, as bytes to be compared.

    Libraries read variables like `OMP_NUM_THREADS`, and how many processors there are, once. So a
    step that differs in one, or in what it cannot give itself, is not for the server.
    """
    facts = [
        [sys.version, sys.prefix, sys.base_prefix, list(sys.flags), sys.warnoptions],
        [crossfl.__version__, crossfl.__file__, Path(crossfl.__file__).stat().st_mtime_ns],
        [os.getresuid(), os.getresgid(), sorted(os.getgroups())],
        [resource.getrlimit(number) for number in LIMITS],
        [os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0)],
        sorted(os.sched_getaffinity(0)),
        sorted(item for item in os.environ.items() if not _is_free(item[0])),
    ]
    return json.dumps(facts).encode()


def _is_free(name: str) -> bool:
    return name in FREE or name.startswith(FREE_PREFIX)
