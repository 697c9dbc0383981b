"""The runs in a journal: list them, remove them, let one go on with another configuration."""

import argparse
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from crossfl.errors import CrossFLError
from crossfl.protocol import variables
from crossfl.protocol.formats import size
from crossfl.protocol.layout import JOURNAL, STATE
from crossfl.server import state as server_state
from crossfl.server.journal import journal
from crossfl.storage import locks

FOLDER = Path(JOURNAL)


def journals(given: Path | None) -> list[Path]:
    """The journal that was named, by flag or variable, or else all in `.crossfl`."""
    if named := given or journal.here():
        return [named]
    return sorted(p for p in FOLDER.glob("*") if p.is_dir())


def disk_use(paths: Iterable[Path]) -> int:
    """Bytes on the disk under some directories, a file with several names counted once."""
    files = {}
    for path in paths:
        for each in path.rglob("*"):
            if each.is_file():
                facts = each.stat()
                files[facts.st_dev, facts.st_ino] = facts.st_size
    return sum(files.values())


def describe(folder: Path) -> str:
    """One line about a run."""
    try:
        run = journal.Run.load(folder)
    except CrossFLError as error:
        return f"{folder.name}  damaged: {error}"
    rounds = run.rounds()
    done = "no round"
    if rounds:
        try:
            state = server_state.load(rounds[-1] / STATE)
            done = f"round {state.round} of {state.rounds}"
        except CrossFLError:
            done = "damaged"
    described = run.description
    status = "finished" if described.finished else "unlocked" if described.unlocked else "goes on"
    kept = f"{len(rounds)} kept"
    return f"{run.path.name}  {done:<18} {status:<9} {kept:<8} {size(disk_use([run.path])):>8}"


def chosen(names: Sequence[str], places: Sequence[Path]) -> list[Path]:
    """The folders of the runs of these names.

    Raises:
        CrossFLError: there is no such run.
    """
    found = {path.name: path for place in places for path in journal.folders(place)}
    if missing := [name for name in names if name not in found]:
        where = ", ".join(str(place) for place in places) or FOLDER
        raise CrossFLError(f"no run {missing[0]!r} in {where}; 'crossfl runs' lists them")
    return [found[name] for name in names]


def unlock(folder: Path) -> None:
    """Let a run go on with another configuration.

    Raises:
        CrossFLError: it is finished, so that nothing goes on.
    """
    run = journal.Run.load(folder)
    if run.description.finished:
        raise CrossFLError(f"{folder} is finished: the next command begins a new run")
    run.save(unlocked=True)
    print(f"{folder} goes on with the configuration that it is run with next")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `crossfl runs`."""
    parser.add_argument(
        "action", nargs="?", choices=("list", "rm", "unlock"), default="list", help="default: list"
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="for rm and unlock: which")
    parser.add_argument(
        "--journal", type=Path, help=f"default: {variables.JOURNAL}, or all journals in .crossfl/"
    )


def main(args: argparse.Namespace) -> None:
    """List, remove, or let go on with another configuration."""
    places = journals(args.journal)
    if missing := [place for place in places if not place.is_dir()]:
        raise CrossFLError(f"there is no journal {missing[0]}: name one with --journal")
    if args.action == "list":
        for place in places:
            print(f"{place}  {size(disk_use([place]))}")
            for folder in journal.folders(place):
                print(f"  {describe(folder)}")
        return
    if not args.runs:
        raise CrossFLError(f"name the runs to {args.action}: 'crossfl runs' lists them")
    for folder in chosen(args.runs, places):
        with locks.acquire(folder.parent):  # none that is going on
            if args.action == "rm":
                shutil.rmtree(folder)
                print(f"removed {folder}")
            else:
                unlock(folder)
