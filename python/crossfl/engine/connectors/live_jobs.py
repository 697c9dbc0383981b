"""What is reported of batch jobs: each change that the scheduler tells, and how far jobs are."""

from __future__ import annotations

import contextlib
import shlex
import time
from dataclasses import dataclass

from crossfl.engine.connectors.reports import JobReport
from crossfl.engine.live import report
from crossfl.errors import CrossFLError
from crossfl.protocol import events
from crossfl.protocol.text import printable

TAIL = 2048
"""Bytes that are read of the end of a job's own events."""
MOST_READ = 64 << 10
"""Bytes of an answer with the ends of such files that are looked at."""
SHIFT = 60.0
"""Seconds by which an expected start has to move to be worth a report."""


@dataclass
class _Shown:
    """What was last reported of a job."""

    phase: str
    message: str = ""
    expected: float | None = None
    since: float = 0.0
    nodes: int = 1


class LiveJobs:
    """Reports the jobs of one deployment: each change, once.

    Args:
        facility: name of the deployment.
    """

    def __init__(self, facility: str) -> None:
        self._facility = facility
        self._shown: dict[str, _Shown] = {}
        self._unreachable = False
        self._said: dict[str, tuple[str, int | None]] = {}

    def see(self, job_id: str, job_name: str | None, job: JobReport, waited: float = 0.0) -> None:
        """Take note of what the scheduler says of a job.

        Args:
            job_id: the scheduler's id.
            job_name: the engine's name.
            job: the scheduler's word.
            waited: seconds that the job has waited, as far as it waits.
        """
        with contextlib.suppress(Exception):
            now, last = time.time(), self._shown.get(job_id)
            self._unreachable = False
            if job.over:
                self._end(job_id, job_name, job, now)
                return
            if job.pending:
                since = last.since if last and last.phase == events.QUEUED else now - waited
                wait = job.expected_wait
                expected = None if wait is None else max(now, since + wait)
                shown = _Shown(events.QUEUED, _reason(job), expected, since, job.nodes)
            else:
                begun = now if job.elapsed is None else now - job.elapsed
                since = last.since if last and last.phase == events.RUNNING else begun
                message = "" if job.state == "RUNNING" else job.state.lower()
                shown = _Shown(events.RUNNING, message, None, since, max(1, job.nodes))
            if last is None or _differs(last, shown):
                self._shown[job_id] = shown
                facts = {"message": shown.message or None, "expected": shown.expected}
                facts |= {"job": job_id[:200], "since": shown.since, "nodes": shown.nodes or None}
                report(self._facility, shown.phase, job_name=job_name, **facts)

    def cannot_see(self, message: str) -> None:
        """Report, once, that the scheduler cannot be asked."""
        if not self._unreachable:
            self._unreachable = True
            report(self._facility, events.UNREACHABLE, message=message)

    def say(self, job_id: str, job_name: str | None, content: bytes) -> None:
        """Report how far a job is, from the end of its own events; what is odd is left out.

        Only counts, loss and speed are taken: whose event it is, is not for the job to say.
        """
        with contextlib.suppress(Exception):
            for line in reversed(content.split(b"\n")):
                with contextlib.suppress(CrossFLError):
                    event = events.decode_line(line)
                    facts = {
                        "step": event.step,
                        "steps": event.steps,
                        "loss": event.loss,
                        "tokens_per_second": event.tokens_per_second,
                        "job": job_id[:200],
                    }
                    said = event.phase, event.step
                    if event.phase in (events.TRAIN, "load") and self._said.get(job_id) != said:
                        self._said[job_id] = said
                        report(self._facility, event.phase, job_name=job_name, **facts)
                    return

    def _end(self, job_id: str, job_name: str | None, job: JobReport, now: float) -> None:
        last, _ = self._shown.pop(job_id, None), self._said.pop(job_id, None)
        ran = last is not None and last.phase == events.RUNNING
        report(
            self._facility,
            events.ENDED,
            job_name=job_name,
            job=job_id[:200],
            nodes=(last.nodes if last and ran else job.nodes) or 1,
            seconds=now - last.since if last and ran else job.elapsed,
            message=None if job.state == "COMPLETED" else printable(job.ending, longest=300),
            log=job.log[:4096] or None,
        )


def _reason(job: JobReport) -> str:
    reason = "" if job.reason == "None" else job.reason
    return printable(reason, longest=300)


def _differs(old: _Shown, new: _Shown) -> bool:
    moved = (old.expected is None) is not (new.expected is None)
    if old.expected is not None and new.expected is not None:
        moved = abs(old.expected - new.expected) >= SHIFT
    return moved or (old.phase, old.message, old.nodes) != (new.phase, new.message, new.nodes)


def tails(files: dict[str, str], mark: str) -> str:
    """A script that prints the ends of files, each behind a mark with its key.

    Args:
        files: path by key; a key is a job's id.
        mark: a word that no file has.
    """
    parts = [
        f"echo; echo {mark} {shlex.quote(key)}; tail -c {TAIL} -- {shlex.quote(path)} 2>/dev/null"
        for key, path in files.items()
    ]
    return "\n".join(parts)


def parts_of(answer: str, mark: str) -> dict[str, bytes]:
    """The ends of files in what `tails` prints, by key."""
    found: dict[str, bytes] = {}
    for part in answer[:MOST_READ].split(f"{mark} ")[1:]:
        key, _, content = part.partition("\n")
        found[key.strip("'\" \r")] = content.encode("utf-8", "replace")
    return found
