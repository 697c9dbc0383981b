"""FedAdam, FedYogi and FedAdagrad: a step for each coordinate by the size of its past deltas.

Reddi et al. 2021, https://arxiv.org/abs/2003.00295, algorithm 2. With Δ = Σ pᵢ(xᵢ − x), decays β₁
and β₂, adaptivity τ and server learning rate η: m ← β₁m + (1 − β₁)Δ; v by the optimizer;
x ← x + ηm/(√v + τ). It starts from m = 0 and v = τ², and corrects no bias.
"""

from typing import Protocol

import torch
from torch import Tensor

from crossfl.protocol.records import Aggregation


class _Adaptive(Protocol):
    LEARNING_RATE: float = 0.01

    def second(self, v: Tensor, square: Tensor, aggregation: Aggregation) -> Tensor:
        """The next v, given Δ²."""
        ...

    def init(self, parameter: Tensor, aggregation: Aggregation) -> dict[str, Tensor]:
        """M = 0 and v = τ²."""
        floor = torch.full_like(parameter, aggregation.tau**2)
        return {"first": torch.zeros_like(parameter), "second": floor}

    def apply(
        self, parameter: Tensor, delta: Tensor, slots: dict[str, Tensor], aggregation: Aggregation
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The next x + ηm/(√v + τ), m and v."""
        beta = aggregation.beta1
        first = beta * slots["first"] + (1 - beta) * delta
        second = self.second(slots["second"], delta.square(), aggregation)
        step = first / (second.sqrt() + aggregation.tau)
        rate = aggregation.learning_rate(self.LEARNING_RATE)
        return parameter + rate * step, {"first": first, "second": second}


class FedAdam(_Adaptive):
    """v ← β₂v + (1 − β₂)Δ²."""

    def second(self, v: Tensor, square: Tensor, aggregation: Aggregation) -> Tensor:
        """The next v."""
        return aggregation.beta2 * v + (1 - aggregation.beta2) * square


class FedYogi(_Adaptive):
    """v ← v − (1 − β₂)Δ² sign(v − Δ²)."""

    def second(self, v: Tensor, square: Tensor, aggregation: Aggregation) -> Tensor:
        """The next v."""
        return v - (1 - aggregation.beta2) * square * torch.sign(v - square)


class FedAdagrad(_Adaptive):
    """v ← v + Δ²."""

    def second(self, v: Tensor, square: Tensor, aggregation: Aggregation) -> Tensor:
        """The next v."""
        return v + square
