"""The language model in use: loaded from a checkpoint, its loss on a batch, its completions."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from crossfl import checkpoint
from crossfl.batch import batch_of
from crossfl.data import IGNORED, Sample, encode, encode_prompt
from crossfl.errors import CrossFLError
from crossfl.parallel import Parallel
from crossfl.records import Training

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def load(directory: Path, training: Training) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model in fp32 and its tokenizer, from a Hugging Face checkpoint directory.

    Raises:
        CrossFLError: they cannot be loaded, or do not take samples of `sequence_length`.
    """
    if training.threads is not None:
        torch.set_num_threads(training.threads)
    model = load_weights(directory, torch.float32, training.attention)
    if training.activations == "recompute":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise CrossFLError(f"the tokenizer in {directory} cannot be loaded: {error}") from None
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and training.sequence_length > longest:
        raise CrossFLError(
            f"training.sequence_length is {training.sequence_length}: the model in {directory} "
            f"takes at most {longest} tokens (max_position_embeddings)"
        )
    return model, tokenizer


def load_weights(
    directory: Path, dtype: torch.dtype | str, attention: str = "auto"
) -> PreTrainedModel:
    """A causal language model, all of its weights from safetensors files.

    Attention is computed as named; `auto` is the best that model and machine have.

    Raises:
        CrossFLError: a weight is missing or of another shape, or the files are no such model.
    """
    checkpoint.model_files(directory)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            attn_implementation=None if attention == "auto" else attention,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise CrossFLError(f"the model in {directory} cannot be loaded: {error}") from None
    model, found = cast("tuple[PreTrainedModel, dict[str, set[Any]]]", loaded)
    if lacking := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):
        raise CrossFLError(
            f"the model in {directory} lacks {lacking[0]} (and {len(lacking) - 1} more): "
            "its weights and its config.json are not of one model"
        )
    # Completions are greedy, whatever generation_config.json came with the model.
    model.generation_config = GenerationConfig()
    return model


def summed_loss(
    model: nn.Module, ids_BL: Tensor, labels_BL: Tensor, positions_BL: Tensor | None = None
) -> Tensor:
    """Cross-entropy in nats summed over the tokens that have a label.

    Positions are given where a row holds several samples; else they count from the row's start.
    """
    placed = {} if positions_BL is None else {"position_ids": positions_BL}
    logits_BLV = model(input_ids=ids_BL, use_cache=False, **placed).logits[:, :-1]
    return nn.functional.cross_entropy(
        logits_BLV.flatten(0, 1).float(),
        labels_BL[:, 1:].flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )


@torch.no_grad()
def validate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    training: Training,
    parallel: Parallel,
) -> dict[str, float]:
    """Mean loss (nats per token), perplexity and tokens over the validation samples.

    Each rank takes its share of them.
    """
    was_training = model.training
    model.eval()
    encoded = [encode(s, tokenizer, training.sequence_length) for s in samples]
    encoded.sort(key=lambda sample: len(sample.ids))  # little padding; the sum is the same
    size = training.micro_batch or training.batch_size
    total, tokens = 0.0, 0
    for start in range(0, len(encoded), size * parallel.number):
        mine = encoded[start : start + size * parallel.number][parallel.rank :: parallel.number]
        batch = batch_of([[sample] for sample in mine], parallel.device)
        with parallel.autocast():
            loss = summed_loss(model, batch.ids, batch.labels)
        total, tokens = total + loss.item(), tokens + batch.tokens
    total, tokens = parallel.gather(total, tokens).sum(0).tolist()
    model.train(was_training)
    if tokens == 0:
        raise CrossFLError(
            "no validation sample has a token to predict within "
            f"sequence_length {training.sequence_length}"
        )
    mean = total / tokens
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "tokens": int(tokens)}


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
