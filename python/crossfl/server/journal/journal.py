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

from crossfl import __version__
from crossfl.errors import CrossFLError
from crossfl.protocol.records import Retention
from crossfl.server.state import ServerState
from crossfl.storage import files, manifest

VARIABLE = "CROSSFL_JOURNAL"
JOURNALS = ".crossfl"
"""The folder beside a StreamFlow file where its journal lies, unless told otherwise."""
FORMAT = 1
RUN = "run.json"
TRAINING = "training"
"""What a configuration gains when the first round is planned."""
MODEL, STATE = "global_model", "state"
ROUND = re.compile(r"(\d{6})(-\d{6})?")
SPARE = 2
"""A round is begun where this many of what the last one took are free."""


def here() -> Path | None:
    """The journal of this federation, if it has one."""
    path = os.environ.get(VARIABLE)
    return Path(path) if path else None


@dataclass(frozen=True)
class Run:
    """One run of a federation: from its first round on, however often it is interrupted."""

    path: Path
    configuration: dict[str, Any]
    finished: bool = False
    forked: bool = False
    """Whether what follows may have another configuration."""

    @classmethod
    def load(cls, path: Path) -> "Run":
        """Read the description of a run.

        Raises:
            CrossFLError: it cannot be read, or a newer crossfl wrote it.
        """
        file = path / RUN
        try:
            values = json.loads(file.read_text())
            version, configuration = values["format"], values["configuration"]
        except (OSError, ValueError, KeyError, TypeError):
            raise CrossFLError(
                f"{file} cannot be read: remove the run with 'crossfl runs rm {path.name}'"
            ) from None
        if version != FORMAT:
            raise CrossFLError(
                f"{file} has format {version}, this crossfl {__version__} reads format {FORMAT}: "
                "go on with the crossfl that wrote it, or name another journal"
            )
        flags = {key: bool(values.get(key)) for key in ("finished", "forked")}
        return cls(path, configuration, **flags)

    def save(self, **changes: bool) -> None:
        """Write the description, whole or not at all."""
        flags = {"finished": self.finished, "forked": self.forked} | changes
        document = {"format": FORMAT, "version": __version__, **flags}
        with _written(self.path):
            files.write_json(
                self.path / RUN, {**document, "configuration": self.configuration}, sync=True
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
                model = manifest.verify(path / MODEL, "model")["digest"]
                manifest.verify(path / STATE, "state")
                if ServerState.load(path / STATE).model == model:
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
        server = ServerState.load(state)
        wait = f"-{server.waits:06}" if server.waits else ""
        path = self.path / f"{server.round:06}{wait}"
        if path.exists():
            if ServerState.load(path / STATE).model == server.model:
                return  # by a step whose engine was killed
            raise CrossFLError(f"{path} is there already: another run of this federation goes on")
        with _written(path), manifest.publish(path) as partial:
            files.link_tree(model, partial / MODEL)
            files.link_tree(state, partial / STATE)
        self._thin(retention)

    def _thin(self, retention: Retention) -> None:
        rounds = self.rounds()
        finished = [path for path in rounds if "-" not in path.name]
        keep = {*finished[-retention.keep_last :], rounds[-1]}
        every = retention.keep_every
        keep |= {path for path in finished if every and int(path.name) % every == 0}
        history = ServerState.load(rounds[-1] / STATE).history
        # The loss in a round's history is that of the model before it.
        losses = {
            entry["round"] - 1: entry["loss"] for entry in history if entry["loss"] is not None
        }
        best = sorted(losses, key=lambda number: (losses[number], number))[: retention.keep_best]
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
    unfinished = [run for run in runs(journal) if not run.finished]
    if not unfinished:
        return None
    run = unfinished[-1]
    known = {key: value for key, value in run.configuration.items() if key != TRAINING}
    if run.forked:
        run = Run(run.path, dict(configuration))
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
    known = run.configuration.get(TRAINING)
    if known is None:
        Run(run.path, {**run.configuration, TRAINING: dict(training)}).save()
    elif known != training:
        raise _changed(run, {TRAINING: known}, {TRAINING: training})


def _changed(run: Run, known: Mapping[str, Any], wanted: Mapping[str, Any]) -> CrossFLError:
    changes = "\n  ".join(differences(known, wanted))
    return CrossFLError(
        f"the configuration is not that of the run {run.path}, which is not finished:\n"
        f"  {changes}\nTake the changes back; or 'crossfl runs fork {run.path.name}' to go on "
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
    run = Run(journal / f"{stamp}-{secrets.token_hex(2)}", dict(configuration))
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
