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

from crossfl.storage.encodings import CELL

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
_ZERO = np.float32(0)
_HALF, _UPPER = np.uint32(16), np.uint32(0xFFFF0000)
_DOUBLES = types.Array(types.float64, 1, "C")
_ADDRESSES = types.Array(types.uintp, 1, "C")


@_compiled(types.float32(types.uint32), inline="always")
def _lower(word: Any) -> Any:
    """The bf16 in the lower half of a word."""
    return np.uint32(word << _HALF).view(np.float32)


@_compiled(types.float32(types.uint32), inline="always")
def _upper(word: Any) -> Any:
    """The bf16 in the upper half of a word."""
    return np.uint32(word & _UPPER).view(np.float32)


@_compiled(types.uint32(types.float32), inline="always")
def _rounded(value: Any) -> Any:
    """The nearest bf16, ties to even, as the upper half of a word."""
    bits = np.float32(value).view(np.uint32)
    last = np.uint32(np.uint32(bits >> _HALF) & np.uint32(1))
    near = np.uint32(np.uint32(bits + np.uint32(np.uint32(0x7FFF) + last)) & _UPPER)
    return near if value == value else np.uint32(0x7FC00000)  # or it is none


def _adding(half: bool, rounding: bool) -> Any:
    """Compile the sum of four deltas in bf16, or in fp32, to what has been summed before.

    Nothing is stored between two of them. The sum goes back to where it came from, or, rounding,
    to `out` in bf16; where it is fresh, nothing was summed before. Deltas in bf16 are read two
    numbers at a time: either half of a word, as the upper half of one, is the number in fp32.
    """
    kind, width = (types.uint16, 2) if half else (types.float32, 4)

    # Of the liberties a compiler may take, the one given here, "reassoc", has squares added up by
    # the processor's vectors. It moves no other sum without "nsz", which is not given.
    @_compiled(
        types.void(_FLOATS, types.boolean, types.uintp, _ADDRESSES, types.intp, _FLOATS, _DOUBLES),
        fastmath={"reassoc"},
    )
    def add(
        total: Any,
        fresh: bool,
        out: int,
        addresses: Any,
        start: int,
        coefficients: Any,
        squares: Any,
    ) -> None:
        size, offset = total.shape[0], start * width
        p, q, r, s = coefficients[0], coefficients[1], coefficients[2], coefficients[3]
        ww = xx = yy = zz = _ZERO
        pairs = size // 2 if half else 0
        if half:
            aa = carray(_at(addresses[0] + offset, types.uint32), pairs)
            bb = carray(_at(addresses[1] + offset, types.uint32), pairs)
            cc = carray(_at(addresses[2] + offset, types.uint32), pairs)
            dd = carray(_at(addresses[3] + offset, types.uint32), pairs)
            words = carray(_at(out, types.uint32), pairs)
            for i in range(pairs):
                w, w1 = _lower(aa[i]), _upper(aa[i])
                x, x1 = _lower(bb[i]), _upper(bb[i])
                y, y1 = _lower(cc[i]), _upper(cc[i])
                z, z1 = _lower(dd[i]), _upper(dd[i])
                before = _ZERO if fresh else total[2 * i]
                before1 = _ZERO if fresh else total[2 * i + 1]
                value = (((before + p * w) + q * x) + r * y) + s * z
                value1 = (((before1 + p * w1) + q * x1) + r * y1) + s * z1
                if rounding:
                    words[i] = np.uint32(np.uint32(_rounded(value) >> _HALF) | _rounded(value1))
                else:
                    total[2 * i] = value
                    total[2 * i + 1] = value1
                ww += w * w + w1 * w1
                xx += x * x + x1 * x1
                yy += y * y + y1 * y1
                zz += z * z + z1 * z1
        a = carray(_at(addresses[0] + offset, kind), size)
        b = carray(_at(addresses[1] + offset, kind), size)
        c = carray(_at(addresses[2] + offset, kind), size)
        d = carray(_at(addresses[3] + offset, kind), size)
        rounded = carray(_at(out, types.uint16), size)
        for i in range(2 * pairs, size):  # those of fp32, or the last of an odd number
            if half:
                w, x, y, z = _lower(a[i]), _lower(b[i]), _lower(c[i]), _lower(d[i])
            else:
                w, x, y, z = np.float32(a[i]), np.float32(b[i]), np.float32(c[i]), np.float32(d[i])
            before = _ZERO if fresh else total[i]
            value = (((before + p * w) + q * x) + r * y) + s * z
            if rounding:
                rounded[i] = np.uint16(_rounded(value) >> _HALF)
            else:
                total[i] = value
            ww += w * w
            xx += x * x
            yy += y * y
            zz += z * z
        squares[0] += ww
        squares[1] += xx
        squares[2] += yy
        squares[3] += zz

    return add


_add_wholes, _add_halves = _adding(False, False), _adding(True, False)
_round_wholes, _round_halves = _adding(False, True), _adding(True, True)


@_compiled(
    types.void(
        types.Array(types.uintp, 2, "C"),
        types.intp,
        types.Array(types.boolean, 1, "C"),
        types.Array(types.float32, 2, "C"),
        types.uintp,
        types.intp,
        types.boolean,
        types.intp,
        types.Array(types.float64, 3, "C"),
    )
)
def _walk(
    addresses: Any,
    first: int,
    halves: Any,
    coefficients: Any,
    out: int,
    count: int,
    rounding: bool,
    cell: int,
    squares: Any,
) -> None:
    """Sum `count` elements from `first` on in blocks; squares by cell, group and place in it."""
    block, groups = np.empty(BLOCK, np.float32), addresses.shape[0]
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        total = block[:size] if rounding else carray(_at(out + 4 * start, types.float32), size)
        target = types.uintp(out + 2 * start)
        for g in range(groups):
            found, there, shares = squares[start // cell, g], addresses[g], coefficients[g]
            begin, fresh = first + start, g == 0
            if rounding and g == groups - 1:
                if halves[g]:
                    _round_halves(total, fresh, target, there, begin, shares, found)
                else:
                    _round_wholes(total, fresh, target, there, begin, shares, found)
            elif halves[g]:
                _add_halves(total, fresh, target, there, begin, shares, found)
            else:
                _add_wholes(total, fresh, target, there, begin, shares, found)


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
        self._coefficients = np.where(self._present, weights, _ZERO)
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
        _walk(
            self._addresses,
            start,
            self._halves,
            self._coefficients,
            out.data_ptr(),
            count,
            out.dtype == torch.bfloat16,
            CELL,
            self._squares[start // CELL :],
        )

    def squares(self) -> list[list[float]]:
        """For each cell of `encodings.CELL` elements, the sum of squares of each delta."""
        rows: list[list[float]] = self._squares[:, self._present].tolist()
        # Squares can be too large for fp32 where the values are not.
        if not np.isfinite(self._squares).all():
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
