"""Shares, means and robust combinations against closed forms and numpy."""

from itertools import combinations as subsets
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossfl.errors import CrossFLError
from crossfl.server import aggregation_rules
from crossfl.server.aggregation_rules import UpdateStatistics, krum
from crossfl.server.aggregation_rules.coordinatewise import _network, median, trimmed_mean
from crossfl.server.optimizers import OPTIMIZERS
from tests.support.federation import Federation, Values, facilities, master


def _run(folder: Path, values: list[float], said: list[dict[str, Any]], **rules: Any) -> Any:
    federation = Federation(folder, {"w": torch.zeros(2)}, **rules)
    updates = [
        federation.update(f"s{i}", {"w": torch.full((2,), v)}, **fields)
        for i, (v, fields) in enumerate(zip(values, said, strict=True))
    ]
    out = federation.run(updates)
    shares = [entry.share for entry in facilities(out).values()]
    return float(master(out)["w"][0]), shares


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"weighting": "tokens"}, [0.1, 0.9]),
        ({"weighting": "samples"}, [0.75, 0.25]),
        ({"weighting": "steps"}, [0.2, 0.8]),
        ({"weighting": "equal"}, [0.5, 0.5]),
        ({"weighting": "tokens", "max_share": 0.6}, [0.4, 0.6]),
        ({"weighting": "tokens", "max_share": 0.2}, [0.5, 0.5]),
    ],
)
def test_shares(tmp_path: Path, rules: dict[str, Any], expected: list[float]) -> None:
    said = [{"tokens": 10, "samples": 3, "steps": 2}, {"tokens": 90, "samples": 1, "steps": 8}]
    value, shares = _run(tmp_path, [1.0, 2.0], said, **rules)
    assert shares == pytest.approx(expected)
    assert value == pytest.approx(expected[0] + 2 * expected[1])


def test_the_cap_is_filled_from_the_largest_down(tmp_path: Path) -> None:
    said = [{"tokens": n} for n in (80, 15, 4, 1)]
    _, shares = _run(tmp_path, [1.0] * 4, said, max_share=0.4)
    assert shares == pytest.approx([0.4, 0.4, 0.16, 0.04])


def test_fednova_takes_steps_out_of_the_weights(tmp_path: Path) -> None:
    # τ̄ = 0.5·2 + 0.5·8 = 5; Δ = 5 (0.5·1/2 + 0.5·4/8) = 2.5
    said = [{"steps": 2}, {"steps": 8}]
    value, shares = _run(tmp_path, [1.0, 4.0], said, aggregation_rule="fednova")
    assert shares == pytest.approx([1.25, 0.3125])
    assert value == pytest.approx(2.5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 33), st.integers(0, 2**31), st.integers(0, 3))
def test_coordinatewise_is_numpy(sites: int, seed: int, num_byzantine: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    deltas = [torch.randint(-4, 5, (50,), generator=generator).float() for _ in range(sites)]
    rows = np.stack([d.numpy() for d in deltas])
    np.testing.assert_allclose(median(deltas, 1).numpy(), np.median(rows, axis=0))
    if sites > 2 * num_byzantine:
        kept = np.sort(rows, axis=0)[num_byzantine : sites - num_byzantine]
        got = trimmed_mean(deltas, num_byzantine).numpy()
        np.testing.assert_allclose(got, kept.mean(axis=0), rtol=1e-5, atol=1e-6)


def _cohort(points: np.ndarray, num_byzantine: int = 1) -> UpdateStatistics:
    products = torch.tensor(points @ points.T, dtype=torch.float64)
    return UpdateStatistics(
        [1 / len(points)] * len(points), [1] * len(points), num_byzantine, products
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(5, 9), st.integers(0, 2**31))
def test_krum_is_its_definition(sites: int, seed: int) -> None:
    points = np.random.default_rng(seed).normal(size=(sites, 3))
    scores = []
    for i in range(sites):
        others = sorted(((points[i] - p) ** 2).sum() for j, p in enumerate(points) if j != i)
        scores.append(sum(others[: sites - 3]))
    np.testing.assert_allclose(krum.scores(_cohort(points)), scores, rtol=1e-9)
    assert int(np.argmax(krum.krum(_cohort(points)))) == int(np.argmin(scores))
    chosen = np.flatnonzero(krum.multi_krum(_cohort(points)))
    assert set(chosen) == set(np.argsort(scores)[: sites - 3])


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**31))
def test_no_point_near_the_geometric_median_is_better(sites: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(sites, 3))
    coefficients = aggregation_rules.RULES["geometric_median"].coefficients(_cohort(points))
    assert sum(coefficients) == pytest.approx(1)
    found = np.array(coefficients) @ points

    def total(point: np.ndarray) -> float:
        return float(np.linalg.norm(points - point, axis=1).sum())

    for _ in range(50):
        assert total(found) <= total(found + rng.normal(size=3) * 0.01) + 1e-6


def test_geometric_median_of_a_triangle_and_a_far_point() -> None:
    # Fermat point of an equilateral triangle: its centre.
    triangle = np.array([[1, 0], [-0.5, 3**0.5 / 2], [-0.5, -(3**0.5) / 2]])
    coefficients = aggregation_rules.RULES["geometric_median"].coefficients(_cohort(triangle))
    assert coefficients == pytest.approx([1 / 3] * 3)


ROBUST = ("median", "trimmed_mean", "krum", "multi_krum", "geometric_median")


@pytest.mark.parametrize("aggregation_rule", ROBUST)
def test_one_liar_among_five_moves_little(tmp_path: Path, aggregation_rule: str) -> None:
    model: Values = {"w": torch.zeros(1000), "v": torch.zeros(3, 3)}
    rules = {"weighting": "equal", "max_norm_ratio": 1e9, "max_norm": 1e9}
    federation = Federation(tmp_path, model, aggregation_rule=aggregation_rule, **rules)
    honest = {n: torch.ones_like(t) for n, t in model.items()}
    updates = []
    for i in range(4):
        noise = federation.deltas(i, 0.01)
        updates.append(federation.update(f"s{i}", {n: honest[n] + noise[n] for n in honest}))
    liar = {n: -1e6 * t for n, t in honest.items()}
    updates.append(federation.update("liar", liar, tokens=10**9))
    found = master(federation.run(updates))
    assert all((found[n] - honest[n]).abs().max() < 0.1 for n in honest)


@pytest.mark.parametrize(
    ("aggregation_rule", "least"), [("krum", 5), ("multi_krum", 5), ("trimmed_mean", 3)]
)
def test_too_few_for_the_guarantee_is_an_error(
    tmp_path: Path, aggregation_rule: str, least: int
) -> None:
    federation = Federation(tmp_path, {"w": torch.zeros(2)}, aggregation_rule=aggregation_rule)
    updates = [federation.update(f"s{i}", federation.deltas(i)) for i in range(least - 1)]
    with pytest.raises(
        CrossFLError, match=f"{aggregation_rule} with num_byzantine=1 needs {least}"
    ):
        federation.run(updates)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_every_pair_of_strategy_and_combination_runs(tmp_path: Path) -> None:
    for strategy, aggregation_rule in product(OPTIMIZERS, aggregation_rules.RULES):
        folder = tmp_path / f"{strategy}-{aggregation_rule}"
        federation = Federation(
            folder,
            {"w": torch.zeros(9)},
            server_optimizer=strategy,
            aggregation_rule=aggregation_rule,
        )
        updates = [federation.update(f"s{i}", federation.deltas(i)) for i in range(5)]
        assert master(federation.run(updates))["w"].isfinite().all()


def test_networks_sort() -> None:
    for n in range(1, 12):
        for ones in range(n + 1):
            for where in subsets(range(n), ones):
                row = [int(i in where) for i in range(n)]
                for low, high in _network(n):
                    if row[low] > row[high]:
                        row[low], row[high] = row[high], row[low]
                assert row == sorted(row)
