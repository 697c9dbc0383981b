"""The script that looks at a facility from inside: `crossfl check` runs it in place of the step.

Its text is sent, so it needs nothing but a Python. Its first argument is `login`, on the login
node, or `job`, in a job; the others are datasets.
"""

import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from typing import Any

MARK = "crossfl-check"
"""What its one line of output starts with."""
PACKAGES = ("crossfl", "torch", "transformers")
LAUNCH_SECONDS = 60
"""In a job of two minutes, most of which goes by while Python imports."""
RANK = """\
import os
from crossfl.facility import launcher
launcher.join()
print(f"crossfl-rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}", flush=True)
"""
"""What each rank runs: it finds out who it is, as the step does."""


def launch(words: list[str]) -> dict[str, Any]:
    """The ranks that a launcher starts, and what is wrong with them, if anything is.

    A launcher may be there and start nothing: OpenPBS's `mpiexec` looks for that of an MPI.
    """
    # Launchers that bring their own Python have to be told that they shall not.
    own = ["--no-python"] if os.path.basename(words[0]) == "torchrun" else []  # noqa: PTH119
    try:
        done = subprocess.run(
            [*words, *own, sys.executable, "-c", RANK],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=LAUNCH_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"ranks": 0, "launch_failure": str(error)[-200:]}
    pairs = re.findall(r"crossfl-rank (\d+) of (\d+)", done.stdout)
    numbers, sizes = {int(rank) for rank, _ in pairs}, {int(size) for _, size in pairs}
    answer: dict[str, Any] = {"ranks": len(pairs)}
    if done.returncode != 0 or not pairs:
        last = (done.stderr.strip().splitlines() or ["it started nothing"])[-1]
        answer["launch_failure"] = last[-200:]
    elif numbers != set(range(len(pairs))) or sizes != {len(pairs)}:
        answer["launch_failure"] = f"{len(pairs)} processes that are not one group of ranks"
    return answer


def observe(where: str, datasets: list[str]) -> dict[str, Any]:
    """Versions, datasets that are absent; in a job launcher, staging folder and GPUs as well."""
    packages: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    root = os.environ.get("CROSSFL_DATA", "")
    observation: dict[str, Any] = {
        "host": platform.node(),
        "python": platform.python_version(),
        "packages": packages,
        "absent": [x for x in datasets if not os.access(os.path.join(root, x), os.R_OK)],  # noqa: PTH118
    }
    if where == "job":
        launcher = shlex.split(os.environ.get("CROSSFL_LAUNCHER", ""))
        staging = os.environ.get("CROSSFL_STAGING")
        observation["no_launcher"] = [word for word in launcher[:1] if not shutil.which(word)]
        if launcher and packages["crossfl"] and not observation["no_launcher"]:
            observation |= launch(launcher)
        observation["no_staging"] = [staging] if staging and not os.access(staging, os.W_OK) else []
        if packages["torch"]:
            import torch

            observation["gpus"] = (
                torch.accelerator.device_count() if torch.accelerator.is_available() else 0
            )
    return observation


if __name__ == "__main__":
    print(MARK, json.dumps(observe(sys.argv[1], sys.argv[2:])))
