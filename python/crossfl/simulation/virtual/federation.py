"""A federation in virtual time: what the server decides is decided by the server's own functions.

Tasks are those of `server.planning`. Late updates are admitted, weighed and remembered by
`server.admission`, `server.merging` and `server.ledger`, and a round ends by `server.quorum`. Only
queues, jobs and transfers are played. At each facility there is at most one job. It may outlive the
round that asked for it, takes the newest task when it starts, and is collected by a later round.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

from crossfl.errors import CrossFLError
from crossfl.protocol.history import FacilityEntry
from crossfl.protocol.layout import MEAN
from crossfl.protocol.manifest import UpdateManifest
from crossfl.protocol.measurements import PhaseSeconds
from crossfl.protocol.records import Allowance, Task
from crossfl.protocol.state import ServerState
from crossfl.server import admission, ledger, merging, optimizers
from crossfl.server.admission import Update
from crossfl.server.averaging.kernel import WeightedSum
from crossfl.server.deliveries import Exclusion
from crossfl.server.planning.fixed import plan
from crossfl.server.quorum import BelowQuorumError, check_quorum
from crossfl.simulation.virtual.machines import BatchJob, Machines
from crossfl.simulation.virtual.sites import Site, check_members
from crossfl.storage.delta import Delta
from crossfl.storage.job import Job

FIRST = f"{0:064x}"


class Learner(Protocol):
    """What a federation learns, if anything: one flat vector of weights, fp32 [n]."""

    def first(self) -> Tensor:
        """The first model."""
        ...

    def delta(self, task: Task, model: Tensor) -> Tensor:
        """Local minus global weights after the local steps of a task."""
        ...


@dataclass
class Held:
    """What the one job of a facility holds."""

    job: BatchJob
    failures: int = 0
    task: Task | None = None
    allowance: Allowance | None = None
    model: Tensor | None = None
    """The model that it starts from, then its delta."""
    update: UpdateManifest | None = None


class Federation:
    """One federation of a job file on sites, from the first round on.

    Args:
        job: the job file.
        sites: the sites, by name.
        seed: seed of queues, speeds and failures; the federation's own is that of the job.
        learner: what is learnt; None plays the times alone.

    Raises:
        CrossFLError: a facility is not described, or its queue cannot be played.
    """

    def __init__(
        self, job: Job, sites: Mapping[str, Site], seed: int, learner: Learner | None = None
    ) -> None:
        names = [facility.name for facility in job.facilities]
        check_members(sites, names)
        self.machines = Machines({name: sites[name] for name in names}, seed)
        self.clock, self.accounts = self.machines.clock, self.machines.accounts
        self.schedule: list[dict[str, FacilityEntry]] = []
        """What became of each facility's update, by round."""
        self._job, self._learner = job, learner
        self._attempts = {facility.name: facility.attempts for facility in job.facilities}
        self.state = ServerState(
            rounds=job.rounds, seed=job.seed, aggregation=job.aggregation, started=0, model=FIRST
        )
        self.model = learner.first() if learner else torch.zeros(0)
        optimizer = optimizers.of(job.aggregation)
        self._slots = optimizer.init(self.model, job.aggregation)
        self._jobs: dict[str, Held] = {}
        self._newest: dict[str, list[tuple[float, Task, Allowance, Tensor]]] = {}
        self._arrived: dict[str, Held] = {}
        self._absent: dict[str, str] = {}
        self._allowances: Sequence[Allowance] = ()
        self._asked: list[str] = []
        self._turn = self._grace = 0
        self.clock.after(0.0, self._open)

    @property
    def served(self) -> Tensor:
        """The model that would be delivered, were this the end."""
        return self._slots.get(MEAN, self.model)

    @property
    def is_over(self) -> bool:
        """Whether no further round follows."""
        return not self.state.more(self.clock.now)

    def run(self, horizon: float) -> bool:
        """Go on to the end; False where the horizon, in seconds, came first."""
        return self.clock.run(lambda: self.is_over, horizon)

    # -- rounds

    def _open(self) -> None:
        """Ask for updates."""
        self._turn += 1
        self._absent = {}
        job = self._job
        planned = plan(self.state, job.facilities, job.local_steps, job.training, "train")
        self._allowances, self._asked = planned.allowances, [t.facility for t in planned.tasks]
        allowances = {allowance.facility: allowance for allowance in planned.allowances}
        for task in planned.tasks:
            turn = (self.clock.now, task, allowances[task.facility], self.model)
            running = self._jobs.get(task.facility)
            if running is None:
                self._newest[task.facility] = [turn]
                self._submit(task.facility, failures=0)
            elif running.job.started is None:
                self._newest[task.facility].append(turn)
        closes = self.state.aggregation.closes
        if isinstance(closes, int):
            self.clock.after(closes, self._time_out, self._turn)
        self._look()

    def _look(self) -> None:
        """Close the round if its rule says so, now or after the grace."""
        rules = self.state.aggregation
        missing = [n for n in self._asked if n not in self._arrived and n not in self._absent]
        if not missing:
            self._close()
        elif not self._arrived or self._grace == self._turn:
            return
        elif rules.closes == "first" or (
            rules.closes == "running" and all(self._jobs[n].job.started is None for n in missing)
        ):
            self._grace = self._turn
            self.clock.after(rules.grace_seconds, self._time_out, self._turn)

    def _time_out(self, turn: int) -> None:
        if turn == self._turn:
            self._close()

    def _close(self) -> None:
        """End the round with what has arrived."""
        self._turn += 1  # no timer of this round acts any more
        updates, excluded = self._admit()
        names = {update.facility for update in updates}
        delivered = {name: self._arrived.pop(name) for name in self._asked if name in self._arrived}
        try:
            check_quorum(updates, excluded, self.state, 1, self._asked)
        except BelowQuorumError as shortfall:
            self._below_quorum(excluded, shortfall)
        else:
            self._merge(updates, excluded, delivered)
        for name, held in delivered.items():
            if name not in names:
                self.machines.throw_away(held.job)
        if not self.is_over:
            absent = {exclusion.status for exclusion in excluded} - {"late"}
            waits = self.state.aggregation.wait_seconds if absent and not names else 0.0
            self.clock.after(waits, self._open)

    def _admit(self) -> tuple[list[Update], list[Exclusion]]:
        updates: list[Update] = []
        excluded: list[Exclusion] = []
        for name in sorted(self._asked):
            held = self._arrived.get(name)
            if held is None and name in self._absent:
                excluded.append(Exclusion(name, "absent", self._absent[name]))
                continue
            if held is None:
                excluded.append(Exclusion(name, "late", "its job goes on"))
                continue
            stated = cast(UpdateManifest, held.update)
            late = admission.open_task(stated, self.state)
            try:
                admission.check_base(stated, self.state, late)
            except CrossFLError as error:
                excluded.append(Exclusion(name, "refused", str(error)))
                continue
            version = late.version if late else self.state.updates
            nothing = cast(Delta, None)  # its numbers are in the job
            updates.append(Update(Path(name), stated, nothing, held.allowance, version))
        return updates, excluded

    def _merge(
        self,
        updates: Sequence[Update],
        excluded: Sequence[Exclusion],
        delivered: Mapping[str, Held],
    ) -> None:
        state, number = self.state, self.state.round + 1
        weighed = merging.weigh(updates, state, self._allowances)
        norms = dict.fromkeys(delivered, 1.0)
        if self._learner is not None:
            deltas = [cast(Tensor, delivered[u.facility].model) for u in updates]
            combined = torch.empty_like(self.model)
            total = WeightedSum(deltas, weighed.coefficients)
            total.into(combined)
            norms = {u.facility: float(d.norm()) for u, d in zip(updates, deltas, strict=True)}
            rules = merging.stepping(state, updates, self._allowances).aggregation
            self.model, self._slots = optimizers.of(rules).apply(
                self.model, combined, self._slots, rules
            )
        renewed = ledger.counted(weighed.ledger, updates, norms)
        facilities = {e.facility: FacilityEntry(status=e.status) for e in excluded}
        for update, share, weight in zip(
            updates, weighed.coefficients, weighed.weights, strict=True
        ):
            stated, account = update.manifest, self.accounts[update.facility]
            account.merged += 1
            account.weight += weight
            facilities[update.facility] = FacilityEntry(
                status=stated.status,
                share=share,
                norm=norms[update.facility],
                steps=stated.steps,
                staleness=number - stated.round,
                seconds=stated.seconds,
            )
        self.schedule.append(facilities)
        advanced = merging.advanced(state, facilities, renewed, self._allowances)
        self.state = advanced.replace(round=number, model=f"{number:064x}", waits=0)

    def _below_quorum(self, excluded: Sequence[Exclusion], shortfall: BelowQuorumError) -> None:
        rules, missing = self.state.aggregation, {exclusion.status for exclusion in excluded}
        goes_on = "late" in missing and not rules.waits_for_all
        if rules.below_quorum == "stop" and not goes_on:
            raise shortfall
        facilities = {e.facility: FacilityEntry(status=e.status) for e in excluded}
        state = merging.advanced(self.state, facilities, self.state.ledger, self._allowances)
        if rules.below_quorum == "skip" and not goes_on:
            self.schedule.append(facilities)
            state = state.replace(round=state.round + 1)
        self.state = state

    # -- jobs

    def _submit(self, facility: str, failures: int) -> None:
        def begin(job: BatchJob) -> int:
            return self._begin(held)

        def end(job: BatchJob) -> None:
            self._end(held)

        def lost(job: BatchJob, preempted: bool) -> None:
            self._lost(held, preempted)

        task = self._newest[facility][-1][1]
        walltime = task.walltime_seconds
        job = self.machines.submit(facility, task.local_steps, begin, end, lost, walltime)
        held = self._jobs[facility] = Held(job, failures)

    def _begin(self, held: Held) -> int:
        """Take the newest task that has had time to arrive."""
        facility = held.job.facility
        here = self.clock.now - self.machines.sites[facility].transfer_seconds
        turns = self._newest[facility]
        arrived = [turn for turn in turns if turn[0] <= here] or turns[:1]
        _, held.task, held.allowance, held.model = arrived[-1]
        self.clock.after(0.0, self._look)  # who runs decides when a round closes
        return held.task.local_steps

    def _end(self, held: Held) -> None:
        job, task = held.job, cast(Task, held.task)
        amount = task.local_steps * self._job.training.batch_size
        load = self.machines.sites[job.facility].load_seconds
        held.update = UpdateManifest(
            facility=job.facility,
            federation=task.federation,
            round=task.round,
            base=task.base,
            status="complete",
            steps=task.local_steps,
            samples=amount,
            tokens=amount,
            seconds=PhaseSeconds(queue=job.waited, load=load, train=job.train),
        )
        if self._learner is not None:
            held.model = self._learner.delta(task, cast(Tensor, held.model))
        self._arrived[job.facility] = self._jobs.pop(job.facility)
        self._look()

    def _lost(self, held: Held, preempted: bool) -> None:
        facility, failures = held.job.facility, held.failures + (not preempted)
        if failures < self._attempts[facility]:
            self._newest[facility] = self._newest[facility][-1:]
            self._submit(facility, failures)
        else:
            del self._jobs[facility]
            self._absent[facility] = f"its job failed {failures} times"
            self._look()
