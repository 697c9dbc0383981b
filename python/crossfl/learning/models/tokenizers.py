"""The tokenizer of the first global model: the model's own, another, or the byte-level one."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from crossfl.errors import CrossFLError
from crossfl.learning.models.loading import load_tokenizer
from crossfl.protocol.records import BYTES
from crossfl.storage.model_folder import tokenizer_view
from crossfl.storage.model_settings import TOKENIZER_CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
"""The first ids of the byte-level tokenizer, those of ByT5 (Xue et al. 2022,
https://arxiv.org/abs/2105.13626); the bytes follow."""
PROBES = (
    "a",
    " Two  words,\tand\n\nlines \n",
    "numbers 0123456789 and 3.14159 and 2024=",
    "it's I'll don't café naïve Straße",
    "čtyřicet šest, ventiquattro",
    "e\u0301 o\u0308 ﬁ ２ ™",
    "日本語 русский العربية हिन्दी",
    "🙂👩‍🔬 \u200b\u00a0\ufeff",
    "def f(x):\n    return x ** 2  # <b>&amp;</b> </x> [INST] {}",
    "THE END…",
)
"""Texts in which tokenizers differ: spaces, digits, contractions, accents, scripts, symbols."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, numbered as in ByT5; nothing is put before or behind a text.

    `ByT5Tokenizer` itself puts an end-of-sequence token behind every text, and so behind a prompt.
    """
    symbols = _symbols()
    vocabulary = {token: i for i, token in enumerate(SPECIAL.values())}
    vocabulary |= {symbols[byte]: byte + len(SPECIAL) for byte in range(256)}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **SPECIAL,
    )


def _symbols() -> list[str]:
    """The character that stands for each byte, as in GPT-2: itself, if it can be printed."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (256 + i for i in range(256))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def save_tokenizer(
    name: str | None, model: Path | None, settings: "PreTrainedConfig", directory: Path
) -> None:
    """Save a tokenizer beside a model that has all its tokens, and check what is read back.

    Args:
        name: directory of the tokenizer, or `bytes`; unset, it is in the model's directory.
        model: the model's directory, if it has one.
        settings: the model's configuration.
        directory: where to save it; an adapter's folder has no `config.json`.

    Raises:
        CrossFLError: there is none, it has too many tokens, or another one is read back.
    """
    with contextlib.ExitStack() as stack:
        if name == BYTES:
            loaded: PreTrainedTokenizerBase = byte_tokenizer()
        else:
            folder = _folder(name, model)
            # Some tokenizers copy their files only when they are saved.
            loaded = load_tokenizer(stack.enter_context(tokenizer_view(folder)), folder)
        vocabulary = getattr(settings, "vocab_size", None)
        if vocabulary is None:
            raise CrossFLError("config.json has no vocab_size: it is not of a language model")
        if len(loaded) > vocabulary:
            raise CrossFLError(
                f"the tokenizer has {len(loaded)} tokens, the model's vocab_size is "
                f"{vocabulary}: take the model's own tokenizer, or raise vocab_size in "
                "config.json"
            )
        # Several chat templates would be a folder of files; a model folder has none.
        several = isinstance(loaded.chat_template, dict)
        loaded.save_pretrained(directory, save_jinja_files=not several)
        again = load_tokenizer(stack.enter_context(tokenizer_view(directory)), directory)
    _check_same(loaded, again, settings)


def _check_same(
    one: "PreTrainedTokenizerBase", other: "PreTrainedTokenizerBase", settings: "PreTrainedConfig"
) -> None:
    """Check that the tokenizer that is read back is the one that was saved.

    The library chooses the class of a tokenizer by the model beside it, and may take another.
    """
    advice = (
        f"transformers reads it back as {type(other).__name__} beside a model of type "
        f"{settings.model_type!r}: take the model's own tokenizer, or a model of another type"
    )
    for role in ("bos", "eos", "pad", "unk"):
        ids = [getattr(tokenizer, f"{role}_token_id") for tokenizer in (one, other)]
        if ids[0] != ids[1]:
            raise CrossFLError(
                f"the tokenizer does not survive: its {role} token {ids[0]} is {ids[1]} "
                f"afterwards; {advice}"
            )
    for text in PROBES:
        for special in (False, True):
            before, after = (_ids(text, tokenizer, special) for tokenizer in (one, other))
            if before != after:
                raise CrossFLError(
                    f"the tokenizer does not survive: {text!a} is {len(before)} tokens "
                    f"{before[:4]}… and afterwards {len(after)}, {after[:4]}…; {advice}"
                )
        if one.decode(before) != other.decode(before):
            raise CrossFLError(
                f"the tokenizer does not survive: it writes {text!a} in another way; {advice}"
            )


def _ids(text: str, tokenizer: "PreTrainedTokenizerBase", special: bool) -> list[int]:
    """Token ids of a text; none where the tokenizer cannot read it."""
    try:
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])
    except Exception:  # of any class
        return []


def _folder(name: str | None, model: Path | None) -> Path:
    folder = model if name is None else Path(name)
    if folder is None:
        raise CrossFLError("give a tokenizer: a directory, or 'bytes' for the byte-level one")
    if not (folder / TOKENIZER_CONFIG).is_file():
        raise CrossFLError(f"{folder} has no {TOKENIZER_CONFIG}: name a tokenizer directory")
    return folder
