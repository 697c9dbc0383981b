"""The training loop of one round at one facility: one process or many ranks.

It is one long module because all its parts share the state of one trainer.
"""

import contextlib
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from crossfl import __version__
from crossfl.errors import CrossFLError
from crossfl.facility import place
from crossfl.facility.carryover import CarriedState, Residual
from crossfl.facility.savepoint import Savepoint
from crossfl.facility.time_budget import Budget, StopSignal
from crossfl.learning import allocator, evaluation, lora
from crossfl.learning.batching import Batch, batch_of, rows_of
from crossfl.learning.datasets.cache import training_samples
from crossfl.learning.disclosure import edge_losses
from crossfl.learning.evaluation import Validation, summed_loss
from crossfl.learning.models import probe
from crossfl.learning.models.loading import classes_of, load, persistent_buffers
from crossfl.learning.optimizer import adamw, learning, learning_rate, pull_back, restore, state_of
from crossfl.learning.ranks import Parallel, gather_full, norm, save_full, scatter_like
from crossfl.learning.telemetry import accounting
from crossfl.learning.telemetry.noise import GradientNoise
from crossfl.observe.events import Progress
from crossfl.protocol import variables
from crossfl.protocol.measurements import Metrics, TrainingMetrics
from crossfl.protocol.records import Task, Training
from crossfl.protocol.seeds import derive_seed
from crossfl.storage import delta, encodings
from crossfl.storage.checkpoint import Tensors
from crossfl.storage.delta import Difference
from crossfl.storage.tensorfile import TensorFile

KEPT = "kept.safetensors"
ROUNDING = "rounding//"
"""Before the name of a parameter: what fp32 lost of its delta."""


@dataclass
class TrainingResult:
    """What was done in the round, over all attempts of its job."""

    steps: int = 0
    """Optimizer steps."""
    samples: int = 0
    tokens: int = 0
    """Tokens that counted in the loss."""
    read: int = 0
    """Tokens that went through the model, with those of prompts, without padding."""
    losses: list[float] = field(default_factory=list)
    """Mean loss of each step in nats per token."""
    noise: GradientNoise = field(default_factory=GradientNoise)
    seconds: float = 0.0
    reason: str | None = None
    """Why it ended before the last step; None where it did not."""


class Trainer:
    """Model, data and optimizer of one task."""

    def __init__(self, model: Path, dataset: Path, task: Task, training: Training) -> None:
        self._parallel = Parallel(training)
        if self._parallel.device.type == "cpu":
            allocator.keep_freed()
        if training.batch_size % self._parallel.number:
            raise CrossFLError(
                f"training.batch_size is {training.batch_size}: it must be a multiple of the "
                f"{self._parallel.number} ranks"
            )
        self._task, self._training = task, training
        self._coding = encodings.of(training.encoding, training.topk_fraction)
        remembers = self._coding.lossy or os.environ.get(variables.STATE)
        self._residual = Residual(task, keeps=self._coding.lossy) if remembers else None
        keeps = training.local_optimizer == "keep"
        self._carried = CarriedState(task, "optimizer") if keeps else None
        self._disclosure = place.disclosure()
        valid = evaluation.validation_samples(dataset, training, self._disclosure)
        network, tokenizer = load(model, training)
        takes = (tokenizer, classes_of(network))
        self._samples = training_samples(dataset, model, *takes, task, training)
        facts = {"ranks": self._parallel.number, "samples": len(self._samples)}
        saves = training.checkpoint_steps is not None
        self._savepoint = Savepoint(task, training, facts) if saves else None
        self._validation = Validation(
            valid, tokenizer, training, self._disclosure, classes_of(network)
        )
        self._model = self._parallel.wrap(network)
        self._parameters = learning(self._parallel.unwrap(self._model))
        self._optimizer = adamw(self._model, training, self._parallel.device)
        if tokenizer is not None:  # not before: a pass may put whole weights for sharded ones
            probe.check(self._model, self._parallel, training)
        self._anchors: list[Tensor] = []
        self._coming: list[Batch] = []
        self._energy = accounting.Energy(self._parallel.device)

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes and reports."""
        return self._parallel.leads

    @property
    def notices(self) -> list[str]:
        """What to say: data not learnt from, state that is missing, or that no metric leaves."""
        residual = self._residual.lost if self._residual and self._coding.lossy else None
        lost = residual or (self._carried.lost if self._carried else None)
        others = (notice for notice in (lost, self._validation.withheld) if notice)
        return [*self._samples.notices, *others]

    def validate(self) -> Metrics | None:
        """Metrics of the model as it is, on the validation split; None where none may leave."""
        return self._validation.measure(self._model, self._parallel)

    def train(self, progress: Progress, stop: StopSignal, after: float = 0.0) -> TrainingResult:
        """Take the local steps, or as many as there is time for.

        The loss of a step is the mean over all tokens of the global batch, whatever their share in
        each micro-batch and on each rank: ranks average gradients, hence the factor of their
        number. Whether to stop is agreed before each step, so all ranks stop together. What follows
        is taken to last `after` seconds, for which time is left before the job ends.

        Raises:
            CrossFLError: the loss is not finite, or there was no time for a single step.
        """
        task, training = self._task, self._training
        done = self._begin()
        budget = Budget(training, stop, done.seconds, after, self.leads)
        self._model.train()
        self._coming = self._batches(done.steps)
        while done.steps < task.local_steps:
            batches = self._coming
            spent = budget.spent()
            shares = self._parallel.gather(
                sum(b.tokens for b in batches),
                sum(b.read for b in batches),
                len(batches),
                spent is not None,
            )
            if shares[:, 3].any():
                done.reason = spent or "another rank was told to stop"
                break
            tokens, read = (int(n) for n in shares[:, :2].sum(0))
            blank = int(shares[:, 2].max()) - len(batches)
            batches += [batches[-1].blank()] * blank
            # What a step draws at random follows from its number: nothing is to be remembered.
            torch.manual_seed(derive_seed(task.seed, str(done.steps), str(self._parallel.rank)))
            loss = self._step(batches, tokens, learning_rate(done.steps, task, training), done)
            done.steps, done.samples = done.steps + 1, done.samples + training.batch_size
            done.tokens, done.read = done.tokens + tokens, done.read + read
            done.losses.append(loss)
            done.seconds = budget.used
            if self._savepoint and done.steps % (training.checkpoint_steps or 1) == 0:
                self._save(done)
            progress(
                "train",
                step=done.steps,
                steps=task.local_steps,
                loss=self._edge_losses(done)[1],
                tokens_per_second=done.tokens / max(done.seconds, 1e-9),
            )
        if done.steps == 0:
            raise CrossFLError(
                f"{task.facility} had no time for a step in round {task.round}: {done.reason}"
            )
        return done

    def account(self, done: TrainingResult) -> TrainingMetrics:
        """What the training did and cost, for the manifest; every rank has to ask for it.

        Counts and rates are of all ranks, memory is that of the rank that held most, energy that
        of the first one's node and GPU.
        """
        network, device = self._parallel.unwrap(self._model), self._parallel.device
        memory = int(self._parallel.gather(accounting.peak_memory(device)).max())
        rate = done.read / max(done.seconds, 1e-9)
        peak = accounting.peak(device, self._training.precision)
        needed = accounting.operations(network, done.read / max(done.samples, 1))
        used = rate * needed / (peak * self._parallel.number) if peak and needed else None
        first, last = self._edge_losses(done)
        return TrainingMetrics(
            first_loss=first,
            last_loss=last,
            tokens_per_second=done.tokens / max(done.seconds, 1e-9),
            tokens_read=done.read,
            bad_samples=self._samples.bad_samples,
            cut_samples=self._samples.cut,
            gradient_noise_scale=done.noise.scale(),
            ranks=self._parallel.number,
            peak_memory=memory,
            flops_utilisation=used,
            joules=self._energy.joules(),
            device=accounting.device_name(device),
            software=f"crossfl {__version__}, torch {torch.__version__}",
        )

    def _edge_losses(self, done: TrainingResult) -> tuple[float | None, float | None]:
        batch, floor = self._training.batch_size, self._disclosure.min_samples
        return edge_losses(done.losses, batch, floor)

    def save_delta(self, model: Path, directory: Path) -> int:
        """Write local minus global weights, in files like the model's; their size in bytes.

        The local weights go through `save_pretrained`, so that the names are those of the
        checkpoint even where the module in memory names or ties its tensors otherwise. Every rank
        has to call it, for it may hold a shard; the first one writes.
        """
        network = self._parallel.unwrap(self._model)
        if not self.leads:
            self._save_local(network, model, None)
            return 0
        weights = Tensors.of_model(model)
        with contextlib.ExitStack() as stack:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(dir=directory.parent))
            keeps = self._residual if self._coding.lossy else None
            lost = stack.enter_context(keeps.after()) if keeps else None
            self._save_local(network, model, Path(scratch))
            local = Tensors(sorted(Path(scratch).glob("*.safetensors")))
            for file in weights.files:
                carried = self._residual.before(file) if self._residual else None
                path = directory / delta.file_name(file.path.name)
                rest = lost / file.path.name if lost else None
                difference = Difference(local, file, carried)
                delta.write(path, difference, self._coding, rest, file.buffers)
        return sum(path.stat().st_size for path in directory.iterdir())

    def _save_local(self, network: nn.Module, model: Path, folder: Path | None) -> None:
        """Write the local weights by the names of the checkpoint; ranks without a folder give.

        Shards are gathered one tensor at a time. Where the module names its tensors otherwise than
        the checkpoint does, all are gathered before, on every rank.
        """
        state: dict[str, Tensor] | None = None
        if self._parallel.shards:
            mine, lean = network.state_dict(), lora.is_adapter(model)
            entries = Tensors.of_model(model).floats()
            if all(n in mine and tuple(mine[n].shape) == e.shape for n, e in entries.items()):
                save_full(
                    {name: mine[name] for name in entries}, folder and folder / "local.safetensors"
                )
                return
            state = {n: gather_full(t) for n, t in mine.items() if lora.is_own(n) or not lean}
        if folder and not lora.save(network, state, folder):
            network.save_pretrained(folder, state_dict=state)  # type: ignore[operator]

    def keep(self) -> None:
        """Leave at the facility what its next round starts from, where the record says so.

        That is the optimizer's state and, where the delta is fp32, what its rounding lost: the sum
        of the received weights and the delta is not always the local weight to the bit.
        """
        if self._carried is None:
            return
        kept = state_of(self._optimizer, self._parameters)
        if self._training.encoding == "fp32":
            for (name, local), base in zip(self._parameters.items(), self._anchors, strict=True):
                values = local.detach()
                kept[ROUNDING + name] = values - (base + (values - base))
        if not self.leads:
            save_full(kept, None)
            return
        with self._carried.after() as folder:
            save_full(kept, folder / KEPT)

    def forget(self, own: bool = True) -> None:
        """Remove what was kept for another attempt: the update is delivered.

        Args:
            own: whether this round's is removed, too. After a partial update it stays: a scheduler
                that ended the job may run it again.
        """
        if self._savepoint and self.leads:
            self._savepoint.remove(own)

    def _begin(self) -> TrainingResult:
        """Go on from the savepoint, or from the last round's optimizer, or from nothing."""
        if self._training.proximal_mu > 0 or self._carried:
            self._anchors = [p.detach().clone() for p in self._parameters.values()]
        if self._savepoint and (saved := self._savepoint.read()):
            families, counts = saved
            self._load(families)
            restore(self._optimizer, self._parameters, families["optimizer"])
            return TrainingResult(**counts | {"noise": GradientNoise(**counts["noise"])})
        if self._carried and self._carried.before:
            kept = TensorFile(self._carried.before / KEPT)
            try:
                restore(self._optimizer, self._parameters, Tensors([kept.path]))
            except (KeyError, RuntimeError):
                raise CrossFLError(
                    f"{kept.path} is of another model: remove {self._carried.folder}"
                ) from None
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    if ROUNDING + name in kept.entries:
                        parameter.add_(scatter_like(kept.tensor(ROUNDING + name), parameter))
        return TrainingResult()

    def _load(self, families: Mapping[str, Tensors]) -> None:
        buffers = persistent_buffers(self._parallel.unwrap(self._model))
        with torch.no_grad():
            for name, tensor in [*self._parameters.items(), *buffers.items()]:
                saved = families["model" if name in self._parameters else "buffers"]
                tensor.copy_(scatter_like(saved[name], tensor))

    def _save(self, done: TrainingResult) -> None:
        assert self._savepoint  # noqa: S101
        families: dict[str, Mapping[str, Tensor]] = {
            "model": self._parameters,
            "optimizer": state_of(self._optimizer, self._parameters),
            "buffers": persistent_buffers(self._parallel.unwrap(self._model)),
        }
        savers = {name: partial(save_full, family) for name, family in families.items() if family}
        if self.leads:
            self._savepoint.write(savers, done)
        else:
            for save in savers.values():
                save(None)

    def _batches(self, step: int) -> list[Batch]:
        """This rank's share of the samples of a step, in micro-batches; none after the last."""
        training, size = self._training, self._training.batch_size
        if step >= self._task.local_steps:
            return []
        first = self._task.samples_seen + step * size
        mine = range(first + self._parallel.rank, first + size, self._parallel.number)
        samples = [self._samples[self._samples.order[position]] for position in mine]
        rows = rows_of(samples, training.sequence_length if training.packing else None)
        most = training.micro_batch or size
        return [
            batch_of(rows[i : i + most], self._parallel.device) for i in range(0, len(rows), most)
        ]

    def _step(
        self, batches: Sequence[Batch], tokens: int, rate: float, done: TrainingResult
    ) -> float:
        """One step of the optimizer; the mean loss of its batch in nats per token."""
        parallel, training = self._parallel, self._training
        scale = parallel.number / max(tokens, 1)
        total, first = torch.zeros((), device=parallel.device), 0.0
        # The noise shows in the gradient of a part of the batch, before ranks have averaged it.
        probes = len(batches) > 1 and not parallel.shards
        for i, batch in enumerate(batches):
            with parallel.no_sync(self._model, i < len(batches) - 1):
                with parallel.autocast():
                    loss = summed_loss(self._model, batch)
                torch.autograd.backward(loss * scale)
            total += loss.detach()
            if i == 0 and probes and batch.tokens:
                first = norm(self._gradients()) * tokens / (parallel.number * batch.tokens)
        if done.steps == 0 and tokens:
            lora.check_gradients(self._parameters)
        self._coming = self._batches(done.steps + 1)  # while a GPU still computes
        summed = float(parallel.gather(float(total))[:, 0].sum())
        if not math.isfinite(summed):
            raise CrossFLError(
                f"the loss of {self._task.facility} is {summed} at step {done.steps + 1} of round "
                f"{self._task.round}: lower training.learning_rate, or look at the data"
            )
        if probes and batches[0].tokens:
            done.noise.add(batches[0].tokens, first, tokens, norm(self._gradients()))
        parameters = list(self._parameters.values())
        if training.proximal_mu:
            pull_back(parallel.unwrap(self._model), self._anchors, training.proximal_mu)
        if training.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(parameters, training.max_grad_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        return summed / max(tokens, 1)

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters.values() if p.grad is not None]
