"""The columns of a row, and the sample that they are.

A row has the columns of one layout. Beside them, a further column of text must add nothing, or the
row is refused: what it holds would be lost. Columns with other names are not read.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from crossfl.errors import CrossFLError
from crossfl.learning.datasets.samples import Chat, Image, Sample, Text
from crossfl.protocol.fields import is_name

Values = Mapping[str, Any]

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
"""The prompts of Stanford Alpaca (Taori et al. 2023), without and with an input, as in its
https://github.com/tatsu-lab/stanford_alpaca/blob/main/train.py."""
EXPECTED = (
    "a sample has 'text', or 'prompt' and 'completion', or 'input' and 'output', or 'instruction', "
    "'input' and 'output', each a string of Unicode characters and not all empty; or 'messages'; "
    "or 'pixels' and 'label'"
)
TURNS = (
    "'messages' is a list of turns; each has a 'role' and a 'content', two strings of Unicode "
    "characters, and nothing else"
)


class Layout(NamedTuple):
    """Columns of text that are a sample together."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    make: Callable[[Values, str | None, str | None], Text | Chat]


def _alpaca(values: Values, task: str | None, group: str | None) -> Text:
    context = values.get("input")
    prompt = ALPACA_WITH_INPUT if context else ALPACA
    filled = prompt.format(instruction=values["instruction"], input=context)
    return Text(filled, values["output"], task, group)


def _chat(values: Values, task: str | None, group: str | None) -> Chat:
    turns = []
    for turn in values["messages"]:
        given = {k: v for k, v in turn.items() if v is not None} if isinstance(turn, dict) else {}
        if set(given) != {"role", "content"} or not all(map(_is_text, given.values())):
            raise CrossFLError(TURNS)
        turns.append((given["role"], given["content"]))
    return Chat(tuple(turns), task, group)


LAYOUTS = (
    Layout(("messages",), (), _chat),
    Layout(("instruction", "output"), ("input",), _alpaca),
    Layout(("prompt", "completion"), (), lambda v, *of: Text(v["prompt"], v["completion"], *of)),
    Layout(("input", "output"), (), lambda v, *of: Text(v["input"], v["output"], *of)),
    Layout(("text",), (), lambda v, *of: Text(None, v["text"], *of)),
)
"""The first one that a row has is the one it is of."""
OTHERS = ("answer", "chosen", "context", "conversations", "history", "question", "rejected",
          "response", "system", "tools")  # fmt: skip
"""Columns that the field gives a meaning to, and no layout has."""
IMAGE = ("pixels", "label")
TEXTS = dict.fromkeys((*(c for layout in LAYOUTS for c in layout.required), *OTHERS))
COLUMNS = dict.fromkeys((*TEXTS, *IMAGE, "task", "group"))
"""Every column that is looked at."""


def sample_of(row: object) -> Sample:
    """The sample of a row, a mapping of columns to values; None is no value.

    Raises:
        CrossFLError: it is none; the reason quotes no value, and names only columns in `COLUMNS`.
    """
    if not isinstance(row, dict):
        raise CrossFLError(EXPECTED)
    given = {n: v for n, v in row.items() if n in COLUMNS and v is not None}
    task, group = _task(given.pop("task", None)), _group(given.pop("group", None))
    texts = {name: value for name, value in given.items() if name in TEXTS}
    if all(name in given for name in IMAGE):
        if texts:
            raise CrossFLError(f"it has both 'pixels' and {_names(texts)}: leave one out")
        return _image(given["pixels"], given["label"], task)._replace(group=group)
    layout = next((la for la in LAYOUTS if all(name in texts for name in la.required)), None)
    if layout is None:
        raise CrossFLError(EXPECTED + (f"; this one has {_names(texts)}" if texts else ""))
    own = {name: texts.pop(name) for name in (*layout.required, *layout.optional) if name in texts}
    _check(own)
    sample = layout.make(own, task, group)
    if any(texts.values()):
        _check_nothing_is_lost(sample, own, texts)
    return sample


def _check(values: Values) -> None:
    for name, value in values.items():
        if name == "messages":
            if not isinstance(value, list | tuple) or not value:
                raise CrossFLError(TURNS)
        elif not _is_text(value):
            raise CrossFLError(EXPECTED)
    if not any(values.values()):
        raise CrossFLError(EXPECTED)


def _check_nothing_is_lost(sample: Text | Chat, own: Values, others: Values) -> None:
    """Check that further columns hold nothing, or repeat a text of the sample, or all of it."""
    texts = (
        [sample.prompt or "", sample.text]
        if isinstance(sample, Text)
        else [content for _, content in sample.turns]
    )
    known = {_squeeze(text) for text in (*texts, "".join(texts))}
    for name, value in others.items():
        if value and not (isinstance(value, str) and _squeeze(value) in known):
            raise CrossFLError(
                f"it has {_names(own)}, and {name!r} besides, which would be lost: leave one out"
            )


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _names(columns: Values) -> str:
    return " and ".join(repr(name) for name in columns)


def _task(value: object) -> str | None:
    task = None if value in (None, "") else str(value)
    if task is not None and not is_name(task):
        raise CrossFLError(
            "the name of its 'task' has more than letters, digits, '.', '_' and '-', or more than "
            "100 characters"
        )
    return task


def _group(value: object) -> str | None:
    """The name of a group; what is neither a text nor a whole number names none."""
    return str(value) if isinstance(value, str | int) and _is_text(str(value)) else None


def _is_text(value: object) -> bool:
    """Whether it is a text without a lone surrogate, which no tokenizer reads."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _image(values: object, label: object, task: str | None) -> Image:
    import numpy as np

    try:
        # Without a dtype, what is no number keeps its own kind and is seen.
        numbers = np.asarray(values)
    except (TypeError, ValueError, OverflowError):
        numbers = np.empty(0)
    if numbers.dtype.kind not in "iuf":
        numbers = np.empty(0)
    with np.errstate(over="ignore"):
        pixels = numbers.astype(np.float32)
    if pixels.ndim != 3 or not pixels.size or not np.isfinite(pixels).all():
        raise CrossFLError("'pixels' are finite numbers, [channels][height][width]")
    if isinstance(label, bool) or not isinstance(label, int) or label < 0:
        raise CrossFLError("'label' is the number of a class, 0 or more")
    return Image(pixels, label, task)
