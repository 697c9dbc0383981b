"""Other ways to federate without waiting, in virtual time, for `benchmarks/scheduling.py`.

Each is as its paper or its code has it; where both differ, both are here. They run on the same
machines and learn the same as ours, and share nothing else with it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from crossfl.simulation.virtual.machines import BatchJob, Machines

Delta = Callable[[str, int, int, float, Tensor], Tensor]
"""Facility, number of the job, steps, learning rate over the usual one, and model: the delta."""


@dataclass
class Work:
    """What a job was asked for."""

    steps: int
    base: Tensor
    version: int
    number: int
    rate: float = 1.0


class Peer(ABC):
    """A server that is told of each delivery."""

    def __init__(self, machines: Machines, delta: Delta, model: Tensor) -> None:
        self.machines, self.delta, self.model = machines, delta, model
        self.version = self.number = 0
        for name in machines.sites:
            self.submit(name, self.first_steps())

    def first_steps(self) -> int:
        """Steps of the first jobs."""
        return 25

    def submit(self, facility: str, steps: int, rate: float = 1.0) -> None:
        """Send the model of this moment and ask for so many steps; what fails is tried again."""
        self.number += 1
        work = Work(steps, self.model, self.version, self.number, rate)

        def again(job: BatchJob, preempted: bool) -> None:
            self.machines.submit(facility, steps, lambda job: steps, done, again)

        def done(job: BatchJob) -> None:
            delta = self.delta(facility, work.number, steps, rate, work.base)
            self.delivered(job, work, delta)

        self.machines.submit(facility, steps, lambda job: steps, done, again)

    @abstractmethod
    def delivered(self, job: BatchJob, work: Work, delta: Tensor) -> None:
        """Take in an update."""

    def step(self, change: Tensor) -> None:
        """Move the model."""
        self.model = self.model + change
        self.version += 1

    def note(self, facility: str, weight: float) -> None:
        """Account for an update that is in the model."""
        account = self.machines.accounts[facility]
        account.merged += 1
        account.weight += weight


class FedBuff(Peer):
    """Deltas, each by (1 + τ)^−½, are summed and applied in threes: x ← x + Σ / 3.

    Nguyen et al. 2022, https://arxiv.org/abs/2106.06639, algorithm 1 with a server rate of 1.
    """

    size = 3

    def __init__(self, machines: Machines, delta: Delta, model: Tensor) -> None:
        self.buffer: list[Tensor] = []
        super().__init__(machines, delta, model)

    def delivered(self, job: BatchJob, work: Work, delta: Tensor) -> None:
        """Fill the buffer."""
        weight = (1 + self.version - work.version) ** -0.5 / self.size
        self.buffer.append(weight * delta)
        self.note(job.facility, weight)
        if len(self.buffer) == self.size:
            self.step(torch.stack(self.buffer).sum(0))
            self.buffer = []
        self.submit(job.facility, 25)


@dataclass(frozen=True)
class QueuePlan:
    """FedQueue's plan: steps so that predicted wait and training fill the round, T seconds.

    arXiv 2605.02125 and its code: the wait q and the seconds c of a step are exponential averages
    with β ½; steps are max(⌊(T − q − θ) / c⌋, warm-up); T 3600, θ 60, warm-up 10, first wait 2 s.
    """

    waits: dict[str, float] = field(default_factory=dict)
    costs: dict[str, float] = field(default_factory=dict)
    round_seconds: float = 3600.0
    threshold: float = 60.0
    warm_up: int = 10
    first_wait: float = 2.0

    def observe(self, facility: str, wait: float, cost: float) -> "QueuePlan":
        """The plan after a job."""
        before = self.wait(facility)
        waits = self.waits | {facility: 0.5 * wait + 0.5 * before}
        costs = self.costs | {facility: 0.5 * cost + 0.5 * self.costs.get(facility, cost)}
        return QueuePlan(waits, costs, self.round_seconds, self.threshold, self.warm_up)

    def wait(self, facility: str) -> float:
        """The wait that is expected."""
        return self.waits.get(facility, self.first_wait)

    def apply(self, facility: str) -> int:
        """Steps of the next job."""
        left = max(0.5, self.round_seconds - self.wait(facility) - self.threshold)
        return max(int(left / self.costs[facility]), self.warm_up)


class FedQueue(Peer):
    """Rounds of T seconds; who waits longer than was foreseen counts in the next one, discounted.

    On time is a wait within α T (α 0.2) of the one predicted. A round ends when all are in, or
    1.15 T after it began. Shares are steps / (1 + τ / 2), the learning rate is scaled by the fewest
    steps over the facility's own, and whole models are averaged. `repaired` adds deltas to the
    newest model, and leaves the learning rate alone.
    """

    repaired = False

    def __init__(self, machines: Machines, delta: Delta, model: Tensor) -> None:
        self.plan = QueuePlan()
        self.round = self.timer = 0
        self.limits: dict[str, float] = {}
        self.since = dict.fromkeys(machines.sites, 0)
        self.on_time: dict[str, tuple[Work, Tensor]] = {}
        self.late: dict[str, tuple[Work, Tensor]] = {}
        super().__init__(machines, delta, model)
        self.arm()

    def first_steps(self) -> int:
        """The warm-up."""
        return self.plan.warm_up

    def arm(self) -> None:
        """End the round at its time."""
        self.timer += 1
        self.machines.clock.after(1.15 * self.plan.round_seconds, self.fire, self.timer)

    def fire(self, timer: int) -> None:
        """End the round, if it is still the same; with nothing in, wait for the next delivery."""
        if timer == self.timer:
            self.timer += 1
            self.merge()

    def delivered(self, job: BatchJob, work: Work, delta: Tensor) -> None:
        """Sort an update into this round or the next."""
        name, before = job.facility, self.plan.wait(job.facility)
        ran = (job.ended or 0.0) - (job.started or 0.0)
        self.plan = self.plan.observe(name, job.waited, ran / work.steps)
        limit = self.limits.get(name, before + 0.2 * self.plan.round_seconds)
        (self.on_time if job.waited <= limit else self.late)[name] = (work, delta)
        if len(self.on_time) + len(self.late) == len(self.machines.sites):
            self.merge()

    def merge(self) -> None:
        """Average what is due, and ask those who are in for more."""
        due = {n for n in self.late if self.since[n] < self.round or not self.on_time}
        for name in due:
            self.on_time[name] = self.late.pop(name)
        if not self.on_time:
            self.arm()  # the code never arms it again
            return
        age = {name: self.round - self.since[name] for name in self.on_time}
        shares = {n: w.steps / (1 + 0.5 * age[n]) for n, (w, _) in self.on_time.items()}
        total, change = sum(shares.values()), torch.zeros_like(self.model)
        for name, (work, delta) in sorted(self.on_time.items()):
            towards = delta if self.repaired else work.base + delta - self.model
            change += shares[name] / total * towards
            self.note(name, shares[name] / total)
        self.step(change)
        self.round += 1
        back, self.on_time = sorted(self.on_time), {}
        steps = {name: self.plan.apply(name) for name in self.plan.costs}
        for name in back:
            self.since[name] = self.round
            self.limits[name] = self.plan.wait(name) + 0.2 * self.plan.round_seconds
            rate = 1.0 if self.repaired else min(steps.values()) / steps[name]
            self.submit(name, steps[name], rate)
        self.arm()


class FedQueueRepaired(FedQueue):
    """With deltas, and the usual learning rate."""

    repaired = True
