"""int8 and int4: each block of 64 values is rounded to steps of a scale of its own.

Blockwise quantisation is that of Dettmers et al. 2022, https://arxiv.org/abs/2110.02861.
"""

import math

import torch
from torch import Tensor

from crossfl.storage.encodings.cells import Encoding

BLOCK = 64
"""Elements that share a scale."""


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
