"""The engine as the parent of the steps on its machine: when it ends, they end.

Every `crossfl` command imports this module, so it imports next to nothing.
"""

import os
import threading
import time
from pathlib import Path

from crossfl.protocol import variables

POLL_SECONDS = 0.5


def end_with_engine() -> None:
    """End this process soon after the engine's, which may be killed before it can end its steps."""
    engine = os.environ.get(variables.ENGINE)
    if not engine:
        return

    def watch() -> None:
        while Path("/proc", engine).exists():
            time.sleep(POLL_SECONDS)
        os._exit(1)

    if Path("/proc", engine).exists():
        threading.Thread(target=watch, daemon=True).start()
