"""LoRA: the global model is an adapter, and its base stays where it is, at every facility.

Hu et al. 2021, https://arxiv.org/abs/2106.09685. The directory of such a model is one that peft
loads (`adapter_config.json`, `adapter_model.safetensors`), with the record and the identity of the
base in `lora.json`. Bases lie under `CROSSFL_MODELS` at each facility and never travel; one whose
weights are not those the federation began with is refused.
"""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from crossfl.errors import CrossFLError
from crossfl.facility import place
from crossfl.protocol import variables
from crossfl.protocol.records import Lora
from crossfl.storage import checkpoint
from crossfl.storage.files import write_json
from crossfl.storage.model_folder import ModelFolder
from crossfl.storage.model_settings import LORA
from crossfl.storage.weight_files import ADAPTER, weights_digest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

FILE = LORA
MARK = ".lora_"
"""In the names of all that is the adapter's."""
FROZEN = ".lora_A."
"""In the names of the factors that do not learn where `factors` is `b`."""


def is_adapter(directory: Path) -> bool:
    """Whether a model directory holds an adapter."""
    return (directory / FILE).is_file()


def base_of(directory: Path) -> Path:
    """The base model of an adapter on this machine, after its weights were checked.

    Raises:
        CrossFLError: it is not there, or it is another one.
    """
    lora = Lora.parse(json.loads((directory / FILE).read_text(encoding="utf-8")))
    folder = place.resolve(lora.base_model, place.model_root(), variables.MODELS)
    if (actual := weights_digest(folder)) != lora.base_digest:
        raise CrossFLError(
            f"the base model {folder} has the digest {actual}, and the adapter is of "
            f"{lora.base_digest}: place the same files at every facility"
        )
    return folder


def create(config: "PreTrainedConfig", lora: Lora, seed: int, directory: Path) -> None:
    """Write an adapter that changes nothing yet: A at random from the seed, B zero.

    The base itself is not needed, only its configuration.

    Raises:
        CrossFLError: the base has no such modules.
    """
    peft = _peft()
    from transformers import AutoModelForCausalLM

    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules) or "all-linear",
        task_type="CAUSAL_LM",
        base_model_name_or_path=lora.base_model,
        inference_mode=True,
    )
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        base.name_or_path = lora.base_model  # or peft would take the name away
        try:
            network = peft.get_peft_model(base, settings)
        except ValueError as error:
            raise CrossFLError(f"lora.target_modules: {str(error).splitlines()[0]}") from None
    settings.save_pretrained(directory)
    generator = torch.Generator().manual_seed(seed)
    start = {}
    for name, tensor in sorted(_own(network).items()):
        start[name] = torch.zeros(tensor.shape)
        if FROZEN in name:
            bound = 1 / math.sqrt(tensor.shape[1])  # as peft's own, Kaiming with a = √5
            start[name].uniform_(-bound, bound, generator=generator)
    _write(start, directory)
    write_json(directory / FILE, lora.asdict())


def load(base: "PreTrainedModel", directory: Path) -> "PreTrainedModel":
    """The base with the adapter of a directory on it; what does not learn is frozen.

    Raises:
        CrossFLError: the adapter is not one of this base.
    """
    peft = _peft()
    lora = Lora.parse(json.loads((directory / FILE).read_text(encoding="utf-8")))
    try:
        with ModelFolder.received(directory, only=()).view() as view:
            network = peft.PeftModel.from_pretrained(base, str(view), is_trainable=True)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CrossFLError(f"the adapter in {directory} cannot be loaded: {error}") from None
    expected = {name: tuple(tensor.shape) for name, tensor in _own(network).items()}
    saved = checkpoint.Tensors.of_model(directory)
    if expected != {name: tuple(entry.shape) for name, entry in saved.floats().items()}:
        raise CrossFLError(f"the adapter in {directory} is not one of the base {lora.base_model}")
    if lora.factors == "b":
        for name, parameter in network.named_parameters():
            if FROZEN in name:
                parameter.requires_grad_(False)
    return cast("PreTrainedModel", network)


def save(network: nn.Module, state: dict[str, Tensor] | None, directory: Path) -> bool:
    """Write the weights of the adapter; False, and nothing, where the model is no adapter."""
    if not hasattr(network, "peft_config"):
        return False
    _write(_own(network, state), directory)
    return True


def _own(network: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapter's tensors by the names of its file."""
    tensors: dict[str, Tensor] = _peft().get_peft_model_state_dict(
        network, state_dict=state, save_embedding_layers=False
    )
    return tensors


def _write(tensors: dict[str, Tensor], directory: Path) -> None:
    from safetensors.torch import save_file

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, directory / ADAPTER, {"format": "pt"})


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise CrossFLError("LoRA needs peft: pip install 'crossfl[lora]'") from None
    return peft
