"""Where the binding filter sends a job, with the engine's own jobs, targets and connectors."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from streamflow.core.deployment import DeploymentConfig, Target
from streamflow.core.exception import WorkflowDefinitionException
from streamflow.core.workflow import Job, Token
from streamflow.main import build_context

from crossfl.engine.connectors.ssh import SSHConnector
from crossfl.engine.connectors.ssh_connection import HostKeyError
from crossfl.engine.recovery.jobs import facility_job
from crossfl.engine.recovery.policy import RecoveryPolicy
from crossfl.engine.recovery.registry import REGISTRY, RunRecovery
from crossfl.engine.routing import FacilityFilter

TARGETS = [
    Target(DeploymentConfig(name=name, type="local", config={}))
    for name in ("leonardo", "karolina", "vm")
]


def job_of(facility: str, round_number: int = 0, **task: int) -> Job:
    fields = {"facility": facility, **task}
    tokens = {name: Token(value) for name, value in fields.items()}
    name = f"/federate/train/0.{round_number}.0"
    return Job(name, 1, {"task": Token(tokens)}, None, None, None)


async def route(job: Job) -> list[str]:
    targets = await FacilityFilter("by_facility").get_targets(job, TARGETS)
    return [target.deployment.name for target in targets]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunRecovery]:
    """A run whose facility leonardo has a login node that refuses connections."""
    context = build_context({"path": str(tmp_path / "streamflow.yml")})
    recovery = RunRecovery(RecoveryPolicy(), context.deployment_manager)
    (tmp_path / "known_hosts").touch()
    context.deployment_manager.deployments_map["leonardo"] = SSHConnector(
        deployment_name="leonardo",
        config_dir=str(tmp_path),
        nodes=["127.0.0.1:1"],
        knownHosts="known_hosts",
    )
    REGISTRY.enter(recovery)
    yield recovery
    REGISTRY.leave(recovery)


async def test_a_job_goes_to_its_facility_with_and_without_a_failure_manager(
    run: RunRecovery,
) -> None:
    assert await route(job_of("karolina")) == ["karolina"]
    REGISTRY.leave(run)
    assert REGISTRY.run is None
    assert await route(job_of("karolina")) == ["karolina"]


@pytest.mark.parametrize("facility", ["nowhere", "vm"])
async def test_a_facility_without_a_deployment_is_refused(facility: str) -> None:
    with pytest.raises(WorkflowDefinitionException, match=r"\(karolina, leonardo\)"):
        await route(job_of(facility))


async def test_after_its_last_attempt_a_job_goes_to_the_stand_in(run: RunRecovery) -> None:
    job = job_of("karolina", attempts=1, queue_timeout=60)
    run.policy.fail(facility_job(job), OSError("ended in TIMEOUT"))
    assert await route(job) == ["vm"]
    assert run.policy.absence(job.name) == "ended in TIMEOUT"
    assert run.policy.queue_timeout(job.name) == 60


async def test_a_facility_that_was_down_is_asked_before_a_job_is_spent(run: RunRecovery) -> None:
    run.policy.fail(facility_job(job_of("leonardo")), OSError("connection lost"))
    job = job_of("leonardo", 1, attempts=3)
    assert await route(job) == ["vm"]
    assert "connection refused" in str(run.policy.absence(job.name))


async def test_a_login_that_a_person_must_put_right_is_no_absence(
    run: RunRecovery, tmp_path: Path
) -> None:
    (tmp_path / "known_hosts").unlink()
    run.policy.fail(facility_job(job_of("leonardo")), OSError("connection lost"))
    with pytest.raises(HostKeyError, match="unknown host"):
        await route(job_of("leonardo", 1, attempts=3))


def test_a_run_that_ends_late_does_not_end_the_next(run: RunRecovery) -> None:
    following = RunRecovery(RecoveryPolicy(), run.deployments)
    REGISTRY.enter(following)
    REGISTRY.leave(run)
    assert REGISTRY.run is following
    REGISTRY.leave(following)
