"""The training loop of one round at one facility, on accelerate: one process or many ranks."""

import contextlib
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from crossfl import data, delta, encoding
from crossfl.checkpoint import Tensors
from crossfl.delta import Difference
from crossfl.errors import CrossFLError
from crossfl.model import accelerator, batch_of, check_samples, load, summed_loss, validate
from crossfl.progress import Progress
from crossfl.records import Task, Training
from crossfl.residual import Residual


@dataclass
class Trained:
    """What was done: optimizer steps, samples, tokens that counted in the loss, loss per step."""

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)


class Trainer:
    """Model, data and optimizer of one task."""

    def __init__(self, model: Path, dataset: Path, task: Task, training: Training) -> None:
        self._accelerator = accelerator(training)
        if training.batch_size % self._accelerator.num_processes:
            raise CrossFLError(
                f"training.batch_size is {training.batch_size}: it must be a multiple of the "
                f"{self._accelerator.num_processes} ranks"
            )
        self._task, self._training = task, training
        self._coding = encoding.of(training.encoding, training.kept)
        self._residual = Residual(task) if self._coding.lossy else None
        self._samples = data.read(dataset, "train")
        self._valid = data.read(dataset, "valid")[: training.validation_samples]
        set_seed(task.seed)
        network, self._tokenizer = load(model, training)
        check_samples(network, [*self._samples, *self._valid])
        optimizer = torch.optim.AdamW(
            network.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay
        )
        self._model, self._optimizer = self._accelerator.prepare(network, optimizer)

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes and reports."""
        return bool(self._accelerator.is_main_process)

    def validate(self) -> dict[str, Any]:
        """Metrics of the model as it is, on the validation split."""
        return validate(self._model, self._tokenizer, self._valid, self._training)

    def train(self, progress: Progress) -> Trained:
        """Take the local steps.

        The loss of a step is the mean over all tokens of the global batch, whatever their share on
        each rank: DDP averages gradients over ranks, hence the factor of their number.

        Raises:
            CrossFLError: the loss is not finite.
        """
        task, size = self._task, self._training.batch_size
        ranks, rank = self._accelerator.num_processes, self._accelerator.process_index
        indices = data.order(
            len(self._samples), task.data_seed, task.samples_seen, task.local_steps * size
        )
        done, begun = Trained(), time.monotonic()
        self._model.train()
        proximal = self._training.proximal_mu > 0
        anchors = [p.detach().clone() for p in self._model.parameters()] if proximal else []
        for step in range(task.local_steps):
            mine = indices[step * size : (step + 1) * size][rank::ranks]
            encoded = [
                data.encode(self._samples[i], self._tokenizer, self._training.sequence_length)
                for i in mine
            ]
            ids_BL, labels_BL = batch_of(encoded, self._accelerator.device)
            with self._accelerator.autocast():
                loss, tokens = summed_loss(self._model, ids_BL, labels_BL)
            total, count = self._accelerator.reduce(
                torch.stack([loss.detach(), tokens.to(loss.dtype)])
            ).tolist()
            if not math.isfinite(total):
                raise CrossFLError(
                    f"the loss of {task.facility} is {total} at step {step + 1} of round "
                    f"{task.round}: lower training.learning_rate, or look at the data"
                )
            self._accelerator.backward(loss * (ranks / max(count, 1.0)))
            if self._training.proximal_mu:
                pull_back(self._model, anchors, self._training.proximal_mu)
            if self._training.gradient_clip:
                self._accelerator.clip_grad_norm_(
                    self._model.parameters(), self._training.gradient_clip
                )
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate(step, task, self._training)
            self._optimizer.step()
            self._optimizer.zero_grad()
            done.steps, done.samples = done.steps + 1, done.samples + size
            done.tokens += int(count)
            done.losses.append(total / max(count, 1.0))
            progress(
                "train",
                step=done.steps,
                steps=task.local_steps,
                loss=done.losses[-1],
                tokens_per_second=done.tokens / max(time.monotonic() - begun, 1e-9),
            )
        return done

    def save_delta(self, model: Path, directory: Path) -> int:
        """Write local minus global weights, in files like the model's; their size in bytes.

        The local weights go through `save_pretrained`, so that the names are those of the
        checkpoint even where the module in memory names or ties its tensors otherwise.
        """
        weights = Tensors.of_model(model)
        with contextlib.ExitStack() as stack:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=directory.parent))
            lost = stack.enter_context(self._residual.after()) if self._residual else None
            self._accelerator.unwrap_model(self._model).save_pretrained(scratch)
            local = Tensors.of_model(Path(scratch))
            for file in weights.files:
                carried = self._residual.before(file) if self._residual else None
                path = directory / delta.file_name(file.path.name)
                rest = lost / file.path.name if lost else None
                delta.write(path, Difference(local, file, carried), self._coding, rest)
        return sum(path.stat().st_size for path in directory.iterdir())


def pull_back(model: nn.Module, anchors: Sequence[Tensor], mu: float) -> None:
    """Add the gradient of μ/2 ‖x − x₀‖², which keeps local weights x near the global ones x₀.

    FedProx, Li et al. 2020, https://arxiv.org/abs/1812.06127.
    """
    for parameter, anchor in zip(model.parameters(), anchors, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - anchor, alpha=mu)


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
