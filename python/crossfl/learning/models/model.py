"""The model in use: loaded from a checkpoint, its loss on a batch, what it writes.

It is a causal language model, or an image classifier.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from crossfl.errors import CrossFLError
from crossfl.learning import lora
from crossfl.learning.batching import Batch, batch_of
from crossfl.learning.datasets import IGNORED, Encoded, Image, Sample, encode, encode_prompt
from crossfl.learning.models import vision
from crossfl.learning.ranks import Parallel
from crossfl.protocol.records import Training
from crossfl.storage.model_folder import ModelFolder

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
vision.register()

MOST_TASKS = 64
"""Tasks that a dataset may name."""


def load(directory: Path, training: Training) -> tuple[nn.Module, PreTrainedTokenizerBase | None]:
    """The model in fp32 and its tokenizer, from a verified model folder.

    An image classifier has no tokenizer. An adapter comes on its base, as this machine holds it.

    Raises:
        CrossFLError: they cannot be loaded, or do not take samples of `sequence_length`.
    """
    if training.threads is not None:
        torch.set_num_threads(training.threads)
    folder = ModelFolder.received(directory, only=())
    base = ModelFolder.own(lora.base_of(directory)) if folder.is_adapter else None
    # Weights that do not learn need no more digits than the arithmetic; shards are of one dtype.
    halved = base and training.precision == "bf16" and training.sharding == "none"
    dtype = torch.bfloat16 if halved else torch.float32
    model = load_weights(base or folder, dtype, training.attention)
    if base:
        model = lora.load(model, directory)
    if training.activations == "recompute":
        if not model.supports_gradient_checkpointing:
            raise CrossFLError(
                f"training.activations is recompute: the model in {directory} cannot; leave it out"
            )
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if classifies_images(model.config):
        return model, None
    with folder.view() as view:
        tokenizer = load_tokenizer(view, directory)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and training.sequence_length > longest:
        raise CrossFLError(
            f"training.sequence_length is {training.sequence_length}: the model in {directory} "
            f"takes at most {longest} tokens (max_position_embeddings)"
        )
    return model, tokenizer


def classifies_images(config: PreTrainedConfig) -> bool:
    """Whether a configuration is of an image classifier, and not of a causal language model."""
    named = (config.architectures or [""])[0]
    if named.endswith(("ForCausalLM", "ForImageClassification")):
        return named.endswith("ForImageClassification")
    mapping = AutoModelForImageClassification._model_mapping
    return type(config) in mapping and type(config) not in AutoModelForCausalLM._model_mapping


def kind_of(config: PreTrainedConfig) -> type[Any]:
    """The class that makes a model of a configuration."""
    return AutoModelForImageClassification if classifies_images(config) else AutoModelForCausalLM


def load_tokenizer(view: Path, directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a private view of a folder; the folder is named where that fails.

    Raises:
        CrossFLError: it cannot be loaded.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            view, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # libraries raise whatever a damaged file makes them
        raise _unfit("tokenizer", directory, view, error) from None
    return tokenizer


def _unfit(what: str, directory: Path, view: Path, error: Exception) -> CrossFLError:
    message = str(error).replace(str(view), str(directory)) or type(error).__name__
    return CrossFLError(f"the {what} in {directory} cannot be loaded: {message}")


def load_weights(
    folder: ModelFolder, dtype: torch.dtype | str, attention: str = "auto"
) -> PreTrainedModel:
    """A causal language model or image classifier, all of its weights from safetensors files.

    Attention is computed as named; `auto` is the best that model and machine have.

    Raises:
        CrossFLError: a weight is missing or of another shape, or the files are no such model.
    """
    directory = folder.path
    with folder.view() as view:
        try:
            config = AutoConfig.from_pretrained(
                view, local_files_only=True, trust_remote_code=False
            )
            loaded: Any = kind_of(config).from_pretrained(
                view,
                config=config,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
                attn_implementation=None if attention == "auto" else attention,
            )
        except Exception as error:  # libraries raise whatever a damaged file makes them
            raise _unfit("model", directory, view, error) from None
    model, found = cast("tuple[PreTrainedModel, dict[str, set[Any]]]", loaded)
    if lacking := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):
        raise CrossFLError(
            f"the model in {directory} lacks {lacking[0]} (and {len(lacking) - 1} more): "
            "its weights and its config.json are not of one model"
        )
    # Completions are greedy, whatever generation_config.json came with the model.
    if model.can_generate():
        model.generation_config = GenerationConfig()
    return model


def check_samples(model: nn.Module, samples: Sequence[Sample]) -> None:
    """Check that the model takes these samples: text, or images of one shape in its classes.

    Tasks must be few, as their names and metrics leave the facility.

    Raises:
        CrossFLError: it does not.
    """
    config = cast("PreTrainedModel", model).config
    images = [sample for sample in samples if isinstance(sample, Image)]
    wanted = "images" if classifies_images(config) else "text"
    if len(images) != (len(samples) if wanted == "images" else 0):
        raise CrossFLError(f"the model takes {wanted}, and the dataset holds something else")
    if (tasks := len({sample.task for sample in samples})) > MOST_TASKS:
        raise CrossFLError(f"the dataset names {tasks} tasks: {MOST_TASKS} at most")
    if len(shapes := {image.pixels.shape for image in images}) > 1:
        raise CrossFLError(f"the images are of {len(shapes)} shapes: make them of one")
    if images and max(image.label for image in images) >= int(config.num_labels or 0):
        raise CrossFLError(
            f"an image has a label beyond the model's {config.num_labels} classes: "
            "raise the number of classes in config.json"
        )


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
                max_new_tokens=training.completion_tokens,
                do_sample=False,
                pad_token_id=pad,
                eos_token_id=tokenizer.eos_token_id,
            )
        for row, i in enumerate(rows):
            texts[i] = str(tokenizer.decode(out_BL[row, longest:], skip_special_tokens=True))
    return [texts[i] for i in range(len(prompts))]
