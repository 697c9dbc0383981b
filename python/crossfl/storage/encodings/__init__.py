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

from collections.abc import Mapping

import msgspec
import torch

from crossfl.protocol.model import EncodingMetadata
from crossfl.storage.encodings.cells import CELL, Encoding
from crossfl.storage.encodings.integer import BLOCK, Quantised
from crossfl.storage.encodings.plain import Plain
from crossfl.storage.encodings.topk import TopK

__all__ = [
    "BLOCK",
    "CELL",
    "ENCODINGS",
    "Encoding",
    "Plain",
    "Quantised",
    "TopK",
    "of",
    "of_metadata",
]

ENCODINGS: dict[str, Encoding] = {
    "fp32": Plain(torch.float32),
    "bf16": Plain(torch.bfloat16),
    "fp16": Plain(torch.float16),
    "int8": Quantised(8),
    "int4": Quantised(4),
}


def of(name: str, topk_fraction: float) -> Encoding:
    """The encoding a training record names.

    Raises:
        ValueError: topk with a share that is not in (0, 1].
    """
    return TopK(topk_fraction) if name == "topk" else ENCODINGS[name]


def of_metadata(metadata: Mapping[str, str]) -> Encoding:
    """The encoding that a file says it has; plain where it says nothing.

    Raises:
        ValueError: there is no such encoding.
    """
    try:
        stated = msgspec.convert(metadata, EncodingMetadata, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"encoding: {error}") from None
    if stated.encoding != "topk" and stated.encoding not in ENCODINGS:
        raise ValueError(f"there is no encoding {stated.encoding!r}")
    try:
        return of(stated.encoding, stated.topk_fraction)
    except ValueError as error:
        raise ValueError(f"encoding {stated.encoding!r}: {error}") from None
