"""The process that has the imports of every step and forks them; `engine.forkserver` starts it."""

import contextlib
import importlib
import os
import sys
from pathlib import Path

from crossfl import cli
from crossfl.engine.forkserver import step
from crossfl.engine.forkserver.server import Server

MODULES = (
    "crossfl.learning.training",
    "crossfl.learning.first_model",
    "crossfl.steps.initialise",
    "crossfl.steps.plan",
    "crossfl.steps.train",
    "crossfl.steps.evaluate",
    "crossfl.steps.aggregate",
    "crossfl.steps.report",
    "transformers.models.llama.modeling_llama",
)
"""The steps, what they import once they have refused what is cheap to refuse, and a usual model."""


def main() -> int:
    """Serve; in each fork, run the command that it was asked for."""
    server = Server(engine=int(sys.argv[1]), listener=int(sys.argv[2]))
    for module in MODULES:
        importlib.import_module(module)
    _compile_patterns()
    if not _forks_whole():
        server.end()
    server.serve()
    status = cli.main()
    step.leave(status)
    return status


def _compile_patterns() -> None:
    """Have transformers make what it would for the first model that it loads: 900 patterns."""
    with contextlib.suppress(ImportError):  # in another version it is made elsewhere
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("llama")


def _forks_whole() -> bool:
    """Whether a fork can do what this process could: one tries.

    OpenBLAS starts threads when numpy is imported, and ends them before the first fork. A fork has
    no GPU where an import has asked the driver for one.
    """
    import torch

    process = os.fork()
    if process == 0:
        try:
            if torch.accelerator.is_available():
                torch.zeros(1, device=torch.accelerator.current_accelerator())
            os._exit(torch.cuda._is_in_bad_fork())
        finally:
            os._exit(1)
    _, status = os.waitpid(process, 0)
    return status == 0 and len(list(Path("/proc/self/task").iterdir())) == 1


if __name__ == "__main__":
    sys.exit(main())
