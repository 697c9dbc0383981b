"""What a safetensors file says of itself is not taken for granted."""

import json
import struct
from pathlib import Path

import pytest

from crossfl.errors import CrossFLError
from crossfl.storage.tensorfile import TensorFile


def write(path: Path, buffers: str) -> Path:
    """A file with one number, whose metadata list buffers."""
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"__metadata__": {"buffers": buffers}, "a": entry}).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    return path


@pytest.mark.parametrize(
    "buffers",
    ["", "[", "{}", "null", '"a"', "[1]", '[["a"]]', "[" * 100_000, '["a', '["b"]', '["\\ud800"]'],
)
def test_a_list_of_buffers_that_is_none_is_refused(tmp_path: Path, buffers: str) -> None:
    with pytest.raises(CrossFLError, match=r"model\.safetensors"):
        TensorFile(write(tmp_path / "model.safetensors", buffers))


def test_buffers_are_told_from_parameters(tmp_path: Path) -> None:
    assert TensorFile(write(tmp_path / "a.safetensors", '["a"]')).buffers == {"a"}
    assert TensorFile(write(tmp_path / "b.safetensors", "[]")).buffers == set()
