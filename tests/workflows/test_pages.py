"""Pages that a reader follows from the first line to the last do what they say."""

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.test_docs import RUN_WHOLE

BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
LEFT_OUT = ("make setup\n", "crossfl compare")
"""This environment is set up; a comparison trains four times, and has its own test."""


@pytest.mark.parametrize("page", RUN_WHOLE)
def test_it_runs_as_it_stands(page: str, environment: Mapping[str, str], tmp_path: Path) -> None:
    """Every block, in order: commands in one shell, code in one interpreter each time."""
    text = (ROOT / page).read_text("utf-8")
    steps: list[str] = ["set -e"]
    programs: list[Path] = []
    for indent, language, block in BLOCK.findall(text):
        lines = "".join(line.removeprefix(indent) for line in block.splitlines(keepends=True))
        if lines.startswith(LEFT_OUT):
            continue
        if language != "python":
            steps.append(lines)
            continue
        # Names of a block are known to those that follow.
        programs.append(tmp_path / f"block{len(programs)}.py")
        programs[-1].write_text(lines)
        whole = tmp_path / f"program{len(programs)}.py"
        whole.write_text("".join(p.read_text() for p in programs))
        if page == "docs/python.md":  # trained once: the last program is all of them
            continue
        steps.append(f"{sys.executable} {whole}")
    if page == "docs/python.md":
        steps.append(f"{sys.executable} {tmp_path / f'program{len(programs)}.py'}")
    assert len(programs) >= 1 and len(steps) >= 3
    done = subprocess.run(
        ["bash", "-c", "\n".join(steps)],
        cwd=tmp_path,
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
