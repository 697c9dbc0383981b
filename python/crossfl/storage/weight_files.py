"""Which files of a model folder hold its weights."""

from pathlib import Path

import msgspec

from crossfl.errors import CrossFLError
from crossfl.protocol.manifest import FileEntry, digest
from crossfl.protocol.model import WeightIndex
from crossfl.storage.manifest import sha256
from crossfl.storage.model_settings import LORA, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"
"""What `peft` saves in place of the weights that it adapts, which stay as they are."""
WEIGHTS = ".safetensors"


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a model folder, in order: its adapter's if it holds `lora.json`.

    Raises:
        CrossFLError: there are none in safetensors format, or the index names a missing one.
    """
    if (directory / LORA).is_file():
        names = {ADAPTER}
    elif (directory / SINGLE).is_file():
        names = {SINGLE}
    elif (directory / INDEX).is_file():
        names = set(weight_map(directory / INDEX).values())
    else:
        raise CrossFLError(
            f"{directory} has neither {SINGLE} nor {INDEX}: "
            "save the model with safe_serialization (pickled weights are never read)"
        )
    for name in sorted(names):
        if Path(name).name != name or not name.endswith(WEIGHTS):
            raise CrossFLError(f"{directory / INDEX} names {name!a}, which is no weight file")
        if not (directory / name).is_file():
            raise CrossFLError(f"{directory / name} is not there, which holds weights: add it")
    return [directory / name for name in sorted(names)]


def weights_digest(directory: Path) -> str:
    """The identity of a model: one sha256 over those of its weight files, and their names."""
    files = {
        path.name: FileEntry(bytes=path.stat().st_size, sha256=sha256(path))
        for path in weight_files(directory)
    }
    return digest(files)


def weight_map(path: Path) -> dict[str, str]:
    """The file of each tensor, as an index has it.

    Raises:
        CrossFLError: it is no index.
    """
    try:
        return msgspec.convert(read_json(path), WeightIndex).weight_map
    except msgspec.ValidationError:
        raise CrossFLError(f"{path} is not a safetensors index") from None
