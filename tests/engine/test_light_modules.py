"""Modules that every start of `crossfl` imports, or that run without an engine, load no engine."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module",
    [
        "cli",
        "engine.parent",
        "engine.forkserver.server",
        "engine.placement",
        "engine.recovery.policy",
    ],
)
def test_no_engine_is_loaded(module: str) -> None:
    code = f"import sys, crossfl.{module}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"streamflow", "torch", "msgspec"} & set(run.stdout.split())
