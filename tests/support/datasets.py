"""Datasets and tokenizers as the world writes them."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TURNS = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}|{% endgeneration %}"
    "{% else %}{{ m.content }}|{% endif %}{% endfor %}"
)
"""A chat template that marks the turns of the assistant."""
END = "</s>"
UNMARKED = TURNS.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """A `.jsonl` file; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def words_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of these words, without a token for others: of text with another, it fails."""
    vocabulary = {word: number for number, word in enumerate([END, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[none]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def bytes_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """A fast tokenizer with a token for each byte, and none besides."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: number for number, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template)
