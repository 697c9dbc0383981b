"""What libraries write beside tensors, as far as this package reads it."""

from math import nan

import msgspec


class WeightIndex(msgspec.Struct, frozen=True):
    """`model.safetensors.index.json` of transformers: the file that holds each tensor."""

    weight_map: dict[str, str]


class EncodingMetadata(msgspec.Struct, frozen=True):
    """The metadata of a delta's safetensors file: how its tensors are encoded."""

    encoding: str = "fp32"
    topk_fraction: float = nan


class RoleMetadata(msgspec.Struct, frozen=True):
    """The metadata of a safetensors file: which of its tensors are buffers, and which are frozen.

    Each is a JSON array of names.
    """

    buffers: str = "[]"
    frozen: str = "[]"
