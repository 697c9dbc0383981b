"""The testbed of tests/schedulers, its login nodes to be stopped and started, and its runs."""

# ruff: noqa: F401, F811 (fixtures that are taken over, and then asked for by name)

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.schedulers.conftest import alpha, engine, python, shim, sites, testbed
from tests.support.faults import Federation, Login
from tests.support.testbed import Site


@pytest.fixture
def login(testbed: dict[str, Any]) -> Iterator[Login]:
    """The login node of alpha; it runs again afterwards, and the nodes behind it take jobs."""
    found = Login(testbed)
    yield found
    found.start()
    found.nodes("RESUME")


@pytest.fixture
def federation(tmp_path: Path, alpha: Site, python: Path) -> Iterator[Callable[..., Federation]]:
    """Makes a federation of alpha and leonardo; its runs end with the test."""
    made: list[Federation] = []

    def make(**job: Any) -> Federation:
        made.append(Federation(tmp_path, alpha, python, **job))
        return made[-1]

    yield make
    for run in (run for each in made for run in each.runs if run.poll() is None):
        run.kill()
        run.wait()
