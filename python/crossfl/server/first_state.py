"""The server state before the first round: master weights, and the slots of the optimizer."""

import contextlib
import json
from pathlib import Path

import torch

from crossfl.protocol.layout import MASTER
from crossfl.protocol.records import Aggregation
from crossfl.server import optimizers
from crossfl.server.averaging.walk import pieces
from crossfl.storage.checkpoint import Tensors
from crossfl.storage.files import write_json
from crossfl.storage.tensorfile import Writer
from crossfl.storage.weight_files import INDEX

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Number formats in which a global model may travel."""


def write_tensors(weights: Tensors, aggregation: Aggregation, state: Path) -> dict[str, str]:
    """Write the master weights and the optimizer's slots before the first round; their sha256."""
    optimizer = optimizers.of(aggregation)
    sums: dict[str, str] = {}
    for file in weights.files:
        floats = {n: e.shape for n, e in file.entries.items() if e.dtype.is_floating_point}
        layout = {name: (torch.float32, shape) for name, shape in floats.items()}
        slots = [MASTER, *optimizer.init(torch.zeros(0), aggregation)]
        with contextlib.ExitStack() as stack:
            writers = {
                slot: stack.enter_context(Writer(state / f"{slot}.{file.path.name}", layout))
                for slot in slots
            }
            for name in floats:
                master = file.tensor(name).float()
                for slot, tensor in {MASTER: master, **optimizer.init(master, aggregation)}.items():
                    writers[slot].write(tensor)
        sums |= {writer.path.name: writer.sha256 for writer in writers.values()}
    return sums


def convert(directory: Path, dtype: torch.dtype) -> None:
    """Round the floating-point weights of a model directory to a dtype, and say so in its files."""
    total = 0
    for file in Tensors.of_model(directory).files:
        layout = {
            name: (dtype if entry.dtype.is_floating_point else entry.dtype, entry.shape)
            for name, entry in file.entries.items()
        }
        partial = file.path.with_suffix(".partial")
        with Writer(partial, layout) as writer:
            for piece in pieces(file):
                values = file.span(piece.name, piece.start, piece.count)
                writer.write(values.to(layout[piece.name][0]))
        partial.rename(file.path)
        total += sum(torch.Size(shape).numel() * kind.itemsize for kind, shape in layout.values())
    for name, key, value in (
        ("config.json", "dtype", str(dtype).removeprefix("torch.")),
        (INDEX, "metadata", {"total_size": total}),
    ):
        if (directory / name).is_file():
            write_json(
                directory / name,
                json.loads((directory / name).read_text(encoding="utf-8")) | {key: value},
            )
