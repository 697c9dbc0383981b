"""What is written is read back: nothing of a model is lost on the way into a federation."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from crossfl.errors import CrossFLError
from crossfl.learning.datasets import Text, encode, encode_prompt
from crossfl.learning.models.tokenizers import PROBES, SPECIAL, byte_tokenizer
from crossfl.protocol.records import Aggregation
from crossfl.steps.initialise import initialise
from crossfl.storage.checkpoint import Tensors
from crossfl.storage.model_settings import GENERATION

SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def _source(tmp_path: Path, **changes: Any) -> Path:
    """A model folder of a Llama with a tokenizer of bytes."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, **changes)).save_pretrained(tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def _edit(source: Path, change: Any) -> None:
    weights = load_file(source / "model.safetensors")
    change(weights)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})


def _initialise(source: Path, tmp_path: Path, tokenizer: str | None = None) -> Path:
    initialise(source, None, tokenizer, 0, 1, Aggregation(), tmp_path / "out")
    return tmp_path / "out" / "global_model"


def _norms_in_fp32(weights: dict[str, torch.Tensor]) -> None:
    for name, tensor in weights.items():
        weights[name] = (tensor + 1 / 3) if "norm" in name else tensor.bfloat16()


def test_every_tensor_keeps_its_dtype(tmp_path: Path) -> None:
    """Norms in fp32 among weights in bf16 are not rounded."""
    source = _source(tmp_path)
    _edit(source, _norms_in_fp32)
    before = load_file(source / "model.safetensors")
    after = load_file(_initialise(source, tmp_path) / "model.safetensors")
    assert {t.dtype for t in before.values()} == {torch.float32, torch.bfloat16}
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (after[name].dtype, after[name].equal(tensor)) == (tensor.dtype, True), name
    told = [
        json.loads((p / "config.json").read_text()) for p in (source, tmp_path / "out/global_model")
    ]
    assert told[0]["dtype"] == told[1]["dtype"]


def test_dtypes_are_kept_under_old_names_too(tmp_path: Path) -> None:
    """A GPT-2 of long ago lacks the prefix of its names."""
    source = tmp_path / "source"
    config = GPT2Config(vocab_size=384, n_positions=64, n_embd=8, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(source)

    def old(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            tensor = weights.pop(name)
            kept = tensor + 1 / 3 if "ln" in name else tensor.bfloat16()
            weights[name.removeprefix("transformer.")] = kept

    _edit(source, old)
    before = load_file(source / "model.safetensors")
    after = load_file(_initialise(source, tmp_path, "bytes") / "model.safetensors")
    assert {f"transformer.{name}" for name in before} == set(after)
    for name, tensor in before.items():
        found = after[f"transformer.{name}"]
        assert (found.dtype, found.equal(tensor)) == (tensor.dtype, True), name


def test_a_head_that_has_no_place_is_refused(tmp_path: Path) -> None:
    source = _source(tmp_path)
    _edit(source, lambda weights: weights.update({"v_head.summary.weight": torch.ones(1, 8)}))
    message = r"has v_head\.summary\.weight .*LlamaForCausalLM has no place: it would be lost"
    with pytest.raises(CrossFLError, match=message):
        _initialise(source, tmp_path)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_classifier_of_texts_is_refused(tmp_path: Path) -> None:
    source = _source(tmp_path)
    LlamaForSequenceClassification(LlamaConfig(**SIZES, pad_token_id=0)).save_pretrained(source)
    with pytest.raises(CrossFLError, match=r"lacks lm_head\.weight|has score\.weight"):
        _initialise(source, tmp_path)


def test_a_tied_weight_that_differs_is_not_dropped(tmp_path: Path) -> None:
    source = _source(tmp_path)
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps(config))
    head = load_file(source / "model.safetensors")["lm_head.weight"]
    try:
        model = _initialise(source, tmp_path)
    except CrossFLError as error:
        assert "lm_head.weight" in str(error)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        assert loaded.lm_head.weight.equal(head)


@pytest.mark.parametrize("generation", [None, {"eos_token_id": [1, 7]}])
def test_a_model_stops_where_it_stopped_before(
    generation: dict[str, Any] | None, tmp_path: Path
) -> None:
    """Without a generation_config.json, plain transformers takes the token from config.json."""
    source = _source(tmp_path, eos_token_id=1, pad_token_id=0)
    (source / GENERATION).unlink()
    if generation:
        (source / GENERATION).write_text(json.dumps(generation))
    model = _initialise(source, tmp_path)
    assert (model / GENERATION).exists() == bool(generation)
    ends = [
        AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
        for folder in (source, model)
    ]
    assert ends == [generation["eos_token_id"] if generation else 1] * 2


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    source = _source(tmp_path)

    def rounded(weights: dict[str, torch.Tensor]) -> None:
        weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.float8_e4m3fn)

    _edit(source, rounded)
    with pytest.raises(CrossFLError, match=r"'lm_head\.weight' has the dtype torch\.float8"):
        _initialise(source, tmp_path)


def test_a_buffer_is_listed_under_the_name_it_is_saved_under(tmp_path: Path) -> None:
    config = DeepseekV3Config(
        **SIZES, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=0, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    DeepseekV3ForCausalLM(config).save_pretrained(tmp_path / "source")
    weights = Tensors.of_model(_initialise(tmp_path / "source", tmp_path, "bytes"))
    assert weights.buffers == {"model.layers.0.mlp.gate.e_score_correction_bias"}


def _pairs(folder: Path) -> None:
    """A tokenizer of byte pairs that splits nowhere, in the folder of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(["words, and 0123456789 and more words"] * 9, trainer)
    special = {"eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


@pytest.mark.parametrize("kind", ["llama", "mistral", "mixtral", "qwen2", "qwen3", "olmo2", "phi3"])
@pytest.mark.parametrize("own", [False, True], ids=["bytes", "pairs"])
def test_a_tokenizer_is_the_same_beside_a_model_or_is_refused(
    kind: str, own: bool, tmp_path: Path
) -> None:
    """The library takes the class of the tokenizer from the model's type, and reads other ids."""
    (tmp_path / "config.json").write_text(
        json.dumps({**SIZES, "model_type": kind, "pad_token_id": 0, "eos_token_id": 1})
    )
    if own:
        _pairs(tmp_path / "pairs")
    name = str(tmp_path / "pairs") if own else "bytes"
    plain = AutoTokenizer.from_pretrained(name) if own else byte_tokenizer()
    config = tmp_path / "config.json"
    try:
        initialise(None, config, name, 0, 1, Aggregation(), tmp_path / "out")
    except CrossFLError as error:
        assert kind == "qwen2"
        assert "the tokenizer does not survive" in str(error)
        assert "Qwen2Tokenizer beside a model of type 'qwen2'" in str(error)
        return
    assert kind != "qwen2"
    found = AutoTokenizer.from_pretrained(tmp_path / "out" / "global_model")
    assert found.eos_token_id == plain.eos_token_id
    for text in (*PROBES, "a text that is none of the probes: ß 42"):
        assert found(text)["input_ids"] == plain(text)["input_ids"]


def test_the_tokenizer_of_bytes_has_the_ids_of_byt5() -> None:
    """And puts nothing behind a prompt."""
    ours, theirs = byte_tokenizer(), ByT5Tokenizer()
    for text in (*PROBES, "".join(map(chr, range(0x20, 0x250)))):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours(text)["input_ids"] == ids
        assert ours(text, add_special_tokens=False)["input_ids"] == ids
        assert ours.decode(ids) == text
    assert set(ours("a")) == {"input_ids", "attention_mask"}
    for role in SPECIAL:
        assert getattr(ours, f"{role}_id") == getattr(theirs, f"{role}_id")
    sample = encode(Text("it 2=", "due"), ours, 96)
    assert sample == encode(Text("it 2=", "due"), theirs, 96)
    assert sample.ids[-1] == ours.eos_token_id


@pytest.mark.parametrize("adds", [True, False])
def test_a_text_begins_as_the_tokenizer_says(adds: bool) -> None:
    """A begin-of-sequence token is there to be had; whether it is used is the tokenizer's."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    if adds:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", bos)]
        )
    start = [bos] if adds else []
    assert encode_prompt("a", tokenizer) == [*start, 100]
    sample = encode(Text("a", "b"), tokenizer, 9)
    assert sample.ids == [*start, 100, 101, tokenizer.eos_token_id]
    assert encode(Text(None, "b"), tokenizer, 9).ids == [*start, 101, tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "gemma3"}, r"a multimodal model \(gemma3: text_config, vision_config\)"),
        ({"model_type": "t5"}, r"'t5' \(it is an encoder with a decoder\)"),
        ({"model_type": "git"}, r"a multimodal model \(git: vision_config\)"),
        ({"model_type": "musicgen"}, r"an encoder with a decoder \(musicgen: audio_encoder"),
        ({"model_type": "bert"}, r"BertLMHeadModel is not a causal language model"),
        ({"model_type": "llama", "num_attention_heads": 3}, r"describes neither .*heads \(3\)"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_said(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    sizes = SIZES if values["model_type"] in ("bert", "llama") else {}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, **values}))
    with pytest.raises(CrossFLError, match=f"(?s){message}") as raised:
        initialise(None, tmp_path / "config.json", "bytes", 0, 1, Aggregation(), tmp_path / "out")
    assert len(str(raised.value)) < 600
