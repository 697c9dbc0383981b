"""Samples as tensors: padded, one in a row, or packed, several in a row that do not see each other.

Packing changes where samples lie and not what is learnt from them: a step has the same samples, and
its loss is the same but for rounding. Positions begin anew with every sample of a row, from which
transformers makes the mask that keeps them apart (`create_causal_mask`), for any attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crossfl.learning.datasets import IGNORED, Encoded, Image

Row = Sequence[Encoded | Image]


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes."""

    inputs: Tensor
    """Token ids [rows, longest], or images, fp32 [rows, channels, height, width]."""
    labels: Tensor
    """Token ids [rows, longest], or classes [rows]."""
    positions: Tensor | None
    """Place of each token in its sample; None where each row is one sample from its start."""
    tokens: int
    """Tokens that count in the loss; of an image, one."""
    read: int
    """Tokens without padding, with those of prompts."""

    def blank(self) -> "Batch":
        """The same batch with nothing to learn, for a rank that has run out of samples."""
        return replace(self, labels=torch.full_like(self.labels, IGNORED), tokens=0, read=0)


def batch_of(rows: Sequence[Row], device: torch.device) -> Batch:
    """Rows of samples as one batch; text is padded on the right, an image has a row to itself.

    Attention is causal, so no token sees the padding behind it; the labels keep the padding, and
    the first token of each sample, which nothing foretells, out of the loss.
    """
    images = [sample for row in rows for sample in row if isinstance(sample, Image)]
    if images:
        pixels_BCHW = torch.stack([torch.from_numpy(image.pixels) for image in images])
        labels_B = torch.tensor([image.label for image in images])
        return Batch(pixels_BCHW.to(device), labels_B.to(device), None, len(images), len(images))
    texts = [[sample for sample in row if isinstance(sample, Encoded)] for row in rows]
    shape = (len(texts), max(2, *(sum(len(sample.ids) for sample in row) for row in texts)))
    ids_BL = torch.zeros(shape, dtype=torch.long)
    labels_BL = torch.full(shape, IGNORED)
    positions_BL = torch.arange(shape[1]).repeat(shape[0], 1)
    for number, row in enumerate(texts):
        start = 0
        for sample in row:
            end = start + len(sample.ids)
            ids_BL[number, start:end] = torch.tensor(sample.ids)
            labels_BL[number, start:end] = torch.tensor(sample.labels)
            labels_BL[number, start] = IGNORED
            positions_BL[number, start:] -= int(positions_BL[number, start])
            start = end
    packed = any(len(row) > 1 for row in texts)
    return Batch(
        ids_BL.to(device),
        labels_BL.to(device),
        positions_BL.to(device) if packed else None,
        int((labels_BL != IGNORED).sum()),
        sum(len(sample.ids) for row in texts for sample in row),
    )


def rows_of(samples: Sequence[Encoded | Image], length: int | None) -> Sequence[Row]:
    """A row for each sample, or, with a `length`, rows of text packed up to it."""
    texts = [sample for sample in samples if isinstance(sample, Encoded)]
    if length is None or len(texts) < len(samples):
        return [[sample] for sample in samples]
    return pack(texts, length)


def pack(samples: Sequence[Encoded], length: int) -> list[list[Encoded]]:
    """Samples in rows of at most `length` tokens: the longest first, each where it first fits."""
    rows: list[list[Encoded]] = []
    left: list[int] = []
    for sample in sorted(samples, key=lambda s: len(s.ids), reverse=True):
        fitting = (i for i, room in enumerate(left) if room >= len(sample.ids))
        place = next(fitting, len(rows))
        if place == len(rows):
            rows.append([])
            left.append(length)
        rows[place].append(sample)
        left[place] -= len(sample.ids)
    return rows
