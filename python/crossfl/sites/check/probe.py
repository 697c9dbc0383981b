"""The script that looks at a facility from inside: `crossfl check` runs it in place of the step.

Its text is sent, so it needs nothing but a Python. Its first argument is `login`, on the login
node, or `job`, in a job; the others are datasets.
"""

import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import sys
from typing import Any

MARK = "crossfl-check"
"""What its one line of output starts with."""
PACKAGES = ("crossfl", "torch", "transformers")


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
        launcher = shlex.split(os.environ.get("CROSSFL_LAUNCHER", ""))[:1]
        staging = os.environ.get("CROSSFL_STAGING")
        observation["no_launcher"] = [word for word in launcher if not shutil.which(word)]
        observation["no_staging"] = [staging] if staging and not os.access(staging, os.W_OK) else []
        if packages["torch"]:
            import torch

            observation["gpus"] = (
                torch.accelerator.device_count() if torch.accelerator.is_available() else 0
            )
    return observation


if __name__ == "__main__":
    print(MARK, json.dumps(observe(sys.argv[1], sys.argv[2:])))
