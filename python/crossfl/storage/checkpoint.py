"""Tensors in several safetensors files, laid out in a directory as Hugging Face does."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from crossfl.errors import CrossFLError
from crossfl.storage.tensorfile import Entry, TensorFile
from crossfl.storage.weight_files import weight_files


class Tensors(Mapping[str, Tensor]):
    """The tensors of one or several safetensors files, mapped, by sorted name.

    What is handed out are views of the files, which must not be written.

    Example:
        >>> weights = Tensors.of_model(Path("global_model"))
        >>> weights["lm_head.weight"].shape
        torch.Size([384, 96])
    """

    def __init__(self, paths: list[Path]) -> None:
        self.files = [TensorFile(path) for path in paths]
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

    def span(self, name: str, start: int, count: int) -> Tensor:
        """Elements `start` to `start + count` of a tensor, flat."""
        return self.file_of[name].span(name, start, count)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.file_of))

    def __len__(self) -> int:
        return len(self.file_of)


def slots(directory: Path) -> dict[str, Tensors]:
    """The families of tensors in a server state, `<slot>.<file>` each, by the name of the slot."""
    paths: dict[str, list[Path]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        paths.setdefault(path.name.split(".")[0], []).append(path)
    return {slot: Tensors(family) for slot, family in paths.items()}
