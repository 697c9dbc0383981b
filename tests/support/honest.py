"""Honest federations in memory: real AdamW on small models, for the norms that its deltas have."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from crossfl.protocol.records import Aggregation, Allowance, Schedule
from crossfl.protocol.schedule import effective_steps, learning_rate
from crossfl.protocol.state import FacilityLedger, PastNorm, ServerState
from crossfl.server import bounds
from crossfl.storage import encodings

ROWS, WIDTH, CLASSES = 400, 16, 8


class LowRank(nn.Module):
    """A frozen layer with an adapter of rank 2, whose B begins at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(0.3 * torch.randn(WIDTH, CLASSES), requires_grad=False)
        self.a = nn.Parameter(0.25 * torch.randn(WIDTH, 2))
        self.b = nn.Parameter(torch.zeros(2, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.base + 4 * x @ self.a @ self.b


def network(kind: str) -> nn.Module:
    """A perceptron, an adapter, or a table of embeddings of which a batch touches a part."""
    if kind == "adapter":
        return LowRank()
    if kind == "embeddings":
        return nn.Sequential(nn.Embedding(40, WIDTH), nn.Linear(WIDTH, 40))
    return nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, CLASSES))


def samples(kind: str, seed: int, facility: int) -> tuple[Tensor, Tensor]:
    """Inputs and classes of a facility: in part those of all, in part its own."""
    common, own = (torch.Generator().manual_seed(s) for s in (seed, 100 * seed + facility + 1))
    if kind == "embeddings":
        logits = 2 * torch.randn(40, 40, generator=common) + torch.randn(40, 40, generator=own)
        tokens = torch.randint(0, 40, (ROWS,), generator=own)
        return tokens, torch.multinomial(logits.softmax(1)[tokens], 1, generator=own)[:, 0]
    weights = torch.randn(WIDTH, CLASSES, generator=common)
    weights = weights + 0.7 * torch.randn(WIDTH, CLASSES, generator=own)
    inputs = torch.randn(ROWS, WIDTH, generator=own)
    return inputs, (inputs @ weights + torch.randn(ROWS, CLASSES, generator=own)).argmax(1)


@dataclass(frozen=True)
class Delivered:
    """An update as `bounds.check_norms` sees it."""

    facility: str
    effective_steps: float
    effective_steps_of_task: float


@dataclass(kw_only=True)
class HonestFederation:
    """Facilities that train in rounds and send what they have; a part of them is cut off early.

    Attributes:
        kind: the model, see `network`.
        facilities: how many.
        joins: first round, from 0, of the last facility.
        steps: optimizer steps of a round.
        rounds: how many.
        schedule: learning rate after the warm-up.
        warmup_steps: steps of linear warm-up.
        topk: share of its values that a delta keeps; unset, all.
        batch_size: samples of a step.
        cut: share of updates that are cut off.
        seed: of everything.
    """

    kind: str
    facilities: int = 3
    joins: int = 0
    steps: int = 40
    rounds: int = 30
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    topk: float | None = None
    batch_size: int = 8
    cut: float = 0.25
    seed: int = 1
    peak: float = 3e-3
    refused: list[str] = field(default_factory=list)
    """Reasons why updates were refused."""

    def run(self) -> None:
        """Every round, with the bound of the server, and its memory of the last rounds."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # more of them only wait for each other: the tensors are tiny
        try:
            self._run()
        finally:
            torch.set_num_threads(threads)

    def _run(self) -> None:
        torch.manual_seed(self.seed)
        chance, net = random.Random(self.seed), network(self.kind)
        weights = [p for p in net.parameters() if p.requires_grad]
        start = [p.detach().clone() for p in weights]
        data = [samples(self.kind, self.seed, i) for i in range(self.facilities)]
        left = [[torch.zeros_like(p) for p in weights] for _ in data]
        state = ServerState(
            rounds=self.rounds, aggregation=Aggregation(), started=0.0, model="0" * 64
        )
        for number in range(self.rounds):
            deltas: dict[str, list[Tensor]] = {}
            updates: list[Delivered] = []
            for i in range(self.facilities):
                if i == self.facilities - 1 and number < self.joins:
                    continue
                early = chance.random() < self.cut
                done = chance.choice([1, 2, self.steps // 2]) if early else self.steps
                task = self._task(f"facility{i}", number)
                with torch.no_grad():
                    for p, values in zip(weights, start, strict=True):
                        p.copy_(values)
                self._train(net, weights, data[i], task, done, chance)
                delta = [p.detach() - x for p, x in zip(weights, start, strict=True)]
                deltas[task.facility] = self._encoded(delta, left[i])
                updates.append(
                    Delivered(
                        task.facility,
                        effective_steps(task, done),
                        effective_steps(task, self.steps),
                    )
                )
            state = self._aggregate(state, updates, deltas, start)

    def _task(self, facility: str, number: int) -> Allowance:
        return Allowance(
            facility=facility,
            steps=self.steps,
            samples=self.steps * self.batch_size,
            tokens=self.steps * self.batch_size,
            schedule=self.schedule,
            schedule_step=number * self.steps,
            schedule_steps=self.rounds * self.steps,
            warmup_steps=self.warmup_steps,
        )

    def _train(
        self,
        net: nn.Module,
        weights: list[nn.Parameter],
        data: tuple[Tensor, Tensor],
        task: Allowance,
        steps: int,
        chance: random.Random,
    ) -> None:
        optimizer = torch.optim.AdamW(weights, lr=self.peak, weight_decay=0.0)
        inputs, classes = data
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    task.schedule_step + step,
                    self.peak,
                    task.schedule,
                    task.schedule_steps,
                    task.warmup_steps,
                )
            rows = torch.tensor(chance.sample(range(ROWS), self.batch_size))
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs[rows]), classes[rows]).backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()

    def _encoded(self, delta: list[Tensor], left: list[Tensor]) -> list[Tensor]:
        """What arrives of a delta; what does not is left for the next one."""
        if self.topk is None:
            return delta
        coding, arrives = encodings.of("topk", self.topk), []
        for i, values in enumerate(delta):
            whole = (values + left[i]).reshape(-1)
            kept = coding.decode(coding.encode(whole), len(whole))
            left[i] = (whole - kept).reshape(values.shape)
            arrives.append(kept.reshape(values.shape))
        return arrives

    def _aggregate(
        self,
        state: ServerState,
        updates: list[Delivered],
        deltas: Mapping[str, list[Tensor]],
        start: list[Tensor],
    ) -> ServerState:
        squares = {f: sum(t.double().square().sum().item() for t in d) for f, d in deltas.items()}
        reasons = bounds.check_norms(squares, updates, state)
        self.refused += [f"round {state.round}: {f}: {why}" for f, why in reasons.items()]
        counted = [u for u in updates if u.facility not in reasons]
        ledger: dict[str, FacilityLedger] = dict(state.ledger)
        for update in counted:
            norm = squares[update.facility] ** 0.5
            past = PastNorm(norm=norm, effective_steps=update.effective_steps)
            ledger[update.facility] = state.ledger_of(update.facility).with_norm(past)
        for i, values in enumerate(start if counted else []):
            parts = [deltas[u.facility][i] for u in counted]
            start[i] = values + torch.stack(parts).mean(0)
        return state.replace(round=state.round + 1, ledger=ledger)
