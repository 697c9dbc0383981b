"""The model on data: its loss on a batch, its metrics on a validation split, what it writes."""

import math
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from crossfl.errors import CrossFLError
from crossfl.facility.place import Disclosure
from crossfl.learning import datasets
from crossfl.learning.batching import Batch, batch_of
from crossfl.learning.datasets import (
    IGNORED,
    Encoded,
    Image,
    Sample,
    Samples,
    encode_prompt,
    encoded,
)
from crossfl.learning.disclosure import (
    Span,
    groups_of,
    measured_length,
    rounded,
    usable,
    whole_blocks,
    withheld,
)
from crossfl.learning.ranks import Parallel
from crossfl.protocol.manifest import Completion
from crossfl.protocol.measurements import Metrics
from crossfl.protocol.records import Training
from crossfl.protocol.variables import PROMPTS

MOST_TASKS = 64
"""Tasks that a dataset may name: their names and metrics leave the facility."""


def predict(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [predictions, classes] and targets [predictions] of a batch.

    A token is predicted from those before it; an image has one prediction.
    """
    if batch.inputs.is_floating_point():
        return model(pixel_values=batch.inputs).logits, batch.labels
    placed = {} if batch.positions is None else {"position_ids": batch.positions}
    logits_BLV = model(input_ids=batch.inputs, use_cache=False, **placed).logits
    if (longer := logits_BLV.shape[1] - batch.inputs.shape[1]) > 0:
        logits_BLV = logits_BLV[:, longer:]  # a prompt that learns stands before the tokens
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


class _Sums(NamedTuple):
    """Sums over predictions, from which the metrics follow."""

    samples: int = 0
    nats: float = 0.0
    tokens: int = 0
    right: int = 0
    bytes: int | None = None
    """UTF-8 bytes of the text that is predicted; of images, None."""

    def metrics(self) -> dict[str, float]:
        """Metrics as the manifest has them, rounded."""
        mean = {"loss": self.nats / self.tokens}
        if self.bytes is None:
            mean["accuracy"] = self.right / self.tokens
        else:
            mean["perplexity"] = math.exp(min(mean["loss"], 700.0))
        if self.bytes:
            mean["bits_per_byte"] = self.nats / math.log(2) / self.bytes
        return rounded(mean) | {"tokens": self.tokens, "samples": self.samples}


def validation_samples(dataset: Path, training: Training, disclosure: Disclosure) -> Samples:
    """The samples of a dataset that are measured: the first of its validation split.

    Raises:
        CrossFLError: the dataset cannot be read.
    """
    wanted, floor = training.validation_samples, disclosure.min_samples
    samples = datasets.read(dataset, "valid", wanted and max(wanted, floor))
    return samples.begin(usable(len(samples), wanted, floor))


class _Measurable(NamedTuple):
    """A sample, how the model takes it, or why it cannot, and what of it is predicted."""

    sample: Sample
    encoded: Encoded | Image | CrossFLError
    span: Span


class Validation:
    """A facility's validation data, cut down to what its metrics may tell of it.

    Samples are grouped by task; tasks too small go together with the samples that name none. Each
    group is measured up to a sequence length that no few samples reach alone. Where a sample cannot
    be encoded, the samples around it are left out with it (`crossfl.learning.disclosure`).

    Args:
        samples: those of the validation split that are used.
        tokenizer: the model's; of an image classifier, None.
        training: how long samples are, and how many go through the model at once.
        disclosure: of how many samples and tokens metrics may leave.
        classes: how many an image classifier tells apart.

    Raises:
        CrossFLError: the samples name too many tasks.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        tokenizer: PreTrainedTokenizerBase | None,
        training: Training,
        disclosure: Disclosure,
        classes: int | None = None,
    ) -> None:
        if (tasks := len({sample.task for sample in samples})) > MOST_TASKS:
            raise CrossFLError(f"the dataset names {tasks} tasks: {MOST_TASKS} at most")
        self._tokenizer, self._training = tokenizer, training
        self._groups: dict[str | None, list[Encoded | Image]] = {}
        floor = disclosure.min_samples

        def is_large(group: Sequence[_Measurable]) -> bool:
            return len(group) >= floor and enough(group, sys.maxsize)

        def enough(group: Sequence[_Measurable], length: int) -> bool:
            texts = [one.span.until(length) for one in group if isinstance(one.encoded, Encoded)]
            return not texts or sum(texts) >= disclosure.min_tokens

        results = zip(samples, encoded(samples, tokenizer, classes), strict=True)
        every = [(s.task, _Measurable(s, result, _span(result))) for s, result in results]
        kept: list[Sample] = []
        for task, whole in groups_of(every, is_large).items():
            group = whole_blocks(whole, floor, lambda one: one.span.until(sys.maxsize) > 0)
            kept += [one.sample for one in group]
            length = measured_length([o.span for o in group], training.sequence_length, floor)
            if is_large(group) and enough(group, length):
                self._groups[task] = [_cut(one.encoded, length) for one in group]
        self.usable = kept
        """The samples that can be encoded, whether or not they are enough to be measured."""
        self.withheld = None if self._groups else withheld(disclosure)
        """Why no metric may leave; None where they may."""

    @torch.no_grad()
    def measure(self, model: nn.Module, parallel: Parallel | None = None) -> Metrics | None:
        """Metrics over all groups; under `tasks`, those of each task. None where none may leave.

        `loss` (nats per token), `perplexity`, `bits_per_byte` and `tokens` of text; `loss`,
        `accuracy` and `tokens`, one for each, of images. The bytes are those of the text predicted,
        in UTF-8: not of prompts, and not of what the sequence length cuts off. The end-of-sequence
        token, which has no bytes, counts in the loss. Each rank takes its share of the samples.
        """
        if not self._groups:
            return None
        was_training = model.training
        model.eval()
        parallel = parallel or Parallel(self._training)
        sums = {task: self._sums(model, group, parallel) for task, group in self._groups.items()}
        model.train(was_training)
        tasks = {t: s.metrics() for t, s in sums.items() if t is not None}
        total = _total(sums.values()).metrics()
        return Metrics.parse(total | {"tasks": dict(sorted(tasks.items()))})

    def _sums(
        self, model: nn.Module, group: Sequence[Encoded | Image], parallel: Parallel
    ) -> _Sums:
        texts = [sample for sample in group if isinstance(sample, Encoded)]
        ordered = sorted(group, key=_length)  # little padding; the sum is the same
        nats, tokens, right = 0.0, 0, 0
        size = (self._training.micro_batch or self._training.batch_size) * parallel.number
        for start in range(0, len(ordered), size):
            mine = ordered[start : start + size][parallel.rank :: parallel.number]
            # Ranks that hold shards have to go through the model together, even without a sample.
            batch = batch_of([[sample] for sample in mine or ordered[:1]], parallel.device)
            with parallel.autocast():
                logits, targets = predict(model, batch if mine else batch.blank())
            nats += _cross_entropy(logits, targets).item()
            tokens += int((targets != IGNORED).sum())
            right += int((logits.argmax(-1) == targets).sum())
        nats, tokens, right = parallel.gather(nats, tokens, right).sum(0).tolist()
        tokenizer = self._tokenizer
        text = sum(_bytes(t, tokenizer) for t in texts) if texts and tokenizer else None
        return _Sums(len(group), nats, int(tokens), int(right), text)


def _total(parts: Iterable[_Sums]) -> _Sums:
    samples, nats, tokens, right, texts = zip(*parts, strict=True)
    text = None if None in texts else sum(texts)
    return _Sums(sum(samples), sum(nats), sum(tokens), sum(right), text)


def _span(result: Encoded | Image | CrossFLError) -> Span:
    """The positions that are predicted: an image has one, a text those behind its prompt."""
    if isinstance(result, CrossFLError):
        return Span(0, 0)
    if isinstance(result, Image):
        return Span(0, 1)
    # The first token is not: it has none before it.
    places = [i for i, label in enumerate(result.labels) if label != IGNORED and i > 0]
    if not places:
        return Span(0, 0)
    begin, end = places[0], places[-1] + 1
    whole = len(places) == end - begin
    return Span(begin, end, () if whole else tuple(sorted({*range(begin, end)} - {*places})))


def _cut(result: Encoded | Image | CrossFLError, length: int) -> Encoded | Image:
    if isinstance(result, CrossFLError):
        raise result
    return result if isinstance(result, Image) else Encoded(*(part[:length] for part in result))


def _length(sample: Encoded | Image) -> int:
    return len(sample.ids) if isinstance(sample, Encoded) else 0


def _bytes(sample: Encoded, tokenizer: PreTrainedTokenizerBase) -> int:
    """UTF-8 bytes of the text that is predicted: the first token is not, having none before it."""
    predicted = [label for label in sample.labels[1:] if label != IGNORED]
    text = tokenizer.decode(predicted, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(str(text).encode())


def complete_prompts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[str],
    training: Training,
    disclosure: Disclosure,
    parallel: Parallel | None = None,
) -> tuple[list[Completion], str | None]:
    """Completions of the job's prompts, where the facility allows them; or none, and why.

    A model that has learnt a sample by heart writes it behind a prompt that begins like it.
    """
    if not prompts or tokenizer is None:
        return [], None
    if not disclosure.prompts:
        return [], f"the job's prompts are not completed here: {PROMPTS} is not 1"
    texts = complete(model, tokenizer, prompts, training, parallel)
    pairs = zip(prompts, texts, strict=True)
    return [Completion(prompt=prompt, completion=text) for prompt, text in pairs], None


@torch.no_grad()
def complete(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    training: Training,
    parallel: Parallel | None = None,
) -> list[str]:
    """Greedy completions of the prompts, without the end-of-sequence token.

    A prompt that leaves too few of the model's positions for what is to be written loses its
    beginning; at least half of them are the prompt's. Ranks share the batches, which are those of
    one rank. Ranks that hold shards go through all of them together.

    Raises:
        CrossFLError: another rank has failed.
    """
    parallel = parallel or Parallel(training)
    error: Exception | None = None
    texts: dict[int, str] = {}
    try:
        texts = _completed(parallel.unwrap(model), tokenizer, prompts, training, parallel)
    except Exception as failure:  # told below, when the other ranks know of it
        error = failure
    failed = bool(parallel.gather(float(error is not None)).any())
    if error is not None:
        raise error
    if failed:
        raise CrossFLError("another rank has failed to complete prompts: its output says why")
    everywhere = parallel.gather_texts(texts)
    return [everywhere[i] for i in range(len(prompts))]


def _completed(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    training: Training,
    parallel: Parallel,
) -> dict[int, str]:
    """The completions that are this rank's share, by the number of the prompt."""
    positions = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    room = positions - min(training.max_new_tokens, positions // 2)
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    encoded = [encode_prompt(prompt, tokenizer)[-room:] for prompt in prompts]
    texts: dict[int, str] = {}
    by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    starts = range(0, len(by_length), training.batch_size)
    for start in starts if parallel.shards else starts[parallel.rank :: parallel.number]:
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
                max_new_tokens=min(training.max_new_tokens, positions - longest),
                do_sample=False,
                pad_token_id=pad,
                eos_token_id=tokenizer.eos_token_id,
            )
        for row, i in enumerate(rows):
            texts[i] = str(tokenizer.decode(out_BL[row, longest:], skip_special_tokens=True))
    return texts
