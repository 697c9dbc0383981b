"""What tests of the engine's side share."""

from collections.abc import Iterator

import pytest

from crossfl.engine.recovery.policy import RecoveryPolicy
from crossfl.engine.recovery.registry import REGISTRY, RunRecovery


@pytest.fixture
def policy() -> Iterator[RecoveryPolicy]:
    """The recovery policy of a run that goes on, without deployments."""
    run = RunRecovery(RecoveryPolicy(), None)  # type: ignore[arg-type] # it is not asked for any
    REGISTRY.enter(run)
    yield run.policy
    REGISTRY.leave(run)
