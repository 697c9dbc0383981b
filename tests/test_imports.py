"""Which wing of the package may import which: the contracts in `pyproject.toml` hold, and bite."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

LINTER = Path(sys.executable).with_name("lint-imports")

AT_THE_TOP = (
    ("cli", "storage.files"),
    ("engine.connectors.local", "facility.place"),
    ("engine.recovery.policy", "observe.page.plots"),
    ("server.rounds", "facility.place"),
    ("server.rounds", "observe.follow"),
    ("observe.follow", "server.state"),
    ("storage.files", "observe.events"),
)
IN_A_FUNCTION = (
    ("steps.plan", "engine.placement"),
    ("sites.bind", "server.state"),
    ("engine.routing", "sites.bind"),
    ("learning.training", "server.state"),
    ("server.rounds", "learning.training"),
    ("facility.place", "learning.training"),
    ("protocol.layout", "storage.files"),
)
CIRCLE = ("engine.recovery.policy", "engine.recovery.replay")


def lint(root: Path) -> "subprocess.CompletedProcess[str]":
    """Hold the package in `root/python` to the contracts in `root/pyproject.toml`."""
    return subprocess.run(
        [LINTER, "--no-cache"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root / "python")},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def complaints(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the linter says of a copy of the package that has all these imports added."""
    root = tmp_path_factory.mktemp("copy")
    shutil.copy(ROOT / "pyproject.toml", root)
    package = root / "python" / "crossfl"
    shutil.copytree(
        ROOT / "python" / "crossfl", package, ignore=shutil.ignore_patterns("__pycache__")
    )
    for importer, imported in (*AT_THE_TOP, *IN_A_FUNCTION, CIRCLE):
        statement = f"import crossfl.{imported}\n"
        if (importer, imported) in IN_A_FUNCTION:
            statement = f"def _spoiled() -> None:\n    {statement}"
        path = package / f"{importer.replace('.', '/')}.py"
        path.write_text(f"{path.read_text()}\n\n{statement}")
    result = lint(root)
    assert result.returncode == 1, result.stdout + result.stderr
    return result.stdout


def test_every_import_goes_down_and_none_closes_a_circle() -> None:
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


@pytest.mark.parametrize(("importer", "imported"), AT_THE_TOP + IN_A_FUNCTION)
def test_a_forbidden_import_is_found(complaints: str, importer: str, imported: str) -> None:
    assert f"crossfl.{importer} -> crossfl.{imported} (l." in complaints


def test_a_circle_is_found(complaints: str) -> None:
    assert "No cycles are allowed in crossfl.engine.recovery.\n" in complaints
