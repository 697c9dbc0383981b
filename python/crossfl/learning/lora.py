"""LoRA: the global model is an adapter, and its base stays where it is, at every facility.

Hu et al. 2021, https://arxiv.org/abs/2106.09685. The directory of such a model is one that peft
loads (`adapter_config.json`, `adapter_model.safetensors`), with the record and the identity of the
base in `lora.json`. Bases lie under `CROSSFL_MODELS` at each facility and never travel; one whose
weights are not those the federation began with is refused.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from crossfl.errors import CrossFLError
from crossfl.facility import place
from crossfl.learning.ranks import norm
from crossfl.protocol import variables
from crossfl.protocol.records import Lora
from crossfl.storage import checkpoint
from crossfl.storage.files import write_json
from crossfl.storage.model_folder import ModelFolder
from crossfl.storage.model_settings import LORA
from crossfl.storage.weight_files import ADAPTER, weights_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = LORA
MARK = ".lora_"
"""In the names of all that is the adapter's."""
DRAWN = (".lora_A.", ".lora_embedding_B")
"""In the names of the factors that are drawn; the other factor of each begins as zero. Of an
embedding it is B, as in peft. Where `factors` is `b`, these do not learn."""


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


def create(base: "PreTrainedModel", lora: Lora, seed: int, directory: Path) -> None:
    """Write an adapter that changes nothing yet: one factor of each pair at random, the other zero.

    Args:
        base: a language model as its configuration describes it; its weights are not needed.
        lora: the adapter.
        seed: seed of what is drawn.
        directory: where to write.

    Raises:
        CrossFLError: the base has no such modules.
    """
    peft = _peft()
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules) or "all-linear",
        task_type="CAUSAL_LM",
        base_model_name_or_path=lora.base_model,
        inference_mode=True,
    )
    base.name_or_path = lora.base_model  # or peft would take the name away
    with torch.device("meta"):
        try:
            network = peft.get_peft_model(base, settings)
        except Exception as error:  # peft raises whatever a layer makes it
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CrossFLError(f"lora.target_modules: {reason}") from None
    if whole := sorted(settings.target_parameters or ()):
        raise CrossFLError(
            f"lora.target_modules: the experts of a {base.config.model_type!r} are not adapted "
            f"({', '.join(whole)}): name other layers, such as q_proj and v_proj"
        )
    settings.save_pretrained(directory)
    generator = torch.Generator().manual_seed(seed)
    start = {}
    for name, tensor in sorted(_own(network).items()):
        start[name] = torch.zeros(tensor.shape)
        if not _is_drawn(name):
            continue
        if DRAWN[0] in name:
            bound = 1 / math.sqrt(tensor[0].numel())  # as peft's own, Kaiming with a = √5
            start[name].uniform_(-bound, bound, generator=generator)
        else:
            start[name].normal_(generator=generator)
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
            if _is_drawn(name):
                parameter.requires_grad_(False)
    return cast("PreTrainedModel", network)


def check_gradients(parameters: Mapping[str, nn.Parameter]) -> None:
    """Check, after a backward pass, that adapters of every kind of layer got a gradient.

    Of layers that share a name, as the experts of a mixture do, one is enough.

    Args:
        parameters: those that learn, by name; every rank has to ask.

    Raises:
        CrossFLError: a kind of layer got none, so its adapters would never learn.
    """
    kinds: dict[str, list[Tensor]] = {}
    for name, parameter in parameters.items():
        if MARK in name:
            gradients = kinds.setdefault(name.split(MARK)[0].rpartition(".")[2], [])
            if parameter.grad is not None:
                gradients.append(parameter.grad)
    for kind, gradients in kinds.items():
        if not gradients or not norm(gradients):
            raise CrossFLError(
                f"lora.target_modules: the adapters on {kind!r} get no gradient, and would never "
                "learn: the model does not use these layers in training. Leave them out"
            )


def save(network: nn.Module, state: dict[str, Tensor] | None, directory: Path) -> bool:
    """Write the weights of the adapter; False, and nothing, where the model is no adapter."""
    if not hasattr(network, "peft_config"):
        return False
    _write(_own(network, state), directory)
    return True


def _is_drawn(name: str) -> bool:
    return any(part in name for part in DRAWN)


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
