"""What training costs, against arithmetic by hand and a counter of our own."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from crossfl.learning.telemetry import accounting
from crossfl.protocol.manifest import UpdateManifest
from crossfl.protocol.records import Task, Training
from crossfl.steps.train import train
from crossfl.storage import manifest
from tests.support.paths import ROUND


def test_operations_of_a_llama() -> None:
    """Against torch's own count of a forward and backward pass, whose attention is not causal."""
    from torch.utils.flop_counter import FlopCounterMode

    config = AutoConfig.for_model(
        "llama", vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids = torch.randint(0, 96, (3, 40))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    found = accounting.operations(model, 40)
    assert found is not None
    assert found * ids.numel() == pytest.approx(counter.get_total_flops(), rel=0.03)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    frozen = accounting.operations(model, 40)
    assert frozen is not None
    weights = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2) - 96 * 32
    assert found - frozen == 2 * weights


def test_energy_is_what_the_counters_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder like that of the kernel, whose count begins anew in between."""
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text("9000000")
        (tmp_path / name / "max_energy_range_uj").write_text("10000000")
    monkeypatch.setattr(accounting, "POWERCAP", tmp_path)
    energy = accounting.Energy(torch.device("cpu"))
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("9500000")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("1000000")
    assert energy.joules() == {"cpu": pytest.approx(0.5 + 2.0)}
    monkeypatch.setattr(accounting, "POWERCAP", tmp_path / "nowhere")
    assert accounting.Energy(torch.device("cpu")).joules() == {}


def test_the_manifest_has_the_account(task: Task, tmp_path: Path) -> None:
    training = Training(batch_size=4, sequence_length=48, threads=1, micro_batch=2)
    train(ROUND / "global_model", task, training, tmp_path)
    cost = manifest.verify(tmp_path / "update", UpdateManifest).metrics.training
    assert cost is not None
    assert cost.tokens_read > 0
    assert cost.peak_memory > 1e8
    assert (cost.ranks, cost.bad_samples, cost.flops_utilisation) == (1, 0, None)
