"""The inner loop of aggregation, compiled: every number of every delta is read once from memory.

torch walks its operands once for each operation, and its threads meet at the interpreter's lock
between any two of them; where the numbers come at the speed of memory, that is what takes the time.
Here a block of four deltas at a time is widened, measured and added to one that stays in the
nearest cache, without the lock. Products and sums are rounded one by one, as IEEE 754 has it, never
fused: the sum is the same bytes on any processor. Sums of squares, of which norms are made, are
added by the processor's vectors, and the same on any of its kind.
"""

import functools
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
_HALVES = types.Array(types.uint16, 1, "C")
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


@_compiled(types.void(_FLOATS, _HALVES))
def _round(values: Any, out: Any) -> None:
    """Round fp32 to bf16, to the nearest and ties to even."""
    bits = carray(_at(types.uintp(values.ctypes.data), types.uint32), values.shape[0])
    for i in range(out.shape[0]):
        word = np.uint32(bits[i])
        odd = np.uint32(np.uint32(word >> np.uint32(16)) & np.uint32(1))
        near = np.uint32(np.uint32(word + np.uint32(np.uint32(0x7FFF) + odd)) >> np.uint32(16))
        nan = np.uint32(word & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out[i] = np.uint16(np.uint32(0x7FC0) if nan else near)


def _walking(half: bool) -> Any:
    """Compile the sum of groups of four into fp32, or into bf16."""

    @_compiled(
        types.void(
            types.Array(types.uintp, 2, "C"),
            types.intp,
            types.Array(types.boolean, 1, "C"),
            types.Array(types.float32, 2, "C"),
            _HALVES if half else _FLOATS,
            types.intp,
            types.Array(types.float64, 3, "C"),
        )
    )
    def walk(
        addresses: Any,
        first: int,
        halves: Any,
        coefficients: Any,
        out: Any,
        cell: int,
        squares: Any,
    ) -> None:
        """Block by block from element `first` on; squares by cell, group and place in it."""
        block = np.empty(BLOCK if half else 0, np.float32)
        for start in range(0, out.shape[0], BLOCK):
            end = min(start + BLOCK, out.shape[0])
            part = block[: end - start] if half else out[start:end]
            part[:] = 0
            for g in range(addresses.shape[0]):
                found = squares[start // cell, g]
                if halves[g]:
                    _add_halves(part, addresses[g], first + start, coefficients[g], found)
                else:
                    _add_wholes(part, addresses[g], first + start, coefficients[g], found)
            if half:
                _round(part, out[start:end])

    return walk


_walk_to_wholes, _walk_to_halves = _walking(False), _walking(True)


@functools.cache
def _groups(dtypes: tuple[torch.dtype, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Deltas in groups of four of one dtype: their numbers, which are there, which are of bf16.

    Where a group is not full, what is missing is its first, which takes no memory to read again.
    """
    groups: list[list[int]] = []
    for _, run in itertools.groupby(range(len(dtypes)), key=lambda number: dtypes[number]):
        alike = list(run)
        groups += [alike[i : i + 4] for i in range(0, len(alike), 4)]
    numbers = np.array([group + group[:1] * (4 - len(group)) for group in groups], np.intp)
    present = np.array([[place < len(group) for place in range(4)] for group in groups])
    return numbers, present, np.array([dtypes[group[0]] == torch.bfloat16 for group in groups])


class WeightedSum:
    """Σ cᵢΔᵢ, added in fp32 in that order, where it is asked for; what is added is measured.

    Args:
        deltas: flat and contiguous, [n], each in one of `DTYPES`; at least one.
        coefficients: one for each delta.

    Raises:
        ValueError: dtypes, shapes or numbers of them are not those.

    Example:
        >>> mean = torch.empty(3)
        >>> total = WeightedSum([torch.tensor([1.0, 2.0, 3.0]), torch.ones(3)], [0.5, 0.5])
        >>> total.into(mean)
        >>> mean, total.squares()
        (tensor([1.0000, 1.5000, 2.0000]), [[14.0, 3.0]])
    """

    def __init__(self, deltas: Sequence[Tensor], coefficients: Sequence[float]) -> None:
        if not deltas or len(deltas) != len(coefficients):
            raise ValueError(f"{len(deltas)} deltas and {len(coefficients)} coefficients")
        self._deltas, self._count = deltas, deltas[0].numel()
        for delta in deltas:
            _check(delta, self._count)
        numbers, self._present, self._halves = _groups(tuple(delta.dtype for delta in deltas))
        weights = np.array(coefficients, np.float32)[numbers]
        self._coefficients = np.where(self._present, weights, np.float32(0))
        self._addresses = np.array([delta.data_ptr() for delta in deltas], np.uintp)[numbers]
        self._squares = np.zeros((-(-self._count // CELL), *numbers.shape))

    def into(self, out: Tensor, start: int = 0) -> None:
        """Write the elements from `start`, the first of a cell, on.

        Args:
            out: [m], in one of `DTYPES`, to which the sum is rounded at the end, ties to even.
            start: at most n − m.
        """
        count = out.numel()
        _check(out, count)
        if not 0 <= start <= self._count - count or start % CELL:
            raise ValueError(f"elements {start} to {start + count} are not cells of {self._count}")
        arguments = (self._addresses, start, self._halves, self._coefficients)
        squares = self._squares[start // CELL :]
        if out.dtype == torch.float32:
            _walk_to_wholes(*arguments, out.numpy(), CELL, squares)
        else:
            _walk_to_halves(*arguments, out.view(torch.uint16).numpy(), CELL, squares)

    def squares(self) -> list[list[float]]:
        """For each cell of `crossfl.encoding.CELL` elements, the sum of squares of each delta."""
        rows: list[list[float]] = self._squares[:, self._present].tolist()
        if not np.isfinite(
            self._squares
        ).all():  # their sum can be too large for fp32, and they not
            for cell, row in enumerate(rows):
                for number, square in enumerate(row):
                    if not math.isfinite(square):
                        values = self._deltas[number][cell * CELL : (cell + 1) * CELL]
                        row[number] = float(values.double().square().sum())
        return rows


def _check(tensor: Tensor, count: int) -> None:
    if tensor.shape != (count,) or tensor.dtype not in DTYPES or not tensor.is_contiguous():
        found = f"{tensor.dtype}, {list(tensor.shape)}"
        raise ValueError(f"{found}: not fp32 or bf16, not flat, or not of {count} elements")
