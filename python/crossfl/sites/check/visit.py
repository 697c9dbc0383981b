"""What is looked at in every place: the way there, its clock, its folders, what is installed.

The job script itself is run on the login node, with a look around in place of the step; so modules,
virtual environment or container, and variables are those of the jobs.
"""

import asyncio
import base64
import json
import re
import shlex
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from streamflow.core.deployment import Connector, ExecutionLocation
from streamflow.core.exception import WorkflowExecutionException

from crossfl.engine.connectors.ssh import HostKeyError, SSHConnector
from crossfl.sites.check import look
from crossfl.sites.check.check import Finding, Result, Site

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
SEE = "see the message"
# Whatever else the job script does, how it sees its facility is said at its end.
LAST_WORDS = f"""\
tell() {{ echo "{look.MARK}-facility $CROSSFL_FACILITY"; echo "{look.MARK}-data $CROSSFL_DATA"; }}
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
        """Do every check, one after the other; without a login there is none but that.

        Args:
            room: GiB that have to be free in the work folder.
            wire: held while the bandwidth is measured, so that no other measurement disturbs it.
        """
        if not await self._login():
            self.note("all else", Finding("skip", "not tried, for want of a login"))
            return
        await self.check("clock", self._clock)
        await self.check("work folder", partial(self._workdir, room))
        root = await self._environment()
        for name in self.site.datasets:
            await self.check(f"dataset {name}", partial(self._dataset, name, root))
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
            finding = Finding("fail", f"no end within {seconds:.0f} s", remedy)
        except Exception as error:
            finding = Finding("fail", first_line(error), SEE)
        self.note(name, finding)
        return finding.status != "fail"

    async def ask(self, script: str, shell: str = "sh") -> tuple[str, int]:
        """Run a script at the site; what it prints, errors too, and its status.

        Raises:
            WorkflowExecutionException: the site cannot be asked.
        """
        code = base64.b64encode(script.encode()).decode()
        answer: tuple[str, int] | None = await self.connector.run(
            location=self.location,
            command=[f"echo {code} | base64 -d | timeout {LIMIT} {shell}", "2>&1"],
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
            self.note("host key", Finding("fail", *remedied(error)))
            return False
        except TimeoutError:
            self.note("login", Finding("fail", f"no end within {LIMIT + CONNECT} s", "try again"))
            return False
        except Exception as error:
            self.note("login", Finding("fail", *remedied(error)))
            return False
        self.location = next(iter(places.values())).location
        if isinstance(node := self.login_node, SSHConnector):
            if node.checkHostKey:
                self.note("host key", Finding("pass", f"the one in {node.known_hosts}"))
            else:
                remedy = "take `checkHostKey: false` out of the deployment"
                self.note("host key", Finding("warn", "nobody looks at it", remedy))
            took = f"{time.monotonic() - begun:.1f} s"
            self.note("login", Finding("pass", f"as {node.username or 'you'}, {took}"))
        return True

    async def _clock(self) -> Finding:
        before = time.time()
        answer, _ = await self.ask("date +%s.%N")
        after = time.time()
        skew = float(answer.split()[-1]) - (before + after) / 2
        said = f"{abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} ours"
        if abs(skew) > SKEW + (after - before):
            return Finding("warn", said, "have NTP put right, there or here")
        return Finding("pass", said)

    async def _workdir(self, room: float) -> Finding:
        if not (folder := self.site.workdir):
            return Finding("pass", "the engine's own, in the folder for temporary files")
        # The engine makes the folder: what counts is the nearest that is there.
        answer, status = await self.ask(
            f"p={shlex.quote(folder)}\n"
            'while [ ! -e "$p" ]; do p=$(dirname "$p"); done\n'
            f't=$(mktemp "$p/{look.MARK}.XXXXXX") && rm "$t" && df -Pk "$p" | tail -n 1'
        )
        if status != 0:
            return Finding("fail", f"{folder}: {first_line(answer)}", self.setting("workdir"))
        free = int(answer.split()[-3]) / 2**20
        said = f"{folder} is writable, {free:.1f} GiB free (quotas aside)"
        if free < room:
            return Finding("fail", said, f"make room, {room:g} GiB (--room), or another `workdir`")
        return Finding("pass", said)

    async def _environment(self) -> str:
        """Run the job script on the login node; gives the folder of the datasets."""
        answer = ""

        async def check() -> Finding:
            nonlocal answer
            script = LAST_WORDS + self.rendered(self.looking("login"))
            answer, _ = await self.ask(script, "bash -l" if self.site.script else "bash")
            if found := seen(answer):
                return versions(found)
            other = [line for line in answer.splitlines() if not line.startswith(look.MARK)]
            said = other[-1] if other else "the job script ends before its step"
            where = f"see {self.site.script}: " if self.site.script else ""
            return Finding("fail", said, f"{where}modules, virtual environment or container")

        await self.check("environment", check)
        if self.site.datasets and (name := told(answer, "facility")) not in (self.site.name, "*"):
            remedy = f"bind again: the job script of {self.site.name} has to set it"
            said = f"CROSSFL_FACILITY is {name or 'not set'}"
            self.note("facility", Finding("fail", said, remedy))
        return told(answer, "data")

    async def _dataset(self, name: str, root: str) -> Finding:
        remedy = f"{self.setting('data')}, or put it there"
        if not root:
            return Finding("fail", "CROSSFL_DATA is not set there", remedy)
        path = shlex.quote(f"{root}/{name}")
        script = f"[ -r {path} ] || exit 3; timeout 20 du -sLk {path} || echo slow"
        answer, status = await self.ask(script)
        if status == 3:
            return Finding("fail", f"{root}/{name} is not there, or not readable", remedy)
        size = answer.split()[0]
        if not size.isdecimal():
            return Finding("pass", f"{root}/{name}; not summed up within 20 s")
        return Finding("pass", f"{root}/{name}, {int(size) / 2**10:.2f} MiB")

    async def _bandwidth(self) -> Finding:
        begun, block = time.monotonic(), b"\0" * 2**16
        async with await self.connector.get_stream_writer(
            ["cat", ">", "/dev/null"], self.location
        ) as writer:
            for _ in range(TRAFFIC // len(block)):
                await writer.write(block)
        up = TRAFFIC / 2**20 / (time.monotonic() - begun)
        begun, got = time.monotonic(), 0
        async with await self.connector.get_stream_reader(
            ["head", "-c", str(TRAFFIC), "/dev/zero"], self.location
        ) as reader:
            while chunk := await reader.read(2**16):
                got += len(chunk)
        down = got / 2**20 / (time.monotonic() - begun)
        if got < TRAFFIC:
            return Finding("fail", f"only {got} of {TRAFFIC} bytes came", "look at the network")
        said = f"{up:.0f} MiB/s there, {down:.0f} MiB/s back ({TRAFFIC >> 20} MiB each)"
        if min(up, down) < SLOW:
            return Finding("warn", said, "send less: aggregation.encoding, or fewer rounds")
        return Finding("pass", said)

    # --- words ---

    def setting(self, name: str) -> str:
        """How to change a setting of this site."""
        return f"crossfl bind --set {self.site.name}.{name}=…"

    def looking(self, where: str) -> str:
        """The command that looks around."""
        source = Path(look.__file__).read_text()
        return shlex.join(["python", "-c", source, where, *self.site.datasets])


def seen(output: str) -> dict[str, Any] | None:
    """What a look around printed, if it got that far."""
    found = re.search(rf"^{look.MARK} (\{{.*\}})$", output, re.MULTILINE)
    return json.loads(found[1]) if found else None


def told(output: str, name: str) -> str:
    """What the job script said at its end."""
    found = re.search(rf"^{look.MARK}-{name} (.+)$", output, re.MULTILINE)
    return found[1] if found else ""


def versions(found: Mapping[str, Any]) -> Finding:
    """What is installed there against what is installed here: crossfl has to be the same."""
    ours = {name: metadata.version(name).partition("+")[0] for name in look.PACKAGES}
    theirs = {name: (found[name] or "none").partition("+")[0] for name in look.PACKAGES}
    said = f"python {found['python']}, " + ", ".join(f"{k} {v}" for k, v in theirs.items())
    other = [name for name in look.PACKAGES if theirs[name] != ours[name]]
    if not other:
        return Finding("pass", said)
    said += f"; here {', '.join(f'{name} {ours[name]}' for name in other)}"
    if "crossfl" in other:
        return Finding("fail", said, "install our version of crossfl there")
    missing = any(found[name] is None for name in other)
    return Finding("fail" if missing else "warn", said, "install requirements.lock there")


def first_line(error: object) -> str:
    """The first line of a message, or the name of the error."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def remedied(error: Exception) -> tuple[str, str]:
    """A connector's message: what is wrong, and then what to do."""
    said, _, remedy = str(error).partition(". ")
    return said.partition(", host ")[2] or first_line(said), remedy or SEE


def lines_of(text: str, words: Sequence[str]) -> str:
    """The last line with one of the words, else the last line."""
    lines = text.strip().splitlines() or [""]
    return next((x for x in reversed(lines) if any(word in x for word in words)), lines[-1])
