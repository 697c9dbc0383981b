"""The lock on a journal: one run at a time writes there.

The engine's connector holds it for a whole run, `crossfl runs` while it changes one.
"""

import fcntl
import os
import time
from pathlib import Path
from typing import IO

from crossfl.errors import CrossFLError
from crossfl.protocol.layout import JOURNAL_LOCK


def acquire(journal: Path) -> IO[str]:
    """Keep other runs from a journal for as long as the returned file stays open.

    The kernel lets go of the lock when its holder ends, however it ends.

    Raises:
        CrossFLError: another run is going on, or the journal cannot be written.
    """
    try:
        journal.mkdir(parents=True, exist_ok=True)
        lock = (journal / JOURNAL_LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise CrossFLError(
            f"the journal cannot be written: {journal}: {error.strerror}. Rounds that were "
            "published before are unharmed. Free space or change permissions, then run the same "
            "command again"
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise CrossFLError(
            f"another run of this federation is going on (process {holder}): wait for its end, or "
            f"name another journal than {journal}"
        ) from None
    lock.truncate(0)
    lock.write(f"{os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    lock.flush()
    return lock
