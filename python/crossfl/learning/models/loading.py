"""Loading a model from a checkpoint: a causal language model, or an image classifier."""

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
from crossfl.learning.models import vision
from crossfl.protocol.records import Training
from crossfl.storage.model_folder import ModelFolder

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
vision.register()

SENSES = ("vision", "audio", "image", "speech")
"""In the names of the parts of multimodal models."""


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
    # What a base has besides stays with the base: nothing of it is lost.
    model = load_weights(base or folder, dtype, training.attention, whole=base is None)
    if base:
        model = lora.load(model, directory)
    if training.activation_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise CrossFLError(
                f"training.activation_checkpointing: the model in {directory} cannot; leave it out"
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
    """The class that makes a model of a configuration.

    Raises:
        CrossFLError: there is none that is trained here.
    """
    if classifies_images(config):
        return AutoModelForImageClassification
    kind = config.model_type
    try:
        composed = config.get_text_config() is not config
    except ValueError:  # it has several
        composed = True
    if composed or any(sense in part for part in config.sub_configs for sense in SENSES):
        parts = ", ".join(sorted(name for name in config.sub_configs if hasattr(config, name)))
        what = "an encoder with a decoder" if config.is_encoder_decoder else "a multimodal model"
        raise CrossFLError(
            f"{what} ({kind}: {parts}) is not supported, only a language model or an image "
            "classifier by itself: take the language model of its family, if there is one"
        )
    if type(config) not in AutoModelForCausalLM._model_mapping:
        encodes = " (it is an encoder with a decoder)" if config.is_encoder_decoder else ""
        raise CrossFLError(
            f"transformers has neither a causal language model nor an image classifier of the "
            f"model type {kind!r}{encodes}: take a model of another type"
        )
    return AutoModelForCausalLM


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
    folder: ModelFolder, dtype: torch.dtype, attention: str = "auto", *, whole: bool = True
) -> PreTrainedModel:
    """A causal language model or image classifier, all of its weights from safetensors files.

    Attention is computed as named; `auto` is the best that model and machine have. If `whole`, the
    model has a place for every weight in the files.

    Raises:
        CrossFLError: a weight is missing or of another shape, or has no place, or the files are no
            such model.
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
    if whole and (dropped := sorted(map(str, found["unexpected_keys"]))):
        raise CrossFLError(
            f"the model in {directory} has {dropped[0]} (and {len(dropped) - 1} more), for which "
            f"{type(model).__name__} has no place: it would be lost. Save the model without it"
        )
    # Completions are greedy, whatever generation_config.json came with the model.
    if model.can_generate():
        model.generation_config = GenerationConfig()
    return model


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's checkpoint that are no parameters, by their names in the model."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return {name: buffers[name] for name in model.state_dict() if name in buffers}


def classes_of(model: nn.Module) -> int | None:
    """How many classes an image classifier tells apart; None of a language model."""
    config = cast("PreTrainedModel", model).config
    return int(config.num_labels or 0) if classifies_images(config) else None
