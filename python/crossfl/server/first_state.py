"""The server state before the first round: master weights, and the slots of the optimizer."""

import contextlib
from pathlib import Path

import torch

from crossfl.protocol.layout import MASTER
from crossfl.protocol.records import Aggregation
from crossfl.server import optimizers
from crossfl.storage.checkpoint import Tensors, rewrite
from crossfl.storage.tensorfile import Writer

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
    """Round the parameters of a model directory to a dtype, and say so in its files.

    Buffers stay as they are: a variance that is rounded need not be one any more.
    """
    weights = Tensors.of_model(directory)
    dtypes = {name: dtype for file in weights.files for name in file.parameters()}
    rewrite(directory, dtypes, weights.buffers, str(dtype).removeprefix("torch."))
