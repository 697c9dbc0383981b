"""One safetensors file: a strict reader over a memory map, and a writer that hashes as it goes.

Format: https://huggingface.co/docs/safetensors (eight bytes of header length, a JSON header, then
the data without gaps). Nothing here trusts a file: every offset is checked before a byte is read.
"""

import hashlib
import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from weakref import WeakValueDictionary

import msgspec
import torch
from torch import Tensor

from crossfl.errors import CrossFLError
from crossfl.protocol.model import RoleMetadata
from crossfl.storage.json_limits import MOST_VALUES, count_values, unique

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 1 << 24
"""Bytes of the header of a file."""
LARGEST_RANK = 64
"""Dimensions of a tensor."""
ALIGNMENT = 64
"""Bytes of a cache line, at which the data of a file begin: processors copy and add up such numbers
faster than those that lie across two lines."""
PLAIN = {"format": "pt"}
"""The metadata that `from_pretrained` asks for."""
BUFFERS = "buffers"
"""Where the metadata of a model's file list its buffers: their names, as a JSON array."""
FROZEN = "frozen"
"""The same for the parameters that do not learn: they have no delta."""


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in its file: bytes `begin` to `end`, counted from the file's start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """What the header of a file says."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    buffers: frozenset[str]
    frozen: frozenset[str]


_LAYOUTS: WeakValueDictionary[tuple[bytes, int], Layout] = WeakValueDictionary()
"""Those of all files that are open."""


class TensorFile:
    """The tensors of one file, mapped and not read: memory is the page cache's.

    `entries` are in the order of the data. `buffers` are the names of those that are no parameters,
    as running statistics are: they are averaged, and never optimized. `frozen` are those of the
    parameters that do not learn: they stay as they are, and no delta has them.

    Example:
        >>> file = TensorFile(Path("global_model/model.safetensors"))
        >>> file.span("lm_head.weight", 0, 96).dtype
        torch.float32

    Raises:
        CrossFLError: the file is not safetensors to the letter.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.size = path.stat().st_size
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if not 2 <= length <= min(LARGEST_HEADER, self.size - 8):
                    raise ValueError(f"a header of {length} bytes in a file of {self.size}")
                header = stream.read(length)
            self._layout = _layout(header, self.size)
        except (OSError, ValueError, RecursionError) as error:
            raise CrossFLError(f"{path} is not a valid safetensors file: {error}") from None
        self.entries, self.metadata = self._layout.entries, self._layout.metadata
        self.buffers, self.frozen = self._layout.buffers, self._layout.frozen
        self._bytes = torch.from_file(str(path), shared=False, size=self.size, dtype=torch.uint8)

    def parameters(self) -> dict[str, Entry]:
        """The floating-point tensors that are no buffers, and learn."""
        return {
            name: entry
            for name, entry in self.entries.items()
            if entry.dtype.is_floating_point and name not in self.buffers | self.frozen
        }

    def span(self, name: str, start: int, count: int) -> Tensor:
        """Elements `start` to `start + count`, flat; a view that must not be written."""
        entry = self.entries[name]
        if not 0 <= start <= start + count <= entry.elements:
            raise IndexError(f"{self.path}: {name!r} has no elements {start} to {start + count}")
        begin = entry.begin + start * entry.dtype.itemsize
        part = self._bytes[begin : begin + count * entry.dtype.itemsize]
        return (part if self.aligned(name) else part.clone()).view(entry.dtype)

    def aligned(self, name: str) -> bool:
        """Whether spans of a tensor are views, and not copies of what lies at an odd address."""
        entry = self.entries[name]
        return entry.begin % entry.dtype.itemsize == 0

    def tensor(self, name: str) -> Tensor:
        """A whole tensor; a view that must not be written."""
        entry = self.entries[name]
        return self.span(name, 0, entry.elements).reshape(entry.shape)

    @property
    def content(self) -> memoryview:
        """The bytes of the whole file."""
        return self._bytes.numpy().data


class Writer:
    """Writes the tensors of one file: in order and hashed, or from several threads.

    Either `write` them in order, after which `sha256` is that of the file; or, with `reserve`,
    `put` them in any order, from any thread. Who puts sees to it that nothing is left out.

    Args:
        path: the file to write.
        layout: dtype and shape of each tensor, in their order in the file.
        metadata: strings for the header.
        reserve: take the whole file's space on the disk at once, to `put` into: a disk too small is
            known before any work, and what is written then costs less.

    Raises:
        CrossFLError: there is no room for what is to be reserved.
    """

    def __init__(
        self,
        path: Path,
        layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str] = PLAIN,
        *,
        reserve: bool = False,
    ) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        end = 0
        for name, (dtype, shape) in layout.items():
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        text = len(text).to_bytes(8, "little") + text
        self.path, self.size = path, len(text) + end
        self._places: dict[str, tuple[int, int]] = {
            name: (len(text) + header[name]["data_offsets"][0], dtype.itemsize)
            for name, (dtype, _) in layout.items()
        }
        self._hash = hashlib.sha256(text)
        self._written = len(text)
        self._stream = path.open("wb", buffering=0)
        self._whole = reserve
        if reserve:
            try:
                os.posix_fallocate(self._stream.fileno(), 0, self.size)
            except OSError as error:
                self._stream.close()
                raise CrossFLError(
                    f"{path}: no room for its {self.size} bytes ({error.strerror}): "
                    "free some, then run the same command again"
                ) from None
        self._place(memoryview(text), 0)

    def write(self, piece: Tensor) -> None:
        """Append the next elements, in the dtype that was announced."""
        data = _bytes(piece)
        self._place(data, self._written)
        self._hash.update(data)
        self._written += len(data)

    def put(self, name: str, start: int, piece: Tensor) -> None:
        """Write elements of a tensor to where they belong, from its element `start` on."""
        self._place(_bytes(piece), self.offset(name, start))

    def offset(self, name: str, element: int) -> int:
        """The byte of the file at which an element of a tensor lies, or the tensor ends."""
        begin, width = self._places[name]
        return begin + element * width

    def _place(self, data: memoryview, offset: int) -> None:
        while data:
            count = os.pwrite(self._stream.fileno(), data, offset)
            data, offset = data[count:], offset + count

    @property
    def sha256(self) -> str:
        """Hexadecimal sha256 of what has been written in order."""
        return self._hash.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stream.close()
        if kind is None and not self._whole and self._written != self.size:
            raise ValueError(f"{self.path}: {self._written} of {self.size} bytes were written")


def metadata_of(buffers: Collection[str], frozen: Collection[str] = ()) -> dict[str, str]:
    """The metadata of a model's file that has these buffers and frozen parameters."""
    roles = {BUFFERS: buffers, FROZEN: frozen}
    return PLAIN | {role: json.dumps(sorted(names)) for role, names in roles.items() if names}


def _bytes(piece: Tensor) -> memoryview:
    if not piece.numel():
        return memoryview(b"")
    return memoryview(piece.contiguous().view(-1).view(torch.uint8).numpy().data)


def _layout(header: bytes, size: int) -> Layout:
    """The layout that a header describes; the files of many facilities, being alike, share one."""
    key = (hashlib.sha256(header).digest(), size)
    layout = _LAYOUTS.get(key)
    if layout is None:
        layout = _LAYOUTS[key] = _parse(header, size)
    return layout


def _parse(header: bytes, size: int) -> Layout:
    if count_values(header) > MOST_VALUES:
        raise ValueError(f"its header has more than {MOST_VALUES} values")
    document = json.loads(header.decode(), object_pairs_hook=unique)
    if not isinstance(document, dict):
        raise ValueError("the header is not a JSON object")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata are not strings")
    base = 8 + len(header)
    entries = {name: _entry(name, fields, base) for name, fields in document.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = base
    for name, entry in ordered.items():
        if entry.begin != position:
            raise ValueError(f"{name!r} starts at byte {entry.begin}, and not at {position}")
        position = entry.end
    if position != size:
        raise ValueError(f"the data end at byte {position}, the file at {size}")
    return Layout(ordered, metadata, *_roles(metadata, entries))


def _roles(metadata: Mapping[str, str], entries: Mapping[str, Entry]) -> list[frozenset[str]]:
    """The buffers and the frozen parameters that metadata list."""
    try:
        stated = msgspec.convert(metadata, RoleMetadata)
        listed = [
            msgspec.json.decode(text, type=list[str]) for text in msgspec.structs.astuple(stated)
        ]
    except msgspec.MsgspecError:
        raise ValueError("its buffers or frozen tensors are not an array of names") from None
    for role, names in zip((BUFFERS, FROZEN), listed, strict=True):
        if unknown := sorted(set(names) - entries.keys()):
            raise ValueError(f"it lists {unknown[0]!r} as {role}, which it does not hold")
    return [frozenset(names) for names in listed]


def _entry(name: str, fields: Any, base: int) -> Entry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} is not described by dtype, shape and data_offsets")
    if not isinstance(fields["dtype"], str) or fields["dtype"] not in DTYPES:
        raise ValueError(f"{name!r} has dtype {fields['dtype']!r}, which is unknown")
    for key in ("shape", "data_offsets"):
        numbers = fields[key]
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"{name!r} has {key} that are not counts")
    if len(fields["data_offsets"]) != 2:
        raise ValueError(f"{name!r} has {len(fields['data_offsets'])} offsets")
    if len(fields["shape"]) > LARGEST_RANK:
        raise ValueError(f"{name!r} has {len(fields['shape'])} dimensions")
    begin, end = fields["data_offsets"]
    dtype, shape = DTYPES[fields["dtype"]], tuple(fields["shape"])
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name!r} has {end - begin} bytes, which its shape and dtype do not fill")
    return Entry(dtype, shape, base + begin, base + end)
