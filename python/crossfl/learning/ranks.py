"""The ranks of a job: the model replicated on them (DDP) or sharded over them (FSDP2).

accelerate finds ranks and devices and replicates. It shards on GPUs alone, so sharding is torch's
own `fully_shard` (Zhao et al. 2023, https://arxiv.org/abs/2304.11277): the same on CPUs, where it
can be tested.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from crossfl.protocol.records import Training
from crossfl.storage.tensorfile import Writer


class Parallel:
    """This process among the ranks of its job."""

    def __init__(self, training: Training) -> None:
        # The record decides how the model is trained, and no variable of the user's environment.
        for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
            del os.environ[name]
        # Without being told that there is no GPU, accelerate takes each rank for the only one.
        self._accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        self._training = training
        self.device: torch.device = self._accelerator.device
        self.number: int = self._accelerator.num_processes
        """Ranks of the job."""
        self.rank: int = self._accelerator.process_index

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes and reports."""
        return self.rank == 0

    @property
    def shards(self) -> bool:
        """Whether each rank holds but a part of the model."""
        return self.number > 1 and self._training.sharding == "fsdp"

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model on its device, replicated or sharded over the ranks.

        Its parameters are new ones, so the optimizer is to be made afterwards.
        """
        if self._training.compile:
            model.compile()
        if not self.shards:
            prepared: nn.Module = self._accelerator.prepare(model)
            return prepared
        half = self._training.precision == "bf16"
        policy = (
            MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            if half
            else MixedPrecisionPolicy()
        )
        mesh = init_device_mesh(self.device.type, (self.number,))
        model = model.to(self.device)
        kinds = set(getattr(model, "_no_split_modules", None) or ())
        for module in list(model.modules()):
            if type(module).__name__ in kinds:
                fully_shard(module, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        return model

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The model itself, without what `wrap` has put around it."""
        unwrapped: nn.Module = self._accelerator.unwrap_model(model)
        return unwrapped

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Where forward passes run, in the precision of the record; weights stay in fp32."""
        half = self._training.precision == "bf16" and not self.shards
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)

    def gather(self, *values: float) -> Tensor:
        """The values of every rank, fp64 on the CPU [ranks, values]."""
        mine = torch.tensor([values], dtype=torch.float64)
        if self.number == 1:
            return mine
        gathered: Tensor = self._accelerator.gather(mine.to(self.device))
        return gathered.cpu()

    def gather_texts(self, texts: Mapping[int, str]) -> dict[int, str]:
        """The texts of every rank by their numbers; every rank has to ask.

        They travel as UTF-8 in JSON, so that ranks read no code of each other's.
        """
        if self.number == 1:
            return dict(texts)
        mine = torch.frombuffer(bytearray(json.dumps(texts).encode()), dtype=torch.uint8)
        sizes = self.gather(len(mine))[:, 0].int().tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: len(mine)] = mine
        gathered: Tensor = self._accelerator.gather(padded[None].to(self.device))
        every: dict[int, str] = {}
        for row, size in zip(gathered.cpu(), sizes, strict=True):
            every |= {int(n): t for n, t in json.loads(bytes(row[:size].tolist())).items()}
        return every

    @contextlib.contextmanager
    def no_sync(self, model: nn.Module, active: bool) -> Iterator[None]:
        """Where `active`, gradients are of this rank's own samples, not yet averaged over ranks."""
        if not active or self.number == 1:
            yield
        elif isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(False)
            yield
            model.set_requires_gradient_sync(True)
        else:
            with self._accelerator.no_sync(model):
                yield

    def wait(self) -> None:
        """Wait for the other ranks."""
        self._accelerator.wait_for_everyone()


def gather_full(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each rank may hold a part; every rank has to ask for it."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def save_full(tensors: Mapping[str, Tensor], path: Path | None) -> None:
    """Write tensors of which each rank may hold a part: whole, one after the other.

    Every rank has to call it. None of them ever holds more than one whole tensor.

    Args:
        tensors: the same names on every rank.
        path: the file to write; None on the ranks that do not write.
    """
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with Writer(path, layout) if path else contextlib.nullcontext() as file:
        for tensor in tensors.values():
            full = gather_full(tensor)
            if file is not None:
                file.write(full)


def scatter_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor where another one lies, cut into the same parts."""
    tensor = tensor.to(like.device, like.dtype, copy=True)
    if isinstance(like, DTensor):
        return distribute_tensor(tensor, like.device_mesh, like.placements)
    return tensor


def norm(tensors: Sequence[Tensor]) -> float:
    """The L2 norm of tensors taken as one."""
    return float(gather_full(torch.nn.utils.get_total_norm(tensors)))
