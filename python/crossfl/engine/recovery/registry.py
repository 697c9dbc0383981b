"""The recovery of the run in this process, for the parts that the engine gives no context.

StreamFlow makes a failure manager with its context. It makes a binding filter from a name and a
configuration, and a connector from a deployment's name, folder and configuration: neither can
reach the failure manager of its run. The failure manager therefore enters the run here.
"""

from dataclasses import dataclass

from streamflow.core.deployment import DeploymentManager

from crossfl.engine.recovery.policy import RecoveryPolicy


@dataclass(frozen=True)
class RunRecovery:
    """What a binding filter and a connector need to know about their run."""

    policy: RecoveryPolicy
    deployments: DeploymentManager


class Registry:
    """Holds the recovery of the current run; a process of the engine has one run at a time."""

    def __init__(self) -> None:
        self._run: RunRecovery | None = None

    @property
    def run(self) -> RunRecovery | None:
        """That of the current run; None where the run has no failure manager of ours."""
        return self._run

    @property
    def policy(self) -> RecoveryPolicy | None:
        """The policy of the current run."""
        return self._run.policy if self._run else None

    def enter(self, run: RunRecovery) -> None:
        """Make a run the current one."""
        self._run = run

    def leave(self, run: RunRecovery) -> None:
        """End a run, unless another has taken its place."""
        if self._run is run:
            self._run = None


REGISTRY = Registry()
