#!/usr/bin/env python3
"""Three little facilities on loopback: real sshd, munge and Slurm, and an emulation of OpenPBS.

``alpha`` and ``beta`` are two separate Slurm clusters, each with its own munge key, configuration,
ports, spool folders, login node (sshd) and ordinary user. ``gamma`` is a third login node, with a
user of its own, whose ``qsub``, ``qstat`` and the like are an *emulation* of OpenPBS in front of
beta's cluster (OpenPBS is in no package registry). Everything lies under one state directory,
every daemon is stopped by its own process id, and nothing listens beyond 127.0.0.1.

There is no accounting database (``slurmdbd`` needs MariaDB): finished jobs are known from
``scontrol show job`` for five minutes, and after that from ``sacct -c`` (``jobcomp/filetxt``).

Example::

    ./install.sh && ./testbed.py start
    HOME=/tmp/crossfl-testbed/vm ssh alpha squeue
    ./testbed.py status --format json
    ./testbed.py stop
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEFAULT_STATE = "/tmp/crossfl-testbed"
# AF_UNIX addresses hold 107 bytes; the longest socket here adds about 30 to the state directory.
MAX_STATE_PATH = 70
NODES = 2
CPUS = 8
MEMORY_MB = 8192
DAEMON_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
ACCOUNT = "crossfl"


class TestbedError(Exception):
    """Something the person at the keyboard can put right; the message says what."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One login node, and the cluster behind it."""

    name: str
    scheduler: str  # slurm | pbs
    cluster: str  # the Slurm cluster that runs its jobs
    index: int  # which block of ten ports is its own

    @property
    def user(self) -> str:
        return f"crossfl-{self.name}"


SITES = (
    Site(name="alpha", scheduler="slurm", cluster="alpha", index=1),
    Site(name="beta", scheduler="slurm", cluster="beta", index=2),
    Site(name="gamma", scheduler="pbs", cluster="beta", index=3),
)
CLUSTERS = tuple(site for site in SITES if site.scheduler == "slurm")


@dataclass(frozen=True, kw_only=True)
class Testbed:
    """Where everything lies, and which ports are ours."""

    state: Path
    base_port: int

    def port(self, site: Site, offset: int) -> int:
        """0: sshd, 1: slurmctld, 2 and up: one slurmd each."""
        return self.base_port + 10 * site.index + offset

    def cluster(self, name: str) -> Path:
        return self.state / name / "slurm"

    def slurm_conf(self, name: str) -> Path:
        return self.cluster(name) / "slurm.conf"

    def home(self, site: Site) -> Path:
        return self.state / site.name / "home"

    @property
    def vm(self) -> Path:
        """A home for the aggregation VM: its key, its known hosts, its ssh configuration."""
        return self.state / "vm"

    @property
    def pids(self) -> Path:
        return self.state / "pids"

    def describe(self) -> dict[str, object]:
        """What a test, or a person, needs to know to use the testbed."""
        return {
            "state": str(self.state),
            "home": str(self.vm),
            "ssh_key": str(self.vm / ".ssh" / "id_ed25519"),
            "known_hosts": str(self.vm / ".ssh" / "known_hosts"),
            "sites": {
                site.name: {
                    "scheduler": site.scheduler,
                    "emulated": site.scheduler == "pbs",
                    "hostname": f"127.0.0.1:{self.port(site, 0)}",
                    "username": site.user,
                    "workdir": str(self.home(site) / "work"),
                    "home": str(self.home(site)),
                    "partition": "boost",
                    "closed_partition": "closed",
                    "account": ACCOUNT,
                    "slurm_conf": str(self.slurm_conf(site.cluster)),
                }
                for site in SITES
            },
        }


def say(message: str) -> None:
    print(f"testbed: {message}", file=sys.stderr, flush=True)


def command(*words: str, environment: dict[str, str] | None = None) -> str:
    """Run a command to its end and give its output; its own words are the error."""
    done = subprocess.run(
        words,
        env=os.environ | (environment or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if done.returncode != 0:
        raise TestbedError(
            f"`{' '.join(words)}` ended with {done.returncode}: {done.stderr.strip()}"
        )
    return done.stdout


def write(path: Path, text: str | bytes, *, mode: int = 0o644, owner: str = "root") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as handle:
        handle.write(text.encode() if isinstance(text, str) else text)
    path.chmod(mode)
    shutil.chown(path, owner, owner)
    return path


def folder(path: Path, *, mode: int = 0o755, owner: str = "root") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(mode)
    shutil.chown(path, owner, owner)
    return path


# --- daemons -------------------------------------------------------------------------------------


def started_at(pid: int) -> str | None:
    """When the kernel started this process; tells it from a later one with the same number."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


def running(testbed: Testbed, name: str) -> int | None:
    """The process id of a daemon that we started and that still runs."""
    with contextlib.suppress(OSError, ValueError):
        pid, _, start = (testbed.pids / name).read_text().partition(" ")
        if start and started_at(int(pid)) == start:
            return int(pid)
    return None


def spawn(testbed: Testbed, name: str, *words: str, user: str | None = None) -> None:
    """Start a daemon in the foreground of its own session, and note its process id."""
    if running(testbed, name):
        return
    folder(testbed.state / "log", mode=0o1777)
    with (testbed.state / "log" / f"{name}.out").open("ab") as log:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
            user=user,
            group=user,
            extra_groups=[] if user else None,
            env={"PATH": DAEMON_PATH, "LANG": "C.UTF-8"},
        )
    write(testbed.pids / name, f"{process.pid} {started_at(process.pid)}")


def halt(testbed: Testbed, name: str) -> None:
    """Stop one of our daemons by its process id: politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        pid = running(testbed, name)
        if pid is None:
            break
        os.kill(pid, number)
        wait_until(lambda: running(testbed, name) is None, seconds=10)
    (testbed.pids / name).unlink(missing_ok=True)


def wait_until(ready: Callable[[], bool], *, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


# --- start ---------------------------------------------------------------------------------------


def require_parts() -> None:
    if os.geteuid() != 0:
        raise TestbedError("root is needed, to run jobs as other users; try: sudo testbed.py start")
    missing = [
        name
        for name in ("sshd", "munged", "slurmctld", "slurmd", "sbatch", "ssh-keygen")
        if shutil.which(name, path=DAEMON_PATH) is None
    ]
    if missing:
        raise TestbedError(f"not installed: {', '.join(missing)}; run {HERE / 'install.sh'}")


def make_account(testbed: Testbed, site: Site) -> None:
    """An ordinary user per site; `*` is no password, where `!` would lock sshd out as well."""
    home = testbed.home(site)
    try:
        if pwd.getpwnam(site.user).pw_dir != str(home):
            command("usermod", "--home", str(home), site.user)
    except KeyError:
        command(
            "useradd", "--home-dir", str(home), "--no-create-home", "--user-group",
            "--shell", "/bin/bash", "--password", "*", site.user,
        )  # fmt: skip
    folder(testbed.state / site.name)
    folder(home, mode=0o750, owner=site.user)
    folder(home / "work", owner=site.user)
    folder(home / "bin", owner=site.user)
    folder(home / ".ssh", mode=0o700, owner=site.user)


def make_keys(testbed: Testbed) -> None:
    """One key for the VM, one host key per login node: host-key checking stays on."""
    ssh = folder(testbed.vm / ".ssh", mode=0o700)
    key = ssh / "id_ed25519"
    if not key.exists():
        command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "testbed", "-f", str(key))
    known: list[str] = []
    config: list[str] = []
    for site in SITES:
        host_key = testbed.state / site.name / "ssh_host_ed25519_key"
        if not host_key.exists():
            command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(host_key))
        kind, blob = host_key.with_suffix(".pub").read_text().split()[:2]
        known.append(f"[127.0.0.1]:{testbed.port(site, 0)} {kind} {blob}\n")
        config.append(
            f"Host {site.name}\n  HostName 127.0.0.1\n  Port {testbed.port(site, 0)}\n"
            f"  User {site.user}\n  IdentityFile {key}\n  UserKnownHostsFile {ssh}/known_hosts\n"
        )
        write(
            testbed.home(site) / ".ssh" / "authorized_keys",
            key.with_suffix(".pub").read_text(),
            mode=0o600,
            owner=site.user,
        )
    write(ssh / "known_hosts", "".join(known))
    write(ssh / "config", "".join(config))


def start_login(testbed: Testbed, site: Site) -> None:
    """A login node: an sshd of its own that lets in one user, with one key."""
    folder(Path("/run/sshd"))
    home = testbed.home(site)
    path = f"{home}/bin:/usr/local/bin:/usr/bin:/bin"
    if site.scheduler == "pbs":
        emulation = folder(testbed.state / site.name / "pbs-emulation")
        for name in ("qsub", "qstat", "qdel", "qhold", "qrls", "qrerun"):
            (emulation / name).unlink(missing_ok=True)
            shutil.copy(HERE / "pbs.py", emulation / name)
            (emulation / name).chmod(0o755)
        path = f"{home}/bin:{emulation}:/usr/local/bin:/usr/bin:/bin"
    config = write(
        testbed.state / site.name / "sshd_config",
        f"""\
ListenAddress 127.0.0.1
Port {testbed.port(site, 0)}
HostKey {testbed.state}/{site.name}/ssh_host_ed25519_key
PidFile none
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin no
AllowUsers {site.user}
MaxSessions 100
MaxStartups 100
PrintMotd no
Subsystem sftp internal-sftp
SetEnv PATH={path} SLURM_CONF={testbed.slurm_conf(site.cluster)}
""",
    )
    spawn(testbed, f"sshd-{site.name}", "/usr/sbin/sshd", "-D", "-e", "-f", str(config))


def start_munge(testbed: Testbed, name: str) -> Path:
    """Authentication between the parts of one cluster: its own key, its own socket."""
    home = folder(testbed.state / name / "munge", mode=0o755, owner="munge")
    key = home / "munge.key"
    if not key.exists():
        write(key, secrets.token_bytes(128), mode=0o400, owner="munge")
    sock = home / "munge.socket"
    spawn(
        testbed, f"munged-{name}", "/usr/sbin/munged", "--foreground", "--force",
        f"--socket={sock}", f"--key-file={key}", f"--pid-file={home}/munged.pid",
        f"--log-file={home}/munged.log", f"--seed-file={home}/munged.seed", "--num-threads=2",
        user="munge",
    )  # fmt: skip
    if not wait_until(sock.exists, seconds=10):
        raise TestbedError(f"munged of {name} did not start; see {home}/munged.log")
    return sock


def slurm_conf(testbed: Testbed, site: Site, munge_socket: Path) -> str:
    """A small cluster; memory is enforced by polling, for want of cgroups of our own.

    A poll counts a child twice that has not begun its own program: hence twice what training takes.
    """
    home = testbed.cluster(site.name)
    host = socket.gethostname()
    nodes = "".join(
        f"NodeName={site.name}{n} NodeHostname={host} NodeAddr=127.0.0.1 "
        f"Port={testbed.port(site, 2 + n)} CPUs={CPUS} RealMemory={MEMORY_MB} State=UNKNOWN\n"
        for n in range(NODES)
    )
    return f"""\
ClusterName={site.name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={testbed.port(site, 1)}
SlurmctldParameters=enable_configless
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={munge_socket}
CredType=cred/munge
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/%n.pid
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
PropagateResourceLimits=NONE
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
JobCompType=jobcomp/filetxt
JobCompLoc={home}/jobcomp.log
JobSubmitPlugins=lua
AccountingStorageType=accounting_storage/none
DefMemPerCPU=1024
MinJobAge=300
KillWait=2
OverTimeLimit=0
InactiveLimit=0
MessageTimeout=10
{nodes}\
PartitionName=boost Nodes=ALL Default=YES MaxTime=01:00:00 DefaultTime=00:10:00 State=UP
PartitionName=closed Nodes=ALL MaxTime=01:00:00 DefaultTime=00:10:00 State=DOWN
"""


# What a site with an accounting database does of itself, refuse an account that is not the user's,
# and what many sites do: greet every submission on stderr.
JOB_SUBMIT_LUA = f"""\
function slurm_job_submit(job, partitions, uid)
   slurm.log_user("please acknowledge this machine in your papers")
   if job.account ~= nil and job.account ~= "{ACCOUNT}" then
      slurm.log_user("account " .. job.account .. " is not one of yours")
      return 2045  -- ESLURM_INVALID_ACCOUNT
   end
   return slurm.SUCCESS
end
function slurm_job_modify(job, record, partitions, uid)
   return slurm.SUCCESS
end
"""


def start_cluster(testbed: Testbed, site: Site) -> None:
    """munged, slurmctld and the slurmds of one cluster."""
    sock = start_munge(testbed, site.name)
    home = folder(testbed.cluster(site.name))
    folder(home / "state", mode=0o700)
    write(home / "job_submit.lua", JOB_SUBMIT_LUA)
    conf = write(testbed.slurm_conf(site.name), slurm_conf(testbed, site, sock))
    write(home / "cgroup.conf", "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    spawn(testbed, f"slurmctld-{site.name}", "/usr/sbin/slurmctld", "-D", "-f", str(conf))
    for n in range(NODES):
        node = f"{site.name}{n}"
        folder(home / node)
        spawn(testbed, f"slurmd-{node}", "/usr/sbin/slurmd", "-D", "-f", str(conf), "-N", node)


def slurm(testbed: Testbed, cluster: str, *words: str) -> str:
    return command(*words, environment={"SLURM_CONF": str(testbed.slurm_conf(cluster))})


def nodes_ready(testbed: Testbed, cluster: str) -> bool:
    try:
        states = slurm(testbed, cluster, "sinfo", "-h", "-N", "-p", "boost", "-o", "%T").split()
    except (TestbedError, subprocess.TimeoutExpired):
        return False
    return len(states) == NODES and all(state in ("idle", "mixed") for state in states)


def queue_empty(testbed: Testbed, cluster: str) -> bool:
    return not slurm(testbed, cluster, "squeue", "-h").strip()


def start(testbed: Testbed) -> None:
    """Start what does not run yet; a testbed that runs is left as it is."""
    require_parts()
    if len(str(testbed.state)) > MAX_STATE_PATH:
        raise TestbedError(f"{testbed.state}: too long for AF_UNIX; use a shorter --state")
    folder(testbed.state)
    folder(testbed.pids)
    for site in SITES:
        if running(testbed, f"sshd-{site.name}") is None and listening(testbed.port(site, 0)):
            raise TestbedError(f"port {testbed.port(site, 0)} is taken; choose another --base-port")
        make_account(testbed, site)
    make_keys(testbed)
    for site in CLUSTERS:
        say(f"cluster {site.name}: munged, slurmctld, {NODES} slurmd")
        start_cluster(testbed, site)
    for site in SITES:
        kind = "Slurm" if site.scheduler == "slurm" else "emulated OpenPBS"
        say(f"login {site.name}: sshd on 127.0.0.1:{testbed.port(site, 0)}, {kind}")
        start_login(testbed, site)
    for site in SITES:
        if not wait_until(partial(listening, testbed.port(site, 0)), seconds=15):
            raise TestbedError(
                f"sshd of {site.name} did not start; see {testbed.state}/log/sshd-{site.name}.out"
            )
    for site in CLUSTERS:
        if not wait_until(partial(nodes_ready, testbed, site.name), seconds=60):
            raise TestbedError(
                f"cluster {site.name} did not come up; see {testbed.cluster(site.name)}/*.log"
            )
    for site in CLUSTERS:
        # `sacct -c` runs as the user and opens the file for writing, though it only reads, and
        # slurmctld sets its permissions anew when it starts.
        (testbed.cluster(site.name) / "jobcomp.log").chmod(0o666)
    write(testbed.state / "testbed.json", json.dumps(testbed.describe(), indent=2) + "\n")
    say(f"up; described in {testbed.state}/testbed.json")


# --- stop and status -----------------------------------------------------------------------------


def processes_of(uid: int) -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and entry.stat().st_uid == uid:
                yield int(entry.name)


def stop(testbed: Testbed, *, purge: bool) -> None:
    """Cancel the jobs, then end every process that we started; with purge, leave no trace."""
    if not testbed.pids.is_dir():
        say(f"nothing to stop in {testbed.state}")
        return
    for site in CLUSTERS:
        if running(testbed, f"slurmctld-{site.name}"):
            say(f"cluster {site.name}: cancelling its jobs")
            with contextlib.suppress(TestbedError, subprocess.TimeoutExpired):
                users = [f"--user={s.user}" for s in SITES if s.cluster == site.name]
                slurm(testbed, site.name, "scancel", *users)
                wait_until(partial(queue_empty, testbed, site.name), seconds=15)
    names = sorted(path.name for path in testbed.pids.iterdir())
    for kind in ("sshd", "slurmd", "slurmctld", "munged"):
        for name in names:
            if name.partition("-")[0] == kind:
                halt(testbed, name)
    for site in SITES:
        with contextlib.suppress(KeyError):
            for pid in processes_of(pwd.getpwnam(site.user).pw_uid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    say("stopped")
    if purge:
        for site in SITES:
            with contextlib.suppress(TestbedError):
                command("userdel", site.user)
        shutil.rmtree(testbed.state)
        say(f"removed {testbed.state} and the accounts")


def status(testbed: Testbed, *, as_json: bool) -> bool:
    """Print what runs; true when everything does."""
    expected = [f"sshd-{site.name}" for site in SITES]
    for site in CLUSTERS:
        expected += [f"munged-{site.name}", f"slurmctld-{site.name}"]
        expected += [f"slurmd-{site.name}{n}" for n in range(NODES)]
    pids = {name: running(testbed, name) for name in expected}
    if as_json:
        print(json.dumps(testbed.describe() | {"daemons": pids}, indent=2))
    else:
        for name, pid in pids.items():
            print(f"{name:20} {pid or 'down'}")
    return all(pids.values())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0] if __doc__ else None,
        epilog="exit status: 0 done (status: everything runs), 1 not, 4 bad input",
    )
    parser.add_argument("verb", choices=("start", "stop", "status"))
    parser.add_argument(
        "--state",
        type=Path,
        default=Path(os.environ.get("CROSSFL_TESTBED", DEFAULT_STATE)),
        help="the one directory for everything (default: $CROSSFL_TESTBED or %(default)s)",
    )
    parser.add_argument(
        "--base-port", type=int, default=22000, help="ports from here on are ours (%(default)s)"
    )
    parser.add_argument(
        "--purge", action="store_true", help="stop: remove the state and the accounts as well"
    )
    parser.add_argument("--format", choices=("text", "json"), default="text", help="of status")
    options = parser.parse_args()
    if not 1024 <= options.base_port <= 65000:
        print("testbed: --base-port must lie between 1024 and 65000", file=sys.stderr)
        return 4
    testbed = Testbed(state=options.state.absolute(), base_port=options.base_port)
    try:
        if options.verb == "start":
            start(testbed)
        elif options.verb == "stop":
            stop(testbed, purge=options.purge)
        else:
            return 0 if status(testbed, as_json=options.format == "json") else 1
    except (TestbedError, subprocess.TimeoutExpired) as error:
        print(f"testbed: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
