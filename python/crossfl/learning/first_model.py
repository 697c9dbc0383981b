"""The first global model, made with the model library: copied, drawn at random, or an adapter."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from crossfl.errors import CrossFLError
from crossfl.protocol.records import BYTES, Lora
from crossfl.storage.model_folder import ModelFolder, tokenizer_view
from crossfl.storage.weight_files import weights_digest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def write_first_model(
    model: Path | None,
    config: Path | None,
    tokenizer: str | None,
    lora: Lora | None,
    seed: int,
    directory: Path,
) -> None:
    """Write the first global model, without its manifest.

    Args:
        model: Hugging Face model directory to start from, or
        config: its `config.json` alone; the weights are then random, drawn from the seed.
        tokenizer: directory of a tokenizer, or `bytes`; unset, the one in the model directory.
        lora: adapter to train on the model, of which only the configuration is then read, and its
            weights for their digest; unset, the whole model.
        seed: seed of the weights.
        directory: where to write.

    Raises:
        CrossFLError: the model or the tokenizer cannot be made.
    """
    if (model is None) == (config is None):
        raise CrossFLError("give either a model directory (--model) or a --config, not both")
    if lora is not None:
        _adapter(model, config, lora, seed, directory)
    elif model is not None:
        _copy_model(model, directory)
    elif config is not None:
        _random_model(config, seed, directory)
    described_by = model / "config.json" if model else config
    if described_by and (vocabulary := _vocabulary(described_by)) is not None:
        _save_tokenizer(tokenizer, model, vocabulary, directory)


def _copy_model(model: Path, directory: Path) -> None:
    """Save the model anew, under the names and in the files that `save_pretrained` gives them.

    What a facility saves after training then has the same names, whatever those in `model` were.
    """
    if not (model / "config.json").is_file():
        raise CrossFLError(f"{model} has no config.json: it is not a Hugging Face model directory")
    folder = ModelFolder.own(model)
    from crossfl.learning.models.loading import load_weights

    generation = model / "generation_config.json"
    network = load_weights(folder, "auto")
    # The class is transformers' own, whatever code the folder may have come with.
    network.config.__dict__.pop("auto_map", None)
    network.save_pretrained(directory)
    if generation.is_file():
        shutil.copyfile(generation, directory / generation.name)


def _adapter(
    model: Path | None, config: Path | None, lora: Lora, seed: int, directory: Path
) -> None:
    from crossfl.learning import lora as adapter

    if model is not None and lora.base_digest is None:
        lora = lora.replace(base_digest=weights_digest(model))
    if lora.base_digest is None:
        raise CrossFLError(
            "lora.base_digest is missing: run 'crossfl digest FOLDER' where the base model lies, "
            "or give the model itself (--model)"
        )
    described_by = model / "config.json" if model else config
    adapter.create(_settings(described_by or Path()), lora, seed, directory)


def _random_model(config: Path, seed: int, directory: Path) -> None:
    from crossfl.learning.models.loading import kind_of

    settings = _settings(config)
    torch.manual_seed(seed)
    try:
        network = kind_of(settings).from_config(settings)
    except (ValueError, TypeError, KeyError) as error:
        raise _describes_nothing(config, error) from None
    network.save_pretrained(directory)


def _settings(config: Path) -> "PreTrainedConfig":
    from transformers import AutoConfig

    import crossfl.learning.models.loading  # noqa: F401 (it makes known the configurations that are ours)

    try:
        settings: PreTrainedConfig = AutoConfig.for_model(
            **json.loads(config.read_text(encoding="utf-8"))
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _describes_nothing(config, error) from None
    return settings


def _describes_nothing(config: Path, error: Exception) -> CrossFLError:
    return CrossFLError(
        f"{config} describes neither a causal language model nor an image classifier: {error}"
    )


def _save_tokenizer(name: str | None, model: Path | None, vocabulary: int, directory: Path) -> None:
    """Save a tokenizer by name, or else the model's own, if the model has all its tokens."""
    from transformers import ByT5Tokenizer

    from crossfl.learning.models.loading import load_tokenizer

    with contextlib.ExitStack() as stack:
        if name == BYTES:
            loaded: PreTrainedTokenizerBase = ByT5Tokenizer()
        else:
            folder = _tokenizer_folder(name, model)
            # Some tokenizers copy their files only when they are saved.
            loaded = load_tokenizer(stack.enter_context(tokenizer_view(folder)), folder)
        if len(loaded) > vocabulary:
            raise CrossFLError(
                f"the tokenizer has {len(loaded)} tokens, the model's vocab_size is "
                f"{vocabulary}: take the model's own tokenizer, or raise vocab_size in "
                "config.json"
            )
        # Several chat templates would be a folder of files; a model folder has none.
        several = isinstance(loaded.chat_template, dict)
        loaded.save_pretrained(directory, save_jinja_files=not several)


def _tokenizer_folder(name: str | None, model: Path | None) -> Path:
    folder = model if name is None else Path(name)
    if folder is None:
        raise CrossFLError("give a tokenizer: a directory, or 'bytes' for the byte-level one")
    if not (folder / "tokenizer_config.json").is_file():
        raise CrossFLError(f"{folder} has no tokenizer_config.json: name a tokenizer directory")
    return folder


def _vocabulary(config: Path) -> int | None:
    """Tokens that the model knows; an image classifier knows none."""
    from transformers import AutoConfig

    from crossfl.learning.models.loading import classifies_images

    values: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
    if classifies_images(AutoConfig.for_model(**values)):
        return None
    try:
        return int(values["vocab_size"])
    except (KeyError, TypeError, ValueError):
        raise CrossFLError(f"{config} has no vocab_size: it is not a language model") from None
