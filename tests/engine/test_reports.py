"""What schedulers say of a job, in one vocabulary; no scheduler is needed."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from crossfl.engine.connectors.pbs import PBSConnector, report_of
from crossfl.engine.connectors.reports import ADVICE, JobReport
from crossfl.engine.connectors.slurm import SlurmConnector
from crossfl.protocol.schedulers.pbs import Job


def job(state: str = "F", **facts: Any) -> dict[str, Any]:
    return {"job_state": state, "Output_Path": "login1:/home/me/out.log", **facts}


@pytest.mark.parametrize(
    ("record", "state", "exit_code"),
    [
        (job("Q"), "PENDING", 0),
        (job("H"), "PENDING", 0),
        (job("R"), "RUNNING", 0),
        (job("E"), "RUNNING", 0),
        (job("E", Exit_status=0), "RUNNING", 0),
        (job(Exit_status=0, substate=92), "COMPLETED", 0),
        (job(Exit_status=3, substate=92), "FAILED", 3),
        (job(Exit_status=137, substate=92), "FAILED", 137),
        (job(Exit_status=-29), "TIMEOUT", 0),
        (job(Exit_status=-27), "OUT_OF_MEMORY", 0),
        (job(Exit_status=-4), "NODE_FAIL", 0),
        (job(Exit_status=-3), "FAILED", 0),
        (job(Exit_status=271, substate=91), "CANCELLED", 0),
        (job(Exit_status=0, substate=91), "CANCELLED", 0),
        (job(substate=91), "CANCELLED", 0),
        (job(), "CANCELLED", 0),
        (job(Exit_status=265, substate=92), "FAILED", 0),
        (job(Exit_status=265, comment="Job preempted by 7.server"), "PREEMPTED", 0),
        (
            job(
                Exit_status=271,
                substate=92,
                resources_used={"walltime": "01:00:05"},
                Resource_List={"walltime": "01:00:00"},
            ),
            "TIMEOUT",
            0,
        ),
        (job("M"), "UNKNOWN", 0),
    ],
)
def test_pbs(record: dict[str, Any], state: str, exit_code: int) -> None:
    report = report_of(msgspec.convert(record, Job, strict=False))
    assert (report.state, report.exit_code) == (state, exit_code)
    assert report.log == "/home/me/out.log"
    assert report.over == (record["job_state"] in "FM")


@pytest.mark.parametrize("state", ADVICE)
def test_every_failure_is_an_end(state: str) -> None:
    assert JobReport(state=state).over


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING", "PENDING", "CONFIGURING", "SUSPENDED"])
def test_what_is_not_an_end(state: str) -> None:
    assert not JobReport(state=state).over


@pytest.mark.parametrize(
    ("connector", "answer", "job_id"),
    [
        (SlurmConnector, "42", "42"),
        (SlurmConnector, "42;alpha", "42"),
        (SlurmConnector, "sbatch: 7 announcements\nsbatch: please cite us\n42", "42"),
        (SlurmConnector, "42\nsbatch: please cite us", "42"),
        (PBSConnector, "42.pbs-01.lab.gov", "42.pbs-01.lab.gov"),
        (PBSConnector, "Job routed to 2 queues\n42.pbs-01.lab.gov", "42.pbs-01.lab.gov"),
    ],
)
def test_job_ids_among_greetings(
    connector: type[SlurmConnector] | type[PBSConnector], answer: str, job_id: str
) -> None:
    assert connector.job_id_pattern.findall(answer) == [job_id]
