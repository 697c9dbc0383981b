"""Many ranks from one command: a step starts itself again under the launcher of its facility.

The job template runs the step once, on the first node. Where `CROSSFL_LAUNCHER` is set, for example
to `srun --ntasks-per-node=4`, `mpiexec -n 8 --ppn 4` or `torchrun --nproc-per-node=4`, the step
runs that launcher on itself, and each of the processes it starts is one rank.
"""

import atexit
import functools
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from crossfl.errors import CrossFLError
from crossfl.facility.time_budget import StopSignal
from crossfl.protocol import variables

RANKS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun, accelerate
    ("PALS_RANKID", "PALS_SIZE", "PALS_LOCAL_RANKID"),  # mpiexec of Cray
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),  # mpiexec of MPICH and Intel
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),  # srun
)
"""How launchers name rank, number of ranks and rank on the node; the first that is there counts."""
SCRIPTS = ("torchrun", "accelerate")
"""Launchers that bring their own Python and start a module with `-m`."""
LOGS = "PET_LOG_DIR"
"""Where these two make a folder, which they leave behind."""


def is_wanted() -> bool:
    """Whether this process is to launch ranks."""
    return bool(os.environ.get(variables.LAUNCHER)) and not is_rank()


def is_rank() -> bool:
    """Whether this process is one of the ranks."""
    return variables.LAUNCHED in os.environ


def is_follower() -> bool:
    """Whether this process is a rank that leaves writing to the first one."""
    return is_rank() and os.environ.get("RANK") != "0"


def ranks(arguments: Sequence[str], stop: StopSignal) -> None:
    """Run `crossfl` with these arguments under the launcher, and wait for it.

    An order to stop is passed on to the ranks through the launcher: as SIGUSR1, which srun and
    mpiexec forward and survive, or as SIGTERM, the one that torchrun forwards.

    Raises:
        CrossFLError: the launcher cannot be started, or a rank failed; it has said why.
    """
    launcher = shlex.split(os.environ[variables.LAUNCHER])
    python = [] if Path(launcher[0]).name in SCRIPTS else [sys.executable]
    command = [*launcher, *python, "-m", "crossfl", *arguments]
    address = {"MASTER_ADDR": first_node(os.environ), "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory(prefix="crossfl-ranks-") as logs:
        environment = {LOGS: logs, **address, **os.environ, variables.LAUNCHED: "1"}
        try:
            process = subprocess.Popen(command, env=environment)
        except OSError as error:
            raise CrossFLError(
                f"{variables.LAUNCHER}: {launcher[0]} cannot be started: {error}"
            ) from None
        number = signal.SIGUSR1 if python else signal.SIGTERM
        stop.passed_on = functools.partial(process.send_signal, number)
        if stop.received:
            stop.passed_on()
        if (status := process.wait()) != 0:
            raise CrossFLError(f"{shlex.join(launcher)} ended with {status}: its output says why")


def join() -> None:
    """Tell torch and accelerate which rank this is, in the words they know; all but one are silent.

    Raises:
        CrossFLError: no variable of a known launcher says which rank this is.
    """
    known = [names for names in RANKS if all(name in os.environ for name in names)]
    if not known:
        raise CrossFLError(
            f"{variables.LAUNCHER} started this process, but no variable of a launcher says which "
            f"rank it is: none of {', '.join(names[0] for names in RANKS)}"
        )
    for name, own in zip(RANKS[0], known[0], strict=True):
        os.environ[name] = os.environ[own]
    if os.environ["RANK"] != "0":
        os.environ[variables.PROGRESS] = os.devnull


def leave() -> NoReturn:
    """End this rank, well: part from the others, tidy up, and leave Python without winding it up.

    While Python is wound up, a thread of torch that still serves the ranks can abort the process.
    """
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()  # Python has no other name for it
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def first_node(environment: Mapping[str, str]) -> str:
    """Where rank 0 runs: the first of the job's nodes; on a single one, no name is looked up.

    In a container, where jobs have one node, there may be neither `scontrol` nor the node file.
    """
    hosts: list[str] = []
    nodes = environment.get("SLURM_JOB_NODELIST")
    if nodes and environment.get("SLURM_JOB_NUM_NODES") != "1":
        command = ["scontrol", "show", "hostnames", nodes]
        hosts = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace"
        ).stdout.split()
    elif (path := environment.get("PBS_NODEFILE")) and Path(path).is_file():
        hosts = Path(path).read_text(encoding="utf-8").split()
    return hosts[0] if len(set(hosts)) > 1 else "127.0.0.1"


def free_port() -> int:
    """A port of this node, where rank 0 runs, that nobody listens on now, for the ranks to meet."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
