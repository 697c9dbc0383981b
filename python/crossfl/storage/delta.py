"""The delta of an update: written at a facility, read cell by cell where it is averaged."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from crossfl.errors import CrossFLError
from crossfl.storage import encodings
from crossfl.storage.checkpoint import Tensors
from crossfl.storage.encodings import CELL, Encoding, Plain
from crossfl.storage.tensorfile import PLAIN, Entry, TensorFile, Writer

PATTERN = "delta*.safetensors"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
UNCHANGED = encodings.ENCODINGS["fp32"]
"""The encoding of buffers, whatever that of the parameters: a variance must not become negative."""


class Delta:
    """The delta files of one update, mapped.

    Args:
        directory: where they lie.
        buffers: names of the model's tensors that are no parameters: they travel as they are.

    Raises:
        CrossFLError: a file is not valid safetensors, or its encoding is not known.
    """

    def __init__(self, directory: Path, buffers: Collection[str] = ()) -> None:
        self._buffers = buffers
        self.tensors = Tensors(sorted(directory.glob(PATTERN)))
        self._encodings: dict[Path, Encoding] = {}
        for file in self.tensors.files:
            try:
                self._encodings[file.path] = encodings.of_metadata(file.metadata)
            except ValueError as error:
                raise CrossFLError(f"{file.path}: {error}") from None

    def check(self, parameters: Mapping[str, Entry]) -> None:
        """Check that this is a delta of those parameters, by names, shapes and dtypes.

        Raises:
            CrossFLError: it is not; the message names the first tensor at fault.
        """
        expected = set()
        for name, parameter in parameters.items():
            coding = self._encoding_of(name)
            totals = coding.totals(parameter.elements)
            for suffix, dtype, total in zip(coding.suffixes, coding.dtypes, totals, strict=True):
                part = name + suffix
                expected.add(part)
                if part not in self.tensors:
                    raise CrossFLError(f"tensor {part!r} is missing")
                entry = self.tensors.file_of[part].entries[part]
                plain = isinstance(coding, Plain)
                if entry.dtype not in (FLOATS if plain else (dtype,)):
                    raise CrossFLError(f"tensor {part!r} has dtype {entry.dtype}")
                shape = parameter.shape if plain else (total,)
                if entry.shape != shape:
                    raise CrossFLError(
                        f"tensor {part!r} has shape {list(entry.shape)} instead of {list(shape)}"
                    )
        if strange := sorted(set(self.tensors) - expected):
            raise CrossFLError(f"tensor {strange[0]!r} is not in the global model")

    def viewed(self, name: str) -> bool:
        """Whether spans of a parameter are views: its values lie in the file, in fp32 or bf16."""
        if not isinstance(self._encoding_of(name), Plain):
            return False
        file = self.tensors.file_of[name]
        return file.entries[name].dtype != torch.float16 and file.aligned(name)

    def span(self, name: str, start: int, count: int) -> Tensor:
        """The `count` values from `start`, flat, fp32 or bf16; a view that must not be written.

        Where they are not `viewed`, they must be those of one cell.

        Raises:
            ValueError: the cell is not validly encoded.
        """
        coding = self._encoding_of(name)
        if isinstance(coding, Plain):
            values = self.tensors.span(name, start, count)
            return values.float() if values.dtype == torch.float16 else values
        parts = (
            self.tensors.span(name + suffix, start // CELL * full, length)
            for suffix, full, length in zip(
                coding.suffixes, coding.lengths(CELL), coding.lengths(count), strict=True
            )
        )
        return coding.decode(tuple(parts), count)

    def _encoding_of(self, name: str) -> Encoding:
        """The encoding of the file that holds the parameter, found by its first part."""
        if name in self._buffers:
            return UNCHANGED
        for suffix in ("", encodings.TopK.suffixes[0]):
            if file := self.tensors.file_of.get(name + suffix):
                return self._encodings[file.path]
        raise CrossFLError(f"tensor {name!r} is missing")


def file_name(weights: str) -> str:
    """The name of the delta of a file of weights: `model-00001-of-00002…` is `delta-00001-of…`."""
    return "delta" + weights.partition("model")[2]


def write(
    path: Path,
    delta: Mapping[str, Tensor],
    coding: Encoding,
    residual: Path | None = None,
    buffers: Collection[str] = (),
) -> str:
    """Write one file of a delta; its sha256.

    Args:
        path: the file to write.
        delta: fp32 tensors, any mapping that makes them when they are asked for.
        coding: how to write them.
        residual: file for what the encoding loses, fp32; unset, it is forgotten.
        buffers: names of those that are no parameters, and are written as they are.

    Raises:
        CrossFLError: a number is not finite.
    """
    layout = {}
    shapes = {name: tuple(delta[name].shape) for name in delta}
    codings = {name: UNCHANGED if name in buffers else coding for name in shapes}
    for name, shape in shapes.items():
        used = codings[name]
        totals = used.totals(torch.Size(shape).numel())
        for suffix, dtype, total in zip(used.suffixes, used.dtypes, totals, strict=True):
            layout[name + suffix] = (dtype, shape if isinstance(used, Plain) else (total,))
    lost = {name: (torch.float32, shape) for name, shape in shapes.items() if name not in buffers}
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(Writer(path, layout, {**PLAIN, **coding.metadata()}))
        rest = stack.enter_context(Writer(residual, lost)) if residual else None
        for name in shapes:
            flat = delta[name].reshape(-1)
            if not flat.isfinite().all():
                raise CrossFLError(f"the delta of {name!r} has values that are not finite")
            cells = torch.split(flat, CELL) if len(flat) else ()
            encoded = [codings[name].encode(cell) for cell in cells]
            floats = (p for parts in encoded for p in parts if p.is_floating_point())
            if not all(part.isfinite().all() for part in floats):
                raise CrossFLError(f"the delta of {name!r} has values too large for its encoding")
            for pieces in zip(*encoded, strict=True):
                for piece in pieces:
                    file.write(piece)
            if rest and name in lost:
                for cell, parts in zip(cells, encoded, strict=True):
                    rest.write(cell - coding.decode(parts, len(cell)))
    return file.sha256


class Difference(Mapping[str, Tensor]):
    """Local minus global weights in fp32, for what learns in one file of the model.

    These are its floating-point tensors but the frozen ones.

    Args:
        local: the weights after training, by the names of the checkpoint.
        base: a file of the model that training started from.
        residual: what earlier deltas lost of parameters, to be added; unset, nothing.
    """

    def __init__(
        self, local: Tensors, base: TensorFile, residual: TensorFile | None = None
    ) -> None:
        self._local, self._base, self._residual = local, base, residual
        floats = (n for n, entry in base.entries.items() if entry.dtype.is_floating_point)
        self._names = [name for name in floats if name not in base.frozen]

    def __getitem__(self, name: str) -> Tensor:
        difference = self._local[name].float() - self._base.tensor(name).float()
        if self._residual is None or name in self._base.buffers:
            return difference
        return difference.add_(self._residual.tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
