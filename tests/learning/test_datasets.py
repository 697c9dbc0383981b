"""Datasets: where they may lie, how they are read, and in which order they are drawn."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from crossfl.errors import CrossFLError
from crossfl.facility import place
from crossfl.learning import datasets
from crossfl.learning.datasets import IGNORED, Text

ROWS = [{"prompt": f"{i}=", "completion": "x" * i} for i in range(20)]


def _jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ["", "..", "../x", "/etc", "a/../../x", "out", "out/hosts"])
def test_a_name_that_leads_out_is_refused(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "out").symlink_to("/etc")
    with pytest.raises(CrossFLError, match="dataset"):
        place.resolve(name, root)


def test_a_link_that_stays_inside_is_followed(tmp_path: Path) -> None:
    (tmp_path / "it").mkdir()
    (tmp_path / "latest").symlink_to("it")
    assert place.resolve("latest", tmp_path) == tmp_path / "it"


def test_formats_agree(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    table = Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    DatasetDict(
        {"train": table.select(range(4)), "validation": table.select(range(4, 6))}
    ).save_to_disk(tmp_path / "split")
    expected = datasets.read(_jsonl(tmp_path / "rows.jsonl", ROWS), "train")
    assert len(expected) == 18  # every tenth is held out
    assert datasets.read(tmp_path / "rows.parquet", "train") == expected
    assert datasets.read(tmp_path / "saved", "train") == expected
    assert datasets.read(tmp_path / "saved", "valid") == [Text("0=", ""), Text("10=", "x" * 10)]
    assert datasets.read(tmp_path / "split", "train") == [Text(f"{i}=", "x" * i) for i in range(4)]
    assert datasets.read(tmp_path / "split", "valid") == [Text(f"{i}=", "x" * i) for i in (4, 5)]


def test_text_and_other_names(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "train.txt").write_text("uno\n\ndue\n")
    _jsonl(tmp_path / "t" / "valid.jsonl", [{"input": "a", "output": "b"}, {"text": "c"}])
    assert datasets.read(tmp_path / "t", "train") == [Text(None, "uno"), Text(None, "due")]
    assert datasets.read(tmp_path / "t", "valid") == [Text("a", "b"), Text(None, "c")]


def test_rows_are_read_as_they_were(tmp_path: Path) -> None:
    samples = [Text("a", "b", "greetings"), Text("a", "b"), Text(None, "è")]
    path = _jsonl(tmp_path / "d.jsonl", [datasets.row(sample) for sample in [samples[0], *samples]])
    assert datasets.read(path, "train") == samples


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", '{"text": "a"}\n{"text"', "d.jsonl:2 is not JSON"),
        ("d.jsonl", '{"label": 1}\n', "d.jsonl:1: a sample has"),
        ("d.jsonl", '{"prompt": "a", "completion": 1}\n', "each a string"),
        ("d.jsonl", '{"text": "a", "task": "a task"}\n', "d.jsonl:1: the name of its 'task' has"),
        ("d.jsonl", '{"text": "a", "task": []}\n', "d.jsonl:1: the name of its 'task' has"),
        ("d.jsonl", "", "is empty"),
        ("d.txt", "one line\n", "is empty: it has no train sample"),
        ("d.xlsx", "a,b\n", "is none of .txt, .jsonl, .json, .csv, .parquet"),
        ("d.parquet", "no", "is not a parquet file"),
    ],
)
def test_bad_data_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CrossFLError, match=message):
        datasets.read(tmp_path / name, "train")


def test_a_bad_sample_is_counted_and_left_out(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "a"}\n{"text"\n{"text": "b"}\n{"label": 1}\n{"text": "c"}\n')
    read = datasets.read(path, "train")
    assert read == [Text(None, "b"), Text(None, "c")]
    assert [reason.split(":")[1].split()[0] for reason in read.bad] == ["2", "4"]
    path.write_text('{"text": "a"}\n' + '{"label": 1}\n' * 2)
    with pytest.raises(CrossFLError, match=r"2 of 3 samples cannot be read, the first because"):
        datasets.read(path, "train")


def test_the_prompt_is_masked() -> None:
    tokenizer = ByT5Tokenizer()
    a, b, x, end = (*tokenizer("abx", add_special_tokens=False)["input_ids"], 1)
    sample = datasets.encode(Text("ab", "x"), tokenizer, 10)
    assert sample == ([a, b, x, end], [IGNORED, IGNORED, x, end])
    assert datasets.encode(Text(None, "ab"), tokenizer, 10) == ([a, b, end], [a, b, end])
    assert datasets.encode(Text("ab", "x"), tokenizer, 3).ids == [a, b, x]


@given(
    size=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=8),
)
def test_no_sample_is_repeated_before_all_were_seen(
    size: int, seed: int, counts: list[int]
) -> None:
    drawn: list[int] = []
    for count in counts:
        drawn += datasets.order(size, seed, len(drawn), count)
        seen = Counter(drawn)
        times = [seen[i] for i in range(size)]
        assert max(times) - min(times) <= 1
    assert drawn == datasets.order(size, seed, 0, sum(counts))
