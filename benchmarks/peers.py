"""Other ways to federate without waiting, in virtual time, for `benchmarks/scheduling.py`.

Each is as its paper or its code has it; where both differ, both are here. They run on the same
machines and learn the same as ours. Plans and discounts are those of `crossfl.server`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from crossfl.server.planning import fedcompass, fedqueue
from crossfl.server.staleness import discount
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


class FedAsync(Peer):
    """Whole local models are mixed in, each as it comes: x ← x + α s(τ) / N · (x_i − x).

    Xie et al. 2019, https://arxiv.org/abs/1903.03934, with α 0.9 and the polynomial discount of ½,
    and the 1 / N that APPFL's code has.
    """

    size = 1

    def __init__(self, machines: Machines, delta: Delta, model: Tensor) -> None:
        self.buffer: list[Tensor] = []
        super().__init__(machines, delta, model)

    def weight(self, age: int) -> float:
        """The weight of an update."""
        return 0.9 * discount("polynomial", age) / len(self.machines.sites)

    def towards(self, work: Work, delta: Tensor) -> Tensor:
        """What an update moves the model by, were its weight 1."""
        return work.base + delta - self.model

    def delivered(self, job: BatchJob, work: Work, delta: Tensor) -> None:
        """Fill the buffer; where it is full, move the model."""
        weight = self.weight(self.version - work.version)
        self.buffer.append(weight * self.towards(work, delta))
        self.note(job.facility, weight)
        if len(self.buffer) == self.size:
            self.step(torch.stack(self.buffer).sum(0))
            self.buffer = []
        self.submit(job.facility, 25)


class FedBuffCode(FedAsync):
    """FedAsync's changes, summed and applied in threes, as APPFL's code has it."""

    size = 3


class FedBuff(FedAsync):
    """Deltas, each by (1 + τ)^−½, are summed and applied in threes: x ← x + Σ / 3.

    Nguyen et al. 2022, https://arxiv.org/abs/2106.06639, algorithm 1 with a server rate of 1.
    """

    size = 3

    def weight(self, age: int) -> float:
        """The weight of an update."""
        return discount("polynomial", age) / self.size

    def towards(self, work: Work, delta: Tensor) -> Tensor:
        """The delta, whatever the model is by now."""
        return delta


class FedCompass(Peer):
    """Whole models are mixed in by groups that arrive together (`server.planning.fedcompass`).

    Each weighs α (τ + 1)^−½ / N, with α 0.9. The plan measures a facility by the moments at which
    it is asked and has delivered, so that its wait in the queue is in its speed.
    """

    def __init__(self, machines: Machines, delta: Delta, model: Tensor) -> None:
        self.plan = fedcompass.init()
        self.buffers: dict[int | None, dict[str, tuple[Work, Tensor]]] = {None: {}}
        super().__init__(machines, delta, model)

    def first_steps(self) -> int:
        """As many as there may be."""
        return self.plan.rules.most

    def delivered(self, job: BatchJob, work: Work, delta: Tensor) -> None:
        """Merge an update at once, or with its group."""
        name = job.facility
        self.plan, arrival = fedcompass.observe(self.plan, name, self.machines.clock.now)
        group = self.plan.known[name].group
        if arrival in ("early", "complete"):
            self.buffers.setdefault(group, {})[name] = (work, delta)
            if arrival == "complete":
                self.merge(group)
            return
        if arrival == "alone":
            self.mix({name: (work, delta)})
        else:
            self.buffers[None][name] = (work, delta)
        self.ask(name)

    def mix(self, updates: dict[str, tuple[Work, Tensor]]) -> None:
        """Move the model towards those of updates."""
        change = torch.zeros_like(self.model)
        for name, (work, delta) in sorted(updates.items()):
            age = self.version - work.version
            weight = 0.9 * discount("polynomial", age) / len(self.machines.sites)
            change += weight * (work.base + delta - self.model)
            self.note(name, weight)
        self.step(change)

    def merge(self, group: int | None) -> None:
        """Merge a group that is in, or whose time is over, with what came late before."""
        in_time = self.buffers.pop(group, {})
        if not in_time or group not in self.plan.groups:
            return
        self.mix(self.buffers[None] | in_time)
        self.buffers[None] = {}
        self.plan, back = fedcompass.merged(self.plan, group)
        for name in back:
            self.ask(name)
        self.plan = fedcompass.without_empty(self.plan)

    def ask(self, name: str) -> None:
        """Ask a facility for more."""
        now = self.machines.clock.now
        self.plan, opened = fedcompass.apply(self.plan, name, now)
        if opened is not None:
            latest = self.plan.groups[opened].latest
            self.machines.clock.after(latest - now, self.merge, opened)
        self.submit(name, self.plan.known[name].steps)


class FedQueue(Peer):
    """Rounds of T seconds; who waits longer than was foreseen counts in the next one, discounted.

    On time is a wait within α T (α 0.2) of the one predicted. A round ends when all are in, or
    1.15 T after it began. Shares are steps / (1 + τ / 2), the learning rate is scaled by the fewest
    steps over the facility's own, and whole models are averaged. `repaired` adds deltas to the
    newest model, and leaves the learning rate alone.
    """

    repaired = False

    def __init__(self, machines: Machines, delta: Delta, model: Tensor) -> None:
        self.plan = fedqueue.init()
        self.round = self.timer = 0
        self.limits: dict[str, float] = {}
        self.since = dict.fromkeys(machines.sites, 0)
        self.on_time: dict[str, tuple[Work, Tensor]] = {}
        self.late: dict[str, tuple[Work, Tensor]] = {}
        super().__init__(machines, delta, model)
        self.arm()

    def first_steps(self) -> int:
        """The warm-up."""
        return self.plan.rules.warm_up

    def arm(self) -> None:
        """End the round at its time."""
        self.timer += 1
        rules = self.plan.rules
        seconds = (1 + rules.overtime) * rules.round_seconds
        self.machines.clock.after(seconds, self.fire, self.timer)

    def fire(self, timer: int) -> None:
        """End the round, if it is still the same; with nothing in, wait for the next delivery."""
        if timer == self.timer:
            self.timer += 1
            self.merge()

    def delivered(self, job: BatchJob, work: Work, delta: Tensor) -> None:
        """Sort an update into this round or the next."""
        name, expected = job.facility, self.plan.latest_wait(job.facility)
        ran = (job.ended or 0.0) - (job.started or 0.0)
        self.plan = fedqueue.observe(self.plan, name, job.waited, ran / work.steps)
        limit = self.limits.get(name, expected)
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
        rules = self.plan.rules
        shares = {
            name: fedqueue.weight(work.steps, age[name], rules)
            for name, (work, _) in self.on_time.items()
        }
        total, change = sum(shares.values()), torch.zeros_like(self.model)
        for name, (work, delta) in sorted(self.on_time.items()):
            towards = delta if self.repaired else work.base + delta - self.model
            change += shares[name] / total * towards
            self.note(name, shares[name] / total)
        self.step(change)
        self.round += 1
        back, self.on_time = sorted(self.on_time), {}
        for name in back:
            self.since[name] = self.round
            self.limits[name] = self.plan.latest_wait(name)
            rate = 1.0 if self.repaired else fedqueue.rate(self.plan, name)
            self.submit(name, fedqueue.apply(self.plan, name), rate)
        self.arm()


class FedQueueRepaired(FedQueue):
    """With deltas, and the usual learning rate."""

    repaired = True
