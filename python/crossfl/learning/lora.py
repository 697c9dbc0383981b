"""Adapters: the global model is one, and its base stays where it is, at every facility.

LoRA is that of Hu et al. 2021, https://arxiv.org/abs/2106.09685; prompt tuning that of Lester et
al. 2021, https://arxiv.org/abs/2104.08691. The directory of such a model is one that peft
loads (`adapter_config.json`, `adapter_model.safetensors`), with the record and the identity of the
base in `lora.json`. Bases lie under `CROSSFL_MODELS` at each facility and never travel; one whose
weights are not those the federation began with is refused.
"""

import json
import math
from collections.abc import Collection, Mapping
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
from crossfl.storage.checkpoint import Tensors
from crossfl.storage.files import write_json
from crossfl.storage.model_folder import ModelFolder
from crossfl.storage.model_settings import LORA
from crossfl.storage.tensorfile import metadata_of
from crossfl.storage.weight_files import ADAPTER, weights_digest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE = LORA
MARK = ".lora_"
"""In the names of the matrices of an adapter."""
PROMPT = "prompt_embeddings"
"""The name of the tokens of a prompt in the file of an adapter."""
PREFIX = "base_model.model."
"""Before the names of the base's layers in that file."""
OWN = (MARK, ".modules_to_save.", "prompt_encoder.")
"""In the names of all that is the adapter's, in the network that peft makes."""
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


def create(
    base: "PreTrainedModel", lora: Lora, seed: int, directory: Path, weights: Tensors | None = None
) -> None:
    """Write an adapter as it is before it learns.

    LoRA changes nothing yet: one factor of each pair is drawn at random, the other is zero, and
    layers that learn whole are those of the base. The tokens of a prompt are drawn as the base's
    own embeddings once were.

    Args:
        base: a language model as its configuration describes it; its weights are not needed.
        lora: the adapter.
        seed: seed of what is drawn.
        directory: where to write.
        weights: those of the base, needed where layers learn whole.

    Raises:
        CrossFLError: the base has no such modules, or their weights are needed and not given.
    """
    settings = _settings(lora)
    base.name_or_path = lora.base_model  # or peft would take the name away
    field = "target_modules" if lora.virtual_tokens is None else "virtual_tokens"
    with torch.device("meta"):
        try:
            network = _peft().get_peft_model(base, settings)
        except Exception as error:  # peft raises whatever a layer makes it
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CrossFLError(f"lora.{field}: {reason}") from None
    if whole := sorted(getattr(settings, "target_parameters", None) or ()):
        raise CrossFLError(
            f"lora.target_modules: the experts of a {base.config.model_type!r} are not adapted "
            f"({', '.join(whole)}): name other layers, such as q_proj and v_proj"
        )
    settings.save_pretrained(directory)
    generator = torch.Generator().manual_seed(seed)
    start = {}
    for name, tensor in sorted(_own(network).items()):
        start[name] = torch.zeros(tensor.shape)
        if name == PROMPT:
            spread = float(getattr(base.config, "initializer_range", None) or 0.02)
            start[name].normal_(std=spread, generator=generator)
        elif MARK not in name:
            start[name] = _of_base(name, weights)
        elif DRAWN[0] in name:
            bound = 1 / math.sqrt(tensor[0].numel())  # as peft's own, Kaiming with a = √5
            start[name].uniform_(-bound, bound, generator=generator)
        elif _is_drawn(name):
            start[name].normal_(generator=generator)
    frozen = [name for name in start if lora.factors == "b" and _is_drawn(name)]
    _write(start, directory, frozen)
    write_json(directory / FILE, lora.asdict())


def _settings(lora: Lora) -> Any:
    """What peft is told of an adapter."""
    peft = _peft()
    common = {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lora.base_model,
        "inference_mode": True,
    }
    if lora.virtual_tokens is not None:
        return peft.PromptTuningConfig(num_virtual_tokens=lora.virtual_tokens, **common)
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules) or "all-linear",
        rank_pattern=lora.ranks(),
        modules_to_save=list(lora.modules_to_save) or None,
        **common,
    )


def _of_base(name: str, weights: Tensors | None) -> Tensor:
    """The weights of a layer of the base that learns whole, fp32."""
    if weights is None:
        raise CrossFLError(
            "lora.modules_to_save needs the weights of the base where the federation begins: give "
            "the model itself (--model), not its configuration alone"
        )
    own = name.removeprefix(PREFIX)
    if own not in weights:
        raise CrossFLError(
            f"lora.modules_to_save: the base has no {own!r} of its own (tied weights are those of "
            "the embedding): name another layer"
        )
    return weights[own].float()


def load(base: "PreTrainedModel", directory: Path) -> "PreTrainedModel":
    """The base with the adapter of a directory on it; what does not learn is frozen.

    Raises:
        CrossFLError: the adapter is not one of this base.
    """
    peft = _peft()
    lora = Lora.parse(json.loads((directory / FILE).read_text(encoding="utf-8")))
    try:
        with ModelFolder.received(directory, only=()).view() as view:
            # peft loads prompts to be used, and not to learn on.
            learns = lora.virtual_tokens is None
            network = peft.PeftModel.from_pretrained(base, str(view), is_trainable=learns)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CrossFLError(f"the adapter in {directory} cannot be loaded: {error}") from None
    expected = {name: tuple(tensor.shape) for name, tensor in _own(network).items()}
    saved = checkpoint.Tensors.of_model(directory)
    if expected != {name: tuple(entry.shape) for name, entry in saved.floats().items()}:
        raise CrossFLError(f"the adapter in {directory} is not one of the base {lora.base_model}")
    if not learns:
        network.active_peft_config.inference_mode = False
        network.prompt_encoder.requires_grad_(True)
    _learn_in_fp32(network, saved)
    if lora.factors == "b":
        for name, parameter in network.named_parameters():
            if _is_drawn(name):
                parameter.requires_grad_(False)
    return cast("PreTrainedModel", network)


def _learn_in_fp32(network: nn.Module, saved: checkpoint.Tensors) -> None:
    """Give what learns all of its digits, where the base was loaded with fewer."""
    narrow = [p for p in network.parameters() if p.requires_grad and p.dtype != torch.float32]
    for parameter in narrow:
        parameter.data = parameter.data.float()
    if narrow:
        _peft().set_peft_model_state_dict(network, {name: saved[name].clone() for name in saved})


def is_own(name: str) -> bool:
    """Whether a parameter of an adapted network is the adapter's, by its name."""
    return any(part in name for part in OWN)


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


def _write(tensors: dict[str, Tensor], directory: Path, frozen: Collection[str] = ()) -> None:
    from safetensors.torch import save_file

    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, directory / ADAPTER, metadata_of((), frozen))


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise CrossFLError("LoRA needs peft: pip install 'crossfl[lora]'") from None
    return peft
