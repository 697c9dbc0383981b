"""What training costs: utilisation of the devices, memory, energy.

Utilisation is that of Chowdhery et al. 2022, appendix B (PaLM), https://arxiv.org/abs/2204.02311:
floating-point operations that the model needs, whatever was computed again, over what the devices
could have done.
"""

import platform
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

CPU_INFO = Path("/proc/cpuinfo")
LONGEST_NAME = 100
"""Characters of a device's name."""
PEAKS = {
    "A100-SXM4": 312e12,
    "A100-PCIE": 312e12,
    "A100 80GB PCIe": 312e12,
    "H100 80GB HBM3": 989.4e12,
    "H100 PCIe": 756e12,
    "H200": 989.4e12,
    "GH200": 989.4e12,
    "MI250X": 191.5e12,
    "MI300X": 1307.4e12,
}
"""Dense bf16 operations per second of a device, by a part of its name. For an MI250X it is one of
its two dies, which is what a process sees. From the makers' data sheets:
https://www.nvidia.com/en-us/data-center/a100/ h100/ h200/ grace-hopper-superchip/ and
https://www.amd.com/en/products/accelerators/instinct.html"""
POWERCAP = Path("/sys/class/powercap")


def peak(device: torch.device, precision: str) -> float | None:
    """Operations per second that a device can do at most in bf16; None where it is not known."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAKS.items() if part in name), None)


def operations(model: nn.Module, length: float) -> float | None:
    """Operations that a token needs, forward and backward, in samples of `length` tokens.

    Two for each weight it is multiplied with forward, two for the gradient that is passed on, two
    for the gradient of a weight that learns; and those of attention. None for other models than
    language models.
    """
    config: Any = getattr(model, "config", None)
    layers, width = (getattr(config, k, None) for k in ("num_hidden_layers", "hidden_size"))
    size = getattr(config, "vocab_size", None)
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    looked_up = [m.weight for m in tables if m.num_embeddings == size]
    if layers is None or width is None or not looked_up:
        return None
    # Looking a row up costs nothing, unless the same weights are multiplied with at the end.
    tied = getattr(config, "tie_word_embeddings", False)
    weights = [p for p in model.parameters() if p.dim() == 2 and (tied or p is not looked_up[0])]
    learning = sum(p.numel() for p in weights if p.requires_grad)
    total = sum(p.numel() for p in weights)
    return float(4 * total + 2 * learning) + 12.0 * float(layers * width) * length


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held: on the GPU, or of main memory where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "xpu":
        return torch.xpu.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_name(device: torch.device) -> str:
    """What a rank computes on, as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)[:LONGEST_NAME]
    for line in _lines(CPU_INFO):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()[:LONGEST_NAME]
    return platform.machine()[:LONGEST_NAME]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8", "replace").splitlines()
    except OSError:
        return []


class Energy:
    """Energy since this was made, where the node tells it, in joules."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._gpu, self._cpu = self._read_gpu(), _read_packages()

    def joules(self) -> dict[str, float]:
        """Of the process's GPU (NVML) as `gpu`, of the node's CPU packages (RAPL) as `cpu`."""
        used: dict[str, float] = {}
        if self._gpu is not None and (now := self._read_gpu()) is not None:
            used["gpu"] = now - self._gpu
        packages = _read_packages()
        if self._cpu and packages.keys() == self._cpu.keys():
            spans = [(now - self._cpu[name][0]) % wrap for name, (now, wrap) in packages.items()]
            used["cpu"] = sum(spans)
        return used

    def _read_gpu(self) -> float | None:
        if self._device.type != "cuda":
            return None
        try:
            import pynvml

            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(self._device).uuid}"
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1e3
        except Exception:  # no library, or a device that does not tell: it has no error of its own
            return None


def _read_packages() -> dict[str, tuple[float, float]]:
    """Joules counted by each CPU package, and at how many the count begins anew."""
    packages = {}
    for folder in sorted(POWERCAP.glob("intel-rapl:[0-9]*")):
        if folder.name.count(":") == 1:
            try:
                now, wrap = (
                    int((folder / name).read_text(encoding="utf-8")) / 1e6
                    for name in ("energy_uj", "max_energy_range_uj")
                )
            except (OSError, ValueError):
                return {}
            packages[folder.name] = (now, wrap)
    return packages
