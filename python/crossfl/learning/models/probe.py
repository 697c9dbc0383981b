"""Asking a model two things that no configuration tells, with a few tokens.

Does a token see those behind it? Then the loss of the next token is no loss of a causal language
model. Do samples that are packed in one row see each other? Then packing would change what is
learnt. Each takes one forward pass without gradients, which changes no weight, no statistic and no
random number that is drawn later.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from crossfl.errors import CrossFLError
from crossfl.learning.ranks import Parallel
from crossfl.protocol.records import Training

LENGTH = 4
"""Tokens of a sample of the probe."""
SAME = torch.finfo(torch.float32).eps ** (2 / 3)
"""How far apart logits of one pass may be that follow from the same tokens: mostly not at all. In
tiny random models, which tell least, those that follow from others are 20 times as far apart."""


def check(model: nn.Module, parallel: Parallel, training: Training) -> None:
    """Ask a language model, as it is trained, whether it is what the record takes it for.

    Args:
        model: the model, as `parallel` has wrapped it.
        parallel: the ranks, all of which have to ask.
        training: the record; with `packing`, samples are to be kept apart in a row.

    Raises:
        CrossFLError: it is no causal language model, or samples in one row see each other.
    """
    network = parallel.unwrap(model)
    # Flash attention has no fp32, in which the answers are clearest.
    flash = training.attention == "flash_attention_2"
    with parallel.autocast() if flash else contextlib.nullcontext():
        check_causal(network)
        if training.packing:
            check_packing(network)
    if isinstance(network, FSDPModule):
        network.reshard()  # a pass without gradients leaves whole weights in their place


def check_causal(model: nn.Module) -> None:
    """Check that no token sees the ones behind it.

    Two samples differ in their last token alone: what the model says before it must be the same.

    Args:
        model: a language model, as it is trained.

    Raises:
        CrossFLError: it is not so, or the model cannot be run on a few tokens.
    """
    ids_BL = _samples(model)
    before = _logits(model, ids_BL)[:, :-1]
    if _apart(before[0], before[1]) > SAME:
        raise CrossFLError(
            f"{_name(model)} is not a causal language model: a token sees the ones behind it. "
            "Take one that predicts each token from those before it, such as GPT-2 or Llama; an "
            "encoder with a decoder's mask has is_decoder: true in config.json"
        )


def check_packing(model: nn.Module) -> None:
    """Check that samples in one row are to each other as if each had a row to itself.

    Args:
        model: a causal language model, as it is trained.

    Raises:
        CrossFLError: they see each other, or the model does not take positions.
    """
    ids_BL = _samples(model)
    alone_LV = _logits(model, ids_BL)[0]
    # One sample behind another, and behind the other one backwards.
    first_BL = torch.stack((ids_BL[1], ids_BL[1].flip(0)))
    rows_BL = torch.cat((first_BL, ids_BL[:1].expand(2, -1)), dim=1)
    positions_BL = torch.arange(LENGTH, device=rows_BL.device).repeat(2, 2)
    try:
        packed_BLV = _logits(model, rows_BL, position_ids=positions_BL)[:, LENGTH:]
    except CrossFLError:
        packed_BLV = None
    rounding = max(torch.finfo(p.dtype).eps for p in (alone_LV, *_floats(model))) ** (2 / 3)
    if (
        packed_BLV is None
        or _apart(packed_BLV[0], packed_BLV[1]) > SAME
        or _apart(packed_BLV[0], alone_LV) > rounding
    ):
        raise CrossFLError(
            f"training.packing: samples in one row see each other in {_name(model)}, which would "
            "change what is learnt: leave packing out"
        )


def _samples(model: nn.Module) -> Tensor:
    """Two samples that differ in their last token, without tokens of a special meaning [2, 4]."""
    config: Any = model.config
    special = {getattr(config, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos")}
    vocabulary = int(config.get_text_config().vocab_size)
    plain = [i for i in range(min(vocabulary, 32)) if i not in special][-LENGTH - 1 :]
    if len(plain) <= LENGTH:
        plain = [i % vocabulary for i in range(LENGTH + 1)]
    *shared, one, other = plain
    return torch.tensor([[*shared, one], [*shared, other]], device=next(model.parameters()).device)


def _logits(model: nn.Module, ids_BL: Tensor, **inputs: Tensor) -> Tensor:
    with _untouched(model):
        try:
            logits: Tensor = model(input_ids=ids_BL, use_cache=False, **inputs).logits
        except Exception as error:  # of any class: it comes from within a model
            raise CrossFLError(
                f"{_name(model)} cannot be run on {ids_BL.shape[-1]} tokens, and so not be "
                f"trained ({type(error).__name__}: {str(error)[:200]})"
            ) from None
    return logits


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Without gradients, dropout and compilation; afterwards all is as it was."""
    was_training = model.training
    device = next(model.parameters()).device
    accelerators = [] if device.type == "cpu" else [device]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(accelerators, device_type=device.type))
        if getattr(model, "_compiled_call_impl", None) is not None:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        model.eval()
        yield
    model.train(was_training)


def _apart(one: Tensor, other: Tensor) -> float:
    """The largest difference of logits, over the largest of them."""
    one, other = one.float(), other.float()
    return float((one - other).abs().max() / one.abs().max().clamp(min=1e-30))


def _floats(model: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in model.parameters() if p.is_floating_point())


def _name(model: nn.Module) -> str:
    base = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
    return type(base).__name__
