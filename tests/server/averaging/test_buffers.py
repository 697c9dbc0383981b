"""Buffers, such as running statistics: averaged by shares, and never optimized or rounded away."""

from pathlib import Path

import pytest
import torch

from crossfl.protocol.layout import GLOBAL_MODEL
from crossfl.server.first_state import convert
from crossfl.storage import encodings
from crossfl.storage.checkpoint import Tensors
from crossfl.storage.delta import Delta
from tests.support.federation import Federation, Values, entry, master, weights

OPTIMIZERS = ("fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "diloco")
MODEL: Values = {
    "conv": torch.full((200,), 0.5),
    "norm.running_var": torch.tensor([1.0, 2.0, 4.0]),
    "norm.num_batches_tracked": torch.tensor(7),
}
BUFFERS = ("norm.running_var", "norm.num_batches_tracked")
LOCAL = {"a": torch.tensor([0.01, 0.02, 0.5]), "b": torch.tensor([0.03, 1.0, 9.5])}
"""The variances at the end of the round, far from those at its beginning."""


def _updates(federation: Federation, coding: str = "fp32", **steps: int) -> list[Path]:
    paths = []
    for seed, (name, local) in enumerate(LOCAL.items()):
        values = federation.deltas(seed, 0.01)
        values["norm.running_var"] = local - weights_of(federation)["norm.running_var"].float()
        fields = {"steps": steps[name], "samples": steps[name]} if steps else {}
        paths.append(federation.update(name, values, coding, tokens=100 + 200 * seed, **fields))
    return paths


def weights_of(federation: Federation) -> Tensors:
    return Tensors.of_model(federation.model)


@pytest.mark.parametrize("server_optimizer", OPTIMIZERS)
def test_no_server_optimizer_touches_them(server_optimizer: str, tmp_path: Path) -> None:
    """A momentum would carry a variance below zero, a root of squares would make it any number."""
    rules = {"server_optimizer": server_optimizer, "server_learning_rate": 0.3}
    federation = Federation(tmp_path, MODEL, buffers=BUFFERS, **rules)
    for number in range(3):
        for path in (tmp_path / "updates").glob("*"):
            path.rename(tmp_path / f"{number}-{path.name}")
        out = federation.run(_updates(federation), f"out{number}")
        expected = 0.25 * LOCAL["a"] + 0.75 * LOCAL["b"]
        for family in (weights(out), master(out)):
            torch.testing.assert_close(family["norm.running_var"], expected)
        assert weights(out)["norm.num_batches_tracked"].item() == 7
        assert not weights(out)["conv"].equal(MODEL["conv"])
        assert Tensors.of_model(out / GLOBAL_MODEL).buffers == set(BUFFERS)
        federation.go_on(out)


def test_they_are_not_divided_by_steps(tmp_path: Path) -> None:
    """FedNova's coefficients add up to more than 1 where steps differ."""
    federation = Federation(tmp_path, MODEL, buffers=BUFFERS, aggregation_rule="fednova")
    paths = _updates(federation, a=4, b=40)
    out = federation.run(paths, allowances=federation.allowances({"a": 4, "b": 40}))
    expected = 0.25 * LOCAL["a"] + 0.75 * LOCAL["b"]
    torch.testing.assert_close(weights(out)["norm.running_var"], expected)


@pytest.mark.parametrize("rule", ["median", "trimmed_mean", "krum", "geometric_median"])
def test_a_robust_rule_is_one_for_them_too(rule: str, tmp_path: Path) -> None:
    federation = Federation(
        tmp_path, MODEL, buffers=BUFFERS, aggregation_rule=rule, server_optimizer="diloco",
        max_norm_ratio=1e9,
    )  # fmt: skip
    updates = []
    for number in range(5):
        values = federation.deltas(number, 0.01)
        values["norm.running_var"] = torch.full((3,), 1e4 if number == 4 else -0.1)
        updates.append(federation.update(f"s{number}", values))
    out = federation.run(updates)
    assert len(entry(out).facilities) == 5
    expected = MODEL["norm.running_var"] - 0.1
    found = weights(out)["norm.running_var"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)  # of 2,000, the mean's


@pytest.mark.parametrize("coding", [*list(encodings.ENCODINGS), "topk"])
def test_no_encoding_rounds_them(coding: str, tmp_path: Path) -> None:
    federation = Federation(tmp_path, MODEL, buffers=BUFFERS)
    paths = _updates(federation, coding)
    delivered = Delta(paths[0], BUFFERS).span("norm.running_var", 0, 3)
    assert delivered.equal(LOCAL["a"] - MODEL["norm.running_var"])
    out = federation.run(paths)
    assert {f.status for f in entry(out).facilities.values()} == {"complete"}
    assert (weights(out)["norm.running_var"] > 0).all()


def test_a_model_in_bf16_keeps_them(tmp_path: Path) -> None:
    federation = Federation(tmp_path, MODEL, buffers=BUFFERS)
    convert(federation.model, torch.bfloat16)
    sent = weights_of(federation)
    assert sent["conv"].dtype == torch.bfloat16
    assert sent["norm.running_var"].equal(MODEL["norm.running_var"])
    assert sent.buffers == set(BUFFERS)


def test_what_is_remembered_is_what_travels(tmp_path: Path) -> None:
    """A facility's variance of 0 is the difference to what it received, not to something finer."""
    tracked = {**MODEL, "norm.running_var": torch.tensor([0.9980, 1.0, 3.0]).bfloat16()}
    federation = Federation(tmp_path, tracked, buffers=BUFFERS)
    for number in range(4):
        values = federation.deltas(number, 0.01)
        target = torch.tensor([0.3333, 0.0, 1.2345]) if number < 3 else torch.zeros(3)
        values["norm.running_var"] = target - weights_of(federation)["norm.running_var"].float()
        out = federation.run([federation.update(f"s{number}", values)], f"out{number}")
        federation.go_on(out)
    assert weights(out)["norm.running_var"].float().equal(torch.zeros(3))
