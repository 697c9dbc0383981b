"""A real `sbatch --test-only` takes the job script of every named Slurm site."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
import yaml

from tests.support.paths import ROOT
from tests.support.testbed import Site

ENVIRONMENTS = ROOT / "environments"
SITES = sorted(
    path.parent.name
    for path in ENVIRONMENTS.glob("*/deployment.yml")
    if yaml.safe_load(path.read_text()).get("base") == "slurm"
)
REPLACED = {"partition": "boost", "account": "crossfl", "ranks": "2", "cpus": "2", "nodes": "2"}
"""What the testbed has in place of a supercomputer: its own partition and account, small nodes."""
ABSENT = ("--gpus-per-node=", "--qos=", "--constraint=")
"""What it has not: GPUs, an accounting database, features of nodes. These lines are taken out."""


@pytest.mark.parametrize("name", SITES)
def test_it_is_accepted(name: str, alpha: Site, tmp_path: Path) -> None:
    settings = {"user": "me", "workdir": "/tmp", "data": "/tmp", "venv": "/tmp/venv", **REPLACED}
    settings |= {"directives": "comment=try mail-type=NONE", "time": "00:10:00"}
    words = [w for k, v in settings.items() for w in ("--set", f"{name}.{k}={v}")]
    command = [sys.executable, "-m", "crossfl", "bind", "--facility", name, *words]
    subprocess.run(command, cwd=tmp_path, check=True)
    text = (tmp_path / "streamflow.d" / f"{name}.sh").read_text()
    lines = text.splitlines(keepends=True)
    kept = "".join(x for x in lines if not any(option in x for option in ABSENT))
    script = jinja2.Template(kept).render(streamflow_command="true")
    answer = alpha.shell(f"sbatch --test-only 2>&1 <<'END'\n{script}\nEND\necho status $?")
    assert "status 0" in answer and "to start at" in answer, answer
    assert answer.count("error") == 0, answer
