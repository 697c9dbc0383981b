"""Answers of `qstat -f`, as JSON or as text.

Version 23.06 of the client writes JSON that is none where a variable of a job has a value like
`nan`, `005` or `it's`; its text can always be read.
"""

import re
from datetime import datetime
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from crossfl.errors import CrossFLError

LONGEST_ANSWER = 2**24
"""Characters of an answer about all jobs of a run; each job lists its environment."""

Text = Annotated[str, Meta(max_length=2**16)]
Words = Text | Annotated[float, Meta(ge=-1e18, le=1e18)]
"""Free text, which JSON has as a number where it looks like one."""
ExitStatus = Annotated[int, Meta(ge=-(2**15), le=2**16)]

JOB = re.compile(r"^Job Id: *(\S+) *$", re.MULTILINE)
WALLTIME = re.compile(r"^#PBS\s(?:.*\s)?-l\s*(?:\S*,)?walltime=([^\s,]+)", re.MULTILINE)
FIELD = re.compile(r"^    (\w+)(?:\.(\w+))? = (.*)$", re.MULTILINE)


class Resources(msgspec.Struct, frozen=True):
    """What a job was given, or has used."""

    walltime: Annotated[str, Meta(pattern=r"\A(\d{1,9}(:\d{1,2}){0,2})?\Z")] = ""
    nodect: Annotated[int, Meta(ge=0, le=2**30)] = 0


class Estimate(msgspec.Struct, frozen=True):
    """When the server expects a job to start."""

    start_time: Words = ""


class Job(msgspec.Struct, frozen=True):
    """What is read of one job, by PBS's names."""

    job_state: Annotated[str, Meta(pattern=r"\A[A-Z]\Z")]
    Exit_status: ExitStatus | None = None
    substate: Annotated[int, Meta(ge=0, le=999)] = 0
    comment: Words = ""
    Hold_Types: Words = ""
    Output_Path: Text = ""
    ctime: Text = ""
    stime: Text = ""
    resources_used: Resources = Resources()
    Resource_List: Resources = Resources()
    estimated: Estimate = Estimate()

    @property
    def nodes(self) -> int:
        """Nodes that it was given, or asks for."""
        return self.Resource_List.nodect

    @property
    def elapsed(self) -> float | None:
        """Seconds that it has run; None where the server does not say."""
        return float(seconds(used)) if (used := self.resources_used.walltime) else None

    @property
    def expected_wait(self) -> float | None:
        """Seconds from its submission to the start that the server expects, by its own clock."""
        submitted, start = date(self.ctime), date(str(self.estimated.start_time))
        if submitted is None or start is None:
            return None
        return max(0.0, (start - submitted).total_seconds())


class Answer(msgspec.Struct, frozen=True):
    """What is read of the JSON document; without a job that it knows, it has no `Jobs`."""

    Jobs: dict[str, Job] = {}


def jobs_of(answer: str) -> dict[str, Job]:
    """The jobs of an answer, JSON or text, by their ids; what else the command printed is skipped.

    Raises:
        CrossFLError: it is too long, its JSON is none, or a value is outside its limits. The
            message quotes nothing but the value that is.
    """
    if len(answer) > LONGEST_ANSWER:
        raise CrossFLError(f"an answer of {len(answer)} characters: at most {LONGEST_ANSWER}")
    document = re.search(r"^\{.*^\}", answer, re.MULTILINE | re.DOTALL)
    try:
        if document:
            # Numbers may come as words.
            return msgspec.json.decode(document[0], type=Answer, strict=False).Jobs
        if JOB.search(answer):
            return msgspec.convert(_from_text(answer), dict[str, Job], strict=False)
    except msgspec.ValidationError as error:
        raise CrossFLError(f"an answer unlike PBS's: {str(error)[:200]}") from None
    except (msgspec.DecodeError, RecursionError, ValueError):
        raise CrossFLError("an answer that is no valid JSON") from None
    if "{" in answer:
        raise CrossFLError("an answer that is no whole JSON")
    return {}


def _from_text(answer: str) -> dict[str, dict[str, Any]]:
    """The fields of each job; a long value goes on in lines that begin with a tab."""
    _, *parts = JOB.split(answer.replace("\n\t", ""))
    jobs: dict[str, dict[str, Any]] = {}
    for job_id, text in zip(parts[::2], parts[1::2], strict=True):
        fields: dict[str, Any] = {}
        for name, resource, value in FIELD.findall(text):
            if not resource:
                fields.setdefault(name, value)
            elif isinstance(inner := fields.setdefault(name, {}), dict):
                inner.setdefault(resource, value)
        jobs[job_id] = fields
    return jobs


def date(text: str) -> datetime | None:
    """A date as PBS writes it, like `date`; None for any other word."""
    try:
        return datetime.strptime(text, "%a %b %d %H:%M:%S %Y")
    except ValueError:
        return None


def seconds(clock: str) -> int:
    """Seconds in PBS's `hours:minutes:seconds`, of which the first may be missing.

    Raises:
        ValueError: it is no such clock.
    """
    total = 0
    for part in clock.split(":"):
        total = 60 * total + int(part)
    return total


def limit_in(script: str) -> str | None:
    """The walltime that the directives of a job script ask for; None if they do not."""
    found = WALLTIME.search(script)
    return found[1] if found else None
