#!/usr/bin/python3
"""An EMULATION of OpenPBS's `qsub`, `qstat` and `qdel`, in front of a Slurm cluster.

It is not OpenPBS, and proves nothing about OpenPBS beyond what is written here: the options, the
output and the exit statuses of version 23.06.06, as far as a workflow engine uses them, so that the
same tests can run here and against a real server. Called by the name of the command it stands for.

With a file ``~/.pbs/first-only`` `qstat` prints only the first of the jobs it is asked for, as some
later versions do; with ``~/.pbs/no-history`` `qstat -Bf` denies job history, which is as long as
Slurm's memory of finished jobs (five minutes here).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

LABEL = "EMULATION of OpenPBS 23.06.06 in front of Slurm"
SERVER = "gamma-pbs-emulation"
QUEUES = {"workq": "boost", "boost": "boost", "closed": "closed"}
ACCOUNTS = {"crossfl"}
SPOOL = Path.home() / ".pbs"
STATES = {"PENDING": "Q", "CONFIGURING": "Q", "RUNNING": "R", "SUSPENDED": "S", "COMPLETING": "E"}
SIGNAL_BASE = 256
KILLED_FOR_MEMORY = -27
KILLED_FOR_WALLTIME = -29
BY_TERM = 15


def fail(status: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(status)


def slurm(*words: str, stdin: str = "") -> str:
    done = subprocess.run(words, input=stdin, capture_output=True, text=True)
    if done.returncode != 0:
        raise LookupError(done.stderr.strip())
    return done.stdout


def memory_mb(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([kmgt]?)b?", text.lower()).groups()  # type: ignore[union-attr]
    return max(1, int(number) * {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}[unit] >> 20)


def resources(requests: list[str]) -> dict[str, str]:
    """``-l walltime=…,select=1:ncpus=2:mem=4gb`` as a flat record."""
    flat: dict[str, str] = {}
    for request in requests:
        for item in filter(None, request.split(",")):
            name, _, value = item.partition("=")
            flat[name] = value
    return flat


# --- qsub ----------------------------------------------------------------------------------------


def qsub_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qsub", add_help=False, allow_abbrev=False)
    for name in "aAcCejJkmMNopPqrSuvW":
        parser.add_argument(f"-{name}")
    parser.add_argument("-l", action="append", default=[])
    for name in "hVz":
        parser.add_argument(f"-{name}", action="store_true")
    parser.add_argument("script", nargs="?", default="-")
    return parser


def qsub(words: list[str]) -> None:
    options = qsub_options().parse_args(words)
    script = sys.stdin.read() if options.script == "-" else Path(options.script).read_text()
    # Directives in the script yield to the command line.
    prefix = options.C or "#PBS"
    for line in script.splitlines():
        if line.startswith(prefix):
            directives, _ = qsub_options().parse_known_args(shlex.split(line[len(prefix) :]))
            options.l = directives.l + options.l
            for name, value in vars(directives).items():
                if name not in ("l", "script") and value and not getattr(options, name):
                    setattr(options, name, value)
        elif line and not line.startswith("#"):
            break
    queue = options.q or "workq"
    if queue not in QUEUES:
        fail(170, "qsub: Unknown queue")
    if options.A and options.A not in ACCOUNTS:
        fail(32, f"qsub: Job rejected by hook: account {options.A} is not one of yours")
    wanted = resources(options.l)
    name = options.N or ("STDIN" if options.script == "-" else Path(options.script).name)[:15]
    origin = Path.cwd()
    home = Path.home()
    variables = {
        "PBS_O_WORKDIR": str(origin),
        "PBS_O_HOST": socket.gethostname(),
        "PBS_O_HOME": str(home),
        "PBS_O_QUEUE": queue,
        "PBS_QUEUE": queue,
        "PBS_JOBNAME": name,
        "PBS_ENVIRONMENT": "PBS_BATCH",
    }
    for item in filter(None, (options.v or "").split(",")):
        key, given, value = item.partition("=")
        variables[key] = value if given else os.environ.get(key, "")
    slurm_words = ["sbatch", "--parsable", f"--partition={QUEUES[queue]}", f"--job-name={name}"]
    slurm_words += [f"--chdir={home}", f"--output={SPOOL}/%j.slurm", "--no-requeue"]
    slurm_words += ["--export=ALL" if options.V else "--export=PATH,SLURM_CONF"]
    slurm_words += ["--hold"] if options.h else []
    if walltime := wanted.get("walltime"):
        slurm_words.append(f"--time={walltime}")
    chunk = wanted.get("select", "1").split("+")[0].split(":")
    nodes = chunk[0] if chunk[0].isdecimal() else "1"
    parts = dict(part.split("=", 1) for part in chunk if "=" in part)
    slurm_words += [f"--nodes={nodes}", f"--cpus-per-task={parts.get('ncpus', '1')}"]
    if memory := parts.get("mem", wanted.get("mem")):
        slurm_words.append(f"--mem={memory_mb(memory)}")
    shell = options.S or "/bin/bash"
    if script.startswith("#!") and not options.S:
        shell = script.splitlines()[0][2:].strip()

    def stream(given: str | None, letter: str) -> str:
        path = (given or "").rpartition(":")[2]
        default = f"{name}.{letter}$number"
        if not path or path.endswith("/"):
            return f"{shlex.quote(str(origin / path))}/{default}"
        return shlex.quote(str(origin / path))

    exports = "".join(f"export {k}={shlex.quote(v)}\n" for k, v in variables.items())
    errors = "2>&1" if options.j == "oe" else f"2>{stream(options.e, 'e')}"
    wrapper = f"""#!/bin/bash
number=$SLURM_JOB_ID
{exports}export PBS_JOBID=$number.{SERVER} PBS_NODEFILE={shlex.quote(str(SPOOL))}/$number.nodes
scontrol show hostnames "$SLURM_JOB_NODELIST" > "$PBS_NODEFILE"
cat > {shlex.quote(str(SPOOL))}/$number.sh <<'END-OF-THE-JOB-OF-THE-USER'
{script}
END-OF-THE-JOB-OF-THE-USER
exec > {stream(options.o, "o")} {errors}
exec {shell} {shlex.quote(str(SPOOL))}/$number.sh
"""
    SPOOL.mkdir(exist_ok=True)
    try:
        number = slurm(*slurm_words, stdin=wrapper).strip().split("\n")[-1]
    except LookupError as error:
        fail(188, f"qsub: {error}")
    host = socket.gethostname()
    record = {
        "Job_Name": name,
        "queue": queue,
        "Account_Name": options.A,
        "Output_Path": f"{host}:{plain(stream(options.o, 'o'), number)}",
        "Error_Path": f"{host}:{plain(stream(options.e, 'e'), number)}",
        "Join_Path": options.j or "n",
        "Resource_List": wanted,
    }
    (SPOOL / f"{number}.json").write_text(json.dumps(record))
    print(f"{number}.{SERVER}")


def plain(path: str, number: str) -> str:
    return "".join(shlex.split(path)).replace("$number", number)


# --- qstat ---------------------------------------------------------------------------------------


def clock(text: str) -> str:
    """Slurm's ``[days-]hours:minutes:seconds`` as PBS's ``hours:minutes:seconds``."""
    days, _, rest = text.rpartition("-")
    hours, minutes, seconds = rest.split(":")
    return f"{int(days or 0) * 24 + int(hours):02}:{minutes}:{seconds}"


def job_record(job_id: str) -> dict[str, Any]:
    """One job in OpenPBS's words; LookupError where there is no such job."""
    number = job_id.partition(".")[0]
    facts = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", slurm("scontrol", "show", "job", "-o", number)))
    own = json.loads((SPOOL / f"{number}.json").read_text())
    record: dict[str, Any] = {
        **own,
        "Job_Owner": f"{facts['UserId'].partition('(')[0]}@{socket.gethostname()}",
        "server": SERVER,
        "job_state": STATES.get(facts["JobState"], "F"),
        "Resource_List": {"walltime": clock(facts["TimeLimit"]), **own["Resource_List"]},
        "qtime": facts["SubmitTime"],
        "comment": f"{LABEL}; Slurm says {facts['JobState']}, {facts['Reason']}",
    }
    if facts["StartTime"] not in ("Unknown", "None"):
        record["stime"] = facts["StartTime"]
        record["resources_used"] = {"walltime": clock(facts["RunTime"])}
    if record["job_state"] == "F":
        record["substate"] = 92
        code, number_of_signal = map(int, facts["ExitCode"].split(":"))
        match facts["JobState"]:
            case "TIMEOUT":
                record["Exit_status"] = KILLED_FOR_WALLTIME
            case "OUT_OF_MEMORY":
                record["Exit_status"] = KILLED_FOR_MEMORY
            case "CANCELLED":
                record["substate"] = 91
                if "stime" in record and facts["RunTime"] != "00:00:00":
                    record["Exit_status"] = SIGNAL_BASE + (number_of_signal or BY_TERM)
            case _ if number_of_signal and killed_for_memory(number):
                record["Exit_status"] = KILLED_FOR_MEMORY
            case _ if number_of_signal:
                record["Exit_status"] = SIGNAL_BASE + number_of_signal
            case _:
                record["Exit_status"] = code
    return record


def killed_for_memory(number: str) -> bool:
    """Slurm without cgroups says so only in what the job printed."""
    return "exceeded memory limit" in (SPOOL / f"{number}.slurm").read_text(errors="replace")


def describe(queues: list[str] | None) -> None:
    """The server, or queues, in full: `qstat -Bf` and `qstat -Qf`."""
    if queues is None:
        kept = not (SPOOL / "no-history").exists()
        print(f"Server: {SERVER}\n    server_state = Active\n    job_history_enable = {kept}")
        print(f"    job_history_duration = 00:05:00\n    pbs_version = 23.06.06 ({LABEL})")
        return
    for name in queues or sorted(QUEUES):
        if name not in QUEUES:
            fail(170, f"qstat: Unknown queue {name}")
        running = QUEUES[name] != "closed"
        print(f"Queue: {name}\n    queue_type = Execution\n    enabled = True")
        print(f"    started = {running}\n")


def qstat(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="qstat", allow_abbrev=False, add_help=False)
    for name in "xfHaBQ":
        parser.add_argument(f"-{name}", action="store_true")
    parser.add_argument("-F", choices=("json", "dsv"))
    parser.add_argument("-u")
    parser.add_argument("jobs", nargs="*")
    options = parser.parse_args(words)
    if options.B or options.Q:
        describe(options.jobs if options.Q else None)
        return
    mine = slurm("squeue", "-h", "--me", "-t", "all", "-o", "%i").split()
    jobs: dict[str, dict[str, Any]] = {}
    status = 0
    for job_id in options.jobs or [f"{number}.{SERVER}" for number in sorted(mine, key=int)]:
        try:
            record = job_record(job_id)
        except (LookupError, FileNotFoundError):
            print(f"qstat: Unknown Job Id {job_id}", file=sys.stderr)
            status = 153
            continue
        if record["job_state"] == "F" and not (options.x or options.H):
            if options.jobs:
                print(
                    f"qstat: {job_id} Job has finished, use -x or -H to obtain historical job "
                    "information",
                    file=sys.stderr,
                )
                status = 35
            continue
        jobs[job_id] = record
        if options.jobs and (SPOOL / "first-only").exists():
            break
    if options.F == "json":
        if jobs or not options.jobs:
            document = {
                "timestamp": int(time.time()),
                "pbs_version": f"23.06.06 ({LABEL})",
                "pbs_server": SERVER,
                "Jobs": jobs,
            }
            print(json.dumps(document, indent=4))
    elif jobs:
        print(f"{LABEL}\nJob id                       Name             User             S Queue")
        for job_id, record in jobs.items():
            user = record["Job_Owner"].partition("@")[0]
            print(
                f"{job_id:28} {record['Job_Name']:16} {user:16} {record['job_state']} "
                f"{record['queue']}"
            )
    sys.exit(status)


# --- qdel ----------------------------------------------------------------------------------------


def qdel(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="qdel", allow_abbrev=False, add_help=False)
    parser.add_argument("-W")
    parser.add_argument("-x", action="store_true")
    parser.add_argument("jobs", nargs="+")
    status = 0
    for job_id in parser.parse_args(words).jobs:
        try:
            if job_record(job_id)["job_state"] == "F":
                print(f"qdel: Job has finished {job_id}", file=sys.stderr)
                status = 35
                continue
            slurm("scancel", job_id.partition(".")[0])
        except (LookupError, FileNotFoundError):
            print(f"qdel: Unknown Job Id {job_id}", file=sys.stderr)
            status = 153
    sys.exit(status)


def main() -> None:
    verb = Path(sys.argv[0]).name
    if sys.argv[1:] == ["--version"]:
        print(f"pbs_version = 23.06.06 ({LABEL})")
        return
    {"qsub": qsub, "qstat": qstat, "qdel": qdel}[verb](sys.argv[1:])


if __name__ == "__main__":
    main()
