"""When a job is tried again, when its facility is absent, and what is said of it. No engine."""

import pytest

from crossfl.engine.recovery.closing import LateError, Turn
from crossfl.engine.recovery.policy import (
    MAX_REASON,
    FacilityJob,
    HopelessError,
    RecoveryPolicy,
)

JOB = FacilityJob(name="/federate/train/0.1.0", facility="leonardo", attempts=3)
NEXT = FacilityJob(name="/federate/train/0.2.0", facility="leonardo", attempts=3)


def failed(times: int, job: FacilityJob = JOB) -> RecoveryPolicy:
    policy = RecoveryPolicy()
    for number in range(1, times + 1):
        policy.fail(job, OSError(f"fault {number}"))
    return policy


@pytest.mark.parametrize(("times", "exhausted"), [(0, False), (2, False), (3, True), (4, True)])
def test_a_job_has_as_many_attempts_as_its_task_allows(times: int, exhausted: bool) -> None:
    assert failed(times).is_exhausted(JOB) is exhausted


def test_attempts_are_counted_by_job() -> None:
    policy = failed(3)
    assert not policy.is_exhausted(NEXT)


def test_a_job_that_was_given_up_has_no_attempts_left() -> None:
    policy = RecoveryPolicy()
    policy.give_up(JOB, TimeoutError("no answer within 10 s"))
    assert policy.is_exhausted(JOB)
    assert policy.declare_absent(JOB) == "no answer within 10 s"


def test_an_absence_names_the_last_attempt_and_its_number() -> None:
    policy = failed(3)
    assert policy.absence(JOB.name) is None
    assert policy.declare_absent(JOB) == "fault 3 (attempt 3)"
    assert policy.absence(JOB.name) == "fault 3 (attempt 3)"
    assert policy.absence(NEXT.name) is None


def test_a_job_that_has_not_failed_has_no_absent_facility() -> None:
    with pytest.raises(ValueError, match="has not failed"):
        RecoveryPolicy().declare_absent(JOB)


def test_a_facility_is_down_until_a_job_succeeds_at_once() -> None:
    policy = failed(1)
    assert policy.is_down("leonardo") and not policy.is_down("karolina")
    policy.succeed(JOB)  # at the second attempt, or by the stand-in
    assert policy.is_down("leonardo")
    policy.succeed(NEXT)
    assert not policy.is_down("leonardo")


def test_the_scheduler_knows_best_and_speaks_of_one_attempt() -> None:
    policy = RecoveryPolicy()
    policy.note_verdict(JOB.name, "ended in\n OUT_OF_MEMORY")
    policy.fail(JOB, OSError("exit code 1"))
    assert policy.declare_absent(JOB) == "ended in OUT_OF_MEMORY"
    policy.fail(JOB, OSError("exit code 1"))
    assert policy.declare_absent(JOB) == "exit code 1 (attempt 2)"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError("cut\n\toff"), "cut off"),
        (TimeoutError(), "TimeoutError"),
        (OSError("x" * 2000), "x" * MAX_REASON),
        (
            OSError("FAILED Job /federate/train/0.1.0 with error:\n\tthe patient's name"),
            "the step failed at the facility; what it printed is in the log of the run",
        ),
    ],
)
def test_reasons_are_one_short_line_without_what_a_job_printed(
    error: Exception, reason: str
) -> None:
    policy = RecoveryPolicy()
    policy.fail(JOB, error)
    assert policy.declare_absent(JOB) == reason


def test_a_queue_timeout_is_that_of_the_task() -> None:
    policy = RecoveryPolicy()
    policy.note_task(FacilityJob(name="a", facility="leonardo", queue_timeout=60))
    policy.note_task(FacilityJob(name="b", facility="leonardo"))
    assert [policy.queue_timeout(name) for name in ("a", "b", "unheard of")] == [60, None, None]


def test_a_refusal_leaves_no_second_attempt() -> None:
    policy, job = RecoveryPolicy(), FacilityJob(name="a", facility="leonardo", attempts=3)
    policy.fail(job, OSError("away"))
    assert not policy.is_exhausted(job)
    policy.fail(job, HopelessError("Unknown queue"))
    assert policy.is_exhausted(job)
    assert policy.declare_absent(job) == "Unknown queue (attempt 2)"


TURN = Turn(federation="f", facility="leonardo", round=1, closes="first", grace_seconds=0)


def test_a_job_that_is_late_is_not_tried_again_and_its_facility_is_not_down() -> None:
    policy, job = RecoveryPolicy(), FacilityJob(name="/train/0.1", facility="leonardo", turn=TURN)
    policy.note_task(job)
    policy.note_late(job, LateError("Slurm job 7 waits in\n the queue"))
    assert policy.is_exhausted(job)
    assert policy.is_late(job.name)
    assert policy.declare_absent(job) == "Slurm job 7 waits in the queue"
    assert policy.absence(job.name) == "Slurm job 7 waits in the queue"
    assert not policy.is_down("leonardo")
    assert not policy.is_late(NEXT.name)


def test_what_a_stand_in_delivers_is_no_update() -> None:
    """A round must not close because a facility is absent from it."""
    policy, job = RecoveryPolicy(), FacilityJob(name="/train/0.1", facility="leonardo", turn=TURN)
    policy.note_task(job)
    policy.fail(job, OSError("no route to host"))
    policy.declare_absent(job)
    policy.succeed(job)
    assert not policy.rounds.is_over(TURN)


def test_a_delivery_closes_the_round() -> None:
    policy, job = RecoveryPolicy(), FacilityJob(name="/train/0.1", facility="leonardo", turn=TURN)
    policy.note_task(job)
    policy.succeed(job)
    assert policy.rounds.is_over(TURN)
