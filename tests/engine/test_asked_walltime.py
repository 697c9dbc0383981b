"""The walltime that a task asks for, in the commands that submit its job."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from streamflow.deployment.template import CommandTemplateMap

from crossfl.engine.connectors.pbs import PBSConnector
from crossfl.engine.connectors.slurm import SlurmConnector
from crossfl.engine.recovery.policy import FacilityJob, RecoveryPolicy
from crossfl.protocol.schedulers import pbs, slurm
from tests.support.login import Login

DIRECTIVES = {"slurm": "#SBATCH --time=00:20:00", "pbs": "#PBS -l walltime=00:20:00"}
DONE = {
    "slurm": ("sbatch", "echo 7"),
    "pbs": ("qsub", "echo 7.pbs"),
}


async def submit(login: Login, scheduler: str, policy: RecoveryPolicy, wanted: int | None) -> str:
    """The arguments of the command that submits a job with the usual template."""
    policy.note_task(FacilityJob(name="/train/0", facility="site", walltime_seconds=wanted))
    login.script(*DONE[scheduler])
    connector, location = login.queue(scheduler)
    assert isinstance(connector, SlurmConnector | PBSConnector)
    template = f"#!/bin/sh\n{DIRECTIVES[scheduler]}\n{{{{streamflow_command}}}}"
    connector.template_map = CommandTemplateMap(default=template, template_map={})
    await connector._run_batch_command(
        command=connector.template_map.get_command(command="true", template=None),
        environment={}, job_name="/train/0", location=location, workdir=str(login.home),
        stdin=None, stdout="out", stderr="out", timeout=None,
    )  # fmt: skip
    (call,) = login.calls(DONE[scheduler][0])
    return call


@pytest.mark.parametrize("scheduler", ["slurm", "pbs"])
@pytest.mark.parametrize(("wanted", "asked"), [(None, None), (600, "00:10:00"), (7200, "00:20:00")])
async def test_a_job_asks_for_it_and_for_no_more_than_its_template(
    tmp_path: Path, policy: RecoveryPolicy, scheduler: str, wanted: int | None, asked: str | None
) -> None:
    call = await submit(Login(tmp_path), scheduler, policy, wanted)
    found = re.search(r"(?:time[= ]|walltime=)([\d:]+)", call)
    clock = None if found is None else ":".join(part.zfill(2) for part in found[1].split(":"))
    assert clock == asked, call


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("5", 300),
        ("5:30", 330),
        ("1:00:00", 3600),
        ("2-3", 183600),
        ("1-0:30", 88200),
        ("1-01:01:01", 90061),
    ],
)
def test_every_form_of_a_limit_of_slurm(limit: str, seconds: int) -> None:
    assert slurm.seconds(limit) == seconds


@pytest.mark.parametrize("limit", ["UNLIMITED", "", "1:2:3:4", "1-", "five"])
def test_what_is_no_limit_is_refused(limit: str) -> None:
    with pytest.raises(ValueError, match="no time limit"):
        slurm.seconds(limit)


@pytest.mark.parametrize(
    ("line", "limit"),
    [
        ("#SBATCH --nodes=2 --time=01:00:00", "01:00:00"),
        ("#SBATCH -t 30", "30"),
        ("#SBATCH --time 1-0", "1-0"),
        ("#SBATCH --time-min=10", None),
        ("#SBATCH --signal=B:USR1@120", None),
        ("# SBATCH --time=10", None),
    ],
)
def test_the_limit_in_a_job_script_of_slurm(line: str, limit: str | None) -> None:
    assert slurm.limit_in(f"#!/bin/bash\n{line}\ntrue\n") == limit


@pytest.mark.parametrize(
    ("line", "limit"),
    [
        ("#PBS -l walltime=01:00:00", "01:00:00"),
        ("#PBS -q work -l select=1:ncpus=4,walltime=10:00", "10:00"),
        ("#PBS -l select=1", None),
    ],
)
def test_the_limit_in_a_job_script_of_pbs(line: str, limit: str | None) -> None:
    assert pbs.limit_in(f"#!/bin/bash\n{line}\ntrue\n") == limit
