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

from crossfl.server.averaging import kernel
from crossfl.storage.encodings import CELL


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


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(kernel.DTYPES), min_size=1, max_size=9),
    st.sampled_from((1, 2, 7, kernel.BLOCK + 1, CELL + 4099)),
    st.integers(0, 2**31),
)
def test_rounded_to_bf16_where_it_is_summed(
    dtypes: list[torch.dtype], count: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    deltas = [torch.randn(count, generator=generator).to(dtype) for dtype in dtypes]
    coefficients = torch.rand(len(deltas), generator=generator).tolist()
    out = torch.full((count + 1,), -7.0, dtype=torch.bfloat16)
    squares = _sum(deltas, coefficients, out[:count])
    expected = torch.from_numpy(_in_order(deltas, coefficients)).bfloat16()
    assert out[:count].equal(expected)
    assert out[count] == -7.0
    assert squares == _sum(deltas, coefficients, torch.empty(count))


def test_ties_go_to_even_and_what_is_no_number_stays_none() -> None:
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0x7FFFFFFF, 0x7F800001]
    values = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    out = torch.empty(len(bits), dtype=torch.bfloat16)
    kernel.WeightedSum([values, *[torch.zeros(7)] * 3], [1.0] * 4).into(out)
    assert out[:5].tolist() == values[:5].bfloat16().tolist()
    assert out[5:].isnan().all()
    out = torch.empty(6, dtype=torch.bfloat16)
    halves = torch.tensor([math.nan, 1.0, math.inf, -math.inf, 0.0, math.nan]).bfloat16()
    kernel.WeightedSum([halves, *[torch.zeros(6).bfloat16()] * 3], [1.0] * 4).into(out)
    assert out.tolist()[1:5] == [1.0, math.inf, -math.inf, 0.0]
    assert out[0].isnan()
    assert out[5].isnan()


@pytest.mark.parametrize("dtype", kernel.DTYPES)
def test_a_part_is_that_part_of_the_whole(dtype: torch.dtype) -> None:
    deltas = [torch.randn(3 * CELL + 11).to(dtype) for _ in range(6)]
    whole, total = torch.empty(3 * CELL + 11), kernel.WeightedSum(deltas, [1 / 6] * 6)
    squares = _sum(deltas, [1 / 6] * 6, whole)
    for start, count in ((2 * CELL, CELL + 11), (0, CELL), (CELL, CELL)):
        part = torch.empty(count)
        total.into(part, start)
        assert part.equal(whole[start : start + count])
    assert total.squares() == squares
    with pytest.raises(ValueError, match="not cells"):
        total.into(torch.empty(5), 7)
    with pytest.raises(ValueError, match="not cells"):
        total.into(torch.empty(CELL), 3 * CELL)


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
