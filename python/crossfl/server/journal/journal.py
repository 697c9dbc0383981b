"""The journal: each finished round, published whole on the VM, so that a run that ends goes on.

    <journal>/lock                     held by the run that is going on
    <journal>/<run>/run.json           format, configuration, whether it is finished
    <journal>/<run>/<round>/           global_model/ and state/, as the round left them

`CROSSFL_JOURNAL` names the directory, one for each federation; without it there is none. A round
appears under its name by one rename, after all of it is on the disk. Round 0 is the model that the
federation starts from; a round below its quorum is published with the number of the wait.
"""

import contextlib
import json
import os
import re
import secrets
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
from crossfl.protocol.layout import GLOBAL_MODEL, RUN, STATE
from crossfl.protocol.manifest import ModelManifest, StateManifest
from crossfl.protocol.records import Retention
from crossfl.protocol.variables import JOURNAL
from crossfl.server import state as server_state
from crossfl.storage import manifest
from crossfl.storage.files import link_tree, publish, write_bytes

FORMAT = 2
LARGEST_RUN = 16 << 20
"""Bytes of the description of a run; more is refused unread."""
TRAINING = "training"
"""What a configuration gains when the first round is planned."""
ROUND = re.compile(r"(\d{6})(-\d{6})?")
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
                f"{file} cannot be read: remove the run with 'crossfl runs rm {path.name}' "
                f"({error})"
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
            link_tree(model, partial / GLOBAL_MODEL)
            link_tree(state, partial / STATE)
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
    """The runs in a journal, oldest first."""
    if not journal.is_dir():
        return []
    return [Run.load(p) for p in sorted(journal.iterdir()) if p.is_dir() and p.name[:1] != "."]


def find(journal: Path, configuration: Mapping[str, Any]) -> Run | None:
    """The run of this configuration that is not finished, if there is one.

    Raises:
        CrossFLError: there is one of another configuration, and it was not said that it may change.
    """
    unfinished = [run for run in runs(journal) if not run.description.finished]
    if not unfinished:
        return None
    run = unfinished[-1]
    known = {key: value for key, value in run.description.configuration.items() if key != TRAINING}
    if run.description.unlocked:
        run = Run(run.path, Description(configuration=dict(configuration)))
        run.save()
    elif known != configuration:
        raise _changed(run, known, configuration)
    return run


def check_training(path: Path, training: Mapping[str, Any]) -> None:
    """Check that the facilities train as in the rounds before, or take note of how they do.

    Raises:
        CrossFLError: they do not.
    """
    run = Run.load(path)
    configuration = run.description.configuration
    known = configuration.get(TRAINING)
    if known is None:
        run.save(configuration={**configuration, TRAINING: dict(training)})
    elif known != training:
        raise _changed(run, {TRAINING: known}, {TRAINING: training})


def _changed(run: Run, known: Mapping[str, Any], wanted: Mapping[str, Any]) -> CrossFLError:
    changes = "\n  ".join(differences(known, wanted))
    return CrossFLError(
        f"the configuration is not that of the run {run.path}, which is not finished:\n"
        f"  {changes}\nTake the changes back; or 'crossfl runs unlock {run.path.name}' to go on "
        f"with them; or 'crossfl runs rm {run.path.name}' to begin anew"
    )


def differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """What differs between two configurations, one line for each value."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*old, *new}):
            where = f"{name}.{key}" if name else key
            yield from differences(old.get(key), new.get(key), where)
    elif old != new:
        yield f"{name}: {json.dumps(old)} → {json.dumps(new)}"


def begin(journal: Path, configuration: Mapping[str, Any]) -> Run:
    """Begin a run.

    Raises:
        CrossFLError: the journal cannot be written.
    """
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S")
    description = Description(configuration=dict(configuration))
    run = Run(journal / f"{stamp}-{secrets.token_hex(2)}", description)
    with _written(journal):
        run.path.mkdir(parents=True)
    run.save()
    return run


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
            f"{needed / 1e6:.1f} MB. Free some ('crossfl runs rm'); the same command then goes on"
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
