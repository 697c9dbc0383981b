"""`python -m tests.support.probe CODE`: a command that runs its code, warm where it can be.

With the arguments of `crossfl.warm` it is the server of such commands, without the imports.
"""

import sys

from crossfl.engine.forkserver import step
from crossfl.engine.forkserver.client import run_warm
from crossfl.engine.forkserver.server import Server


def main() -> int:
    """Run the code, in which `WARM` says how."""
    if len(sys.argv) == 3:
        Server(engine=int(sys.argv[1]), listener=int(sys.argv[2])).serve()
        warm = True
    elif (done := run_warm()) is not None:
        return done
    else:
        warm = False
    exec(sys.argv[1], {"WARM": warm})  # noqa: S102
    if warm:
        step.leave(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
