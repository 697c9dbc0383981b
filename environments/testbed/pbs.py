#!/usr/bin/python3
"""An EMULATION of OpenPBS's commands for users, in front of a Slurm cluster.

It is not OpenPBS, and proves nothing about OpenPBS beyond what is written here: the options, the
output and the exit statuses of version 23.06.06, as far as a workflow engine uses them, so that the
same tests can run here and against a real server. Called by the name of the command it stands for:
`qsub`, `qstat`, `qdel`, `qhold`, `qrls` or `qrerun`.

Files in ``~/.pbs`` change what it does:

* ``away``: no server answers. ``full``: `qsub` is told that the user has too many jobs.
* ``exiting``: jobs that run are shown in state E, and cannot be deleted.
* ``first-only``: `qstat` prints only the first of the jobs it is asked for, as some versions do.
* ``no-history``: `qstat -Bf` denies job history, which is as long as Slurm's memory of finished
  jobs (five minutes here).
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
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

LABEL = "EMULATION of OpenPBS 23.06.06 in front of Slurm"
SERVER = "gamma-pbs-emulation"
QUEUES = {"workq": "boost", "boost": "boost", "closed": "closed"}
ACCOUNTS = {"crossfl"}
SPOOL = Path.home() / ".pbs"
STATES = {"PENDING": "Q", "CONFIGURING": "Q", "RUNNING": "R", "SUSPENDED": "S", "COMPLETING": "E"}
SIGNAL_BASE = 256
HELD, WAITING, EXITING, DELETED, FINISHED, FAILED = 20, 30, 50, 91, 92, 93
"""Substates."""
RESOURCES = {"walltime", "select", "place", "mem", "ncpus", "filesystems"}
LINE = 79
"""Characters of a line of `qstat -f`, where the value goes on in the next one."""
KILLED_FOR_MEMORY = -27
KILLED_FOR_WALLTIME = -29
BY_TERM = 15


def fail(status: int, message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(status)


def flag(name: str) -> bool:
    return (SPOOL / name).exists()


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
            if name not in RESOURCES:
                fail(187, f"qsub: Unknown resource: Resource_List.{name}")
            flat[name] = value
    if not re.fullmatch(r"(\d+:)*\d+", flat.get("walltime", "0")):
        fail(166, "qsub: Illegal attribute or resource value for Resource_List.walltime")
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
    script = (
        sys.stdin.read()
        if options.script == "-"
        else Path(options.script).read_text(encoding="utf-8")
    )
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
    if flag("full"):
        fail(38, f"qsub: would exceed queue {queue}'s per-user limit of jobs in 'Q' state")
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
    slurm_words += [f"--chdir={home}", f"--output={SPOOL}/%j.slurm"]
    slurm_words.append("--no-requeue" if options.r == "n" else "--requeue")
    slurm_words += ["--export=ALL" if options.V else "--export=PATH,SLURM_CONF"]
    slurm_words += ["--hold"] if options.h else []
    if options.a:  # [[CC]YY]MMDDhhmm
        begin = datetime.strptime(options.a[-8:], "%m%d%H%M").replace(year=datetime.now().year)
        slurm_words.append(f"--begin={begin.isoformat()}")
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
        **({"Account_Name": options.A} if options.A else {}),
        "Output_Path": f"{host}:{plain(stream(options.o, 'o'), number)}",
        "Error_Path": f"{host}:{plain(stream(options.e, 'e'), number)}",
        "Join_Path": options.j or "n",
        "Resource_List": wanted,
        "Variable_List": variables,
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


def date(iso: str) -> str:
    return datetime.fromisoformat(iso).strftime("%a %b %d %H:%M:%S %Y")


def job_record(job_id: str) -> dict[str, Any]:
    """One job in OpenPBS's words; LookupError where there is no such job."""
    number = job_id.partition(".")[0]
    facts = dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", slurm("scontrol", "show", "job", "-o", number)))
    own = json.loads((SPOOL / f"{number}.json").read_text())
    state = STATES.get(facts["JobState"], "F")
    comment = f"{LABEL}; Slurm says {facts['JobState']}, {facts['Reason']}"
    record: dict[str, Any] = {
        "Job_Name": own.pop("Job_Name"),
        "Job_Owner": f"{facts['UserId'].partition('(')[0]}@{socket.gethostname()}",
        "job_state": state,
        "server": SERVER,
        "ctime": date(facts["SubmitTime"]),
        "qtime": date(facts["SubmitTime"]),
        **own,
        "Resource_List": {"walltime": clock(facts["TimeLimit"]), **own["Resource_List"]},
    }
    if facts["StartTime"] not in ("Unknown", "None") and state != "Q":
        record["stime"] = date(facts["StartTime"])
        record["resources_used"] = {"walltime": clock(facts["RunTime"])}
    if state == "Q" and facts["Reason"].startswith("JobHeld"):
        record |= {"job_state": "H", "substate": HELD, "Hold_Types": "u"}
    elif state == "Q" and facts["Reason"] == "BeginTime":
        record |= {
            "job_state": "W",
            "substate": WAITING,
            "Execution_Time": date(facts["StartTime"]),
        }
    elif state == "E" or (state == "R" and flag("exiting")):
        record |= {"job_state": "E", "substate": EXITING}
    elif state == "F":
        status = exit_status(facts, number, started="stime" in record)
        record["substate"] = FAILED if status else FINISHED
        if facts["JobState"] == "CANCELLED":
            record["substate"] = DELETED
        if status is not None:
            record["Exit_status"] = status
    return record | {"comment": comment}


def exit_status(facts: dict[str, str], number: str, *, started: bool) -> int | None:
    """How the job ended, by PBS's numbers; None for one that never ran."""
    code, killed_by = map(int, facts["ExitCode"].split(":"))
    match facts["JobState"]:
        case "TIMEOUT":
            return KILLED_FOR_WALLTIME
        case "OUT_OF_MEMORY":
            return KILLED_FOR_MEMORY
        case "CANCELLED":
            ran = started and facts["RunTime"] != "00:00:00"
            return SIGNAL_BASE + (killed_by or BY_TERM) if ran else None
        case _ if killed_by and killed_for_memory(number):
            return KILLED_FOR_MEMORY
        case _ if killed_by:
            return SIGNAL_BASE + killed_by
        case _:
            return code


def killed_for_memory(number: str) -> bool:
    """Slurm without cgroups says so only in what the job printed."""
    return "exceeded memory limit" in (SPOOL / f"{number}.slurm").read_text(errors="replace")


def describe(queues: list[str] | None) -> None:
    """The server, or queues, in full: `qstat -Bf` and `qstat -Qf`."""
    if queues is None:
        kept = not flag("no-history")
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
        if options.jobs and flag("first-only"):
            break
    if options.F == "json":
        head = {
            "timestamp": int(time.time()),
            "pbs_version": f"23.06.06 ({LABEL})",
            "pbs_server": SERVER,
        }
        # Where it knows none of the jobs, the document has no `Jobs`.
        print_json(head | ({"Jobs": jobs} if jobs or not options.jobs else {}))
    elif options.f:
        for job_id, record in jobs.items():
            print_text(job_id, record)
    elif jobs:
        print(f"{LABEL}\nJob id                       Name             User             S Queue")
        for job_id, record in jobs.items():
            user = record["Job_Owner"].partition("@")[0]
            print(
                f"{job_id:28} {record['Job_Name']:16} {user:16} {record['job_state']} "
                f"{record['queue']}"
            )
    sys.exit(status)


def print_json(document: dict[str, Any]) -> None:
    """JSON as the client of 23.06.06 writes it.

    What looks like a number to C is one, and `'`, which needs no escape, gets one.
    """
    raw: dict[str, str] = {}
    for record in document.get("Jobs", {}).values():
        variables = {}
        for name, value in record["Variable_List"].items():
            mark = f"raw-{len(raw)}-raw"
            if re.fullmatch(r"[+-]?(nan|inf|infinity|\d+\.?\d*(e[+-]?\d+)?)", value, re.IGNORECASE):
                raw[f'"{mark}"'] = value
                variables[name] = mark
            else:
                raw[mark] = json.dumps(value, ensure_ascii=False)[1:-1].replace("'", "\\'")
                variables[name] = mark
        record["Variable_List"] = variables
    text = json.dumps(document, indent=4, ensure_ascii=False)
    for mark, value in raw.items():
        text = text.replace(mark, value)
    sys.stdout.buffer.write(os.fsencode(text + "\n"))


def print_text(job_id: str, record: dict[str, Any]) -> None:
    """`qstat -f`: one attribute after the other; long values are broken, after commas at best."""
    print(f"Job Id: {job_id}")
    for name, value in record.items():
        if name == "Variable_List":
            value = ",".join(f"{k}={v}" for k, v in value.items())
        items = value.items() if isinstance(value, dict) else [("", value)]
        for resource, text in items:
            label = f"    {name}.{resource} = " if resource else f"    {name} = "
            line = label
            for n, part in enumerate(str(text).split(",")):
                word = ("," if n else "") + part
                if len(line) + len(word) >= LINE and n:
                    print(line + ",")
                    line, word = "\t", part
                while len(line) + len(word) > LINE:
                    room = LINE - len(line)
                    print(line + word[:room])
                    line, word = "\t", word[room:]
                line += word
            sys.stdout.flush()
            sys.stdout.buffer.write(os.fsencode(line + "\n"))
    print(flush=True)


# --- qdel ----------------------------------------------------------------------------------------


def qdel(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="qdel", allow_abbrev=False, add_help=False)
    parser.add_argument("-W")
    parser.add_argument("-x", action="store_true")
    parser.add_argument("jobs", nargs="+")
    status = 0
    for job_id in parser.parse_args(words).jobs:
        try:
            state = job_record(job_id)["job_state"]
            if state == "F":
                print(f"qdel: Job has finished {job_id}", file=sys.stderr)
                status = 35
                continue
            if state == "E":
                print(f"qdel: Request invalid for state of job {job_id}", file=sys.stderr)
                status = 168
                continue
            slurm("scancel", job_id.partition(".")[0])
        except (LookupError, FileNotFoundError):
            print(f"qdel: Unknown Job Id {job_id}", file=sys.stderr)
            status = 153
    sys.exit(status)


# --- qhold, qrls, qrerun -------------------------------------------------------------------------


def start_now(number: str) -> None:
    """Slurm would have a job that it runs again wait for two minutes."""
    for _ in range(100):
        if "Reason=BeginTime" in slurm("scontrol", "show", "job", "-o", number):
            slurm("scontrol", "update", f"JobId={number}", "StartTime=now")
            return
        time.sleep(0.2)


def change(command: str, verb: str, words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=command, allow_abbrev=False, add_help=False)
    parser.add_argument("-h")
    parser.add_argument("-W")
    parser.add_argument("jobs", nargs="+")
    status = 0
    for job_id in parser.parse_args(words).jobs:
        try:
            job_record(job_id)
            slurm("scontrol", verb, number := job_id.partition(".")[0])
            if verb == "requeue":
                start_now(number)
        except (LookupError, FileNotFoundError) as error:
            print(f"{command}: Request invalid for state of job {job_id}: {error}", file=sys.stderr)
            status = 168
    sys.exit(status)


def main() -> None:
    verb, words = Path(sys.argv[0]).name, sys.argv[1:]
    if words == ["--version"]:
        print(f"pbs_version = 23.06.06 ({LABEL})")
        return
    if flag("away"):
        fail(162, f"{verb}: cannot connect to server {SERVER} (errno=15010)")
    match verb:
        case "qhold" | "qrls" | "qrerun":
            names = {"qhold": "hold", "qrls": "release", "qrerun": "requeue"}
            change(verb, names[verb], words)
        case _:
            {"qsub": qsub, "qstat": qstat, "qdel": qdel}[verb](words)


if __name__ == "__main__":
    main()
