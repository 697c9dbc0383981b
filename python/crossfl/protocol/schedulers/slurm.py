"""Answers of `squeue`, `scontrol show job` and `sacct`.

A heterogeneous job has a leader, whose id is the one that was given, and components with ids of
their own, which the same command lists after it.
"""

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from crossfl.errors import CrossFLError

T = TypeVar("T")

LONGEST_ANSWER = 2**24
"""Characters of an answer about all jobs of a run."""

State = Annotated[str, Meta(pattern=r"\A[A-Z_]{1,40}\Z")]
Text = Annotated[str, Meta(max_length=2**16)]
ExitCode = Annotated[str, Meta(pattern=r"\A\d{1,5}:\d{1,3}\Z")]

QUEUE_FORMAT = "%i|%T|%r|%V|%S|%D|%M"
"""What `squeue` is asked for: id, state, reason, submission, start, nodes, time used."""
QUEUE_LINE = re.compile(
    r"^(\d+)(?:\+0)?\|([^|\n]*)\|(.*?)(?:\|([\w:.-]*)\|([\w:./-]*)\|(\d{0,9})\|([\d:-]*))?$",
    re.MULTILINE,
)
ELAPSED = re.compile(r"(?:(\d{1,5})-)?(?:(\d{1,3}):)?(\d{1,2}):(\d{2})")
FOLDER_LINE = re.compile(r"^(\d+)(?:\+0)?\|(/.*)$", re.MULTILINE)
RECORD = re.compile(r"^JobId=(\d+)\b", re.MULTILINE)
FIELD = re.compile(r"(?:^ *| )(\w+)=(.*?)(?= \w+=|$)")
WHOLE_LINE = re.compile(r"^ *(StdOut|WorkDir)=(.*)$")
"""Paths may have blanks, and stand on lines of their own."""
TIME = re.compile(r"^#SBATCH\s(?:.*\s)?(?:--time(?:=|\s+)|-t\s*)\"?([^\s\"]+)", re.MULTILINE)
DAYS = re.compile(r"(\d+)-(\d+(?::\d+){0,2})")
CLOCK = re.compile(r"\d+(?::\d+){0,2}")


class Entry(msgspec.Struct, frozen=True):
    """A job in the queue."""

    state: State
    reason: Text
    nodes: Annotated[int, Meta(ge=0, le=2**30)] = 0
    elapsed: float | None = None
    """Seconds that the job has run, as far as Slurm says."""
    expected_wait: float | None = None
    """Seconds from submission to the start that Slurm expects."""


class JobRecord(msgspec.Struct, frozen=True):
    """What is read of the controller's record of a job, by Slurm's names."""

    JobState: State
    ExitCode: ExitCode
    Reason: Text = ""
    StdOut: Text = ""
    WorkDir: Text = ""
    SubmitTime: Text = ""
    StartTime: Text = ""
    EndTime: Text = ""

    @property
    def exit_code(self) -> int:
        """What the batch script ended with."""
        return int(self.ExitCode.partition(":")[0])

    @property
    def signal(self) -> int:
        """What killed the batch script; 0 for none."""
        return int(self.ExitCode.partition(":")[2])


class Ending(msgspec.Struct, frozen=True):
    """How a job ended, by accounting."""

    state: State
    exit_code: Annotated[int, Meta(ge=0, le=2**16)]
    signal: Annotated[int, Meta(ge=0, le=999)]


def queue_of(answer: str) -> dict[str, Entry]:
    """The jobs that `squeue -o QUEUE_FORMAT` lists, by the ids that `sbatch` gave.

    What stands behind the reason may be missing.

    Raises:
        CrossFLError: it is too long, or a value is outside its limits.
    """
    _check(answer)
    return {
        job_id: _convert(
            {
                "state": state,
                "reason": reason,
                "nodes": nodes or "0",
                "elapsed": _elapsed(used) if state != "PENDING" else None,
                "expected_wait": _between(submitted, start) if state == "PENDING" else None,
            },
            Entry,
        )
        for job_id, state, reason, submitted, start, nodes, used in QUEUE_LINE.findall(answer)
    }


def _elapsed(clock: str) -> float | None:
    """Seconds in Slurm's `days-hours:minutes:seconds`, of which the first may be missing."""
    if not (parts := ELAPSED.fullmatch(clock)):
        return None
    days, hours, minutes, rest = (int(part or 0) for part in parts.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)


def _between(submitted: str, start: str) -> float | None:
    """Seconds between two dates of one clock; None where one of them is no date."""
    try:
        passed = datetime.fromisoformat(start) - datetime.fromisoformat(submitted)
    except (TypeError, ValueError):
        return None
    return max(0.0, passed.total_seconds())


def folders_of(answer: str) -> dict[str, str]:
    """The working folders of the jobs that `squeue -o '%i|%Z'` lists, by their ids.

    Raises:
        CrossFLError: it is too long.
    """
    _check(answer)
    return dict(FOLDER_LINE.findall(answer))


def record_of(answer: str, job_id: str) -> JobRecord | None:
    """The record of one job in what `scontrol show job` prints; None where it is not there.

    Raises:
        CrossFLError: it is too long, lacks a field, or a value is outside its limits.
    """
    _check(answer)
    _, *parts = RECORD.split(answer)
    for number, text in zip(parts[::2], parts[1::2], strict=True):
        if number != job_id:
            continue
        fields: dict[str, str] = {}
        for line in text.splitlines()[1:]:  # the first has the job's name, which may be anything
            whole = WHOLE_LINE.match(line)
            for name, value in [whole.groups()] if whole else FIELD.findall(line):
                fields.setdefault(name, value)
        return _convert(fields, JobRecord)
    return None


def ending_of(answer: str, job_id: str) -> Ending | None:
    """The last ending of a job in what `sacct -n -P -o JobID,State,ExitCode` prints.

    A controller that lost its state gives ids again: the last line is the last job's.

    Raises:
        CrossFLError: it is too long, or a value is outside its limits.
    """
    _check(answer)
    line = re.compile(rf"^{re.escape(job_id)}(?:\+0)?\|(\w+)[^|]*\|(\d+):(\d+)")
    for match in filter(None, map(line.match, reversed(answer.splitlines()))):
        # "CANCELLED by 1000" is one of its ways to say CANCELLED.
        names = ("state", "exit_code", "signal")
        return _convert(dict(zip(names, match.groups(), strict=True)), Ending)
    return None


def _check(answer: str) -> None:
    if len(answer) > LONGEST_ANSWER:
        raise CrossFLError(f"an answer of {len(answer)} characters: at most {LONGEST_ANSWER}")


def _convert(fields: Mapping[str, Any], kind: type[T]) -> T:
    try:
        return msgspec.convert(fields, kind, strict=False)
    except msgspec.ValidationError as error:
        raise CrossFLError(f"an answer unlike Slurm's: {str(error)[:200]}") from None


def limit_in(script: str) -> str | None:
    """The time limit that the directives of a job script ask for; None if they do not."""
    found = TIME.search(script)
    return found[1] if found else None


def seconds(limit: str) -> int:
    """Seconds of a time limit, in any of the six forms that `sbatch --time` takes.

    Raises:
        ValueError: it is no such limit, or it is infinite.
    """
    if found := DAYS.fullmatch(limit):
        hours, minutes, rest = [*map(int, found[2].split(":")), 0, 0][:3]
        return ((24 * int(found[1]) + hours) * 60 + minutes) * 60 + rest
    if not CLOCK.fullmatch(limit):
        raise ValueError(f"{limit!r} is no time limit of Slurm")
    match [int(part) for part in limit.split(":")]:
        case [hours, minutes, rest]:
            return (hours * 60 + minutes) * 60 + rest
        case [minutes, rest]:
            return minutes * 60 + rest
        case [minutes]:
            return minutes * 60
    raise AssertionError(limit)
