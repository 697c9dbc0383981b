"""The journal: each finished round, published whole on the VM, so that a run that ends goes on.

    <journal>/lock                     held by the run that is going on
    <journal>/<run>/run.json           format, configuration, whether it is finished
    <journal>/<run>/<round>/           global_model/ and state/, as the round left them

`CROSSFL_JOURNAL` names the directory, one for each federation; without it there is none. A run
appears under its name by one rename, with its round 0, the model that the federation starts from;
and so does each later round, after all of it is on the disk. A round below its quorum is published
with the number of the wait. A folder without `run.json` is no run.
"""

import contextlib
import os
import re
import secrets
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from crossfl import __version__
from crossfl.errors import CrossFLError
from crossfl.protocol import decoding
from crossfl.protocol.fields import Record
from crossfl.protocol.layout import GLOBAL_MODEL, HELD_UPDATES, RUN, STATE
from crossfl.protocol.manifest import ModelManifest, StateManifest
from crossfl.protocol.records import Retention
from crossfl.protocol.variables import JOURNAL
from crossfl.server import state as server_state
from crossfl.server.journal.configuration import TRAINING, differences, is_fixed
from crossfl.storage import manifest
from crossfl.storage.files import link_tree, publish, write_bytes

FORMAT = 2
LARGEST_RUN = 16 << 20
"""Bytes of the description of a run; more is refused unread."""
ROUND = re.compile(r"(\d{6})(-\d{6})?")
BEGINNING = re.compile(r"000000(-\d{6})?")
"""A round in which nothing is finished yet."""
SPARE = 2
"""A round is begun where this many of what the last one took are free."""


def here() -> Path | None:
    """The journal of this federation, if it has one."""
    path = os.environ.get(JOURNAL)
    return Path(path) if path else None


class Description(Record, frozen=True, kw_only=True):
    """What a run is known by, as the journal keeps it."""

    format: int = FORMAT
    version: str = __version__
    """Of the crossfl that wrote it."""
    configuration: dict[str, Any]
    finished: bool = False
    unlocked: bool = False
    """Whether what follows may have another configuration."""


class _Format(msgspec.Struct):
    format: int


@dataclass(frozen=True)
class Run:
    """One run of a federation: from its first round on, however often it is interrupted."""

    path: Path
    description: Description

    @classmethod
    def load(cls, path: Path) -> "Run":
        """Read the description of a run.

        Raises:
            CrossFLError: it cannot be read, or a newer crossfl wrote it.
        """
        file = path / RUN
        try:
            content = file.read_bytes()
            version = decoding.decode(content, _Format, str(file), LARGEST_RUN).format
            if version == FORMAT:
                return cls(path, decoding.decode(content, Description, str(file), LARGEST_RUN))
        except (OSError, CrossFLError) as error:
            raise CrossFLError(
                f"{file} cannot be read: remove the run with {_command('rm', path)} ({error})"
            ) from None
        raise CrossFLError(
            f"{file} has format {version}, this crossfl {__version__} reads format {FORMAT}: go on "
            "with the crossfl that wrote it, or name another journal"
        )

    def save(self, **changes: Any) -> None:
        """Write the description, whole or not at all."""
        description = self.description.replace(version=__version__, **changes)
        with _written(self.path):
            write_bytes(self.path / RUN, decoding.encode(description), sync=True)

    def go_on(self, configuration: Mapping[str, Any]) -> None:
        """Take note of what the run goes on with, if it was unlocked."""
        if self.description.unlocked:
            self.save(configuration=dict(configuration), unlocked=False)

    @property
    def is_empty(self) -> bool:
        """Whether nothing is in it that a facility delivered: no finished round, no update."""
        return all(
            BEGINNING.fullmatch(path.name) and not (path / STATE / HELD_UPDATES).is_dir()
            for path in self.path.glob("[!.]*")
            if path.is_dir()
        )

    def rounds(self) -> list[Path]:
        """Its published rounds, in order."""
        return sorted(p for p in self.path.iterdir() if ROUND.fullmatch(p.name))

    def last(self) -> Path | None:
        """The last round that is as it was published; one that is not is set aside, and said."""
        for path in self.path.glob(".*"):
            shutil.rmtree(path, ignore_errors=True)  # what a killed step was about to publish
        for path in reversed(self.rounds()):
            try:
                model = manifest.verify(path / GLOBAL_MODEL, ModelManifest).digest
                manifest.verify(path / STATE, StateManifest)
                if server_state.load(path / STATE).model == model:
                    return path
                raise CrossFLError(f"{path}: its model is not that of its state")
            except CrossFLError as error:
                with _written(path):
                    aside = path.with_name(f"{path.name}.damaged-{secrets.token_hex(2)}")
                    path.rename(aside)
                print(f"set aside a damaged round, as {aside.name}: {error}", file=sys.stderr)
        return None

    def publish(self, model: Path, state: Path, retention: Retention) -> None:
        """Add a round, and remove those that are not to be kept.

        Raises:
            CrossFLError: it cannot be written, or another run has published this round.
        """
        server = server_state.load(state)
        wait = f"-{server.waits:06}" if server.waits else ""
        path = self.path / f"{server.round:06}{wait}"
        if path.exists():
            if server_state.load(path / STATE).model == server.model:
                return  # by a step whose engine was killed
            raise CrossFLError(f"{path} is there already: another run of this federation goes on")
        with _written(path), publish(path) as partial:
            _link_round(model, state, partial)
        self._thin(retention)

    def _thin(self, retention: Retention) -> None:
        rounds = self.rounds()
        finished = [path for path in rounds if "-" not in path.name]
        keep = {*finished[-retention.keep_last :], rounds[-1]}
        every = retention.keep_every
        keep |= {path for path in finished if every and int(path.name) % every == 0}
        state = server_state.load(rounds[-1] / STATE)
        best = {number for number, _ in state.best[: retention.keep_best]}
        keep |= {path for path in finished if int(path.name) in best}
        for path in set(rounds) - keep:
            # Under another name first: a round that is half removed is none.
            gone = path.with_name(f".{path.name}.removed")
            path.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)


def runs(journal: Path) -> list[Run]:
    """The runs in a journal, oldest first.

    Raises:
        CrossFLError: the description of one cannot be read.
    """
    return [Run.load(path) for path in folders(journal)]


def folders(journal: Path) -> list[Path]:
    """The folders of the runs in a journal, oldest first; what holds no description is no run."""
    return sorted(path.parent for path in journal.glob(f"[!.]*/{RUN}"))


def find(journal: Path, configuration: Mapping[str, Any]) -> Run | None:
    """The run that goes on with this configuration; None where a new one is to begin.

    Nothing is changed: `Run.go_on` and `begin` are for when it does.

    Raises:
        CrossFLError: a run with finished rounds has another configuration, and was not unlocked;
            or what differs cannot change in a run that goes on.
    """
    unfinished = [run for run in runs(journal) if not run.description.finished]
    if not unfinished:
        return None
    run = unfinished[-1]
    known = {key: value for key, value in run.description.configuration.items() if key != TRAINING}
    changes = differences(known, configuration)
    if changes and run.is_empty:
        return None
    if run.description.unlocked:
        changes = {name: change for name, change in changes.items() if is_fixed(name)}
    if changes:
        raise _changed(run, changes)
    return run


def check_training(path: Path, training: Mapping[str, Any]) -> Mapping[str, str]:
    """Check that the facilities train as in the rounds before, or take note of how they do.

    Returns:
        What has changed in a run in which nothing was finished.

    Raises:
        CrossFLError: they train otherwise.
    """
    run = Run.load(path)
    configuration = run.description.configuration
    known = configuration.get(TRAINING)
    changes = differences({TRAINING: known}, {TRAINING: training}) if known else {}
    if changes and not run.is_empty:
        raise _changed(run, changes)
    if changes or known is None:
        run.save(configuration={**configuration, TRAINING: dict(training)})
    return changes


def _changed(run: Run, changes: Mapping[str, str]) -> CrossFLError:
    listing = "\n  ".join(f"{name}: {change}" for name, change in changes.items())
    anew = f"{_command('rm', run.path)} to begin anew"
    if any(is_fixed(name) for name in changes):
        return CrossFLError(
            f"the run {run.path}, which is not finished, cannot go on with:\n  {listing}\n"
            f"Its rounds were made otherwise. Take the changes back; or {anew}"
        )
    return CrossFLError(
        f"the configuration is not that of the run {run.path}, which is not finished:\n"
        f"  {listing}\nTake the changes back; or {_command('unlock', run.path)} to go on with "
        f"them; or {anew}"
    )


def _command(action: str, run: Path) -> str:
    """The command that does something to a run, as a message names it."""
    words = ("crossfl", "runs", action, run.name, "--journal", str(run.parent.resolve()))
    return f"'{shlex.join(words)}'"


def new_name() -> str:
    """A name for a run: the time, and what tells it from another of the same second."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}-{secrets.token_hex(2)}"


def begin(
    journal: Path, name: str, configuration: Mapping[str, Any], model: Path, state: Path
) -> list[Path]:
    """Begin a run with its round 0, whole or not at all.

    It takes the place of runs in which nothing was finished.

    Returns:
        The runs that it replaced.

    Raises:
        CrossFLError: the journal cannot be written.
    """
    description = Description(configuration=dict(configuration))
    before = [r.path for r in runs(journal) if not r.description.finished and r.is_empty]
    with _written(journal):
        for path in journal.glob(".*.partial-*"):
            shutil.rmtree(path, ignore_errors=True)  # of a step that was killed
        with publish(journal / name) as partial:
            (partial / RUN).write_bytes(decoding.encode(description))
            _link_round(model, state, partial / f"{0:06}")
        for path in before:
            shutil.rmtree(path)
    return before


def _link_round(model: Path, state: Path, folder: Path) -> None:
    link_tree(model, folder / GLOBAL_MODEL)
    link_tree(state, folder / STATE)


def check_space(journal: Path, state: Path) -> None:
    """Check that there is room for another round, before it is begun.

    Raises:
        CrossFLError: there is not.
    """
    # The model is no larger than its fp32 master, which the state holds.
    needed = SPARE * sum(p.stat().st_size for p in state.rglob("*") if p.is_file())
    free = shutil.disk_usage(journal).free
    if free < needed:
        raise CrossFLError(
            f"low disk: {journal} has {free / 1e6:.1f} MB free, a round may need "
            f"{needed / 1e6:.1f} MB. Free some; the same command then goes on"
        )


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CrossFLError(
            f"the journal cannot be written: {path}: {error.strerror}. What was published before "
            "is as it was; once this is put right, the same command goes on"
        ) from None
