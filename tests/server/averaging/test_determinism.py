"""The next model and state are the same bytes however the round was walked."""

import itertools
from pathlib import Path

import pytest
import torch

from crossfl.protocol.records import Aggregation
from crossfl.storage.encodings import CELL
from tests.support.federation import Federation, Values, snapshot

RULES = ("mean", "median", "multi_krum", "geometric_median")


def _model() -> list[Values]:
    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    return [
        {"embed": draw(3, CELL - 5).bfloat16(), "norm": draw(7), "steps": torch.arange(5)},
        {"head": draw(2 * CELL + 1).half(), "bias": draw(1), "empty": draw(0, 4)},
    ]


@pytest.mark.slow
@pytest.mark.parametrize("aggregation_rule", RULES)
def test_same_bytes_for_any_order_piece_and_threads(tmp_path: Path, aggregation_rule: str) -> None:
    federation = Federation(
        tmp_path, _model(), aggregation_rule=aggregation_rule, server_optimizer="fedadam"
    )
    codings = ("fp32", "bf16", "int8", "int4", "topk")
    updates = [
        federation.update(f"site{i}", federation.deltas(i), coding, tokens=100 + i)
        for i, coding in enumerate(codings)
    ]
    seen = []
    orders = [updates, updates[::-1], updates[2:] + updates[:2]]
    ways = itertools.product(orders, (CELL, 3 * CELL, 64 * CELL), (1, 2))
    for number, (order, piece, threads) in enumerate(ways):
        out = federation.run(order, f"out{number}", piece=piece, threads=threads)
        seen.append(snapshot(out))
    for other in seen[1:]:
        assert [n for n in other if other[n] != seen[0][n]] == []
    assert any(name.endswith("second.model-00002-of-00002.safetensors") for name in seen[0])


def test_arguments_that_would_change_the_bytes_are_refused(tmp_path: Path) -> None:
    federation = Federation(tmp_path, {"w": torch.zeros(3)})
    update = federation.update("a", federation.deltas(0))
    with pytest.raises(ValueError, match="multiple"):
        federation.run([update], piece=1000)
    assert Aggregation().server_optimizer == "fedavg"
