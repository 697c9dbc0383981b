"""Tensors in several safetensors files, laid out in a directory as Hugging Face does."""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crossfl.errors import CrossFLError
from crossfl.storage.files import write_json
from crossfl.storage.model_settings import CONFIG
from crossfl.storage.tensorfile import Entry, TensorFile, Writer, metadata_of
from crossfl.storage.weight_files import INDEX, weight_files

REWRITTEN = 1 << 22
"""Elements that are rewritten at a time."""


class Tensors(Mapping[str, Tensor]):
    """The tensors of one or several safetensors files, mapped, by sorted name.

    What is handed out are views of the files, which must not be written. `buffers` are the names
    of the tensors that are no parameters: they are averaged, and never optimized. `frozen` are
    those of the parameters that do not learn, and have no delta.

    Example:
        >>> weights = Tensors.of_model(Path("global_model"))
        >>> weights["lm_head.weight"].shape
        torch.Size([384, 96])
    """

    def __init__(self, paths: list[Path]) -> None:
        self.files = [TensorFile(path) for path in paths]
        self.buffers = frozenset(name for file in self.files for name in file.buffers)
        self.frozen = frozenset(name for file in self.files for name in file.frozen)
        self.file_of: dict[str, TensorFile] = {}
        for file in self.files:
            for name in file.entries:
                if name in self.file_of:
                    raise CrossFLError(f"{file.path}: tensor {name!r} is also in another file")
                self.file_of[name] = file

    @classmethod
    def of_model(cls, directory: Path) -> "Tensors":
        """The weights of a Hugging Face checkpoint directory."""
        return cls(weight_files(directory))

    def __getitem__(self, name: str) -> Tensor:
        return self.file_of[name].tensor(name)

    def floats(self) -> dict[str, Entry]:
        """The floating-point tensors, in the order of the files."""
        entries = {name: entry for file in self.files for name, entry in file.entries.items()}
        return {name: entry for name, entry in entries.items() if entry.dtype.is_floating_point}

    def travelling(self) -> dict[str, Entry]:
        """The floating-point tensors of which deltas travel: all but the frozen ones."""
        return {name: entry for name, entry in self.floats().items() if name not in self.frozen}

    def span(self, name: str, start: int, count: int) -> Tensor:
        """Elements `start` to `start + count` of a tensor, flat."""
        return self.file_of[name].span(name, start, count)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.file_of))

    def __len__(self) -> int:
        return len(self.file_of)


def rewrite(
    directory: Path,
    dtypes: Mapping[str, torch.dtype],
    buffers: Collection[str],
    config_dtype: str | None = None,
) -> None:
    """Write the weights of a model folder anew, in other dtypes or with other buffers.

    Args:
        directory: the folder.
        dtypes: dtype of each tensor that is to be rounded; the others stay.
        buffers: names of all tensors that are buffers.
        config_dtype: the `dtype` that `config.json` is to name; unset, it stays.
    """
    total = 0
    for file in Tensors.of_model(directory).files:
        layout = {
            name: (dtypes.get(name, entry.dtype), entry.shape)
            for name, entry in file.entries.items()
        }
        partial = file.path.with_suffix(".partial")
        with Writer(
            partial, layout, metadata_of(file.entries.keys() & buffers, file.frozen)
        ) as writer:
            for name, entry in file.entries.items():
                for start in range(0, entry.elements, REWRITTEN):
                    count = min(REWRITTEN, entry.elements - start)
                    writer.write(file.span(name, start, count).to(layout[name][0]))
        partial.rename(file.path)
        total += sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())
    changes: dict[str, dict[str, Any]] = {INDEX: {"metadata": {"total_size": total}}}
    if config_dtype is not None:
        changes[CONFIG] = {"dtype": config_dtype}
    for name, values in changes.items():
        if (path := directory / name).is_file():
            write_json(path, json.loads(path.read_text(encoding="utf-8")) | values)


def slots(directory: Path) -> dict[str, Tensors]:
    """The families of tensors in a server state, `<slot>.<file>` each, by the name of the slot."""
    paths: dict[str, list[Path]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        paths.setdefault(path.name.split(".")[0], []).append(path)
    return {slot: Tensors(family) for slot, family in paths.items()}
