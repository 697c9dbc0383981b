"""However a batch is spread over ranks, micro-batches and rows, it is the same batch."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer, set_seed

from crossfl.facility.time_budget import StopSignal
from crossfl.learning.batching import batch_of, pack
from crossfl.learning.datasets import Encoded, encode, read
from crossfl.learning.evaluation import summed_loss
from crossfl.learning.telemetry.noise import GradientNoise
from crossfl.learning.training import KEPT, Trainer, TrainingResult
from crossfl.observe.events import Progress
from crossfl.protocol import variables
from crossfl.protocol.records import Task, Training
from crossfl.steps.train import train
from tests.support.paths import DATA, ROUND
from tests.support.processes import Run, flags, losses, train_there

TRAINING = Training(
    batch_size=8, sequence_length=48, learning_rate=0.01, threads=1, schedule="cosine"
)
STEPS = 50


def _trained(task: Task, **changes: Any) -> TrainingResult:
    """One process, here."""
    training = TRAINING.replace(**changes)
    trainer = Trainer(ROUND / "global_model", DATA / "leonardo" / "words", task, training)
    with Progress() as progress:
        return trainer.train(progress, StopSignal())


def _on_two_ranks(run: Run, task: Task, **changes: Any) -> dict[str, Any]:
    """Two ranks with gloo, started by torchrun."""
    torchrun = (Path(sys.executable).with_name("torchrun"), "--nproc-per-node=2")
    training = TRAINING.replace(**changes)
    return losses(run, task, training, torchrun, OMP_NUM_THREADS="1")


@pytest.fixture
def long(task: Task) -> Task:
    return task.replace(local_steps=STEPS, schedule_steps=2 * STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch": 3},
        {"packing": True},
        {"packing": True, "micro_batch": 1},
        {"activation_checkpointing": True},
        {"attention": "eager"},
    ],
    ids=str,
)
def test_one_process(long: Task, changes: dict[str, Any]) -> None:
    found = _trained(long, **changes)
    expected = _trained(long)
    assert found.tokens == expected.tokens
    assert found.losses == pytest.approx(expected.losses, rel=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sharding": "fsdp", "packing": True, "micro_batch": 1},
    ],
    ids=str,
)
def test_two_ranks(long: Task, run: Run, changes: dict[str, Any]) -> None:
    found, expected = _on_two_ranks(run, long, **changes), _trained(long)
    assert len(found["losses"]) == STEPS
    assert found["losses"] == pytest.approx(expected.losses, rel=2e-4)
    assert expected.losses[-1] < 0.8 * expected.losses[0]


@pytest.mark.slow
def test_sharded_ranks_deliver_and_go_on(
    task: Task, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deltas and the kept optimizer of ranks that hold shards are those of one process."""
    torchrun = f"{Path(sys.executable).with_name('torchrun')} --nproc-per-node=2"
    training = TRAINING.replace(
        batch_size=4, sharding="fsdp", local_optimizer="keep", checkpoint_steps=2
    )
    model, places = ROUND / "global_model", {n: tmp_path / n for n in ("one", "two")}
    monkeypatch.setenv(variables.STATE, str(places["one"] / "state"))
    for number, seen in ((1, 0), (2, 12)):
        asked = task.replace(round=number, samples_seen=seen, counted=number - 1, local_steps=3,
            schedule_steps=8,
        )  # fmt: skip
        train(model, asked, training, places["one"] / str(number))
        there = {variables.LAUNCHER: torchrun, variables.STATE: str(places["two"] / "state")}
        train_there(run, asked, training, places["two"] / str(number), **there)
    paths = ("1/update/delta.safetensors", "2/update/delta.safetensors")
    for path in (*paths, f"state/leonardo/optimizer-{task.data_seed}/{task.federation}-2/{KEPT}"):
        one, two = (load_file(places[name] / path) for name in ("one", "two"))
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)


KINDS = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 32},
    "mistral": {"num_key_value_heads": 2, "intermediate_size": 32, "sliding_window": 24},
    "qwen3": {"num_key_value_heads": 2, "intermediate_size": 32, "head_dim": 8},
    "gpt2": {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0},
}  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_samples_do_not_see_each_other(kind: str, attention: str) -> None:
    """Loss and gradient are those of the samples one by one; without positions they are not."""
    set_seed(0)
    common = {
        "vocab_size": 384,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    }
    settings = AutoConfig.for_model(kind, **common, **KINDS[kind])
    model = AutoModelForCausalLM.from_config(settings, attn_implementation=attention)
    tokenizer, cpu = ByT5Tokenizer(), torch.device("cpu")
    samples = [encode(s, tokenizer, 48) for s in read(DATA / "leonardo" / "words", "train")]
    rows = pack(samples, 96)
    assert max(len(row) for row in rows) > 1
    packed = batch_of(rows, cpu)
    loss = summed_loss(model, packed)
    loss.backward()
    gradient = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    total = torch.zeros(())
    for sample in samples:
        one = batch_of([[sample]], cpu)
        each = summed_loss(model, one)
        each.backward()
        total += each.detach()
    assert packed.tokens == sum(batch_of([[s]], cpu).tokens for s in samples)
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    for found, parameter in zip(gradient, model.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=1e-4)
    blind = summed_loss(model, dataclasses.replace(packed, positions=None))
    assert blind.item() != pytest.approx(total.item(), rel=1e-4)


@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=30), room=st.integers(20, 50))
def test_rows_hold_every_sample_once(lengths: list[int], room: int) -> None:
    samples = [Encoded([i] * n, [i] * n) for i, n in enumerate(lengths)]
    rows = pack(samples, room)
    assert sorted(s.ids[0] for row in rows for s in row) == list(range(len(lengths)))
    assert all(sum(len(s.ids) for s in row) <= room for row in rows)
    assert len(rows) <= 2 * sum(lengths) // room + 1


def test_dropout_follows_from_the_step(long: Task, tmp_path: Path) -> None:
    """Random numbers are the same whatever was drawn before, and others in another round."""
    task = long.replace(local_steps=3)
    first = _trained(task).losses
    torch.manual_seed(123)
    assert _trained(task).losses == first


def test_the_noise_scale_is_that_of_the_noise() -> None:
    """Gradients drawn around a known mean with a known variance give back their ratio."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.full((50,), 0.2, dtype=torch.float64)
    noise = GradientNoise()
    assert noise.scale() is None
    for _ in range(300):
        tokens = mean + 2 * torch.randn(64, 50, dtype=torch.float64, generator=generator)
        small, large = tokens[:16].mean(0).norm().item(), tokens.mean(0).norm().item()
        noise.add(16, small, 64, large)
    assert noise.scale() == pytest.approx(50 * 4 / (50 * 0.04), rel=0.1)


def test_the_noise_scale_is_reported(long: Task) -> None:
    few = long.replace(local_steps=20)
    assert _trained(few).noise.steps == 0
    noise = _trained(few, micro_batch=2).noise
    assert noise.steps == 20
    assert noise.noise > 0


@pytest.mark.slow
def test_a_model_can_be_compiled(long: Task) -> None:
    """The option reaches torch.compile; where no compiler is at hand, eager stands in for it."""
    few = long.replace(local_steps=2)
    with torch.compiler.set_stance("force_eager"):
        found = _trained(few, compile=True)
    assert found.losses == _trained(few).losses


@pytest.mark.slow
def test_the_record_decides_and_no_variable_of_accelerate(task: Task, tmp_path: Path) -> None:
    """A user's environment may say how accelerate is to train, for other programs."""
    training = Training(batch_size=4, sequence_length=48, threads=1)
    train(ROUND / "global_model", task, training, tmp_path / "here")
    command = [sys.executable, "-m", "crossfl", "train", "--outdir", str(tmp_path / "there")]
    said = {
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_DYNAMO_BACKEND": "EAGER",
    }
    subprocess.run(
        [*command, "--global-model", str(ROUND / "global_model"), *flags(task, training)],
        env={**os.environ, **said},
        check=True,
    )
    deltas = [tmp_path / n / "update" / "delta.safetensors" for n in ("here", "there")]
    assert deltas[0].read_bytes() == deltas[1].read_bytes()
