"""The inner loop of aggregation, compiled: every number of every delta is read once from memory.

torch walks its operands once for each operation, and its threads meet at the interpreter's lock
between any two of them; where the numbers come at the speed of memory, that is what takes the time.
Here a block of four deltas at a time is widened, measured and added to one that stays in the
nearest cache, without the lock. Products and sums are rounded one by one, as IEEE 754 has it, never
fused: the sum is the same bytes on any processor. Sums of squares, of which norms are made, are
added by the processor's vectors, and the same on any of its kind.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic
from numba.np.numpy_support import carray
from torch import Tensor

from crossfl.encoding import CELL

BLOCK = 2048
"""Elements worked on at a time, 8 KiB of the sum; a cell has a whole number of them."""
DTYPES = (torch.float32, torch.bfloat16)
"""What the loop reads."""

F = TypeVar("F", bound=Callable[..., Any])


def _compiled(signature: Any, **options: Any) -> Callable[[F], F]:
    """Compile a function now, without the lock; kept beside it or in the user's cache folder."""

    def compile_(function: F) -> F:
        try:
            return numba.njit(signature, nogil=True, cache=True, **options)(function)  # type: ignore[no-any-return]
        except RuntimeError:  # neither folder can be written
            return numba.njit(signature, nogil=True, **options)(function)  # type: ignore[no-any-return]

    return compile_


def _pointer(context: Any, address: Any, kind: Any) -> Any:
    """A pointer to numbers of a kind; what lies there is for the caller to know."""
    pointer = types.CPointer(kind.dtype)

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], target.get_value_type(pointer))

    return pointer(types.uintp, kind), generate


_at: Any = intrinsic(_pointer)
_FLOATS = types.Array(types.float32, 1, "C")
_DOUBLES = types.Array(types.float64, 1, "C")
_ADDRESSES = types.Array(types.uintp, 1, "C")


def _adding(half: bool) -> Any:
    """Compile the sum of four deltas in bf16, or in fp32: nothing is stored between two of them."""
    kind, width = (types.uint16, 2) if half else (types.float32, 4)

    # Of the liberties a compiler may take, the one given here, "reassoc", has squares added up by
    # the processor's vectors. It moves no other sum without "nsz", which is not given.
    @_compiled(types.void(_FLOATS, _ADDRESSES, types.intp, _FLOATS, _DOUBLES), fastmath={"reassoc"})
    def add(total: Any, addresses: Any, start: int, coefficients: Any, squares: Any) -> None:
        size, offset = total.shape[0], start * width
        a = carray(_at(addresses[0] + offset, kind), size)
        b = carray(_at(addresses[1] + offset, kind), size)
        c = carray(_at(addresses[2] + offset, kind), size)
        d = carray(_at(addresses[3] + offset, kind), size)
        p, q, r, s = coefficients[0], coefficients[1], coefficients[2], coefficients[3]
        ww = xx = yy = zz = np.float32(0)
        for i in range(size):
            if half:  # the upper half of the bits of fp32
                w = np.uint32(np.uint32(a[i]) << np.uint32(16)).view(np.float32)
                x = np.uint32(np.uint32(b[i]) << np.uint32(16)).view(np.float32)
                y = np.uint32(np.uint32(c[i]) << np.uint32(16)).view(np.float32)
                z = np.uint32(np.uint32(d[i]) << np.uint32(16)).view(np.float32)
            else:
                w, x, y, z = np.float32(a[i]), np.float32(b[i]), np.float32(c[i]), np.float32(d[i])
            total[i] = (((total[i] + p * w) + q * x) + r * y) + s * z
            ww += w * w
            xx += x * x
            yy += y * y
            zz += z * z
        squares[0] += ww
        squares[1] += xx
        squares[2] += yy
        squares[3] += zz

    return add


_add_wholes, _add_halves = _adding(False), _adding(True)


@_compiled(
    types.void(
        types.Array(types.uintp, 2, "C"),
        types.Array(types.boolean, 1, "C"),
        types.Array(types.float32, 2, "C"),
        _FLOATS,
        types.intp,
        types.Array(types.float64, 3, "C"),
    )
)
def _walk(
    addresses: Any, halves: Any, coefficients: Any, total: Any, cell: int, squares: Any
) -> None:
    """Sum groups of four, block by block; their squares by cell, group and place in it."""
    for start in range(0, total.shape[0], BLOCK):
        part = total[start : start + BLOCK]
        part[:] = 0
        for g in range(addresses.shape[0]):
            found = squares[start // cell, g]
            if halves[g]:
                _add_halves(part, addresses[g], start, coefficients[g], found)
            else:
                _add_wholes(part, addresses[g], start, coefficients[g], found)


def weighted_sum(
    deltas: Sequence[Tensor], coefficients: Sequence[float], out: Tensor
) -> list[list[float]]:
    """Write Σ cᵢΔᵢ, added in fp32 in that order, and measure what is added.

    Args:
        deltas: flat and contiguous, [n], each in one of `DTYPES`.
        coefficients: one for each delta.
        out: fp32 [n].

    Returns:
        For each cell of `crossfl.encoding.CELL` elements, the sum of squares of each delta.

    Raises:
        ValueError: dtypes, shapes or numbers of them are not those.
    """
    wrong = [d for d in (*deltas, out) if d.shape != (len(out),) or not d.is_contiguous()]
    if wrong or out.dtype != torch.float32 or any(d.dtype not in DTYPES for d in deltas):
        raise ValueError(f"deltas of {[(d.dtype, *d.shape) for d in deltas]} for {len(out)} sums")
    addresses: list[list[int]] = []
    weights: list[list[float]] = []
    halves: list[bool] = []
    places: list[tuple[int, int]] = []
    pairs = zip(deltas, coefficients, strict=True)
    for dtype, same in itertools.groupby(pairs, key=lambda pair: pair[0].dtype):
        alike = list(same)
        for group in (alike[i : i + 4] for i in range(0, len(alike), 4)):
            places += [(len(addresses), place) for place in range(len(group))]
            # what is not there is a delta that is, times 0: it takes no memory to read again
            filled = [*group, *[(group[0][0], 0.0)] * (4 - len(group))]
            addresses.append([delta.data_ptr() for delta, _ in filled])
            weights.append([coefficient for _, coefficient in filled])
            halves.append(dtype == torch.bfloat16)
    squares = np.zeros((-(-len(out) // CELL), len(addresses), 4))
    _walk(
        np.array(addresses, np.uintp),
        np.array(halves, np.bool_),
        np.array(weights, np.float32),
        out.numpy(),
        CELL,
        squares,
    )
    groups, inside = np.array(places).T
    rows: list[list[float]] = squares[:, groups, inside].tolist()
    for cell, row in enumerate(rows):
        for number, square in enumerate(row):
            if not math.isfinite(square):  # squares beyond fp32 are not yet values beyond it
                values = deltas[number][cell * CELL : (cell + 1) * CELL].double()
                row[number] = float(values.square().sum())
    return rows
