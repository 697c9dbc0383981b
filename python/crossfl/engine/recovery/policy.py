"""What a run remembers about the failures of its facilities, and the decisions that follow.

A job is retried as often as its task allows. After its last attempt its facility is absent from
the round, and a stand-in on the aggregation VM does the job. Nothing in this module imports the
engine.
"""

from collections import defaultdict
from dataclasses import dataclass, field

from crossfl.engine.recovery.closing import LateError, Rounds, Stage, Turn

MAX_REASON = 500
"""Characters of a reason: it travels in an environment variable and ends in a table."""
JOB_FAILED = "FAILED Job"
"""The start of an engine's message that goes on with what the job printed."""


class HopelessError(Exception):
    """What every further attempt of the same job would meet again."""


@dataclass(frozen=True, kw_only=True)
class FacilityJob:
    """What the task of a job says about the job.

    Attributes:
        name: the engine's name of the job, for example `/federate/train/0.1.0`.
        facility: the facility that the job belongs to.
        attempts: how often the job may be tried at its facility.
        queue_timeout: seconds that the job may wait in its queue; None leaves it to the deployment.
        walltime_seconds: walltime to ask for; None leaves it to the job template.
        turn: what the round asks of the facility.
        round: the round that it belongs to; None where that is not told.
    """

    name: str
    facility: str
    attempts: int = 1
    queue_timeout: int | None = None
    walltime_seconds: int | None = None
    turn: Turn | None = None
    round: int | None = None


@dataclass
class JobRecord:
    """What has happened to a job so far.

    Attributes:
        reasons: why each failed attempt failed, in order.
        hopeless: whether further attempts are pointless, however many the task allows.
        absence: why its facility is absent, once the stand-in does the job.
        late: how far the job was when its round closed without it.
        job: what the task of the job says, once that was noted.
        verdict: what the scheduler said about the attempt that has just ended.
    """

    reasons: list[str] = field(default_factory=list)
    hopeless: bool = False
    absence: str | None = None
    late: str | None = None
    job: FacilityJob | None = None
    verdict: str | None = None


class RecoveryPolicy:
    """Decides whether a job is tried again at its facility, from how its attempts have ended."""

    def __init__(self) -> None:
        self.rounds = Rounds()
        self._records: defaultdict[str, JobRecord] = defaultdict(JobRecord)
        self._down: set[str] = set()

    def note_task(self, job: FacilityJob) -> None:
        """Remember what a job's connector needs to know, which sees the name of the job only."""
        self._records[job.name].job = job
        if job.turn:
            self.rounds.enter(job.turn)

    def note_verdict(self, job_name: str, message: str) -> None:
        """Remember the scheduler's word on an attempt; it becomes the reason if that attempt fails.

        The engine itself passes on an exit code, and no message.
        """
        self._records[job_name].verdict = message

    def fail(self, job: FacilityJob, error: BaseException) -> None:
        """Count a failed attempt, the last one if the error is hopeless.

        Its facility is down until a job there succeeds at once.
        """
        record = self._records[job.name]
        reason = record.verdict or describe(error)
        record.verdict = None
        record.reasons.append(" ".join(reason.split())[:MAX_REASON])
        record.hopeless |= isinstance(error, HopelessError)
        self._down.add(job.facility)

    def note_late(self, job: FacilityJob, error: LateError) -> None:
        """Remember that a round has closed without a job, which goes on at its facility."""
        self._records[job.name].late = " ".join(str(error).split())[:MAX_REASON]

    def give_up(self, job: FacilityJob, error: BaseException) -> None:
        """Count a failed attempt after which another one is pointless."""
        self.fail(job, error)
        self._records[job.name].hopeless = True

    def succeed(self, job: FacilityJob) -> None:
        """Take note of a success; a facility where the first attempt succeeds is no longer down."""
        record = self._records[job.name]
        if record.absence is None and job.turn:
            self.rounds.deliver(job.turn)
        if not record.reasons:
            self._down.discard(job.facility)

    def is_exhausted(self, job: FacilityJob) -> bool:
        """Whether no attempt at the facility is left."""
        record = self._records[job.name]
        return record.hopeless or record.late is not None or len(record.reasons) >= job.attempts

    def is_down(self, facility: str) -> bool:
        """Whether the last attempt at a facility failed."""
        return facility in self._down

    def is_suspect(self, job_name: str) -> bool:
        """Whether the last attempt at the facility of a job failed, of this job or another."""
        job = self._records[job_name].job
        return job is not None and self.is_down(job.facility)

    def declare_absent(self, job: FacilityJob) -> str:
        """Decide that the stand-in does a job; the reason that it has to give.

        Raises:
            ValueError: no attempt of the job has failed.
        """
        record = self._records[job.name]
        if record.late is not None:
            record.absence = record.late
            return record.absence
        if not record.reasons:
            raise ValueError(f"{job.name} has not failed, so {job.facility} is not absent from it")
        if job.turn:
            self.rounds.note(job.turn, Stage.ABSENT)
        count = len(record.reasons)
        record.absence = record.reasons[-1] + (f" (attempt {count})" if count > 1 else "")
        return record.absence

    def absence(self, job_name: str) -> str | None:
        """Why the facility is absent from a job; None where the facility does the job itself."""
        return self._records[job_name].absence

    def is_late(self, job_name: str) -> bool:
        """Whether a job that the stand-in does goes on at its facility."""
        return self._records[job_name].late is not None

    def turn(self, job_name: str) -> Turn | None:
        """What the round asks of the facility of a job; None where its task was not noted."""
        job = self._records[job_name].job
        return job.turn if job else None

    def round_of(self, job_name: str) -> int | None:
        """The round of a job; None where its task was not noted."""
        job = self._records[job_name].job if job_name in self._records else None
        return job.round if job else None

    def queue_timeout(self, job_name: str) -> int | None:
        """Seconds that a job may wait in its queue; None where its task leaves that open."""
        job = self._records[job_name].job
        return job.queue_timeout if job else None

    def walltime(self, job_name: str) -> int | None:
        """Seconds of walltime to ask for; None where the task of a job leaves that open."""
        job = self._records[job_name].job
        return job.walltime_seconds if job else None


def describe(error: BaseException) -> str:
    """The message of an error, without what a job printed: that may quote its private data."""
    message = str(error) or type(error).__name__
    if message.startswith(JOB_FAILED):
        return "the step failed at the facility; what it printed is in the log of the run"
    return message
