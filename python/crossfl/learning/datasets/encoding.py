"""Samples as a model takes them: token ids with labels, or images."""

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from crossfl.errors import CrossFLError
from crossfl.learning.datasets.samples import (
    Chat,
    Image,
    Sample,
    Text,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that the loss leaves out."""
BATCH = 256
"""Samples that are tokenized together."""
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""Marks the assistant's turns in a chat template, where `transformers` looks for them."""
UNMARKED = (
    "the loss of a chat is over all its turns: the chat template does not mark those of the "
    "assistant ({% generation %}), or the tokenizer cannot follow the marks"
)


class Encoded(NamedTuple):
    """A sample as token ids, and the same ids as labels with those of the prompt ignored."""

    ids: list[int]
    labels: list[int]


def encoded(
    samples: Iterable[Sample],
    tokenizer: "PreTrainedTokenizerBase | None",
    classes: int | None = None,
) -> Iterator[Encoded | Image | CrossFLError]:
    """Each sample, whole, as the model takes it; or the reason why it cannot.

    Text ends in the end-of-sequence token, if the tokenizer has one. A chat is as its template lays
    it out.

    Raises:
        CrossFLError: there are chats, and the tokenizer has no template for them.
    """
    marked: bool | None = None
    every = iter(samples)
    while part := list(islice(every, BATCH)):
        texts = [text for s in part if isinstance(s, Text) for text in (s.prompt or "", s.text)]
        ids = iter(_tokenized(texts, tokenizer) if tokenizer else ())
        for sample in part:
            if isinstance(sample, Image):
                yield _image(sample, tokenizer, classes)
            elif tokenizer is None:
                yield CrossFLError("it is text, and the model takes images")
            elif isinstance(sample, Chat):
                marked = marks_turns(tokenizer) if marked is None else marked
                yield _chat(sample, tokenizer, marked)
            else:
                yield _text(next(ids), next(ids), sample, tokenizer)


def encode(
    sample: Sample, tokenizer: "PreTrainedTokenizerBase | None", length: int
) -> Encoded | Image:
    """One sample, cut at `length` tokens.

    Raises:
        CrossFLError: the model cannot take it.
    """
    (result,) = encoded([sample], tokenizer)
    if isinstance(result, CrossFLError):
        raise result
    return result if isinstance(result, Image) else Encoded(*(part[:length] for part in result))


def encode_prompt(prompt: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Token ids of a prompt that is to be completed; never none, even of an empty one."""
    (ids,) = _tokenized([prompt], tokenizer)
    if isinstance(ids, CrossFLError):
        raise ids
    return [*prefix(tokenizer), *ids] or [tokenizer.eos_token_id or 0]


@lru_cache(maxsize=4)
def prefix(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """What the tokenizer itself puts before a text: a begin-of-sequence token, or nothing."""
    try:
        bare, whole = _plain_and_whole("a", tokenizer)
    except BaseException as error:  # it has no token for this letter
        _check_fault(error)
        bare, whole = _plain_and_whole("", tokenizer)
    if not bare:
        return tuple(whole[:1]) if whole[:1] == [tokenizer.bos_token_id] else ()
    starts = range(len(whole) - len(bare) + 1)
    return tuple(whole[: next((i for i in starts if whole[i : i + len(bare)] == bare), 0)])


def _plain_and_whole(
    text: str, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[int], list[int]]:
    """Token ids of a text, without and with what the tokenizer puts around it."""
    plain, whole = (
        list(tokenizer(text, add_special_tokens=special)["input_ids"]) for special in (False, True)
    )
    return plain, whole


def _text(
    prompt: list[int] | CrossFLError,
    text: list[int] | CrossFLError,
    sample: Text,
    tokenizer: "PreTrainedTokenizerBase",
) -> Encoded | CrossFLError:
    if isinstance(prompt, CrossFLError):
        return prompt
    if isinstance(text, CrossFLError):
        return text
    masked = [*prefix(tokenizer), *(prompt if sample.prompt else [])]
    ids = masked + text + ([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])
    if not ids:
        return CrossFLError("it has no token")
    if sample.prompt is None:
        return Encoded(ids, list(ids))
    return Encoded(ids, [IGNORED] * len(masked) + ids[len(masked) :])


def _chat(
    sample: Chat, tokenizer: "PreTrainedTokenizerBase", marked: bool
) -> Encoded | CrossFLError:
    turns = [{"role": role, "content": content} for role, content in sample.turns]
    try:
        laid_out: Any = tokenizer.apply_chat_template(
            turns, return_dict=True, return_assistant_tokens_mask=marked
        )
    except BaseException as error:
        return _failure(error, "the tokenizer's chat template cannot lay out a sample")
    ids = laid_out["input_ids"]
    learnt = laid_out["assistant_masks"] if marked else [1] * len(ids)
    if not any(learnt):
        return CrossFLError("it has no turn of the assistant")
    return Encoded(ids, [i if one else IGNORED for i, one in zip(ids, learnt, strict=True)])


def _image(
    sample: Image, tokenizer: "PreTrainedTokenizerBase | None", classes: int | None
) -> Image | CrossFLError:
    if tokenizer is not None:
        return CrossFLError("it is an image, and the model takes text")
    if classes is not None and sample.label >= classes:
        return CrossFLError(
            f"its label is beyond the model's {classes} classes: raise their number in config.json"
        )
    return sample


def _tokenized(
    texts: list[str], tokenizer: "PreTrainedTokenizerBase"
) -> list[list[int] | CrossFLError]:
    """Token ids of each text, or why it has none."""
    if not texts:
        return []
    try:
        ids: list[list[int]] = tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
    except BaseException as error:
        failure = _failure(error, "the model's tokenizer cannot read a sample")
        half = len(texts) // 2
        if not half:
            return [failure]
        return _tokenized(texts[:half], tokenizer) + _tokenized(texts[half:], tokenizer)
    lacking = CrossFLError("the model's tokenizer has no token for a part of a sample")
    return [lacking if None in part else part for part in ids]


def _failure(error: BaseException, what: str) -> CrossFLError:
    """What to say of an error, whose text may quote the data; an interrupt goes on instead."""
    _check_fault(error)
    return CrossFLError(f"{what} ({type(error).__name__})")


def _check_fault(error: BaseException) -> None:
    """Let an error go on that is no fault of a library, such as an interrupt.

    The libraries in Rust panic with an error that is no `Exception`.
    """
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def marks_turns(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the chat template tells the assistant's turns from the others.

    Raises:
        CrossFLError: there is no template.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        raise CrossFLError(
            "the dataset holds chats ('messages'), and the model's tokenizer has no chat template: "
            "give the first model's tokenizer one, or write 'prompt' and 'completion'"
        ) from None
    return tokenizer.is_fast and GENERATION.search(template) is not None
