"""Runs of the real engine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT
from tests.support.testbed import Site

CWL = ROOT / "tests" / "schedulers" / "cwl"
STREAMFLOW = str(Path(sys.executable).with_name("streamflow"))
RUN_SECONDS = 90


@dataclass
class Outcome:
    """How a run of the engine ended."""

    code: int
    log: str
    seconds: float
    outdir: Path
    outputs: dict[str, Any] = field(default_factory=dict)


def heed_signals() -> None:
    """Let a run heed the signals that whoever started the tests may have had ignored (nohup)."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def streamflow(
    path: Path, outdir: Path, log: Path, environment: Mapping[str, str] = os.environ
) -> subprocess.Popen[bytes]:
    """Start `streamflow run` on a StreamFlow file, in a session of its own."""
    with log.open("ab") as stream:
        return subprocess.Popen(
            [STREAMFLOW, "run", str(path), "--outdir", str(outdir)],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            cwd=path.parent,
            env=environment,
            start_new_session=True,
            preexec_fn=heed_signals,
        )


def unset() -> dict[str, str]:
    """The environment of a person who has set nothing of ours by hand."""
    return {k: v for k, v in os.environ.items() if not k.startswith("CROSSFL_")}


class Engine:
    """`streamflow run` on a workflow of ours, as a person would start it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outdir = folder / "out"

    def write(
        self,
        workflow: str,
        inputs: dict[str, Any],
        deployments: dict[str, Any],
        target: dict[str, Any],
        step: str = "/job",
        **more: Any,
    ) -> Path:
        (self.folder / "job.json").write_text(json.dumps(inputs))
        path = self.folder / "streamflow.yml"
        path.write_text(
            json.dumps(
                {
                    "version": "v1.0",
                    "workflows": {
                        "test": {
                            "type": "cwl",
                            "config": {
                                "file": str(CWL / workflow),
                                "settings": str(self.folder / "job.json"),
                            },
                            "bindings": [{"step": step, "target": target}],
                        }
                    },
                    "deployments": deployments,
                    "database": {"type": "default", "config": {"connection": ":memory:"}},
                    **more,
                },
                indent=2,
            )
        )
        return path

    def start(self, *args: Any, **kwargs: Any) -> subprocess.Popen[bytes]:
        path = self.write(*args, **kwargs)
        (self.folder / "log").unlink(missing_ok=True)
        return streamflow(path, self.outdir, self.folder / "log")

    def wait(
        self, process: subprocess.Popen[bytes], since: float, seconds: float = RUN_SECONDS
    ) -> Outcome:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            pytest.fail(f"the run did not end within {seconds} s:\n{self.log()}")
        text = self.log()
        outcome = Outcome(code, text, time.monotonic() - since, self.outdir)
        if code == 0:
            outcome.outputs = json.JSONDecoder().raw_decode(text[text.rindex("\n{\n") + 1 :])[0]
        return outcome

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def run(self, *args: Any, seconds: float = RUN_SECONDS, **kwargs: Any) -> Outcome:
        since = time.monotonic()
        return self.wait(self.start(*args, **kwargs), since, seconds)

    def run_at(
        self,
        site: Site,
        script: str | list[str],
        service: dict[str, Any] | None = None,
        *,
        seconds: float = RUN_SECONDS,
        login: dict[str, Any] | None = None,
        **queue: Any,
    ) -> Outcome:
        """Run one script, or several at once, as jobs of a site."""
        since = time.monotonic()
        return self.wait(self.start_at(site, script, service, login=login, **queue), since, seconds)

    def start_at(
        self,
        site: Site,
        script: str | list[str],
        service: dict[str, Any] | None = None,
        *,
        login: dict[str, Any] | None = None,
        **queue: Any,
    ) -> subprocess.Popen[bytes]:
        more = deployed(site, service, login, **queue)
        if isinstance(script, str):
            return self.start("one.cwl", {"script": script}, **more)
        return self.start("many.cwl", {"scripts": script}, **more)

    def run_in_rounds(
        self,
        site: Site,
        scripts: list[str],
        *args: Any,
        seconds: float = RUN_SECONDS,
        **kwargs: Any,
    ) -> Outcome:
        """Run scripts as jobs of a loop, where the engine is known to hang on a failure."""
        since = time.monotonic()
        return self.wait(self.start_in_rounds(site, scripts, *args, **kwargs), since, seconds)

    def start_in_rounds(
        self,
        site: Site,
        scripts: list[str],
        service: dict[str, Any] | None = None,
        *,
        login: dict[str, Any] | None = None,
        **queue: Any,
    ) -> subprocess.Popen[bytes]:
        more = deployed(site, service, login, **queue)
        return self.start(
            "loop.cwl", {"scripts": scripts, "more": True}, **more, step="/rounds/job"
        )


def deployed(
    site: Site, service: dict[str, Any] | None, login: dict[str, Any] | None, **queue: Any
) -> dict[str, Any]:
    """The deployments of a site, and the target of the step that runs there."""
    return {
        "deployments": {
            f"{site.name}-login": site.login(**login or {}),
            site.name: site.queue(service, **queue),
        },
        "target": {"deployment": site.name} | ({} if service is None else {"service": "train"}),
    }
