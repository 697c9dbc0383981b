"""What every encoding has: the cells that it works on, and what it makes of one."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

CELL = 65536
"""Elements."""


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
