"""The machines of a federation in virtual time: jobs that wait, run, fail and deliver."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from numpy.random import default_rng

from crossfl.protocol.seeds import derive_seed
from crossfl.protocol.state import Timing
from crossfl.server.planning import equal_time
from crossfl.simulation.virtual.clock import Clock
from crossfl.simulation.virtual.queues import DAY, Backfill, Request
from crossfl.simulation.virtual.sites import Site, queue_of

WARM_UP = 4 * DAY
"""Seconds that machines with other users run before the federation begins."""


@dataclass
class Account:
    """What one facility did, and what it cost."""

    node_seconds: float = 0.0
    thrown_away: float = 0.0
    """Node-seconds of jobs whose work is in no model."""
    merged: int = 0
    weight: float = 0.0
    """Sum of the weights of its updates, before deltas are scaled by their steps."""
    waits: list[float] = field(default_factory=list)
    """Seconds of each of its jobs in the queue."""


@dataclass(eq=False, kw_only=True)
class BatchJob:
    """One batch job."""

    facility: str
    begin: Callable[["BatchJob"], int]
    """Called when it starts: takes its task, and gives the steps to train."""
    end: Callable[["BatchJob"], None]
    """Called when what it made has arrived on the VM."""
    lost: Callable[["BatchJob", bool], None]
    """Called when it fails, or (True) is preempted."""
    request: Request
    queued: float
    """When it came into the queue."""
    started: float | None = None
    ended: float | None = None
    train: float = 0.0
    """Seconds of training."""

    @property
    def waited(self) -> float:
        """Seconds in the queue."""
        return max((self.started or 0.0) - self.queued, 0.0)

    @property
    def ran(self) -> float:
        """Node-seconds from start to end."""
        return ((self.ended or 0.0) - (self.started or 0.0)) * self.request.nodes


class Machines:
    """All sites, from a common moment 0 on.

    Args:
        sites: the sites, by name.
        seed: seed of queues, speeds and failures.

    Raises:
        CrossFLError: a queue cannot be played.
    """

    def __init__(self, sites: Mapping[str, Site], seed: int) -> None:
        self.clock = Clock(-WARM_UP)
        self.sites = sites
        self.accounts = {name: Account() for name in sites}
        self._queues = {name: queue_of(sites[name], name, self.clock, seed) for name in sites}
        self._draws = {name: default_rng(derive_seed(seed, name, "jobs")) for name in sites}
        self._running: set[BatchJob] = set()
        if any(isinstance(queue, Backfill) for queue in self._queues.values()):
            self.clock.run(lambda: False, 0.0)
        self.clock.now = 0.0

    @property
    def node_seconds(self) -> float:
        """Of all jobs, those that run now included."""
        return sum(account.node_seconds for account in self.accounts.values()) + self._in_flight

    @property
    def thrown_away(self) -> float:
        """Node-seconds of work that is in no model, were this the end."""
        return sum(account.thrown_away for account in self.accounts.values()) + self._in_flight

    @property
    def _in_flight(self) -> float:
        now = self.clock.now
        return sum((now - (job.started or 0.0)) * job.request.nodes for job in self._running)

    def submit(
        self,
        facility: str,
        steps: int,
        begin: Callable[[BatchJob], int],
        end: Callable[[BatchJob], None],
        lost: Callable[[BatchJob, bool], None],
        walltime: int | None = None,
    ) -> BatchJob:
        """Submit a job, once the model has been sent.

        Args:
            facility: where.
            steps: steps that are expected of it, for its walltime.
            begin: called when it starts; gives the steps to train.
            end: called when its update has arrived.
            lost: called when it fails, or (True) is preempted.
            walltime: seconds to ask for; None, what such a job takes there, with a margin.
        """
        site = self.sites[facility]
        each = Timing(steps=1, train=site.seconds_per_step, load=site.load_seconds)
        asked = walltime or equal_time.walltime([each], steps)
        request = Request(site.nodes, asked, lambda: self._start(job))
        queued = self.clock.now + site.transfer_seconds
        job = BatchJob(
            facility=facility, begin=begin, end=end, lost=lost, request=request, queued=queued
        )
        self.clock.after(site.transfer_seconds, self._queues[facility].submit, request)
        return job

    def _start(self, job: BatchJob) -> None:
        site, draw = self.sites[job.facility], self._draws[job.facility]
        job.started = self.clock.now
        self._running.add(job)
        self.accounts[job.facility].waits.append(job.waited)
        noise = draw.lognormal(0.0, site.noise)
        job.train = job.begin(job) * site.seconds_per_step * noise
        seconds, fate = site.load_seconds + job.train, draw.random()
        if fate < site.failures + site.preemptions:
            preempted = fate >= site.failures
            self.clock.after(draw.random() * seconds, self._cut_short, job, preempted)
        else:
            self.clock.after(seconds, self._finish, job)

    def _release(self, job: BatchJob) -> None:
        job.ended = self.clock.now
        self._running.discard(job)
        self.accounts[job.facility].node_seconds += job.ran
        self._queues[job.facility].release(job.request)

    def _cut_short(self, job: BatchJob, preempted: bool) -> None:
        self._release(job)
        self.throw_away(job)
        job.lost(job, preempted)

    def _finish(self, job: BatchJob) -> None:
        self._release(job)
        self.clock.after(self.sites[job.facility].transfer_seconds, job.end, job)

    def throw_away(self, job: BatchJob) -> None:
        """Note that the work of a job is in no model."""
        self.accounts[job.facility].thrown_away += job.ran
