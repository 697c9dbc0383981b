"""What a place looks like from inside a job: run there by `crossfl check`, in place of the step.

It is sent as text, so it needs nothing but a Python; `where` is `login` or `job`.
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


def look(where: str, datasets: list[str]) -> dict[str, Any]:
    """Versions, datasets that are absent; in a job launcher, staging folder and GPUs as well."""
    seen: dict[str, Any] = {"host": platform.node(), "python": platform.python_version()}
    for name in PACKAGES:
        try:
            seen[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            seen[name] = None
    root = os.environ.get("CROSSFL_DATA", "")
    seen["absent"] = [x for x in datasets if not os.access(os.path.join(root, x), os.R_OK)]  # noqa: PTH118
    if where == "job":
        launcher = shlex.split(os.environ.get("CROSSFL_LAUNCHER", ""))[:1]
        seen["no_launcher"] = [word for word in launcher if not shutil.which(word)]
        staging = os.environ.get("CROSSFL_STAGING")
        seen["no_staging"] = [staging] if staging and not os.access(staging, os.W_OK) else []
        if seen["torch"]:
            import torch

            seen["gpus"] = (
                torch.accelerator.device_count() if torch.accelerator.is_available() else 0
            )
    return seen


if __name__ == "__main__":
    print(MARK, json.dumps(look(sys.argv[1], sys.argv[2:])))
