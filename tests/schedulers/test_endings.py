"""A job's end is reported as what the scheduler says it was, and never guessed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import Engine
from tests.support.testbed import Site, closed

HOG = 'python3 -c "import time; b = bytearray(600 << 20); time.sleep(30)"'
Shim = Callable[[Site, str, str], None]


def test_success(site: Site, engine: Engine) -> None:
    done = engine.run_at(site, "echo hello", site.walltime(60))
    assert done.code == 0, done.log
    assert Path(done.outputs["said"]["path"]).read_text() == "hello\n"


def test_no_service(site: Site, engine: Engine) -> None:
    done = engine.run_at(site, "echo hello")
    assert done.code == 0, done.log
    assert Path(done.outputs["said"]["path"]).read_text() == "hello\n"


def test_standard_input(site: Site, engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "words").write_text("whisper\n")
    done = engine.run(
        "stdin.cwl",
        {"words": {"class": "File", "path": str(tmp_path / "words")}},
        {f"{site.name}-login": site.login(), site.name: site.queue()},
        {"deployment": site.name},
    )
    assert done.code == 0, done.log
    assert Path(done.outputs["said"]["path"]).read_text() == "WHISPER\n"


def test_several_at_once(site: Site, engine: Engine) -> None:
    done = engine.run_at(site, [f"sleep {n}; echo {n}" for n in range(4)], site.walltime(60))
    assert done.code == 0, done.log
    said = [Path(file["path"]).read_text() for file in done.outputs["said"]]
    assert said == ["0\n", "1\n", "2\n", "3\n"]


def test_several_at_once_where_qstat_prints_only_the_first(gamma: Site, engine: Engine) -> None:
    if not gamma.emulated:
        pytest.skip("the real server has its own way")
    gamma.shell("mkdir -p .pbs; touch .pbs/first-only")
    try:
        done = engine.run_at(gamma, [f"sleep {n}; echo {n}" for n in range(3)])
    finally:
        gamma.shell("rm .pbs/first-only")
    assert done.code == 0, done.log
    assert len(done.outputs["said"]) == 3


def test_exit_code(site: Site, engine: Engine) -> None:
    done = engine.run_at(site, "exit 3", site.walltime(60))
    assert done.code != 0
    assert f"Deployment {site.name}: " in done.log
    assert "ended in FAILED (exit code 3)" in done.log


def test_timeout(sites: dict[str, Site], tmp_path: Path) -> None:
    """Slurm grants no less than a minute, and looks every half; both sites at once, then."""
    began = time.monotonic()
    runs = {}
    for name in ("alpha", "gamma"):
        (folder := tmp_path / name).mkdir()
        engine = Engine(folder)
        runs[name] = engine, engine.start_at(sites[name], "sleep 300", sites[name].walltime(3))
    for name, (engine, process) in runs.items():
        done = engine.wait(process, began, seconds=150)
        assert done.code != 0
        assert f"Deployment {name}: " in done.log and "ended in TIMEOUT" in done.log


def test_out_of_memory(site: Site, engine: Engine) -> None:
    service: dict[str, object] = (
        {"mem": "100"} if site.scheduler == "slurm" else {"resources": {"select": "1:mem=100mb"}}
    )
    done = engine.run_at(site, HOG, service)
    assert done.code != 0
    assert "ended in OUT_OF_MEMORY" in done.log


@pytest.mark.parametrize("moment", ["pending", "running"])
def test_cancelled(site: Site, engine: Engine, moment: str) -> None:
    service = site.walltime(60) | (closed(site) if moment == "pending" else {})
    process = engine.start_at(site, "sleep 120", service)
    (job,) = site.wait_for_jobs(1)
    site.shell("sleep 2")
    site.cancel(job)
    done = engine.wait(process, time.monotonic())
    assert done.code != 0
    assert f"job {job}" in done.log and "ended in CANCELLED" in done.log


def test_queue_timeout(site: Site, engine: Engine) -> None:
    done = engine.run_at(site, "true", closed(site), queueTimeout=3)
    assert done.code != 0
    assert "QUEUE_TIMEOUT" in done.log and "pending for 3 s" in done.log
    site.wait_for_jobs(0)


def test_launch_failed(site: Site, engine: Engine, testbed: dict[str, Any]) -> None:
    """Nodes that cannot keep a job's script: the scheduler holds the job, for ever if we let it."""
    if site.scheduler == "pbs":
        pytest.skip("the emulation of OpenPBS has Slurm cancel such a job")
    cluster = Path(testbed["state"]) / site.name / "slurm"
    spools = [path for path in cluster.iterdir() if path.is_dir() and path.name[-1].isdecimal()]
    assert len(spools) == 2
    try:
        for spool in spools:
            spool.rename(spool.with_suffix(".away"))
        done = engine.run_at(site, "true", site.walltime(60))
    finally:
        for spool in spools:
            spool.with_suffix(".away").rename(spool)
    assert done.code != 0
    assert "ended in LAUNCH_FAILED" in done.log, done.log
    site.wait_for_jobs(0)


STATUS_COMMANDS = {"slurm": "squeue", "pbs": "qstat"}


@pytest.mark.parametrize("way", ["exit 1", "exit 0", "sleep 2; echo 'Unable to contact'; exit 1"])
def test_a_failed_query_is_not_an_end(site: Site, engine: Engine, shim: Shim, way: str) -> None:
    """The query fails for some seconds while the job runs; the job's own end is what counts."""
    name = STATUS_COMMANDS[site.scheduler]
    real = site.shell(f"command -v {name}").strip()
    shim(
        site,
        name,
        f"n=$(cat ~/queries 2>/dev/null || echo 0); echo $((n+1)) > ~/queries\n"
        f'if [ "$n" -lt 3 ]; then {way}; fi\nexec {real} "$@"',
    )
    site.shell("rm -f queries")
    done = engine.run_at(site, "sleep 4; echo done", site.walltime(60))
    assert done.code == 0, done.log
    assert Path(done.outputs["said"]["path"]).read_text() == "done\n"
    assert int(site.shell("cat queries")) > 3
    if way != "exit 0" or site.scheduler == "pbs":
        assert "could not be asked about its jobs" in done.log


def test_a_scheduler_that_stays_away(site: Site, engine: Engine, shim: Shim) -> None:
    shim(site, STATUS_COMMANDS[site.scheduler], "echo 'no controller'; exit 1")
    done = engine.run_at(site, "sleep 60", site.walltime(60), statusTimeout=4)
    assert done.code != 0
    assert "could not be asked about its jobs for 4 s" in done.log and "no controller" in done.log


def test_a_job_that_left_the_queue(
    alpha: Site, engine: Engine, shim: Shim, testbed: dict[str, Any]
) -> None:
    """The controller has forgotten it: accounting (here the completion log) knows how it ended.

    A controller that once lost its state gives ids again, so accounting knows two jobs of that id.
    """
    ended = "2026-01-01T00:00:00"
    upcoming = alpha.shell("scontrol show config | sed -n 's/^NEXT_JOB_ID *= *//p'").strip()
    with (Path(testbed["state"]) / "alpha" / "slurm" / "jobcomp.log").open("a") as log:
        log.write(
            f"JobId={upcoming} UserId=root(0) GroupId=root(0) Name=old JobState=COMPLETED "
            f"Partition=boost TimeLimit=10 StartTime={ended} EndTime={ended} NodeList=alpha0 "
            f"NodeCnt=1 ProcCnt=1 WorkDir=/ ReservationName= Tres= Account= QOS= WcKey= "
            f"Cluster=unknown SubmitTime={ended} EligibleTime={ended} DerivedExitCode=0:0 "
            f"ExitCode=0:0 \n"
        )
    forgotten = "echo 'slurm_load_jobs error: Invalid job id specified'; exit 1"
    shim(alpha, "scontrol", forgotten)
    queued = '/usr/bin/squeue --me -h | grep -q . && exec /usr/bin/squeue "$@"'
    shim(alpha, "squeue", f"{queued}\n{forgotten}")
    done = engine.run_at(alpha, "sleep 3; exit 5")
    assert done.code != 0
    assert "ended in FAILED (exit code 5)" in done.log


def test_a_job_that_nobody_remembers(site: Site, engine: Engine, shim: Shim) -> None:
    if site.scheduler == "slurm":
        forgotten = "echo 'slurm_load_jobs error: Invalid job id specified'; exit 1"
        for name in ("squeue", "scontrol", "sacct"):
            shim(site, name, forgotten)
    else:
        shim(site, "qstat", "for j; do :; done; echo qstat: Unknown Job Id $j; exit 153")
    done = engine.run_at(site, "true", site.walltime(60))
    assert done.code != 0
    assert "ended in UNKNOWN" in done.log


def test_a_server_without_job_history(gamma: Site, engine: Engine, shim: Shim) -> None:
    real = gamma.shell("command -v qstat").strip()
    said = "qstat: PBS is not configured to maintain job history"
    shim(gamma, "qstat", f'[ "$1" = -x ] && {{ echo "{said} $5"; exit 1; }}; exec {real} "$@"')
    done = engine.run_at(gamma, "sleep 60", seconds=30)
    assert done.code != 0
    assert "Deployment gamma: this PBS server keeps no job history" in done.log
    gamma.wait_for_jobs(0)
