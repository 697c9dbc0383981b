"""The `crossfl` command: one verb per module, imported only when it is called."""

import argparse
import errno
import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from crossfl import __version__
from crossfl.engine.forkserver.client import run_warm
from crossfl.engine.parent import end_with_engine
from crossfl.errors import Code, CrossFLError
from crossfl.protocol.exits import Exit
from crossfl.protocol.text import printable

VERBS = {
    "init": ("sites.init", "write a federation to begin with, from a template"),
    "run": ("sites.run", "run a federation on this machine, through the engine"),
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
    "status": ("console.status", "say how a run stands: rounds, facilities, jobs, expected end"),
    "logs": (
        "console.logs",
        "print what a job of a facility printed, where that is allowed",
    ),
    "export": ("console.export", "write the page, plots and tables of a run in a journal"),
    "runs": ("server.journal.runs", "list the runs in a journal, remove them, or unlock one"),
    "provenance": ("observe.provenance", "describe a finished run as a Workflow Run RO-Crate"),
    "track": ("observe.trackers", "hand a history to TensorBoard, MLflow, W&B or a CSV file"),
    "simulate": ("simulation.simulate", "run a federation in this one process, without an engine"),
    "compare": ("simulation.compare", "federated, each facility alone, and pooled data, compared"),
}
"""The module of each verb, and what the verb does."""
BAD_INPUT = Exit.BAD_INPUT
KEPT = "\n"
"""What lays out a message, and does nothing else."""
FULL = "the disk has no room left: free some, then run the same command again"
UNWRITABLE = "nothing can be written there: change its permissions, or name another folder"
ABSENT = "it does not exist: make it, or name another"
REMEDIES = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EACCES: "permission denied: change its permissions, or name another",
    errno.EPERM: UNWRITABLE,
    errno.EROFS: UNWRITABLE,
    errno.ENOENT: ABSENT,
    errno.ENOTDIR: "it is no folder: name another",
    errno.EISDIR: "it is a folder: name a file",
    errno.EEXIST: "it exists already: remove it, or name another",
    errno.ENOTEMPTY: "it exists already: remove it, or name another",
    errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
    errno.EFBIG: "no file may be so large here: raise the limit (ulimit -f)",
    errno.ENFILE: "too many files are open on this machine: close some programs",
}
"""What a person can do about an error of the system."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Without arguments of its own, this is the whole process, and one that is warm may run it.

    Returns:
        The exit status, as `protocol.exits` says. A verb that measures others (`check`) gives its
        own.
    """
    if argv is None and (done := run_warm()) is not None:
        return done
    end_with_engine()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # one that may lack a character of a message
            stream.reconfigure(errors="backslashreplace")
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
    try:
        parsed = verb.parse_args(args.arguments)
        parsed.words = [args.verb, *args.arguments]
        status: int | None = module.main(parsed)
    except CrossFLError as error:
        _tell(args.verb, str(error), error.code)
        return BAD_INPUT
    except BrokenPipeError:  # whoever read the output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.FAILED
    except KeyboardInterrupt:
        _tell(args.verb, "interrupted", Code.INTERRUPTED)
        return Exit.INTERRUPTED
    except Exception as error:
        if (remedy := _remedy(error)) is None:
            return _report_bug(args.verb, args.arguments, error)
        _tell(args.verb, remedy, Code.SYSTEM)
        return BAD_INPUT
    return status or 0


def _remedy(error: Exception) -> str | None:
    """What to do about an error of the system; None where an error is none of these."""
    number = error.errno if isinstance(error, OSError) else _number_in(str(error))
    if number not in REMEDIES:
        return None
    file = getattr(error, "filename", None)
    return (f"{_place(file)}: " if file is not None else "") + REMEDIES[number]


def _number_in(text: str) -> int | None:
    """The number of an error of the system that a library has put into words."""
    for number in REMEDIES:
        if f"(os error {number})" in text or f"{os.strerror(number)} ({number})" in text:
            return number
    return None


class Parser(argparse.ArgumentParser):
    """A parser whose complaints, which quote what it was given, act on no terminal."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the usage, and exit."""
        super().error(f"{printable(message, keep=KEPT)} [{Code.USAGE}]")


def _tell(verb: str, message: str, code: Code) -> None:
    """Print a message, in which the words of others may be, and its code on standard error."""
    print(f"crossfl {verb}: {printable(message, keep=KEPT)} [{code}]", file=sys.stderr)


def _place(file: object) -> str:
    """The file or folder of an error; of a file that is written under another name, its folder."""
    path = Path(str(file))
    return str(path.parent if ".partial-" in path.name else path)


def _report_bug(verb: str, words: Sequence[str], error: Exception) -> int:
    """Say in one line that an error is none of the user's, and keep what it takes to find it.

    A step keeps to its traceback: it runs at a facility, where no file is left behind.
    """
    import tempfile
    import traceback

    if VERBS[verb][0].startswith("steps."):
        raise error
    details = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", prefix=f"crossfl-{verb}-", suffix=".txt", delete=False
        ) as file:
            file.write(f"crossfl {__version__}, Python {sys.version}\n{[verb, *words]}\n{details}")
    except OSError:
        print(printable(details, keep=KEPT), file=sys.stderr)
        _tell(verb, "this is a bug in crossfl; please report the lines above", Code.BUG)
    else:
        summary = printable(str(error) or type(error).__name__, longest=200)
        message = f"this is a bug in crossfl: {summary}. Please report it with {file.name}"
        _tell(verb, message, Code.BUG)
    return Exit.FAILED
