"""The first model: whatever names and files a checkpoint has, training gives them back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    ByT5Tokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from crossfl.errors import CrossFLError
from crossfl.protocol.manifest import ModelManifest
from crossfl.protocol.records import Aggregation, Facility, Training
from crossfl.server import state as server_state
from crossfl.server.planning.fixed import plan
from crossfl.server.rounds import aggregate
from crossfl.steps.initialise import initialise
from crossfl.steps.train import train
from crossfl.storage import manifest
from crossfl.storage.checkpoint import Tensors, slots
from crossfl.storage.delta import file_name as delta_of
from crossfl.storage.weight_files import weight_files
from tests.support.paths import ROUND

TRAINING = Training(batch_size=4, sequence_length=48, threads=1)
LEONARDO = Facility(name="leonardo", dataset="words")


def _llama(**changes: Any) -> LlamaForCausalLM:
    sizes: dict[str, Any] = {"vocab_size": 384, "hidden_size": 8, "intermediate_size": 16}
    heads: dict[str, Any] = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **changes))


def _gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=384, n_positions=64, n_embd=8, n_layer=2, n_head=2)
    )


def _without_prefix(folder: Path) -> None:
    weights = Tensors.of_model(folder)
    bare = {name.removeprefix("transformer."): weights[name] for name in weights}
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})


MODELS = {
    "untied": (lambda: _llama(), {}, None),
    "tied": (lambda: _llama(tie_word_embeddings=True), {}, None),
    "in bf16": (lambda: _llama().bfloat16(), {}, None),
    "sharded": (lambda: _llama(), {"max_shard_size": "10KB"}, None),
    "gpt2": (_gpt2, {}, None),
    "gpt2 without prefix": (_gpt2, {}, _without_prefix),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_round_with_any_checkpoint(case: str, tmp_path: Path) -> None:
    make, saving, change = MODELS[case]
    torch.manual_seed(0)
    source = tmp_path / "source"
    make().save_pretrained(source, **saving)
    ByT5Tokenizer().save_pretrained(source)
    if change is not None:
        change(source)
    initialise(source, None, None, 0, 1, Aggregation(), tmp_path / "0")
    server = server_state.load(tmp_path / "0" / "state")
    (task,) = plan(server, [LEONARDO], 1, TRAINING, "train").tasks
    model, state = tmp_path / "0" / "global_model", tmp_path / "0" / "state"
    train(model, task, TRAINING, tmp_path / "l")
    aggregate(model, state, [tmp_path / "l" / "update"], tmp_path / "1", server.started)
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        for folder in (source, tmp_path / "1" / "global_model")
    )
    assert after.dtype == before.dtype
    moved = [
        not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)
    ]
    assert any(moved)


@pytest.mark.parametrize("saving", [{}, {"max_shard_size": "10KB"}])
def test_a_model_in_fp32_travels_in_bf16(saving: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    _llama().save_pretrained(tmp_path / "source", **saving)
    original = Tensors.of_model(tmp_path / "source")
    initialise(
        tmp_path / "source", None, "bytes", 0, 1, Aggregation(model_dtype="bf16"), tmp_path / "0"
    )
    model, state = tmp_path / "0" / "global_model", tmp_path / "0" / "state"
    sent, kept = Tensors.of_model(model), slots(state)["master"]
    size = sum(path.stat().st_size for path in weight_files(model))
    assert size < 0.6 * sum(p.stat().st_size for p in weight_files(tmp_path / "source"))
    for name in original:
        assert kept[name].equal(original[name])
        assert sent[name].equal(original[name].bfloat16())
    server = server_state.load(state)
    (task,) = plan(server, [LEONARDO], 1, TRAINING, "train").tasks
    train(model, task, TRAINING, tmp_path / "l")
    aggregate(model, state, [tmp_path / "l" / "update"], tmp_path / "1", server.started)
    delta = Tensors([tmp_path / "l/update" / delta_of(p.name) for p in model.glob("model*s")])
    after = slots(tmp_path / "1" / "state")["master"]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "1" / "global_model", dtype="auto")
    assert found.dtype == torch.bfloat16
    for name in original:
        torch.testing.assert_close(after[name], original[name] + delta[name])
        assert found.state_dict()[name].equal(after[name].bfloat16())


def test_a_model_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    _llama().save_pretrained(source)
    weights = Tensors.of_model(source)
    rest = {name: weights[name] for name in weights if name != "lm_head.weight"}
    save_file(rest, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CrossFLError, match=r"lacks lm_head\.weight"):
        initialise(source, None, "bytes", 0, 1, Aggregation(), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_pickled_weights_are_not_read_even_under_a_manifest(round_: Path) -> None:
    from crossfl.learning.models.loading import load

    model = round_ / "global_model"
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")
    manifest.write(model, ModelManifest(round=0))
    with pytest.raises(CrossFLError, match=r"'pytorch_model\.bin' .* a model folder may hold"):
        load(model, TRAINING)


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(_llama().config.to_dict()))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        initialise(None, config, "bytes", seed, 1, Aggregation(), tmp_path / name)
    a, b, c = (
        manifest.read(tmp_path / name / "global_model", ModelManifest).files["model.safetensors"]
        for name in "abc"
    )
    assert a == b != c


def test_a_sample_longer_than_the_model_is_refused_by_name() -> None:
    from crossfl.learning.models.loading import load

    with pytest.raises(CrossFLError, match="takes at most 64 tokens"):
        load(ROUND / "global_model", Training(sequence_length=65))
