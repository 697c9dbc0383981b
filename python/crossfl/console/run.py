"""Finding the run that a person means: in a journal, the last one unless it is named."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from crossfl.errors import CrossFLError
from crossfl.protocol.layout import EVENTS, JOURNAL_LOCK, RUN
from crossfl.server.journal import journal
from crossfl.server.journal.runs import FOLDER, journals

LOCKS = Path("/proc/locks")


@dataclass(frozen=True)
class Found:
    """One run of a journal."""

    run: journal.Run
    going_on: bool
    """Whether an engine holds the journal, and this is the run that it works on."""

    @property
    def path(self) -> Path:
        """Folder of the run."""
        return self.run.path

    @property
    def events(self) -> Path:
        """The file of its events, which may be missing."""
        return self.run.path / EVENTS


def add_run(parser: argparse.ArgumentParser) -> None:
    """Declare what names a run: a journal, and a run of it."""
    parser.add_argument(
        "journal",
        type=Path,
        nargs="?",
        help="journal, or folder of a run; default: CROSSFL_JOURNAL, or all journals in .crossfl/",
    )
    parser.add_argument("--run", help="name of the run; default: the newest")


def find(place: Path | None, name: str | None = None) -> Found:
    """The run of this name; without one, the newest.

    Args:
        place: a journal, or the folder of a run; None, all journals here.
        name: of the run.

    Raises:
        CrossFLError: there is none, or its description cannot be read.
    """
    if place is not None and (place / RUN).is_file():
        place, name = place.resolve().parent, place.resolve().name
    places = journals(place)
    if missing := [each for each in places if not each.is_dir()]:
        raise CrossFLError(f"there is no journal {missing[0]}: name the folder of one")
    folders = [folder for each in places for folder in journal.folders(each)]
    if name is not None:
        folders = [folder for folder in folders if folder.name == name]
    if not folders:
        where = ", ".join(str(each) for each in places) or str(FOLDER)
        what = f"no run {name!r}" if name else "no run"
        raise CrossFLError(f"{what} in {where}; 'crossfl runs' lists what is there")
    newest = max(folders, key=lambda folder: folder.name)
    last = max(journal.folders(newest.parent), key=lambda folder: folder.name)
    run = journal.Run.load(newest)
    going_on = newest == last and not run.description.finished and is_held(newest.parent)
    return Found(run, going_on)


def is_held(place: Path) -> bool:
    """Whether a run on this machine holds a journal now.

    The kernel's list of locks is read. To try the lock would take it for a moment, in which a run
    could not begin.
    """
    try:
        lock = (place / JOURNAL_LOCK).stat()
        held = LOCKS.read_text("utf-8").split()
    except OSError:
        return False
    device = f"{os.major(lock.st_dev):02x}:{os.minor(lock.st_dev):02x}:{lock.st_ino}"
    return device in held
