"""When a job was submitted, started and will end, by the words of its scheduler."""

from datetime import datetime
from pathlib import Path

import pytest

from crossfl.facility import scheduler

SLURM = """\
JobId=7 JobName=my SubmitTime=never
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   SubmitTime=2026-11-27T20:00:00 EligibleTime=2026-11-27T20:00:00
   StartTime=2026-11-27T20:01:30 EndTime=2026-11-27T21:01:30 Deadline=N/A
   WorkDir=/scratch/my runs
   StdOut=/scratch/my runs/slurm-7.out

JobId=8 HetJobId=7 HetJobOffset=1 JobName=other
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode=0:0
   SubmitTime=2020-01-01T00:00:00 EligibleTime=2020-01-01T00:00:00
   StartTime=2020-01-01T00:00:00 EndTime=2020-01-01T00:00:00 Deadline=N/A
"""
TEXT = """\
Job Id: 7.pbs
    job_state = R
    ctime = Fri Nov 27 20:00:00 2026
    stime = Fri Nov 27 20:01:30 2026
    Resource_List.walltime = 01:00:00
    Variable_List = A=nan
"""
JSON = """\
{
 "Jobs": {"7.pbs": {"job_state": "R", "ctime": "Fri Nov 27 20:00:00 2026",
  "stime": "Fri Nov 27 20:01:30 2026", "Resource_List": {"walltime": "01:00:00"},
  "Variable_List": {"A": @}}}
}
"""
END = datetime(2026, 11, 27, 21, 1, 30).timestamp()


@pytest.fixture(autouse=True)
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands of the job's node lie, and no job as yet."""
    for name in ("SLURM_JOB_ID", "SLURM_JOB_END_TIME", "PBS_JOBID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def command(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_slurm_whatever_form_of_dates_the_user_likes(
    commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A heterogeneous job ends when its leader does, whose number the job is told."""
    (commands / "answer").write_text(SLURM)
    odd = "sed 's/T20:0/ at 8:0/g'"
    script = f'if [ "$SLURM_TIME_FORMAT" ]; then {odd}; else cat; fi < {commands}/answer'
    command(commands, "scontrol", script)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    assert scheduler.seconds_in_queue() == 90
    assert scheduler.job_end() == END


@pytest.mark.parametrize("value", ["1", "nan", "005", '"it\\\'s"'])
def test_pbs(value: str, commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (commands / "json").write_text(JSON.replace("@", value))
    (commands / "text").write_text(TEXT)
    command(
        commands,
        "qstat",
        f'case "$*" in *json*) cat {commands}/json;; *) cat {commands}/text; esac',
    )
    monkeypatch.setenv("PBS_JOBID", "7.pbs")
    assert scheduler.seconds_in_queue() == 90
    assert scheduler.job_end() == END


@pytest.mark.parametrize(
    "answer", ["", "nonsense", "JobId=7 JobName=x", "Job Id: 7.pbs", "{", "{}\n"]
)
def test_a_scheduler_that_says_nothing(
    answer: str, commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("scontrol", "qstat"):
        command(commands, name, f"echo '{answer}'")
    for variable, job in (("SLURM_JOB_ID", "7"), ("PBS_JOBID", "7.pbs")):
        with monkeypatch.context() as one:
            one.setenv(variable, job)
            assert scheduler.seconds_in_queue() == 0.0
            assert scheduler.job_end() is None
