"""Every strategy against closed forms, torch's own optimizers and a few lines of numpy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossfl.protocol.records import Aggregation
from crossfl.server import optimizers
from tests.support.federation import Federation, entry, master

SHAPES = st.lists(st.integers(1, 7), min_size=0, max_size=3)


def _rounds(rules: Aggregation, parameter: Tensor, deltas: list[Tensor]) -> Tensor:
    strategy = optimizers.of(rules)
    slots = strategy.init(parameter, rules)
    for delta in deltas:
        parameter, slots = strategy.apply(parameter, delta, slots, rules)
    return parameter


def _torch_rounds(make: Any, parameter: Tensor, deltas: list[Tensor]) -> Tensor:
    x = torch.nn.Parameter(parameter.clone())
    optimizer = make([x])
    for delta in deltas:
        x.grad = -delta
        optimizer.step()
    return x.detach()


@st.composite
def _cases(draw: Any) -> tuple[Tensor, list[Tensor]]:
    shape, rounds = draw(SHAPES), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x, *deltas = (torch.randn(shape, generator=generator) for _ in range(rounds + 1))
    return x, deltas


@settings(max_examples=25, deadline=None)
@given(_cases(), st.floats(0, 0.99), st.floats(0.01, 2))
def test_sgd_family_is_torch_sgd(case: Any, momentum: float, rate: float) -> None:
    for name, nesterov in (("fedavg", False), ("fedavgm", False), ("diloco", True)):
        beta = 0.0 if name == "fedavg" else momentum
        if nesterov and beta == 0:
            continue
        rules = Aggregation(server_optimizer=name, server_momentum=beta, server_learning_rate=rate)
        make = lambda p: torch.optim.SGD(p, lr=rate, momentum=beta, nesterov=nesterov)  # noqa: B023, E731
        torch.testing.assert_close(_rounds(rules, *case), _torch_rounds(make, *case))


@settings(max_examples=25, deadline=None)
@given(_cases(), st.floats(0, 0.95), st.floats(0, 0.99), st.floats(1e-3, 1), st.floats(0.01, 1))
def test_adaptive_family_is_numpy(case: Any, b1: float, b2: float, tau: float, rate: float) -> None:
    parameter, deltas = case
    for name in ("fedadam", "fedyogi", "fedadagrad"):
        rules = Aggregation(
            server_optimizer=name,
            beta1=b1,
            beta2=b2,
            tau=tau,
            server_learning_rate=rate,
        )
        x = parameter.double().numpy()
        m, v = np.zeros_like(x), np.full_like(x, tau**2)
        for delta in deltas:
            d = delta.double().numpy()
            m = b1 * m + (1 - b1) * d
            v = {
                "fedadam": b2 * v + (1 - b2) * d**2,
                "fedyogi": v - (1 - b2) * d**2 * np.sign(v - d**2),
                "fedadagrad": v + d**2,
            }[name]
            x = x + rate * m / (np.sqrt(v) + tau)
        got = _rounds(rules, parameter, deltas).numpy()
        np.testing.assert_allclose(got, x, rtol=2e-4, atol=2e-5)


def test_adagrad_without_decay_is_torch_adagrad() -> None:
    generator = torch.Generator().manual_seed(1)
    x, *deltas = (torch.randn(5, 3, generator=generator) for _ in range(4))
    rules = Aggregation(server_optimizer="fedadagrad", beta1=0.0, tau=0.1, server_learning_rate=0.3)
    make = lambda p: torch.optim.Adagrad(p, lr=0.3, initial_accumulator_value=0.01, eps=0.1)  # noqa: E731
    torch.testing.assert_close(_rounds(rules, x, deltas), _torch_rounds(make, x, deltas))


CLOSED = {
    # Two rounds of Δ = 1 from x = 0, by hand.
    "fedavg": ({}, [1.0, 2.0]),
    "fedavgm": ({"server_momentum": 0.5}, [1.0, 2.5]),
    "diloco": ({"server_momentum": 0.5, "server_learning_rate": 1.0}, [1.5, 3.25]),
    "fedadagrad": (
        {"beta1": 0.0, "tau": 1e-18, "server_learning_rate": 1.0},
        [1.0, 1.0 + 1 / 2**0.5],
    ),
    "fedadam": (
        {
            "beta1": 0.5,
            "beta2": 0.75,
            "tau": 1e-18,
            "server_learning_rate": 1.0,
        },
        [1.0, 1.0 + 0.75 / (0.25 * 0.75 + 0.25) ** 0.5],
    ),
    "fedyogi": (
        {
            "beta1": 0.5,
            "beta2": 0.75,
            "tau": 1e-18,
            "server_learning_rate": 1.0,
        },
        [1.0, 1.0 + 0.75 / 0.5**0.5],
    ),
}


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_closed_form_through_files(tmp_path: Path, name: str) -> None:
    rules, expected = CLOSED[name]
    federation = Federation(tmp_path, {"w": torch.zeros(3)}, server_optimizer=name, **rules)
    for number, value in enumerate(expected, 1):
        update = federation.update("a", {"w": torch.ones(3)}, name=str(number))
        out = federation.run([update], f"out{number}")
        torch.testing.assert_close(master(out)["w"], torch.full((3,), value))
        federation.model, federation.state = out / "global_model", out / "state"
        federation.server = federation.server.replace(round=number, model=entry(out).model)
