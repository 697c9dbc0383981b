"""Read what a facility answers: the line of the probe, the words of commands and connectors."""

import re
from collections.abc import Sequence
from importlib import metadata

import msgspec

from crossfl.errors import CrossFLError
from crossfl.sites.check.findings import Finding
from crossfl.sites.check.probe import MARK, PACKAGES

SEE = "see the message"
"""The remedy where none is known."""


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """What the probe saw.

    `packages` has a version of each, `None` where it is not installed; `ranks` is `None` where
    there is no launcher.
    """

    host: str
    python: str
    packages: dict[str, str | None]
    absent: list[str]
    no_launcher: list[str] = []
    no_staging: list[str] = []
    ranks: int | None = None
    launch_failure: str | None = None
    gpus: int = 0


def observation_of(output: str) -> Observation | None:
    """What the probe saw, `None` where a job script did not get that far.

    Raises:
        CrossFLError: the line of the probe is malformed.
    """
    match = re.search(rf"^{MARK} (\{{.*\}})$", output, re.MULTILINE)
    if not match:
        return None
    try:
        return msgspec.json.decode(match[1], type=Observation)
    except (msgspec.DecodeError, ValueError) as error:
        raise CrossFLError(f"the answer of the probe is malformed: {error}") from None


def variable_of(output: str, name: str) -> str:
    """The value of a variable at the end of the job script, empty where it was not set."""
    match = re.search(rf"^{MARK}-{name} (.+)$", output, re.MULTILINE)
    return match[1] if match else ""


def compare_versions(observation: Observation) -> Finding:
    """What is installed at a facility against what is installed here: crossfl has to be equal."""
    ours = {name: metadata.version(name).partition("+")[0] for name in PACKAGES}
    versions = dict.fromkeys(PACKAGES) | observation.packages
    theirs = {name: (versions[name] or "none").partition("+")[0] for name in PACKAGES}
    result = f"python {observation.python}, " + ", ".join(f"{k} {v}" for k, v in theirs.items())
    others = [name for name in PACKAGES if theirs[name] != ours[name]]
    if not others:
        return Finding("pass", result)
    result += f"; here {', '.join(f'{name} {ours[name]}' for name in others)}"
    if "crossfl" in others:
        return Finding("fail", result, "install our version of crossfl there")
    missing = any(versions[name] is None for name in others)
    return Finding("fail" if missing else "warn", result, "install requirements.lock there")


def first_line(error: object) -> str:
    """The first line of a message, or the name of the error."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def last_line(text: str, words: Sequence[str]) -> str:
    """The last line with one of the words, else the last line."""
    lines = text.strip().splitlines() or [""]
    return next((x for x in reversed(lines) if any(word in x for word in words)), lines[-1])


def failure_of(error: Exception) -> Finding:
    """A connector's message: what is wrong, and then what to do."""
    problem, _, remedy = str(error).partition(". ")
    return Finding("fail", problem.partition(", host ")[2] or first_line(problem), remedy or SEE)
