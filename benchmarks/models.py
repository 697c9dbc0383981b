"""Which architectures of transformers this project trains: one real round of each, or a reason.

    python benchmarks/models.py --work /tmp/models -o docs/models.md

Each architecture is made from a tiny configuration and goes through the project's own functions:
initialise, then a round of one facility (train, aggregate), and the model of the round is loaded by
plain transformers. It *trains* if all of that passes and the weights have moved, and is *refused*
if crossfl says why. Anything else is an error of this project, and ends the script.
"""

import argparse
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from crossfl.errors import CrossFLError
from crossfl.protocol.records import Aggregation, Facility, Lora, Training
from crossfl.protocol.variables import MODELS
from crossfl.server import state as server_state
from crossfl.server.planning.fixed import plan
from crossfl.server.rounds import aggregate
from crossfl.simulation.simulate import playing_every_facility
from crossfl.steps.initialise import initialise
from crossfl.steps.train import train
from crossfl.storage.checkpoint import Tensors
from crossfl.storage.weight_files import weights_digest

Arm = Literal["bytes", "whole", "lora", "packing"]
ARMS: tuple[Arm, ...] = ("bytes", "whole", "lora", "packing")
BASE = "base"
"""Name of the base model under the folder of models, for LoRA."""
IMAGES = 8
SIDE = 32
"""Pixels of a side of an image."""

WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = {
    "vocab_size": 384,
    **WIDTHS,
    "intermediate_size": 32,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
HEADS = {"head_dim": 8}
ENCODER = {
    key: value
    for key, value in DECODER.items()
    if key not in ("num_key_value_heads", "bos_token_id")
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
IMAGE = {"image_size": SIDE, "num_channels": 3, "num_labels": 3}
LANGUAGE: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {"vocab_size": 384, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "gpt_neo": {
        **WIDTHS,
        "vocab_size": 384,
        "num_layers": 2,
        "num_heads": 2,
        "max_position_embeddings": 64,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "gpt_neox": ENCODER,
    "gptj": {
        "vocab_size": 384,
        "n_positions": 64,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "rotary_dim": 4,
    },
    "gpt_bigcode": {"vocab_size": 384, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2},
    "opt": {**ENCODER, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "bloom": {"vocab_size": 384, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "mpt": {"vocab_size": 384, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 64},
    "llama": DECODER,
    "mistral": DECODER,
    "mixtral": {**DECODER, "num_local_experts": 4},
    "qwen2": DECODER,
    "qwen2_moe": {**DECODER, **EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3": {**DECODER, **HEADS},
    "qwen3_moe": {**DECODER, **EXPERTS, **HEADS},
    "gemma": {**DECODER, **HEADS},
    "gemma2": {**DECODER, **HEADS},
    "gemma3_text": {**DECODER, **HEADS},
    "phi": DECODER,
    "phi3": DECODER,
    "olmo": DECODER,
    "olmo2": DECODER,
    "falcon": {"vocab_size": 384, **WIDTHS, "max_position_embeddings": 64},
    "stablelm": DECODER,
    "cohere": DECODER,
    "granite": DECODER,
    "starcoder2": DECODER,
    "smollm3": DECODER,
    "deepseek_v3": {
        **DECODER,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "gpt_oss": {**DECODER, **HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mamba": {"vocab_size": 384, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "mamba2": {
        "vocab_size": 384,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "state_size": 4,
        "head_dim": 8,
        "num_heads": 4,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "rwkv": {
        "vocab_size": 384,
        "hidden_size": 16,
        "attention_hidden_size": 16,
        "num_hidden_layers": 2,
        "context_length": 64,
    },
    "recurrent_gemma": {**DECODER, "lru_width": 16, "attention_window_size": 16},
    "bert": ENCODER,
    "bert as a decoder": {**ENCODER, "model_type": "bert", "is_decoder": True},
    "roberta": ENCODER,
    "xlnet": {"vocab_size": 384, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
    "electra": {**ENCODER, "embedding_size": 16},
    "t5": {"vocab_size": 384, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2},
    "gemma3": {"text_config": {**DECODER, **HEADS, "model_type": "gemma3_text"}},
}
"""Tiny configurations of language models, by model type."""
VISION: Mapping[str, Mapping[str, Any]] = {
    "crossfl_vgg": {**IMAGE, "stages": [[8], [8]], "groups": 4, "hidden_size": 16},
    "vit": {**WIDTHS, **IMAGE, "intermediate_size": 32, "patch_size": 4},
    "deit": {
        **WIDTHS,
        **IMAGE,
        "architectures": ["DeiTForImageClassification"],
        "intermediate_size": 32,
        "patch_size": 4,
    },
    "resnet": {
        "num_labels": 3,
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
    },
    "convnext": {**IMAGE, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "mobilenet_v2": {**IMAGE, "depth_multiplier": 0.1, "min_depth": 8},
    "efficientnet": {
        **IMAGE,
        "width_coefficient": 0.1,
        "depth_coefficient": 0.1,
        "hidden_dim": 128,
        "depth_divisor": 4,
    },
}
"""Tiny configurations of image classifiers."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS: Mapping[str, tuple[str, ...]] = {
    "mixtral": ATTENTION,
    "qwen3_moe": ATTENTION,
    "deepseek_v3": ("q_a_proj", "q_b_proj", "o_proj"),
    "mamba": ("in_proj", "x_proj"),
    "mamba2": ("in_proj",),
}
"""The layers that adapters are put on where all linear ones are refused."""


@dataclass(frozen=True)
class Verdict:
    """What became of one architecture in one arm."""

    trains: bool
    reason: str = ""

    def __str__(self) -> str:
        return "yes" if self.trains else f"refused: {self.reason}"


def verdicts(kind: str, work: Path) -> Iterator[tuple[Arm, Verdict]]:
    """The verdict on an architecture in each arm that is for models of its kind."""
    values = {"model_type": kind, **(VISION.get(kind) or LANGUAGE[kind])}
    text = kind in LANGUAGE
    tokenizer = "bytes" if text else None
    for arm in ARMS:
        if not text and arm in ("bytes", "packing"):
            continue
        folder = work / f"{kind}-{arm}".replace(" ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(values))
        try:
            if arm == "bytes":
                initialise(None, folder / "config.json", tokenizer, 0, 1, Aggregation(), folder)
            else:
                one_round(kind, arm, tokenizer, folder)
        except CrossFLError as error:
            if arm == "bytes" and "the tokenizer does not survive" in str(error):
                tokenizer = str(own_tokenizer(folder))
            yield (
                arm,
                Verdict(
                    False, re.sub(rf"{re.escape(str(folder))}/?(config.json: )?", "", str(error))
                ),
            )
        else:
            yield arm, Verdict(True)


def own_tokenizer(folder: Path) -> Path:
    """A tokenizer of bytes of the class that transformers takes beside the model of a folder."""
    from transformers import AutoTokenizer

    from crossfl.learning.models.tokenizers import byte_tokenizer

    byte_tokenizer().save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder / "own")
    return folder / "own"


def one_round(kind: str, arm: Arm, tokenizer: str | None, folder: Path) -> None:
    """A federation of one facility and one round in a folder that has a `config.json`.

    Raises:
        CrossFLError: the architecture is refused.
        RuntimeError: it is neither refused nor trained.
    """
    config = folder / "config.json"
    data = folder / "data" / "leonardo"
    data.mkdir(parents=True)
    samples = rows(kind in LANGUAGE)
    (data / "samples.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in samples))
    training = Training(
        batch_size=4, sequence_length=32, threads=1, learning_rate=0.01, packing=arm == "packing"
    )
    lora = None
    if arm == "lora":
        initialise(None, config, tokenizer, 0, 1, Aggregation(), folder / "whole")
        base = folder / "models" / BASE
        base.parent.mkdir()
        shutil.copytree(folder / "whole" / "global_model", base)
        lora = Lora(
            base_model=BASE,
            rank=2,
            base_digest=weights_digest(base),
            target_modules=TARGETS.get(kind, ()),
        )
    initialise(None, config, tokenizer, 0, 1, Aggregation(), folder / "0", lora)
    model, state = folder / "0" / "global_model", folder / "0" / "state"
    server = server_state.load(state)
    facility = Facility(name="leonardo", dataset="samples.jsonl")
    (task,) = plan(server, [facility], 2, training, "train").tasks
    os.environ[MODELS] = str(folder / "models")
    with playing_every_facility(folder / "data"):
        train(model, task, training, folder / "leonardo")
    aggregate(model, state, [folder / "leonardo" / "update"], folder / "1", server.started)
    before, after = (Tensors.of_model(folder / n / "global_model") for n in "01")
    if all(before[name].equal(after[name]) for name in before):
        raise RuntimeError(f"{kind}: no weight has moved")
    if lora is None:
        loads(folder / "1" / "global_model")


def loads(folder: Path) -> None:
    """Load a model as its user would."""
    from transformers import AutoConfig

    from crossfl.learning.models.loading import kind_of

    config = AutoConfig.from_pretrained(folder)
    _, found = kind_of(config).from_pretrained(folder, output_loading_info=True)
    if any(found.values()):
        raise RuntimeError(f"{folder} is read as another model: {found}")


def rows(text: bool) -> Iterator[dict[str, Any]]:
    """Samples of the facility."""
    for i in range(10 * IMAGES):
        if text:
            yield {"prompt": f"{i}=", "completion": f"{i % 7} words"}
        else:
            pixel = (i % 3) / 2
            yield {"pixels": [[[pixel] * SIDE] * SIDE] * 3, "label": i % 3}


def versions() -> str:
    """The versions that the verdicts are of."""
    import peft
    import torch
    import transformers

    return (
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, peft {peft.__version__}"
    )


def page(results: Mapping[str, Mapping[Arm, Verdict]], command: str) -> str:
    """The page of the documentation."""
    reasons: list[str] = []

    def cell(verdict: Verdict | None) -> str:
        if verdict is None:
            return "–"
        if verdict.trains:
            return "yes"
        if verdict.reason not in reasons:
            reasons.append(verdict.reason)
        return f"refused ({reasons.index(verdict.reason) + 1})"

    targets = "; ".join(f"`{kind}` {', '.join(names)}" for kind, names in TARGETS.items())
    lines = [
        f"| `{kind}` | " + " | ".join(cell(found.get(arm)) for arm in ARMS) + " |"
        for kind, found in results.items()
    ]
    return INTRODUCTION.format(
        command=command, versions=versions(), count=len(results), targets=targets
    ) + (
        "| Model type | `tokenizer: bytes` | all weights | LoRA | packing |\n"
        "|---|---|---|---|---|\n"
        + "\n".join(lines)
        + "\n\n## Reasons\n\n"
        + "".join(f"{i}. {reason}\n" for i, reason in enumerate(reasons, 1))
    )


INTRODUCTION = """# Models

A model is one of transformers: a causal language model or an image classifier, from a model folder
or from its `config.json` alone. No architecture is known by its name. Each is asked.

* **At `initialise`** the model is saved, loaded and saved again, and compared: names, dtypes and
  values of its tensors, the ids that its tokenizer gives to a set of texts, and its special tokens.
  What would be lost is refused by its name: a head that the architecture has no place for, a tied
  weight that differs, a tokenizer that transformers reads as another one beside this model. Every
  tensor keeps its dtype, and a model without `generation_config.json` stays without it. While this
  goes on, the output folder holds the weights twice.
* **When a facility loads it**, a forward pass of two samples of four tokens tells whether a token
  sees those behind it. Then it is no causal language model, and it is refused. With `packing`, a
  second pass tells whether samples in one row see each other. Then packing is refused. Neither pass
  draws a random number that would be drawn later, so no result changes by it.
* **Texts** begin as the tokenizer begins them, with a begin-of-sequence token or without. Training
  puts the end-of-sequence token behind each sample itself.
* **Buffers**, as the running statistics of batch normalisation are, are told from parameters by the
  model itself, and are listed in the metadata of the weight files (`buffers`). They are
  [averaged](aggregation.md#buffers), and never optimized.
* **LoRA** adapters begin as peft draws them. Adapters on layers that get no gradient in the first
  step are refused.
* **Not supported**: text together with images or sound, encoders with a decoder, quantised weights.

This table is made by

    {command}

with {versions}. Each of its {count} architectures has a
tiny configuration and goes through one round of one facility: `initialise`, `train`, `aggregate`,
and a plain `from_pretrained` of the result. *Yes* says that all of it passed and the weights moved.
*Refused* says that crossfl refuses it; the reasons are below the table. Where `tokenizer: bytes` is
refused for the tokenizer's sake, the rest is with a tokenizer of the class that transformers takes
for the model. LoRA is on all linear layers, or on those named here: {targets}.

"""


def main() -> None:
    """Print the table, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--work", type=Path, help="folder to work in; unset, a temporary one")
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these model types alone")
    parser.add_argument("-o", "--output", type=Path, help="page to write; unset, it is printed")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    results: dict[str, dict[Arm, Verdict]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind in args.only or [*LANGUAGE, *VISION]:
            results[kind] = {}
            for arm, verdict in verdicts(kind, args.work or Path(scratch)):
                results[kind][arm] = verdict
                print(f"{kind:20} {arm:8} {verdict}", file=sys.stderr, flush=True)
    text = page(results, "python benchmarks/models.py -o docs/models.md")
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
