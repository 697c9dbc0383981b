"""What a model is asked before it is trained, and what becomes of architectures when it answers."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from crossfl.errors import CrossFLError
from crossfl.learning.models import probe
from crossfl.learning.models.loading import kind_of
from tests.support.paths import ROOT


def _benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("models", ROOT / "benchmarks" / "models.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BENCHMARK = _benchmark()
ENCODERS = ("bert", "roberta", "xlnet", "electra")
PACKED = ("gpt2", "gpt_neox", "llama", "qwen3_moe", "gemma2")
SEEN = ("bloom", "opt", "falcon", "mamba", "bert as a decoder")
"""Architectures whose samples see each other in a row."""


def _network(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    config = AutoConfig.for_model(**{"model_type": kind, **BENCHMARK.LANGUAGE[kind]})
    torch.manual_seed(0)
    network: nn.Module = kind_of(config).from_config(config)
    return network.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", [*ENCODERS, *PACKED, *SEEN])
def test_the_verdict_on_an_architecture(kind: str, dtype: torch.dtype) -> None:
    network = _network(kind, dtype)
    if kind in ENCODERS:
        with pytest.raises(CrossFLError, match="is not a causal language model: a token sees"):
            probe.check_causal(network)
        return
    probe.check_causal(network)
    if kind in PACKED:
        probe.check_packing(network)
    else:
        with pytest.raises(CrossFLError, match="samples in one row see each other"):
            probe.check_packing(network)


class _Peeking(nn.Module):
    """A Llama that looks one token ahead, by as little as its arithmetic can show."""

    def __init__(self, network: nn.Module, share: float) -> None:
        super().__init__()
        self.network, self.config, self._share = network, network.config, share

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        out = self.network(input_ids=input_ids, **inputs)
        ahead = out.logits.roll(-1, dims=1)
        ahead[:, -1] = 0
        out.logits = out.logits + self._share * ahead
        return out


def test_a_glance_ahead_is_enough() -> None:
    network = _network("llama").eval()
    probe.check_causal(_Peeking(network, 0.0))
    with pytest.raises(CrossFLError, match=r"_Peeking is not a causal"):
        probe.check_causal(_Peeking(network, 1e-3))


def test_nothing_is_changed_by_asking() -> None:
    """Neither a random number, nor a weight, nor whether there is dropout."""
    network = _network("gpt2").train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    probe.check_causal(network)
    probe.check_packing(network)
    assert torch.rand(3).equal(expected)
    assert all(module.training for module in network.modules())
    assert all(tensor.equal(before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_model_that_does_not_run_is_refused() -> None:
    network: Any = _network("llama")
    network.model.layers[0].self_attn.q_proj = nn.Linear(3, 3)
    with pytest.raises(CrossFLError, match=r"LlamaForCausalLM cannot be run on 4 tokens"):
        probe.check_causal(network)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bloom", "roberta", "gemma3", "t5", "qwen2", "resnet"])
def test_an_architecture_trains_or_is_refused_as_the_page_says(kind: str, tmp_path: Path) -> None:
    """Through initialise, train and aggregate; `docs/models.md` has what the script found."""
    page = (ROOT / "docs" / "models.md").read_text("utf-8")
    (line,) = (line for line in page.splitlines() if line.startswith(f"| `{kind}` |"))
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    found = dict(BENCHMARK.verdicts(kind, tmp_path))
    for arm, cell in zip(BENCHMARK.ARMS, cells, strict=True):
        verdict = found.get(arm)
        assert cell.split(" ")[0] == ("–" if verdict is None else str(verdict).split(":")[0])
        if verdict and not verdict.trains:
            number = cell.split("(")[1].rstrip(")")
            assert f"\n{number}. {verdict.reason}\n" in page
