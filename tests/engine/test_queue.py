"""Schedulers that are away, full, or answer oddly; each is a script on a login node of a folder."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from streamflow.core.exception import WorkflowExecutionException
from streamflow.log_handler import logger

from crossfl.engine.connectors import queue
from crossfl.engine.connectors.reports import StatusQueryError
from crossfl.engine.connectors.submission import BusyError, RefusedJobError
from tests.support.login import Login

CANARY = "hf_canary"
ENVIRONMENT = f"HOME=/home/me,HF_TOKEN={CANARY},PATH=/usr/bin"


@pytest.fixture
def login(tmp_path: Path) -> Login:
    return Login(tmp_path)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger=logger.name)
    logger.addHandler(caplog.handler)
    return caplog


def job_json(job_id: str = "7.pbs", **facts: Any) -> str:
    """What `qstat -x -f -F json` prints of a job, as OpenPBS does."""
    record = {"Job_Name": "crossfl", "job_state": "F", "Exit_status": 0, "substate": 92, **facts}
    return json.dumps({"timestamp": 1, "pbs_server": "pbs", "Jobs": {job_id: record}}, indent=4)


def finished(login: Login, **facts: Any) -> None:
    """A `qstat` that knows job 7 to be over."""
    login.script("qstat", f"cat <<'END'\n{job_json(**facts)}\nEND")


def says(status: int, words: str, *, times: int, then: str) -> str:
    """A script that says so for some calls, and something else in the end."""
    return (
        f"n=$(cat ~/count 2>/dev/null || echo 0); echo $((n + 1)) > ~/count\n"
        f'[ "$n" -ge {times} ] || {{ echo "{words}" >&2; exit {status}; }}\n{then}'
    )


BUSY = {
    "pbs away": ("pbs", 162, "qsub: cannot connect to server pbs (errno=15010)"),
    "pbs shutting down": ("pbs", 212, "qsub: Request not allowed: Server shutting down"),
    "pbs user full": ("pbs", 38, "qsub: would exceed queue q's per-user limit"),
    "pbs queue full": ("pbs", 198, "qsub: Maximum number of jobs already in queue q"),
    "slurm away": (
        "slurm", 1, "sbatch: error: Batch job submission failed: Unable to contact slurm "
        "controller (connect failure)",
    ),
    "slurm slow": (
        "slurm", 1, "sbatch: error: Batch job submission failed: Socket timed out on send/recv",
    ),
    "slurm full": (
        "slurm", 1, "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job "
        "submission failed: Job violates accounting/QOS policy (job submit limit, user's size)",
    ),
}  # fmt: skip
RECORD = """\
JobId=7 JobName=my JobState=FAILED name
   UserId=me(1000) GroupId=me(1000) MCS_label=N/A
   JobState={state} Reason={reason} Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode={code}
   SubmitTime=2026-11-27T20:00:00 EligibleTime=2026-11-27T20:00:00
   StartTime=2026-11-27T20:01:00 EndTime=2026-11-27T20:02:00 Deadline=N/A
   Command=(null)
   WorkDir={folder}
   StdErr={folder}/slurm-7.out
   StdIn=/dev/null
   StdOut={folder}/slurm-7.out
"""


def record(folder: Path | str, state: str = "COMPLETED", code: str = "0:0") -> str:
    text = RECORD.format(state=state, reason="None", code=code, folder=folder)
    return f"cat <<'END'\n{text}\nEND"


def queued(login: Login, *lines: str) -> None:
    listing = "\n".join(lines)
    login.script("squeue", f"cat <<'END'\n{listing}\nEND")


SUBMIT = {"pbs": "qsub", "slurm": "sbatch"}


def healthy(login: Login, scheduler: str) -> str:
    """A scheduler where job 7 is over at once; what its submission prints."""
    if scheduler == "pbs":
        finished(login)
        return "echo 7.pbs"
    queued(login, "7|COMPLETED|None")
    login.script("scontrol", record(login.home))
    return "echo 7"


@pytest.mark.parametrize("case", BUSY)
async def test_not_now_is_tried_again(
    case: str, login: Login, log: pytest.LogCaptureFixture
) -> None:
    scheduler, status, words = BUSY[case]
    submit = SUBMIT[scheduler]
    taken = healthy(login, scheduler)
    login.script(submit, says(status, words, times=3, then=taken))
    assert (await login.job(*login.queue(scheduler)))[1] == 0
    assert len(login.calls(submit)) == 4
    assert log.text.count("takes no job now: ") == 3
    assert not list(login.home.glob(".crossfl-submission-*"))


@pytest.mark.parametrize("case", BUSY)
async def test_not_now_has_an_end(case: str, login: Login) -> None:
    scheduler, status, words = BUSY[case]
    login.script(SUBMIT[scheduler], says(status, words, times=10**6, then="exit 1"))
    queued(login)
    full = "full" in case
    limit = {"queueTimeout" if full else "statusTimeout": 1}
    with pytest.raises(WorkflowExecutionException, match="given up after 1 s") as caught:
        await asyncio.wait_for(login.job(*login.queue(scheduler, **limit)), 30)
    assert ("`queue_timeout`" if full else "`statusTimeout`") in str(caught.value)
    calls = len(login.calls(SUBMIT[scheduler]))
    assert 4 <= calls <= 9, "the pauses double: 0.01 s, 0.02 s, … 0.64 s"


async def test_a_job_that_slurm_took_without_an_answer_is_not_submitted_twice(login: Login) -> None:
    login.script(
        "sbatch",
        "touch ~/taken; echo 'sbatch: error: Batch job submission failed: Socket timed out on "
        "send/recv operation' >&2; exit 1",
    )
    login.script(
        "squeue",
        '[ -e ~/asked ] || { touch ~/asked; echo "squeue: error: timed out" >&2; exit 1; }\n'
        'case "$*" in *%Z*) echo "6|/elsewhere"; echo "7|$HOME";; *) echo "7|COMPLETED|None"; esac',
    )
    login.script("scontrol", record(login.home))
    assert (await login.job(*login.queue("slurm")))[1] == 0
    assert len(login.calls("sbatch")) == 1


REFUSALS = {
    "hook": ("pbs", 32, "qsub: Job rejected by hook: no such account"),
    "value": ("pbs", 166, "qsub: Illegal attribute or resource value for Resource_List.walltime"),
    "queue": ("pbs", 170, "qsub: Unknown queue"),
    "resource": ("pbs", 187, "qsub: Unknown resource: Resource_List.gpus"),
    "partition": ("slurm", 1, "sbatch: error: invalid partition specified: bogus"),
    "account": (
        "slurm", 1, "sbatch: error: Batch job submission failed: Invalid account or account/"
        "partition combination specified",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
async def test_no_is_final_at_once(case: str, login: Login) -> None:
    scheduler, status, words = REFUSALS[case]
    login.script(SUBMIT[scheduler], says(status, words, times=10**6, then="exit 1"))
    with pytest.raises(RefusedJobError) as caught:
        await login.job(*login.queue(scheduler))
    assert words in str(caught.value) and "Deployment site: " in str(caught.value)
    assert len(login.calls(SUBMIT[scheduler])) == 1


async def test_a_command_that_is_not_there_is_no_refusal(login: Login) -> None:
    with pytest.raises(WorkflowExecutionException, match="qsub: ") as caught:
        await login.job(*login.queue("pbs"))
    assert not isinstance(caught.value, RefusedJobError | BusyError)


async def test_an_interrupt_before_a_full_queue_submits_nothing(login: Login) -> None:
    words = "qsub: Maximum number of jobs already in queue q"
    login.script("qsub", says(198, words, times=10**6, then="exit 1"))
    running = asyncio.create_task(login.job(*login.queue("pbs")))
    while len(login.calls("qsub")) < 3:
        await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    calls = len(login.calls("qsub"))
    await asyncio.sleep(0.5)
    assert len(login.calls("qsub")) == calls


async def test_a_submission_that_takes_long_is_waited_for(
    login: Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows yet whether it was taken: it is asked for, and not given again."""
    monkeypatch.setattr("crossfl.engine.connectors.submission.ASK_SECONDS", 1)
    finished(login)
    login.script("qsub", "sleep 2; echo 7.pbs")
    assert (await login.job(*login.queue("pbs")))[1] == 0
    assert len(login.calls("qsub")) == 1


# --- answers about jobs ---

QUIRKS = ("A: nan", "A: inf", "A: 005", 'A: "it\\\'s"')


@pytest.mark.parametrize("value", QUIRKS)
async def test_json_that_is_none(
    value: str, login: Login, log: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A variable of one job spoils the answer about all of them, and its own."""
    name, _, raw = value.partition(": ")
    spoilt = job_json("8.pbs", Variable_List={name: "?", "HF_TOKEN": CANARY}, Exit_status=3)
    spoilt = spoilt.replace('"?"', raw)
    both = f"{spoilt[:-1]}, {job_json()[1:]}"
    (tmp_path / "both").write_text(both)
    (tmp_path / "7.pbs").write_text(job_json())
    (tmp_path / "8.pbs").write_text(spoilt)
    (tmp_path / "text").write_text(
        f"Job Id: 8.pbs\n    Job_Name = x\n    job_state = F\n    substate = 93\n"
        f"    Output_Path = login:/scratch/a long/pa\n\tth/out.log\n"
        f"    Variable_List = {ENVIRONMENT},\n\t{name}={raw}\n    Exit_status = 3\n"
        "    Resource_List.walltime = 01:00:00\n"
    )
    login.script(
        "qstat",
        'case "$*" in *json*7.pbs*8.pbs*) cat ~/both;; *json*) cat ~/${!#};; *) cat ~/text; esac',
    )
    connector, location = login.queue("pbs")
    reports = await connector._poll(["7.pbs", "8.pbs"], location)
    assert reports["7.pbs"].state == "COMPLETED"
    assert (reports["8.pbs"].state, reports["8.pbs"].exit_code) == ("FAILED", 3)
    assert reports["8.pbs"].log == "/scratch/a long/path/out.log"
    assert CANARY not in log.text


async def test_a_job_that_cannot_be_read_holds_up_no_other(
    login: Login, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = job_json("8.pbs", substate=10**6)
    (login.home / "odd").write_text(odd)
    (login.home / "good").write_text(job_json())
    login.script("qstat", 'case "$*" in *8.pbs*) cat ~/odd;; *) cat ~/good; esac')
    connector, location = login.queue("pbs", statusTimeout=60)
    reports = await connector._poll(["7.pbs", "8.pbs"], location)
    assert {i: r.state for i, r in reports.items()} == {"7.pbs": "COMPLETED", "8.pbs": "RUNNING"}
    monkeypatch.setattr(connector, "statusTimeout", 0)
    reports = await connector._poll(["7.pbs", "8.pbs"], location)
    assert reports["8.pbs"].state == "UNKNOWN"
    with pytest.raises(StatusQueryError):
        await connector._poll(["8.pbs"], location)


async def test_a_limit_of_size_is_a_refusal(login: Login) -> None:
    """Slurm names all limits of accounting in one sentence, and the one that counts before it."""
    words = (
        "sbatch: error: QOSMaxWallDurationPerJobLimit\\nsbatch: error: Batch job submission "
        "failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time)"
    )
    login.script("sbatch", f'printf "{words}\\n" >&2; exit 1')
    with pytest.raises(RefusedJobError):
        await login.job(*login.queue("slurm"))


async def test_a_long_greeting_does_not_hide_the_reason(login: Login) -> None:
    login.script("qsub", "yes welcome | head -n 500 >&2; echo 'qsub: Unknown queue' >&2; exit 170")
    with pytest.raises(RefusedJobError, match="qsub: Unknown queue"):
        await login.job(*login.queue("pbs"))


async def test_latin_1_in_a_variable(login: Login, tmp_path: Path) -> None:
    (tmp_path / "answer").write_bytes(
        job_json(Variable_List={"A": "?"}).encode().replace(b"?", b"\xe9")
    )
    login.script("qstat", "cat ~/answer")
    connector, location = login.queue("pbs")
    assert (await connector._poll(["7.pbs"], location))["7.pbs"].state == "COMPLETED"


@pytest.mark.parametrize(
    "answer",
    [
        job_json(Variable_List={"HF_TOKEN": CANARY})[:-30],
        f"Job Id: 7.pbs\n    job_state = ???\n    Variable_List = {ENVIRONMENT}",
        job_json(Exit_status="soon", Variable_List={"HF_TOKEN": CANARY}),
        job_json(job_state=["F"], Variable_List={"HF_TOKEN": CANARY}),
        job_json(substate=10**6, Variable_List={"HF_TOKEN": CANARY}),
        "[" * 10**5,
        "qstat: Communication failure. (15031)\x1b[2J",
    ],
)
async def test_an_answer_that_cannot_be_read_says_one_line(
    answer: str, login: Login, tmp_path: Path
) -> None:
    (tmp_path / "answer").write_text(answer)
    login.script("qstat", "cat ~/answer; exit 1")
    connector, location = login.queue("pbs")
    with pytest.raises(StatusQueryError) as caught:
        await connector._poll(["7.pbs"], location)
    message = str(caught.value)
    assert CANARY not in message and message.isprintable() and len(message) < 400


async def test_a_document_without_jobs(login: Login) -> None:
    login.script(
        "qstat",
        "echo qstat: Unknown Job Id 7.pbs >&2; printf '{\\n\"timestamp\": 1\\n}\\n'; exit 153",
    )
    connector, location = login.queue("pbs")
    assert (await connector._poll(["7.pbs"], location))["7.pbs"].state == "UNKNOWN"


@pytest.mark.parametrize(
    ("words", "over"),
    [
        ("qdel: Request invalid for state of job 7.pbs", True),
        ("qdel: Unknown Job Id 8.pbs\nqdel: Request invalid for state of job 7.pbs", True),
        ("qdel: Job has finished 7.pbs", True),
        ("qdel: Unauthorized Request  7.pbs", False),
        ("qdel: Job has finished 8.pbs\nqdel: Unauthorized Request  7.pbs", False),
        ("", False),
    ],
)
async def test_deleting_what_is_over_already(words: str, over: bool, login: Login) -> None:
    login.script("qdel", f'[ -z "{words}" ] || echo "{words}" >&2; exit 168')
    connector, location = login.queue("pbs")
    if over:
        await connector._remove_jobs(location, ["7.pbs", "8.pbs"])
    else:
        with pytest.raises(StatusQueryError, match="`qdel` ended with 168"):
            await connector._remove_jobs(location, ["7.pbs"])


@pytest.mark.parametrize(
    ("line", "state"),
    [
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=7.batch", "OUT_OF_MEMORY"),
        ("Cgroup mem limit exceeded: oom-kill:constraint=CONSTRAINT_MEMCG", "OUT_OF_MEMORY"),
        ("=>> PBS: job killed: mem 700000kb exceeded limit 102400kb", "OUT_OF_MEMORY"),
        ("bash: line 7: 4711 Killed  python", "FAILED"),
    ],
)
@pytest.mark.parametrize("scheduler", ["pbs", "slurm"])
async def test_killed_inside_the_job(
    line: str, state: str, scheduler: str, login: Login, tmp_path: Path
) -> None:
    """The shell of the job lived, and ended with 128 + SIGKILL."""
    folder = tmp_path / "my runs"
    folder.mkdir()
    healthy(login, scheduler)
    job_id = "7.pbs" if scheduler == "pbs" else "7"
    (folder / "slurm-7.out").write_text(f"{line}\n")
    log = f"login:{folder}/slurm-7.out"
    finished(login, Exit_status=137, substate=93, Output_Path=log)
    queued(login, "7|FAILED|NonZeroExitCode")
    login.script("scontrol", record(folder, "FAILED", "137:0"))
    connector, location = login.queue(scheduler)
    connector._scheduled_jobs[job_id] = location
    assert list(await connector._get_running_jobs(location)) == []
    assert connector._reports[job_id].state == state


async def test_a_wait_is_explained_after_a_minute_and_when_its_reason_changes(
    login: Login, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(queue, "time", SimpleNamespace(monotonic=lambda: clock.now))
    connector, location = login.queue("pbs")
    connector._scheduled_jobs["7.pbs"], connector._names["7.pbs"] = location, "/train/0"

    async def look(now: float, **facts: Any) -> str:
        clock.now = now
        log.clear()
        finished(login, **facts)
        connector._jobs_cache.clear()
        assert list(await connector._get_running_jobs(location)) == ["7.pbs"]
        return log.text

    never = "Can Never Run: Insufficient amount of resource: ngpus (R: 8 A: 4 T: 4)"
    assert "waited" not in await look(0, job_state="Q", comment=never)
    assert "waited" not in await look(59, job_state="Q", comment=never)
    assert f"(/train/0) has waited for 61 s: {never}" in await look(
        61, job_state="Q", comment=never
    )
    assert connector.waiting == never
    assert "waited" not in await look(90, job_state="Q", comment=never)
    assert "has waited for 91 s: held (u)" in await look(91, job_state="H", Hold_Types="u")
    assert "\\x1b[2J" in await look(92, job_state="W", comment="after \x1b[2J 8:00")
    assert "waited" not in await look(93, job_state="R", comment="Job run at …")
    assert connector.waiting == ""


async def test_a_reason_of_slurm_is_shown_likewise(
    login: Login, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "SHOW_SECONDS", 0)
    queued(login, "7|PENDING|JobHeldUser")
    connector, location = login.queue("slurm")
    connector._scheduled_jobs["7"], connector._names["7"] = location, "/train/0"
    assert list(await connector._get_running_jobs(location)) == ["7"]
    assert "Slurm job 7 (/train/0) has waited for 0 s: JobHeldUser" in log.text


# --- the word that was asked for ---


@pytest.mark.parametrize(("leader", "state"), [("FAILED", "FAILED"), ("COMPLETED", "COMPLETED")])
@pytest.mark.parametrize("source", ["controller", "accounting"])
async def test_a_heterogeneous_job_ends_as_its_leader(
    leader: str, state: str, source: str, login: Login, tmp_path: Path
) -> None:
    queued(login, f"7+0|{leader}|None", "7+1|CANCELLED|None")
    code = "3:0" if leader == "FAILED" else "0:0"
    records = RECORD.format(state=leader, reason="None", code=code, folder=tmp_path)
    other = RECORD.format(state="CANCELLED", reason="None", code="0:15", folder=tmp_path)
    records += "\n" + other.replace("JobId=7 ", "JobId=8 HetJobId=7 HetJobOffset=1 ")
    (tmp_path / "records").write_text(records)
    (tmp_path / "accounts").write_text(
        f"7+0|{leader}|{code}\n7+0.batch|{leader}|{code}\n7+1|CANCELLED|0:15\n"
    )
    forgotten = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    login.script("scontrol", "cat ~/records" if source == "controller" else forgotten)
    login.script("sacct", "cat ~/accounts")
    connector, location = login.queue("slurm")
    report = (await connector._poll(["7"], location))["7"]
    assert (report.state, report.exit_code) == (state, int(code[0]))


@pytest.mark.parametrize("answer", ["2024\n7\n9000", "7\n12", "9000\n7;alpha\n3"])
async def test_the_id_among_numbers_of_a_wrapper(answer: str, login: Login, tmp_path: Path) -> None:
    folder = tmp_path / "my jobs"
    folder.mkdir()
    login.script("sbatch", f"printf '%b\\n' '{answer}'")
    other = record("/elsewhere").replace("JobId=7 ", "JobId=${!#} ").replace("<<'END'", "<<END")
    login.script("scontrol", f'if [ "${{!#}}" = 7 ]; then\n{record(folder)}\nelse\n{other}\nfi')
    queued(login, "7|COMPLETED|None")
    (folder / "slurm-7.out").write_text("words\n")
    done = await login.job(*login.queue("slurm"), workdir=str(folder))
    assert done == ("words", 0)
    assert f"--chdir {folder}" in login.calls("sbatch")[0]


@pytest.mark.parametrize("answer", ["12.5\n7.pbs", "7.pbs\n12.5"])
async def test_the_id_of_pbs_among_numbers(answer: str, login: Login, tmp_path: Path) -> None:
    folder = tmp_path / "my jobs"
    folder.mkdir()
    login.script(
        "qsub", f"printf '%s' \"$2\" > ~/output; printf '%b\\n' '{answer}'; echo words > \"$2\""
    )
    known = job_json(Output_Path="login:@").replace("@", "$(cat ~/output)")
    unknown = "echo 'qstat: Unknown Job Id 12.5' >&2; exit 153"
    login.script("qstat", f'[ "${{!#}}" = 7.pbs ] || {{ {unknown}; }}\ncat <<END\n{known}\nEND')
    assert await login.job(*login.queue("pbs"), workdir=str(folder)) == ("words", 0)


async def test_greetings_are_no_answers(login: Login) -> None:
    """On standard error they may hold anything, an id of a job as well."""
    finished(login)
    login.script("qsub", "echo 99.pbs is our newest server >&2; echo 99.pbs >&2; echo 7.pbs")
    assert (await login.job(*login.queue("pbs")))[1] == 0
    assert login.calls("qstat") == ["-x -f -F json 7.pbs"]
