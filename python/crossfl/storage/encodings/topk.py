"""topk: the largest values of each cell, with their positions."""

import math

import torch
from torch import Tensor

from crossfl.storage.encodings.cells import Encoding


class TopK(Encoding):
    """The largest values of each cell in bf16, with their positions in it, ascending.

    Args:
        topk_fraction: the share of the values of a cell that is kept, in (0, 1].
    """

    suffixes = ("//position", "//value")
    dtypes = (torch.uint16, torch.bfloat16)

    def __init__(self, topk_fraction: float) -> None:
        if not 0 < topk_fraction <= 1:
            raise ValueError(f"topk keeps {topk_fraction} of the values: give a share in (0, 1]")
        self._fraction = topk_fraction

    def lengths(self, count: int) -> tuple[int, ...]:
        """Equal for positions and values."""
        return (math.ceil(count * self._fraction),) * 2

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
        return {"encoding": "topk", "topk_fraction": repr(self._fraction)}
