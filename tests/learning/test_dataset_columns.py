"""Columns of rows: the layouts that the world writes, and the ones that would lose a column."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from crossfl.errors import CrossFLError
from crossfl.learning import datasets
from crossfl.learning.datasets import Chat, Sample, Text
from crossfl.learning.datasets.columns import COLUMNS, sample_of
from tests.support.datasets import write_rows

ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName it {x}.\n\n### Input:\nblue {instruction}\n\n### Response:"
)
ALPACA_ALONE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nName it.\n\n### Response:"
)
CHAT = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]

GOOD: list[tuple[dict[str, Any], Sample]] = [
    ({"text": "a"}, Text(None, "a")),
    ({"text": "a", "label": 1, "id": 7, "meta": {"x": []}}, Text(None, "a")),
    ({"prompt": "a", "completion": ""}, Text("a", "")),
    ({"input": "a", "output": "b", "task": "t"}, Text("a", "b", "t")),
    (
        {"instruction": "Name it {x}.", "input": "blue {instruction}", "output": "sky"},
        Text(ALPACA, "sky"),
    ),
    ({"instruction": "Name it.", "input": "", "output": "sky"}, Text(ALPACA_ALONE, "sky")),
    ({"instruction": "Name it.", "input": None, "output": "sky"}, Text(ALPACA_ALONE, "sky")),
    ({"instruction": "Name it.", "output": "sky"}, Text(ALPACA_ALONE, "sky")),
    ({"messages": CHAT}, Chat((("user", "a?"), ("assistant", "b")))),
    # Columns that repeat what is there, as data sets of the hub have them, lose nothing.
    (
        {"instruction": "Name it.", "input": "", "output": "sky", "text": f"{ALPACA_ALONE}\nsky"},
        Text(ALPACA_ALONE, "sky"),
    ),
    ({"messages": CHAT, "prompt": "a?"}, Chat((("user", "a?"), ("assistant", "b")))),
    ({"prompt": "a", "completion": "b", "system": "", "tools": []}, Text("a", "b")),
    ({"prompt": "a ", "completion": "b", "text": "a b"}, Text("a ", "b")),
]
LOST = [
    ({"text": "c", "prompt": "a", "completion": "b"}, "'prompt' and 'completion', and 'text'"),
    ({"prompt": "a", "completion": "b", "system": "be kind"}, "and 'system' besides"),
    ({"instruction": "a", "input": "c", "output": "b", "text": "d"}, "and 'text' besides"),
    ({"messages": CHAT, "prompt": "c"}, "and 'prompt' besides, which would be lost"),
    ({"messages": CHAT, "tools": [{"name": "t"}]}, "and 'tools' besides"),
    ({"text": "a", "question": "q"}, "and 'question' besides"),
    ({"pixels": [[[1.0]]], "label": 0, "text": "a"}, "both 'pixels' and 'text'"),
    ({"instruction": "a", "context": "b", "response": "c"}, "this one has 'instruction' and 'con"),
    ({"question": "a", "answer": "b"}, "a sample has .*; this one has 'question' and 'answer'"),
    ({"conversations": [{"from": "human", "value": "a"}]}, "this one has 'conversations'"),
    ({"instruction": "a", "input": "b"}, "this one has 'instruction' and 'input'"),
]
BAD: list[dict[str, Any]] = [
    {"text": " \ud800"},
    {"prompt": "", "completion": ""},
    {"instruction": "a", "input": 1, "output": "b"},
    {"instruction": "a", "input": ["b"], "output": "b"},
    {"messages": []},
    {"messages": "a"},
    {"messages": {"role": "user", "content": "a"}},
    {"messages": ["a"]},
    {"messages": [{"role": "user"}]},
    {"messages": [{"role": "user", "content": None}]},
    {"messages": [{"role": "user", "content": "a \ud83d"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
    {"messages": [{"role": "tool", "content": "a", "tool_calls": ["b"]}]},
]


@pytest.mark.parametrize(("row", "sample"), GOOD, ids=str)
def test_layouts(row: dict[str, Any], sample: Sample) -> None:
    assert sample_of(row) == sample


@pytest.mark.parametrize(("row", "message"), LOST, ids=str)
def test_no_column_is_lost_in_silence(row: dict[str, Any], message: str) -> None:
    with pytest.raises(CrossFLError, match=message):
        sample_of(row)


@pytest.mark.parametrize("row", BAD, ids=ascii)
def test_values_of_another_kind(row: dict[str, Any]) -> None:
    with pytest.raises(CrossFLError, match=r"a sample has|'messages' is a list of turns"):
        sample_of(row)


def test_refusals_name_columns_that_are_known_and_no_others() -> None:
    """A key of JSON may be a name of somebody."""
    with pytest.raises(CrossFLError) as raised:
        sample_of({"Rossi Maria": "1961", "answer": "b"})
    assert "Rossi" not in str(raised.value)
    assert "answer" in COLUMNS


def test_chats_and_instructions_of_tables(tmp_path: Path) -> None:
    """In a table every turn has every key, and rows of other layouts have none of them."""
    turns = [{"role": "user", "content": "a?", "name": None}]
    table = pa.Table.from_pylist(
        [{"messages": turns, "text": None}, {"messages": None, "text": "c"}] * 10
    )
    parquet.write_table(table, tmp_path / "d.parquet")
    samples = datasets.read(tmp_path / "d.parquet", "valid")
    assert samples == [Chat((("user", "a?"),)), Chat((("user", "a?"),))]
    assert datasets.read(tmp_path / "d.parquet", "train")[0] == Text(None, "c")


def test_chats_are_read_as_they_were_written(tmp_path: Path) -> None:
    chat = Chat((("user", "a?"), ("assistant", "è")), "greetings")
    path = write_rows(tmp_path / "d.jsonl", [datasets.row(chat)] * 2)
    assert datasets.read(path, "train") == [chat]


def test_rows_that_would_lose_a_column_are_counted(tmp_path: Path) -> None:
    rows = [{"text": "a"}] * 3 + [LOST[0][0]]
    samples = datasets.read(write_rows(tmp_path / "d.jsonl", rows), "train")
    assert len(samples.bad) == 1
    with pytest.raises(CrossFLError, match=r"d.jsonl:1: it has 'prompt' and 'completion', and 'te"):
        datasets.read(write_rows(tmp_path / "d.jsonl", [LOST[0][0]] * 9), "train")
