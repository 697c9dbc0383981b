"""A run whose job is not as it should be ends before anything starts, as `crossfl check` would."""

import time
from pathlib import Path

import pytest

from crossfl import cli
from tests.support.copies import copy_federation
from tests.support.processes import Run

CASES = [
    ("aggregation:", "agregation:", "no field 'agregation'"),
    ("path: config.json", "path: konfig.json", "konfig.json, which cannot be read"),
]


@pytest.mark.parametrize(("old", "new", "message"), CASES)
def test_it_says_what_check_says(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, message: str
) -> None:
    federation = copy_federation(tmp_path)
    job = federation / "federation.yml"
    assert old in job.read_text()
    job.write_text(job.read_text().replace(old, new, 1))
    bindings = federation / "streamflow.yml"
    journal = "vm: {type: crossfl.local, config: {journal: journal}}"
    bindings.write_text(
        bindings.read_text().replace("vm: {type: crossfl.local, config: {}}", journal)
    )
    before = sorted(tmp_path.rglob("*"))
    begun = time.monotonic()
    result = run(
        "streamflow", "run", "--outdir", tmp_path / "out", "streamflow.yml", cwd=federation
    )
    assert time.monotonic() - begun < 30
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if "ERROR" in line]
    assert f"{job}: " in line and message in line
    assert "Traceback" not in result.stderr and "EXECUTING" not in result.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert cli.main(["check", "--offline", str(bindings)]) == cli.BAD_INPUT
    said = capsys.readouterr().err.strip().removeprefix("crossfl check: ").removesuffix(" [CFL2]")
    assert said in result.stderr
