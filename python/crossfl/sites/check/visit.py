"""Check a facility at its login node: the login, its clock, its folders, what is installed.

The job script itself is run on the login node, with the probe in place of the step. So modules,
virtual environment or container, and variables are those of the jobs.
"""

import asyncio
import base64
import shlex
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

from streamflow.core.deployment import Connector, ExecutionLocation
from streamflow.core.exception import WorkflowExecutionException

from crossfl.engine.connectors.login_shell import interpreter
from crossfl.engine.connectors.ssh import SSHConnector
from crossfl.engine.connectors.ssh_connection import HostKeyError
from crossfl.engine.placement import LOCAL
from crossfl.protocol import variables
from crossfl.sites.check import probe
from crossfl.sites.check.answers import (
    SEE,
    compare_versions,
    failure_of,
    first_line,
    observation_of,
    variable_of,
)
from crossfl.sites.check.findings import Finding, Result, Site

LIMIT = 60
"""Seconds that one check may take at the site."""
CONNECT = 15
"""Seconds after which a login node that does not answer is out of reach."""
SKEW = 5.0
"""Seconds by which a clock may differ from ours."""
TRAFFIC = 8 * 2**20
"""Bytes sent, and bytes fetched, to measure the bandwidth."""
SLOW = 1.0
"""MiB/s below which a warning is due."""
# Whatever else the job script does, at its end it prints the variables of its facility.
TELL = f"""\
tell() {{
    echo "{probe.MARK}-facility ${variables.FACILITY}"
    echo "{probe.MARK}-data ${variables.DATA}"
    echo "{probe.MARK}-models ${variables.MODELS}"
}}
trap tell EXIT
"""
Check = Callable[[], Awaitable[Finding]]


class Visit:
    """The checks of one site, and what they found."""

    def __init__(self, site: Site, connector: Connector) -> None:
        self.site = site
        self.connector = connector
        self.results: list[Result] = []
        self.location: ExecutionLocation

    @property
    def login_node(self) -> Connector:
        """The connector of the machine on which commands are run."""
        return self.connector

    async def examine(self, room: float, wire: asyncio.Lock) -> None:
        """Do every check, one after the other; where the login fails, no other.

        Args:
            room: GiB that have to be free in the work folder.
            wire: held while the bandwidth is measured, so that no other measurement disturbs it.
        """
        if not await self._login():
            self.note("remaining checks", Finding("skip", "skipped: login failed"))
            return
        await self.check("clock", self._clock)
        await self.check("work folder", partial(self._workdir, room))
        root, models = await self._environment()
        if self.site.kind != LOCAL:  # whose files have been looked at without asking
            for name in self.site.datasets:
                await self.check(f"dataset {name}", partial(self._dataset, name, root))
            for base in dict.fromkeys(self.site.bases):
                await self.check(f"base model {base.name}", partial(self._base, base.name, models))
        if isinstance(self.login_node, SSHConnector):
            async with wire:
                await self.check("bandwidth", self._bandwidth)

    async def leave(self) -> None:
        """End the connection, and what an interrupt left in a queue."""
        for connector in {self.connector: None, self.login_node: None}:
            if connector is not self.login_node or isinstance(connector, SSHConnector):
                try:
                    await asyncio.wait_for(connector.undeploy(False), LIMIT)
                except Exception as error:
                    self.note("logout", Finding("warn", first_line(error), SEE))

    def note(self, check: str, finding: Finding) -> None:
        """Add a line to the table."""
        self.results.append(Result(self.site.name, check, *finding))

    async def check(self, name: str, check: Check, seconds: float = LIMIT + CONNECT) -> bool:
        """Do one check; what goes wrong in it is its finding. False if it failed."""
        try:
            finding = await asyncio.wait_for(check(), seconds)
        except TimeoutError:
            remedy = "try again, or ask the site"
            finding = Finding("fail", f"no answer within {seconds:.0f} s", remedy)
        except Exception as error:
            finding = Finding("fail", first_line(error), SEE)
        self.note(name, finding)
        return finding.status != "fail"

    async def ask(self, script: str, shell: Sequence[str] = ("sh",)) -> tuple[str, int]:
        """Run a script at the site; what it prints, errors too, and its status.

        Raises:
            WorkflowExecutionException: the site cannot be asked.
        """
        code = base64.b64encode(script.encode()).decode()
        answer: tuple[str, int] | None = await self.connector.run(
            location=self.location,
            command=[
                f'timeout {LIMIT} {shlex.join(shell)} -c "$(echo {code} | base64 -d)"',
                "</dev/null",
                "2>&1",
            ],
            capture_output=True,
        )
        if answer is None:
            raise WorkflowExecutionException("the site gave no answer")
        return answer

    def rendered(self, command: str) -> str:
        """The job script with a command in place of the step."""
        templates = getattr(self.connector, "template_map", None)
        if templates is None:
            return command
        return str(templates.get_command(command=command, template=self.site.service))

    # --- the checks ---

    async def _login(self) -> bool:
        begun = time.monotonic()
        try:
            async with asyncio.timeout(LIMIT + CONNECT):
                if isinstance(self.login_node, SSHConnector):
                    await self.login_node.probe()
                places = await self.connector.get_available_locations(self.site.service)
        except HostKeyError as error:
            self.note("host key", failure_of(error))
            return False
        except TimeoutError:
            self.note(
                "login", Finding("fail", f"no answer within {LIMIT + CONNECT} s", "try again")
            )
            return False
        except Exception as error:
            self.note("login", failure_of(error))
            return False
        self.location = next(iter(places.values())).location
        if isinstance(node := self.login_node, SSHConnector):
            if node.checkHostKey:
                self.note("host key", Finding("pass", f"the one in {node.known_hosts}"))
            else:
                remedy = "take `checkHostKey: false` out of the deployment"
                self.note("host key", Finding("warn", "it is not checked", remedy))
            seconds = time.monotonic() - begun
            self.note("login", Finding("pass", f"as {node.username or 'you'}, {seconds:.1f} s"))
        return True

    async def _clock(self) -> Finding:
        before = time.time()
        answer, _ = await self.ask("date +%s.%N")
        after = time.time()
        skew = float(answer.split()[-1]) - (before + after) / 2
        result = f"{abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} ours"
        if abs(skew) > SKEW + (after - before):
            return Finding("warn", result, "correct NTP at the facility, or on this machine")
        return Finding("pass", result)

    async def _workdir(self, room: float) -> Finding:
        if not (folder := self.site.workdir):
            return Finding("pass", "the engine's own, in the folder for temporary files")
        # The engine makes the folder: what counts is the nearest that is there.
        answer, status = await self.ask(
            f"p={shlex.quote(folder)}\n"
            'while [ ! -e "$p" ]; do p=$(dirname "$p"); done\n'
            f't=$(mktemp "$p/{probe.MARK}.XXXXXX") && rm "$t" && df -Pk "$p" | tail -n 1'
        )
        if status != 0:
            return Finding("fail", f"{folder}: {first_line(answer)}", self.site.setting("workdir"))
        free = int(answer.split()[-3]) / 2**20
        result = f"{folder} is writable, {free:.1f} GiB free (quotas aside)"
        if free < room:
            return Finding(
                "fail", result, f"make room, {room:g} GiB (--room), or another `workdir`"
            )
        return Finding("pass", result)

    async def _environment(self) -> tuple[str, str]:
        """Run the job script on the login node; the folders of datasets and of base models."""
        answer = ""

        async def check() -> Finding:
            nonlocal answer
            script = self.rendered(self.probing("login"))
            answer, _ = await self.ask(TELL + script, interpreter(script))
            if observation := observation_of(answer):
                return compare_versions(observation)
            lines = [line for line in answer.splitlines() if not line.startswith(probe.MARK)]
            problem = lines[-1] if lines else "the job script ends before its step"
            where = f"see {self.site.script}: " if self.site.script else ""
            return Finding("fail", problem, f"{where}modules, virtual environment or container")

        await self.check("environment", check)
        name = variable_of(answer, "facility")
        if self.site.datasets and name not in (self.site.name, "*"):
            remedy = f"bind again: the job script of {self.site.name} has to set it"
            problem = f"{variables.FACILITY} is {name or 'not set'}"
            self.note("facility", Finding("fail", problem, remedy))
        return variable_of(answer, "data"), variable_of(answer, "models")

    async def _dataset(self, name: str, root: str) -> Finding:
        remedy = f"{self.site.setting('data')}, or put it there"
        if not root:
            return Finding("fail", f"{variables.DATA} is not set there", remedy)
        path = shlex.quote(f"{root}/{name}")
        script = f"[ -r {path} ] || exit 3; timeout 20 du -sLk {path} || echo slow"
        answer, status = await self.ask(script)
        if status == 3:
            return Finding("fail", f"{root}/{name} is not there, or not readable", remedy)
        size = answer.split()[0]
        if not size.isdecimal():
            return Finding("pass", f"{root}/{name}; not summed up within 20 s")
        return Finding("pass", f"{root}/{name}, {int(size) / 2**10:.2f} MiB")

    async def _base(self, name: str, root: str) -> Finding:
        """Whether the base model of an adapter is there; its weights are compared in the job."""
        remedy = f"{self.site.setting('models')}, or put it there"
        if not root:
            return Finding("fail", f"{variables.MODELS} is not set there", remedy)
        _, status = await self.ask(f"[ -r {shlex.quote(f'{root}/{name}')}/config.json ] || exit 3")
        if status == 3:
            return Finding("fail", f"{root}/{name} is no model there, or not readable", remedy)
        return Finding("pass", f"{root}/{name}")

    async def _bandwidth(self) -> Finding:
        begun, block = time.monotonic(), b"\0" * 2**16
        async with await self.connector.get_stream_writer(
            ["cat", ">", "/dev/null"], self.location
        ) as writer:
            for _ in range(TRAFFIC // len(block)):
                await writer.write(block)
        up = TRAFFIC / 2**20 / (time.monotonic() - begun)
        begun, received = time.monotonic(), 0
        async with await self.connector.get_stream_reader(
            ["head", "-c", str(TRAFFIC), "/dev/zero"], self.location
        ) as reader:
            while chunk := await reader.read(2**16):
                received += len(chunk)
        down = received / 2**20 / (time.monotonic() - begun)
        if received < TRAFFIC:
            return Finding(
                "fail", f"only {received} of {TRAFFIC} bytes came", "look at the network"
            )
        result = f"{up:.0f} MiB/s there, {down:.0f} MiB/s back ({TRAFFIC >> 20} MiB each)"
        if min(up, down) < SLOW:
            return Finding("warn", result, "send less: aggregation.encoding, or fewer rounds")
        return Finding("pass", result)

    def probing(self, where: str) -> str:
        """The command that runs the probe."""
        source = Path(probe.__file__).read_text(encoding="utf-8")
        return shlex.join(["python", "-c", source, where, *self.site.datasets])
