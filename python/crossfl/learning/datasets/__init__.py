"""Datasets at a facility: files are read as samples, encoded for a model, and drawn in an order.

Files lie as `splits` says, are of a kind in `formats`, and their rows have columns as in `columns`.
A row that cannot be read, and a sample that cannot be encoded, is left out and counted, with its
file and row and never a value of it. That happens before any sample is drawn, so all ranks, rounds
and attempts draw from the same samples.
"""

from crossfl.learning.datasets.drawing import order
from crossfl.learning.datasets.encoding import IGNORED, Encoded, encode, encode_prompt, encoded
from crossfl.learning.datasets.reading import read
from crossfl.learning.datasets.samples import (
    Chat,
    Image,
    Placed,
    Sample,
    Samples,
    Text,
    left_out,
    row,
)
from crossfl.learning.datasets.splits import Split
from crossfl.learning.datasets.tables import EncodedSamples

__all__ = [
    "IGNORED",
    "Chat",
    "Encoded",
    "EncodedSamples",
    "Image",
    "Placed",
    "Sample",
    "Samples",
    "Split",
    "Text",
    "encode",
    "encode_prompt",
    "encoded",
    "left_out",
    "order",
    "read",
    "row",
]
