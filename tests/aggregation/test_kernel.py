"""The compiled sum: the bytes that plain fp32 arithmetic gives, one rounding after another."""

import math
from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from crossfl import kernel
from crossfl.encoding import CELL


def _sum(deltas: list[Tensor], coefficients: list[float], out: Tensor) -> list[list[float]]:
    total = kernel.WeightedSum(deltas, coefficients)
    total.into(out)
    return total.squares()


def _in_order(deltas: list[Tensor], coefficients: list[float]) -> np.ndarray:
    total = np.zeros(len(deltas[0]), np.float32)
    for delta, coefficient in zip(deltas, coefficients, strict=True):
        total += np.float32(coefficient) * delta.float().numpy()
    return total


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(kernel.DTYPES), min_size=1, max_size=11),
    st.sampled_from((1, 7, kernel.BLOCK, kernel.BLOCK + 1, CELL, 2 * CELL + 4099)),
    st.integers(0, 2**31),
)
def test_sum_and_squares(dtypes: list[torch.dtype], count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    deltas = [torch.randn(count, generator=generator).to(dtype) for dtype in dtypes]
    coefficients = torch.rand(len(deltas), generator=generator).tolist()
    out = torch.full((count,), math.nan)
    squares = _sum(deltas, coefficients, out)
    np.testing.assert_array_equal(out.numpy(), _in_order(deltas, coefficients))
    expected = [
        [float(d[start : start + CELL].double().square().sum()) for d in deltas]
        for start in range(0, count, CELL)
    ]
    np.testing.assert_allclose(squares, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", kernel.DTYPES)
def test_what_is_not_finite_is_seen_and_what_is_only_large_is_measured(dtype: torch.dtype) -> None:
    deltas = [torch.zeros(CELL + 9, dtype=dtype) for _ in range(5)]
    deltas[1][CELL] = math.inf
    deltas[2][5] = math.nan
    deltas[4][3] = 2.0**100
    squares = _sum(deltas, [0.2] * 5, torch.empty(CELL + 9))
    assert math.isnan(squares[0][2])
    assert squares[1][1] == math.inf
    assert squares[0][4] == 2.0**200
    assert [squares[0][i] for i in (0, 1, 3)] == [squares[1][i] for i in (0, 2, 3)] == [0.0] * 3


@pytest.mark.parametrize(
    ("deltas", "coefficients", "out"),
    [
        ([torch.zeros(4)], [1.0], torch.zeros(5)),
        ([torch.zeros(4), torch.zeros(3)], [0.5, 0.5], torch.zeros(4)),
        ([torch.zeros(4).half()], [1.0], torch.zeros(4)),
        ([torch.zeros(8)[::2]], [1.0], torch.zeros(4)),
        ([torch.zeros(4)], [1.0], torch.zeros(4).double()),
        ([torch.zeros(4)], [0.5, 0.5], torch.zeros(4)),
    ],
)
def test_what_does_not_fit_is_never_read(
    deltas: list[Tensor], coefficients: list[float], out: Tensor
) -> None:
    with pytest.raises(ValueError, match=r"fp32 or bf16|coefficients|not cells"):
        _sum(deltas, coefficients, out)


def test_nothing_to_sum_is_nothing() -> None:
    empty = torch.empty(0)
    assert _sum([empty, empty], [0.5, 0.5], empty) == []


def test_it_compiles_where_no_folder_can_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    njit = numba.njit

    def nowhere(*signature: Any, cache: bool = False, **options: Any) -> Any:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(*signature, **options)

    monkeypatch.setattr(numba, "njit", nowhere)
    assert kernel._compiled(numba.float64(numba.float64))(lambda x: 2 * x)(3.0) == 6.0
