"""Encodings: how the numbers of a delta are written for the journey, cell by cell.

A *cell* is 65536 consecutive elements of a parameter (fewer at its end): the unit in which deltas
are encoded, decoded, checked and summed, so that no result depends on how a model is walked.
Each encoding writes one or several tensors for a parameter, and the same number of elements of
each for every full cell; hence any cell can be read without the ones before it.

int8 and int4 quantise blocks of 64 elements to a scale of their own (as Dettmers et al. 2022,
https://arxiv.org/abs/2110.02861); topk keeps the largest values of each cell. What these three lose
is kept at the facility and added to its next delta (Seide et al. 2014; Karimireddy et al. 2019,
https://arxiv.org/abs/1901.09847).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

CELL = 65536
"""Elements."""
BLOCK = 64
"""Elements that share a scale."""


class Encoding(ABC):
    """One way to write the cells of a parameter."""

    suffixes: tuple[str, ...] = ("",)
    """What is added to the name of the parameter to name each of the tensors it becomes."""
    dtypes: tuple[torch.dtype, ...]
    lossy: ClassVar[bool] = True
    """Whether what is lost is worth keeping for the next delta."""

    @abstractmethod
    def lengths(self, count: int) -> tuple[int, ...]:
        """Elements of each tensor for a cell of `count` elements."""

    @abstractmethod
    def encode(self, values: Tensor) -> tuple[Tensor, ...]:
        """A cell of fp32 values, flat, as a piece of each tensor."""

    @abstractmethod
    def decode(self, parts: tuple[Tensor, ...], count: int) -> Tensor:
        """The fp32 values of a cell, from the pieces.

        Raises:
            ValueError: the pieces are not what `encode` would have written.
        """

    def metadata(self) -> dict[str, str]:
        """What a file in this encoding says about it."""
        return {}

    def totals(self, elements: int) -> tuple[int, ...]:
        """Elements of each tensor for a whole parameter."""
        cells, rest = divmod(elements, CELL)
        pairs = zip(self.lengths(CELL), self.lengths(rest), strict=True)
        return tuple(cells * full + last for full, last in pairs)


class Plain(Encoding):
    """The values themselves, in a floating-point dtype; the tensor keeps its shape."""

    lossy = False

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtypes = (dtype,)

    def lengths(self, count: int) -> tuple[int, ...]:
        """As many."""
        return (count,)

    def encode(self, values: Tensor) -> tuple[Tensor, ...]:
        """Rounded to the dtype."""
        return (values.to(self.dtypes[0]),)

    def decode(self, parts: tuple[Tensor, ...], count: int) -> Tensor:
        """As fp32."""
        return parts[0].float()


class Quantised(Encoding):
    """Signed integers of 8 or 4 bits, and a bf16 scale for each block of 64 of them."""

    suffixes = ("", "//scale")

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self._top = 2 ** (bits - 1) - 1
        self.dtypes = (torch.int8 if bits == 8 else torch.uint8, torch.bfloat16)

    def lengths(self, count: int) -> tuple[int, ...]:
        """A byte for one value of 8 bits or two of 4; a scale for each block."""
        return math.ceil(count * self._bits / 8), math.ceil(count / BLOCK)

    def encode(self, values: Tensor) -> tuple[Tensor, ...]:
        """Codes and scales: a code counts steps of the scale of its block."""
        padded = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
        scale = (padded.abs().amax(1) / self._top).bfloat16()
        step = scale.float()
        step = torch.where(step > 0, step, 1.0)[:, None]
        codes = (padded / step).round_().clamp_(-self._top, self._top).view(-1)[: len(values)]
        if self._bits == 8:
            return codes.to(torch.int8), scale
        nibbles = torch.nn.functional.pad(codes, (0, len(codes) % 2)).add_(8).to(torch.uint8)
        return nibbles[::2] | (nibbles[1::2] << 4), scale

    def decode(self, parts: tuple[Tensor, ...], count: int) -> Tensor:
        """Code times scale."""
        codes, scale = parts
        if self._bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), 1).view(-1)[:count].to(torch.int8) - 8
        values = torch.nn.functional.pad(codes.float(), (0, -count % BLOCK))
        return (values.view(-1, BLOCK) * scale.float()[:, None]).view(-1)[:count]

    def metadata(self) -> dict[str, str]:
        """The name of the encoding."""
        return {"encoding": f"int{self._bits}"}


class TopK(Encoding):
    """The largest values of each cell in bf16, with their positions in it, ascending.

    Args:
        kept: the share of the values of a cell that is kept, in (0, 1].
    """

    suffixes = ("//position", "//value")
    dtypes = (torch.uint16, torch.bfloat16)

    def __init__(self, kept: float) -> None:
        if not 0 < kept <= 1:
            raise ValueError(f"topk keeps {kept} of the values: give a share in (0, 1]")
        self._kept = kept

    def lengths(self, count: int) -> tuple[int, ...]:
        """Equal for positions and values."""
        return (math.ceil(count * self._kept),) * 2

    def encode(self, values: Tensor) -> tuple[Tensor, ...]:
        """Positions and values."""
        (count, _) = self.lengths(len(values))
        positions = values.abs().topk(count).indices.sort().values
        return positions.to(torch.int32).to(torch.uint16), values[positions].bfloat16()

    def decode(self, parts: tuple[Tensor, ...], count: int) -> Tensor:
        """The kept values, and 0 elsewhere."""
        positions = parts[0].to(torch.int64)
        if len(positions) and (positions.diff().lt(1).any() or positions[-1] >= count):
            raise ValueError("the positions of a topk cell do not ascend within it")
        return torch.zeros(count).index_copy_(0, positions, parts[1].float())

    def metadata(self) -> dict[str, str]:
        """The name of the encoding and its share."""
        return {"encoding": "topk", "kept": repr(self._kept)}


ENCODINGS: dict[str, Encoding] = {
    "fp32": Plain(torch.float32),
    "bf16": Plain(torch.bfloat16),
    "fp16": Plain(torch.float16),
    "int8": Quantised(8),
    "int4": Quantised(4),
}


def of(name: str, kept: float) -> Encoding:
    """The encoding a training record names.

    Raises:
        ValueError: topk with a share that is not in (0, 1].
    """
    return TopK(kept) if name == "topk" else ENCODINGS[name]


def of_metadata(metadata: Mapping[str, str]) -> Encoding:
    """The encoding that a file says it has; plain where it says nothing.

    Raises:
        ValueError: there is no such encoding.
    """
    name = metadata.get("encoding", "fp32")
    if name != "topk" and name not in ENCODINGS:
        raise ValueError(f"there is no encoding {name!r}")
    try:
        return of(name, float(metadata.get("kept", "nan")))
    except ValueError as error:
        raise ValueError(f"encoding {name!r}: {error}") from None
