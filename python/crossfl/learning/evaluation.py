"""The model on data: its loss on a batch, its metrics on a validation split, what it writes."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from crossfl.errors import CrossFLError
from crossfl.learning.batching import Batch, batch_of
from crossfl.learning.datasets import IGNORED, Encoded, Image, Sample, encode, encode_prompt
from crossfl.learning.ranks import Parallel
from crossfl.protocol.records import Training


def predict(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [predictions, classes] and targets [predictions] of a batch.

    A token is predicted from those before it; an image has one prediction.
    """
    if batch.inputs.is_floating_point():
        return model(pixel_values=batch.inputs).logits, batch.labels
    placed = {} if batch.positions is None else {"position_ids": batch.positions}
    logits_BLV = model(input_ids=batch.inputs, use_cache=False, **placed).logits
    # Moving the labels, and not the logits, spares a copy of the largest tensor there is.
    next_BL = nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
    return logits_BLV.flatten(0, 1), next_BL.flatten()


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy in nats summed over what has a label."""
    return _cross_entropy(*predict(model, batch))


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(
        logits.float(), targets, ignore_index=IGNORED, reduction="sum"
    )


@dataclass
class _Sums:
    """Sums over predictions, from which the metrics follow."""

    nats: float = 0.0
    tokens: int = 0
    right: int = 0
    bytes: int | None = None

    def __add__(self, other: "_Sums") -> "_Sums":
        text = None if self.bytes is None or other.bytes is None else self.bytes + other.bytes
        nats, tokens = self.nats + other.nats, self.tokens + other.tokens
        return _Sums(nats, tokens, self.right + other.right, text)

    def metrics(self) -> dict[str, float]:
        """Metrics as the manifest has them; empty where nothing was predicted."""
        if not self.tokens:
            return {}
        mean: dict[str, float] = {"loss": self.nats / self.tokens, "tokens": self.tokens}
        if self.bytes is None:
            return mean | {"accuracy": self.right / self.tokens}
        mean["perplexity"] = math.exp(min(mean["loss"], 700.0))
        if self.bytes:
            mean["bits_per_byte"] = self.nats / math.log(2) / self.bytes
        return mean


@torch.no_grad()
def validate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    samples: Sequence[Sample],
    training: Training,
    parallel: Parallel | None = None,
) -> dict[str, Any]:
    """Metrics over the validation samples; under `tasks`, those of each task that they name.

    `loss` (nats per token), `perplexity`, `bits_per_byte` and `tokens` of text; `loss`, `accuracy`
    and `tokens`, one for each, of images. The bytes are those of the text predicted, in UTF-8: not
    of prompts, and not of what `sequence_length` cuts off. The end-of-sequence token, which has no
    bytes, counts in the loss. Each rank takes its share of the samples.

    Raises:
        CrossFLError: there is nothing to predict.
    """
    groups: dict[str | None, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(sample.task, []).append(sample)
    was_training = model.training
    model.eval()
    parallel = parallel or Parallel(training)
    sums = {t: _sums(model, tokenizer, g, training, parallel) for t, g in groups.items()}
    model.train(was_training)
    first, *rest = sums.values()
    metrics: dict[str, Any] = dict(sum(rest, first).metrics())
    if not metrics:
        raise CrossFLError(
            "no validation sample has a token to predict within "
            f"sequence_length {training.sequence_length}"
        )
    tasks: Mapping[str, Any] = {t: s.metrics() for t, s in sums.items() if t is not None}
    return metrics | ({"tasks": dict(sorted(tasks.items()))} if tasks else {})


def _sums(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    samples: Sequence[Sample],
    training: Training,
    parallel: Parallel,
) -> _Sums:
    encoded = [encode(s, tokenizer, training.sequence_length) for s in samples]
    texts = [sample for sample in encoded if isinstance(sample, Encoded)]
    encoded.sort(key=_length)  # little padding; the sum is the same
    nats, tokens, right = 0.0, 0, 0
    size = (training.micro_batch or training.batch_size) * parallel.number
    for start in range(0, len(encoded), size):
        mine = encoded[start : start + size][parallel.rank :: parallel.number]
        # Ranks that hold shards have to go through the model together, even one with no sample.
        batch = batch_of([[sample] for sample in mine or encoded[:1]], parallel.device)
        with parallel.autocast():
            logits, targets = predict(model, batch if mine else batch.blank())
        nats += _cross_entropy(logits, targets).item()
        tokens += int((targets != IGNORED).sum())
        right += int((logits.argmax(-1) == targets).sum())
    nats, tokens, right = parallel.gather(nats, tokens, right).sum(0).tolist()
    text = sum(_bytes(t, tokenizer) for t in texts) if texts and tokenizer else None
    return _Sums(nats, int(tokens), int(right), text)


def _length(sample: Encoded | Image) -> int:
    return len(sample.ids) if isinstance(sample, Encoded) else 0


def _bytes(sample: Encoded, tokenizer: PreTrainedTokenizerBase) -> int:
    """UTF-8 bytes of the text that is predicted: the first token is not, having none before it."""
    predicted = [label for label in sample.labels[1:] if label != IGNORED]
    text = tokenizer.decode(predicted, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(str(text).encode())


@torch.no_grad()
def complete(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    training: Training,
) -> list[str]:
    """Greedy completions of the prompts, without the end-of-sequence token."""
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    encoded = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    texts: dict[int, str] = {}
    by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    for start in range(0, len(by_length), training.batch_size):
        rows = by_length[start : start + training.batch_size]
        longest = max(len(encoded[i]) for i in rows)
        ids_BL = torch.full((len(rows), longest), pad or 0)
        mask_BL = torch.zeros_like(ids_BL)
        for row, i in enumerate(rows):
            ids_BL[row, longest - len(encoded[i]) :] = torch.tensor(encoded[i])
            mask_BL[row, longest - len(encoded[i]) :] = 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out_BL = model.generate(  # type: ignore[operator]
                input_ids=ids_BL.to(device),
                attention_mask=mask_BL.to(device),
                max_new_tokens=training.max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
                eos_token_id=tokenizer.eos_token_id,
            )
        for row, i in enumerate(rows):
            texts[i] = str(tokenizer.decode(out_BL[row, longest:], skip_special_tokens=True))
    return [texts[i] for i in range(len(prompts))]
