"""Plain encodings: the values themselves, as fp32, bf16 or fp16."""

import torch
from torch import Tensor

from crossfl.storage.encodings.cells import Encoding


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
