"""Check a facility at its scheduler: its commands, its history, whether it takes and runs a job."""

import asyncio
import re
import shlex
import time
from collections.abc import Sequence
from typing import Any

from streamflow.core.deployment import Connector
from streamflow.core.exception import WorkflowException, WorkflowExecutionException
from streamflow.core.utils import random_name

from crossfl.engine.connectors.pbs import PBSConnector
from crossfl.engine.connectors.queue import QueueConnector
from crossfl.sites.check import probe
from crossfl.sites.check.answers import (
    Observation,
    compare_versions,
    first_line,
    last_line,
    observation_of,
)
from crossfl.sites.check.findings import Finding, Site
from crossfl.sites.check.visit import LIMIT, Visit

COMMANDS = {
    "Slurm": ("sbatch", "squeue", "scontrol", "scancel"),
    "PBS": ("qsub", "qstat", "qdel"),
}
SUBMIT = "sbatch --parsable"
"""How the engine submits to Slurm."""
TEST_SECONDS = 120
"""Wall-clock limit of the test job."""


class TestOnly:
    """Stands in for the connection of a Slurm connector: what it submits is only tried out."""

    def __init__(self, connector: Connector) -> None:
        self._connector = connector

    async def run(self, *, command: Sequence[str], **more: Any) -> tuple[str, int] | None:
        """Run a command, with a flag for `sbatch` that the engine cannot give.

        Raises:
            WorkflowExecutionException: the flag has no place, and a job would be submitted.
        """
        text = " ".join(command)
        if "sbatch" in text and text.count(SUBMIT) != 1:
            raise WorkflowExecutionException(
                f"--test-only cannot be added: {SUBMIT!r} is not once in the command {text}"
            )
        test = text.replace(SUBMIT, f"{SUBMIT} --test-only")
        answer: tuple[str, int] | None = await self._connector.run(command=[test], **more)
        return answer


class QueueVisit(Visit):
    """A site with Slurm or PBS; with `wait`, a job is run that may take so many seconds."""

    connector: QueueConnector

    def __init__(self, site: Site, connector: QueueConnector, wait: int | None) -> None:
        super().__init__(site, connector)
        self._wait = wait

    @property
    def login_node(self) -> Connector:
        """The connector that the scheduler's is wrapped around."""
        return self.connector.connector

    async def examine(self, room: float, wire: asyncio.Lock) -> None:
        """The checks of every place, then those of the scheduler."""
        await super().examine(room, wire)
        if not hasattr(self, "location"):
            return
        if not await self.check("scheduler", self._commands):
            self.note("remaining checks", Finding("skip", "skipped: no scheduler"))
            return
        pbs = isinstance(self.connector, PBSConnector)
        await self.check("job history", self._pbs_history if pbs else self._slurm_history)
        await self.check("submission", self._pbs_queue if pbs else self._slurm_test_only)
        if self._wait is not None:
            await self.check("test job", self._job, seconds=self._wait + LIMIT)

    async def _commands(self) -> Finding:
        words = COMMANDS[self.connector.scheduler]
        answer, _ = await self.ask(
            f'for c in {" ".join(words)}; do command -v "$c" >/dev/null || echo "$c"; done'
        )
        if absent := answer.split():
            return Finding(
                "fail",
                f"no {', '.join(absent)} in the PATH of a login without a terminal",
                "set PATH in ~/.bashrc there, before it returns for shells without a terminal",
            )
        version, _ = await self.ask(f"{words[0]} --version")
        return Finding("pass", f"{', '.join(words)}; {first_line(version)}")

    async def _pbs_history(self) -> Finding:
        answer, status = await self.ask("qstat -Bf")
        if status != 0:
            return Finding("fail", f"`qstat -Bf`: {first_line(answer)}", "ask the site")
        if not re.search(r"job_history_enable\s*=\s*True", answer):
            problem = "the server keeps no job history: nobody can know how a job ended"
            return Finding("fail", problem, "ask the site for job_history_enable=True")
        kept = re.search(r"job_history_duration\s*=\s*(\S+)", answer)
        return Finding("pass", f"the server keeps it{f' for {kept[1]}' if kept else ''}")

    async def _slurm_history(self) -> Finding:
        if (await self.ask("sacct -n -X -j 1"))[1] == 0:
            return Finding("pass", "accounting answers")
        answer, status = await self.ask("scontrol show config")
        kept = re.search(r"MinJobAge\s*=\s*(\d+)", answer)
        if status != 0 or not kept:
            return Finding("fail", f"`scontrol show config`: {first_line(answer)}", "ask the site")
        age, needed = int(kept[1]), 2 * self.connector.pollingInterval
        if age < needed:
            problem = f"no accounting, and the controller forgets a job after {age} s"
            return Finding("fail", problem, f"lower `pollingInterval` to {age // 2} or less")
        return Finding("pass", f"no accounting, but the controller knows a job for {age} s")

    async def _slurm_test_only(self) -> Finding:
        """Whether Slurm would take this very script: partition, account and resources."""
        connector, connection = self.connector, self.connector.connector
        connector.connector = TestOnly(connection)
        try:
            # The engine's own way to submit; ours would then look for the id of a job.
            answer = await super(QueueConnector, connector)._run_batch_command(
                command=self.rendered("true"),
                environment=self.location.environment,
                job_name=probe.MARK,
                location=self.location,
            )
        except WorkflowException as error:
            reason = str(error).partition("to Slurm: ")[2] or str(error)
            return Finding("fail", last_line(reason, ("rror", "fail")), self._remedy(reason))
        finally:
            connector.connector = connection
        start = re.search(r"to start at (\S+)", answer)
        return Finding("pass", f"accepted{f', would start at {start[1]}' if start else ''}")

    async def _pbs_queue(self) -> Finding:
        """Whether the queue is open: PBS has no way to try a submission."""
        script = (
            self.site.script.read_text(encoding="utf-8", errors="replace")
            if self.site.script
            else ""
        )
        directive = re.search(r"^#PBS\s+-q\s+(\S+)", script, re.MULTILINE)
        service = self.connector.services.get(self.site.service)
        queue = (service and service.destination) or (directive and directive[1])
        if not queue:
            return Finding("skip", "the server's default queue; --submit tries a job")
        answer, status = await self.ask(f"qstat -Qf {shlex.quote(queue)}")
        if status != 0:
            remedy = f"{self.site.setting('queue')}, one of `qstat -Q`"
            return Finding("fail", f"queue {queue}: {first_line(answer)}", remedy)
        closed = [key for key in ("enabled", "started") if re.search(rf"{key}\s*=\s*False", answer)]
        if closed:
            problem = f"queue {queue} is not {' and not '.join(closed)}"
            return Finding("fail", problem, f"wait for it, or {self.site.setting('queue')}")
        return Finding("pass", f"queue {queue} is open; the account is judged with --submit only")

    async def _job(self) -> Finding:
        """A job of the real script, by the engine's own way, which cancels it with the check."""
        begun, folder = time.monotonic(), self.site.workdir
        if folder:
            await self.ask(f"mkdir -p {shlex.quote(folder)}")
        try:
            answer = await asyncio.wait_for(
                self.connector.run(
                    location=self.location,
                    command=[self.probing("job")],
                    workdir=folder,
                    job_name=f"/{probe.MARK}-{random_name()}/0",
                    timeout=TEST_SECONDS,
                    capture_output=True,
                ),
                self._wait,
            )
        except TimeoutError:
            remedy = "look at the queue there, or give it longer with --wait"
            why = f": {self.connector.waiting}" if self.connector.waiting else ""
            return Finding("fail", f"not over within {self._wait} s, and cancelled{why}", remedy)
        except WorkflowException as error:
            return Finding("fail", str(error), self._remedy(str(error)))
        output, status = answer or ("", 1)
        observation = observation_of(output)
        if status != 0 or observation is None:
            problem = f"it ended with {status}: {last_line(output, ('rror',))}"
            return Finding("fail", problem, f"see {self.site.script}")
        took = f"on {observation.host}, {time.monotonic() - begun:.0f} s after its submission"
        return self._judge(observation, took)

    def _judge(self, observation: Observation, took: str) -> Finding:
        """What the probe saw in a job, which `took` describes."""
        if observation.absent:
            remedy = f"{self.site.setting('data')}, on a file system that compute nodes have"
            return Finding("fail", f"no dataset {', '.join(observation.absent)} {took}", remedy)
        if observation.no_launcher:
            problem = f"no {observation.no_launcher[0]} in the PATH of the job, {took}"
            return Finding("fail", problem, f"load its module: {self.site.setting('modules')}")
        if observation.launch_failure is not None:
            problem = f"the launcher fails, {took}: {observation.launch_failure}"
            remedy = f"load its MPI ({self.site.setting('modules')}), or see CROSSFL_LAUNCHER in "
            return Finding("fail", problem, f"{remedy}{self.site.script}")
        if observation.no_staging:
            problem = f"{observation.no_staging[0]} is no folder that the job can write to, {took}"
            return Finding("fail", problem, f"{self.site.setting('staging')}, or leave it out")
        if (versions := compare_versions(observation)).status == "fail":
            return versions
        ranks = "" if observation.ranks is None else f"; ranks: {observation.ranks}"
        return Finding("pass", f"ran {took}{ranks}; GPUs that torch sees: {observation.gpus}")

    def _remedy(self, reason: str) -> str:
        """What to change where the scheduler refuses a job, by what its reason names."""
        for word in ("account", "partition", "qos", "queue"):
            if re.search(rf"\b{word}\b", reason, re.IGNORECASE):
                return f"{self.site.setting(word)}, one that is yours there"
        return f"see {self.site.script}: what it asks for"
