"""The local optimizer: AdamW, its rate on the federation's schedule, its state as named tensors.

Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from crossfl.learning.ranks import scatter_like
from crossfl.protocol.records import Task, Training

SEPARATOR = "//"
"""Between the name of a parameter and the name of what the optimizer keeps for it."""


def adamw(model: nn.Module, training: Training, device: torch.device) -> AdamW:
    """The optimizer of the parameters that learn; in one kernel, where there is one."""
    return AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
        fused=True if device.type in ("cpu", "cuda", "xpu") else None,
    )


def learning_rate(step: int, task: Task, training: Training) -> float:
    """The rate of one local step, on a schedule that spans the federation and not the round."""
    position = task.schedule_step + step
    if position < training.warmup_steps:
        return training.learning_rate * (position + 1) / training.warmup_steps
    span = max(task.schedule_steps - training.warmup_steps, 1)
    fraction = min((position - training.warmup_steps) / span, 1.0)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - fraction,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * fraction)),
    }[training.schedule]
    return training.learning_rate * factor


def pull_back(model: nn.Module, anchors: Sequence[Tensor], mu: float) -> None:
    """Add the gradient of μ/2 ‖x − x₀‖², which keeps local weights x near the global ones x₀.

    FedProx, Li et al. 2020, https://arxiv.org/abs/1812.06127.
    """
    for parameter, anchor in zip(learning(model).values(), anchors, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - anchor, alpha=mu)


def learning(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name; tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def state_of(optimizer: AdamW, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """What the optimizer keeps for each parameter, as this rank holds it: moments, steps."""
    return {
        name + SEPARATOR + key: value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def restore(
    optimizer: AdamW, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]
) -> None:
    """Go on with what `state_of` gave.

    Raises:
        KeyError: it is of other parameters.
    """
    fused = bool(optimizer.param_groups[0]["fused"])
    for name, parameter in parameters.items():
        moments = {
            key: scatter_like(saved[name + SEPARATOR + key], parameter)
            for key in ("exp_avg", "exp_avg_sq")
        }
        steps = saved[name + SEPARATOR + "step"].clone()
        optimizer.state[parameter] = {
            "step": steps.to(parameter.device) if fused else steps,
            **moments,
        }
