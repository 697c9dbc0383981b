"""The stand-in for an absent facility: its jobs are told why they stand in."""

import base64
import contextlib
from collections.abc import MutableMapping, MutableSequence
from typing import Any

from streamflow.core.deployment import Connector, ExecutionLocation

from crossfl.engine.interruption import INTERRUPTION
from crossfl.engine.recovery.registry import REGISTRY
from crossfl.protocol import variables


class StandsIn(Connector):
    """To be inherited from before the engine's connector: a stand-in is told why it stands in."""

    async def run(
        self,
        location: ExecutionLocation,
        command: MutableSequence[str],
        environment: MutableMapping[str, str] | None = None,
        *args: Any,
        job_name: str | None = None,
        **kwargs: Any,
    ) -> tuple[str, int] | None:
        policy = REGISTRY.policy
        if policy and job_name and (reason := policy.absence(job_name)):
            encoded = base64.b64encode(reason.encode()).decode()
            variable = variables.LATE if policy.is_late(job_name) else variables.ABSENT
            environment = {**(environment or {}), variable: encoded}
        answer: tuple[str, int] | None
        with INTERRUPTION.running(self.deployment_name) if job_name else contextlib.nullcontext():
            answer = await super().run(
                location, command, environment, *args, job_name=job_name, **kwargs
            )
        return answer
