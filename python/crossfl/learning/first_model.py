"""The first global model, made with the model library: copied, drawn at random, or an adapter.

What is written is read back before anybody trains it. A library may drop a weight, round it, or
read a tokenizer as another one, and says nothing: what does not survive is refused by its name.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from crossfl.errors import CrossFLError
from crossfl.protocol.records import Lora
from crossfl.storage.checkpoint import Tensors, rewrite
from crossfl.storage.model_folder import ModelFolder
from crossfl.storage.model_settings import CONFIG, GENERATION
from crossfl.storage.weight_files import weights_digest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


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
        CrossFLError: the model or the tokenizer cannot be made, or is another one when it is read
            back.
    """
    if (model is None) == (config is None):
        raise CrossFLError("give either a model directory (--model) or a --config, not both")
    if model is not None:
        if not (model / CONFIG).is_file():
            raise CrossFLError(f"{model} has no {CONFIG}: it is not a Hugging Face model directory")
        ModelFolder.own(model)
    settings = _settings(model / CONFIG if model else config or Path())
    if lora is not None:
        _adapter(model, settings, lora, seed, directory)
    else:
        if model is not None:
            _copy_model(model, directory)
        else:
            _random_model(settings, seed, directory)
        _check_read_back(directory)
    from crossfl.learning.models.loading import classifies_images
    from crossfl.learning.models.tokenizers import save_tokenizer

    if not classifies_images(settings):
        save_tokenizer(tokenizer, model, settings, directory)


def _copy_model(model: Path, directory: Path) -> None:
    """Save the model anew, under the names and in the files that `save_pretrained` gives them.

    What a facility saves after training then has the same names, whatever those in `model` were.
    Every tensor keeps its dtype, and the model stops where it stopped before.
    """
    from crossfl.learning.models.loading import load_weights

    folder = ModelFolder.own(model)
    source = Tensors(list(folder.weights))
    network = load_weights(folder, _widest(source, model))
    # The class is transformers' own, whatever code the folder may have come with.
    network.config.__dict__.pop("auto_map", None)
    _save(network, directory)
    _restore_dtypes(source, model, directory)
    _check_values(source, network, model)
    (directory / GENERATION).unlink(missing_ok=True)
    if (model / GENERATION).is_file():
        shutil.copyfile(model / GENERATION, directory / GENERATION)


def _widest(source: Tensors, model: Path) -> torch.dtype:
    """A dtype that holds every number of the model: a library loads all tensors in one."""
    widest: torch.dtype | None = None
    for name, entry in source.floats().items():
        if entry.dtype.itemsize < 2:
            raise CrossFLError(
                f"{model}: {name!r} has the dtype {entry.dtype}: quantised weights are not "
                "trained; take the model in bf16, fp16 or fp32"
            )
        widest = torch.promote_types(widest or entry.dtype, entry.dtype)
    if widest is None:
        raise CrossFLError(f"{model} has no floating-point weights: there is nothing to train")
    return widest


def _restore_dtypes(source: Tensors, model: Path, directory: Path) -> None:
    """Give each tensor that was saved the dtype that it has in the source.

    Raises:
        CrossFLError: the source has several, and it cannot be said which tensor was saved as which.
    """
    floats = {name: entry.dtype for name, entry in source.floats().items()}
    only = next(iter(floats.values())) if len(set(floats.values())) == 1 else None
    saved = Tensors.of_model(directory)
    # An old checkpoint of the inner model lacks the prefix of the outer one.
    found = {n: floats.get(n) or floats.get(n.partition(".")[2]) or only for n in saved.floats()}
    dtypes = {name: dtype for name, dtype in found.items() if dtype is not None}
    if all(saved.floats()[name].dtype == dtype for name, dtype in found.items()):
        return
    if unknown := sorted(found.keys() - dtypes.keys()):
        raise CrossFLError(
            f"{model} has weights of several dtypes under old names, and {unknown[0]!r} may be any "
            "of them: load it with transformers and save it again, or in one dtype"
        )
    values = json.loads((model / CONFIG).read_text(encoding="utf-8"))
    named = values.get("dtype") or values.get("torch_dtype")
    rewrite(directory, dtypes, saved.buffers, named if isinstance(named, str) else None)


def _check_values(source: Tensors, network: "PreTrainedModel", model: Path) -> None:
    """Check that every tensor of the source that the network knows by name is in it as it was."""
    for name, tensor in network.state_dict().items():
        if name in source and not source[name].to(tensor.dtype).equal(tensor):
            raise CrossFLError(
                f"{model}: {name!r} is another tensor once it is loaded. If it is tied to another "
                "one by config.json (tie_word_embeddings), and differs from it, untie them there"
            )


def _random_model(settings: "PreTrainedConfig", seed: int, directory: Path) -> None:
    torch.manual_seed(seed)
    _save(_made(settings), directory)


def _made(settings: "PreTrainedConfig") -> "PreTrainedModel":
    """A model of a configuration.

    Raises:
        CrossFLError: it makes none.
    """
    from crossfl.learning.models.loading import kind_of

    kind = kind_of(settings)
    try:
        network: PreTrainedModel = kind.from_config(settings)
    except Exception as error:  # libraries raise whatever a configuration makes them
        raise CrossFLError(
            f"config.json makes no model of the type {settings.model_type!r}: {error}"
        ) from None
    return network


def _save(network: "PreTrainedModel", directory: Path) -> None:
    """Save a model, and in its files which of their tensors are buffers.

    The library is asked under which names it saves them, which need not be those in the model.
    """
    from crossfl.learning.models.loading import persistent_buffers

    network.save_pretrained(directory)
    if not (buffers := persistent_buffers(network)):
        return
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        network.save_pretrained(scratch, state_dict=buffers)
        names = set(Tensors(sorted(Path(scratch).glob("*.safetensors"))))
    if unknown := sorted(names - set(Tensors.of_model(directory))):
        raise CrossFLError(f"the buffer {unknown[0]!r} has another name once the model is saved")
    rewrite(directory, {}, names)


def _check_read_back(directory: Path) -> None:
    """Check that the model, loaded and saved again, is the same, and is a causal language model.

    Raises:
        CrossFLError: it is not; the message names what is lost.
    """
    from crossfl.learning.models import probe
    from crossfl.learning.models.loading import classifies_images, load_weights

    folder, saved = ModelFolder.own(directory), Tensors.of_model(directory)
    network = load_weights(folder, _widest(saved, directory))
    if not classifies_images(network.config):
        probe.check_causal(network)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        network.save_pretrained(scratch)
        again = Tensors(sorted(Path(scratch).glob("*.safetensors")))
        if changed := sorted(set(saved) ^ set(again)):
            raise CrossFLError(
                f"{type(network).__name__} does not survive being saved and loaded: {changed[0]!r} "
                f"(and {len(changed) - 1} more) is there only once"
            )
        for name in saved:
            if not saved[name].to(again[name].dtype).equal(again[name]):
                raise CrossFLError(
                    f"{type(network).__name__} does not survive being saved and loaded: "
                    f"{name!r} is another tensor afterwards"
                )


def _adapter(
    model: Path | None, settings: "PreTrainedConfig", lora: Lora, seed: int, directory: Path
) -> None:
    from crossfl.learning import lora as adapter
    from crossfl.learning.models.loading import classifies_images

    if classifies_images(settings):
        raise CrossFLError(
            f"lora: {settings.model_type!r} is an image classifier, and adapters are for language "
            "models: leave lora out"
        )
    if model is not None and lora.base_digest is None:
        lora = lora.replace(base_digest=weights_digest(model))
    if lora.base_digest is None:
        raise CrossFLError(
            "lora.base_digest is missing: run 'crossfl digest FOLDER' where the base model lies, "
            "or give the model itself (--model)"
        )
    with torch.device("meta"):
        base = _made(settings)
    weights = Tensors.of_model(model) if model is not None else None
    adapter.create(base, lora, seed, directory, weights)


def _settings(config: Path) -> "PreTrainedConfig":
    """The configuration in a `config.json`.

    Raises:
        CrossFLError: it is missing, or describes nothing that is trained here.
    """
    from transformers import AutoConfig

    from crossfl.learning.models.loading import kind_of  # it makes known the configurations of ours

    try:
        values = json.loads(config.read_text(encoding="utf-8"))
        settings: PreTrainedConfig = AutoConfig.for_model(**values)
    except Exception as error:  # libraries raise whatever a configuration makes them
        raise CrossFLError(
            f"{config} describes neither a causal language model nor an image classifier: {error}"
        ) from None
    try:
        kind_of(settings)
    except CrossFLError as error:
        raise CrossFLError(f"{config}: {error}") from None
    return settings
