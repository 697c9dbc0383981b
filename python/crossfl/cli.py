"""The `crossfl` command: one verb per module, imported only when it is called."""

import argparse
import errno
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from crossfl import __version__
from crossfl.engine.parent import end_with_engine
from crossfl.errors import CrossFLError
from crossfl.protocol.text import printable

VERBS = {
    "initialise": ("steps.initialise", "make the first global model and the server state"),
    "plan": ("steps.plan", "decide the tasks of the next round"),
    "train": ("steps.train", "train the global model on a facility's own data"),
    "aggregate": ("steps.aggregate", "turn the updates of a round into the next global model"),
    "evaluate": ("steps.evaluate", "measure the global model on a facility's validation data"),
    "report": ("steps.report", "turn history and evaluations into one HTML page"),
    "bind": ("sites.bind", "compose facilities into a StreamFlow file"),
    "check": (
        "sites.check.command",
        "check every facility of a StreamFlow file before a job is spent",
    ),
    "digest": ("sites.digest", "print the digest of a base model, for LoRA"),
    "runs": ("server.journal.runs", "list the runs in a journal, remove them, or unlock one"),
    "simulate": ("simulation.simulate", "run a federation in this one process, without an engine"),
    "compare": ("simulation.compare", "federated, each facility alone, and pooled data, compared"),
}
"""The module of each verb, and what the verb does."""
BAD_INPUT = 4
KEPT = "\n"
"""What lays out a message, and does nothing else."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Exit status: 0 done, 2 wrong usage, 4 bad input, 1 anything else.

    A verb that measures others (`check`) gives its own status.
    """
    parser = Parser(
        prog="crossfl",
        description="Cross-facility federated learning; 'crossfl VERB --help' tells more.",
        epilog="\n".join(f"  {verb:<12}{text}" for verb, (_, text) in VERBS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"crossfl {__version__}")
    parser.add_argument("verb", metavar="VERB", choices=VERBS, help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)

    module = importlib.import_module(f"crossfl.{VERBS[args.verb][0]}")
    verb = Parser(prog=f"crossfl {args.verb}", description=module.__doc__)
    module.add_arguments(verb)
    verb.add_argument(
        "--outdir", type=Path, default=Path(), help="folder to write into; default: this one"
    )
    end_with_engine()
    try:
        parsed = verb.parse_args(args.arguments)
        parsed.words = [args.verb, *args.arguments]
        status: int | None = module.main(parsed)
    except CrossFLError as error:
        _tell(args.verb, str(error))
        return BAD_INPUT
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" for {error.filename}" if error.filename else ""
        _tell(
            args.verb,
            f"the disk has no room left{where}: free some, then run the same command again",
        )
        return BAD_INPUT
    except KeyboardInterrupt:
        _tell(args.verb, "interrupted")
        return 130
    return status or 0


class Parser(argparse.ArgumentParser):
    """A parser whose complaints, which quote what it was given, act on no terminal."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the usage, and exit."""
        super().error(printable(message, keep=KEPT))


def _tell(verb: str, message: str) -> None:
    """Print a message, in which the words of others may be, on standard error."""
    print(f"crossfl {verb}: {printable(message, keep=KEPT)}", file=sys.stderr)
