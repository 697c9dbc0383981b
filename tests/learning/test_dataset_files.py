"""Files of datasets: where they may lie, their kinds, and what damage to them does."""

import gzip
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from crossfl.errors import CrossFLError
from crossfl.learning import datasets
from crossfl.learning.datasets import Text
from crossfl.learning.datasets.formats import FORMATS
from tests.support.datasets import write_rows

CANARY = "Rossi-1961"
ROWS = [{"text": f"row {i}"} for i in range(20)]


def texts(path: Path, split: datasets.Split = "train") -> list[str]:
    """The texts of a split of plain text."""
    return [sample.text for sample in datasets.read(path, split) if isinstance(sample, Text)]


def refusal(path: Path, split: datasets.Split = "train") -> str:
    """Why a dataset is refused, in words that name it and nothing of its content."""
    with pytest.raises(CrossFLError) as raised:
        datasets.read(path, split)
    message = str(raised.value)
    assert str(path) in message
    assert CANARY not in message.replace(str(path), "")
    return message


# Lines


def test_bad_lines_are_counted_with_file_and_row(tmp_path: Path) -> None:
    bad = [
        f'{{"text": "perch\xe8 {CANARY}"}}'.encode("latin-1"),
        b"[" * 100_000,
        f'{{"text": "{CANARY} \\ud83d"}}'.encode(),
        f'{{"text": "{CANARY}'.encode(),
        b'{"text": ' + b"9" * 5000 + b"}",
        b'{"text": NaN}',
        b'{"text": 1961}',
        b'{"text": null}',
        b'{"text": ""}',
        b'{"text": ["a"]}',
        b'{"text": {"a": "b"}}',
        b'"text"',
        f'{{"text": "a", "text": "{CANARY}"}}'.encode(),
        f'{{"text": "\0{CANARY}"}}'.encode(),
        b'{"pixels": [[[1' + b"0" * 400 + b']]], "label": 0}',
        b'{"pixels": [[[1e400]]], "label": 0}',
        b'{"pixels": [[["1"]]], "label": 0}',
        b'{"pixels": [[[true]]], "label": 0}',
        b'{"pixels": ' + b"[" * 200 + b"1" + b"]" * 200 + b', "label": 0}',
    ]
    good = [f'{{"text": "row {i}"}}'.encode() for i in range(len(bad))]
    lines = [line for pair in zip(good, bad, strict=True) for line in pair]
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\n".join(lines))
    samples = datasets.read(path, "train")
    assert [reason.split(":")[1].split()[0] for reason in samples.bad] == [
        str(2 * i) for i in range(1, len(bad) + 1)
    ]
    assert not any(CANARY in reason or "Rossi" in reason for reason in samples.bad)
    assert len(samples) == len(good) - 2  # two are held out
    assert samples.place(0) == f"{path}:3"


def test_lines_end_at_newlines_and_nowhere_else(tmp_path: Path) -> None:
    inside = "one\u2028still\x0bthe\x0csame\x85line"
    content = "\ufeff" + "".join(f"{inside} {i}\r\n" for i in range(10)) + "\n \t\n" + "last"
    (tmp_path / "d.txt").write_bytes(content.encode())
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "train.txt").write_bytes(content.encode())
    (tmp_path / "t" / "valid.txt").write_text("a\n")
    expected = [f"{inside} {i}" for i in range(10)] + ["last"]
    assert texts(tmp_path / "t") == expected
    assert len(texts(tmp_path / "d.txt")) + len(texts(tmp_path / "d.txt", "valid")) == 11


def test_a_bad_byte_in_text_costs_its_line(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_bytes(b"uno\ndue\nperch\xe8\n" + b"tre\n" * 3)
    samples = datasets.read(tmp_path / "d.txt", "train")
    assert [s.text for s in samples if isinstance(s, Text)] == ["due", "tre", "tre", "tre"]
    assert samples.bad == [f"{tmp_path}/d.txt:3 is not UTF-8 text (UnicodeDecodeError)"]


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_no_part_of_the_data(ending: str, tmp_path: Path) -> None:
    lines = {
        ".txt": [row["text"] for row in ROWS],
        ".csv": ["text", *(row["text"] for row in ROWS)],
    }.get(ending, [json.dumps(row) for row in ROWS])
    (tmp_path / f"d{ending}").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    assert texts(tmp_path / f"d{ending}", "valid") == ["row 0", "row 10"]


# Kinds


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.JSONL", "D.Jsonl.GZ", "d.json", "d.json.gz"])
def test_names_of_either_case_and_compressed(name: str, tmp_path: Path) -> None:
    content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    packed = name.lower().endswith(".gz")
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    assert len(texts(tmp_path / name)) == 18


def test_a_list_of_rows(tmp_path: Path) -> None:
    rows: list[object] = [*ROWS, 1, {"text": "b\ud83d"}]
    (tmp_path / "d.json").write_text(json.dumps(rows, indent=2))
    samples = datasets.read(tmp_path / "d.json", "train")
    assert len(samples) == 18
    assert [reason.split(":")[1] for reason in samples.bad] == ["21", "22"]
    content = json.dumps(ROWS).encode().replace(b"row 3", b"row \xe8")
    (tmp_path / "d.json").write_bytes(content)
    assert len(datasets.read(tmp_path / "d.json", "train").bad) == 1


def test_csv(tmp_path: Path) -> None:
    lines = ['id,prompt,completion,task', '1,"a, ""b""","c', 'd",greetings', "2,e,f,",
             '3,"g"h,i,', "4,j,k", "5,l,\xe8,", "", "6,m,n,", "7,o,p,"]  # fmt: skip
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "train.csv").write_bytes("\r\n".join(lines).encode("latin-1"))
    write_rows(tmp_path / "t" / "valid.jsonl", ROWS)
    samples = datasets.read(tmp_path / "t", "train")
    assert samples == [
        Text('a, "b"', "c\r\nd", "greetings"), Text("e", "f"), Text("m", "n"), Text("o", "p")
    ]  # fmt: skip
    assert [reason.split(":")[1].split()[0] for reason in samples.bad] == ["5", "6", "7"]
    (tmp_path / "d.csv").write_text(f'text\na\n"{CANARY}\nb\nc\n')
    assert "d.csv:3 begins a quoted value that never ends" in refusal(tmp_path / "d.csv")
    (tmp_path / "d.csv").write_text(f"text,text\na,{CANARY}\n")
    assert "has two columns 'text'" in refusal(tmp_path / "d.csv")
    (tmp_path / "d.csv").write_text("text\n" + "x" * 200_000 + "\ny\n")
    assert texts(tmp_path / "d.csv") == ["y"]


def test_only_the_columns_that_are_needed_are_read(tmp_path: Path) -> None:
    """What Python cannot have, such as a time beyond the year 9999, is not looked at."""
    table = pa.table(
        {
            "text": [row["text"] for row in ROWS],
            "born": pa.array([2**62] * 20, pa.timestamp("us")),
            "image": pa.array([{"bytes": b"no image", "path": None}] * 20),
        }
    )
    parquet.write_table(table, tmp_path / "d.parquet")
    assert len(texts(tmp_path / "d.parquet")) == 18
    Dataset(table).save_to_disk(tmp_path / "saved")
    assert len(texts(tmp_path / "saved")) == 18


def test_a_bad_cell_of_a_table_costs_its_row(tmp_path: Path) -> None:
    words = [b"uno", CANARY.encode() + b"\xff", b"tre", b"cinque"]
    ends = struct.pack("<5i", 0, *(sum(map(len, words[: i + 1])) for i in range(4)))
    column = pa.Array.from_buffers(
        pa.string(), 4, [None, pa.py_buffer(ends), pa.py_buffer(b"".join(words))]
    )
    parquet.write_table(pa.table({"text": column}), tmp_path / "d.parquet")
    samples = datasets.read(tmp_path / "d.parquet", "train")
    assert [s.text for s in samples if isinstance(s, Text)] == ["tre", "cinque"]
    assert samples.bad == [f"{tmp_path}/d.parquet:2 is not a row that can be read (ArrowInvalid)"]


def test_a_damaged_offset_is_not_followed(tmp_path: Path) -> None:
    """An Arrow file is mapped as it is; beyond its end is whatever else the process holds."""
    folder = tmp_path / "saved"
    Dataset.from_list([{"text": f"row {i}"} for i in range(8)]).save_to_disk(folder)
    (file,) = folder.glob("*.arrow")
    content, offsets = file.read_bytes(), struct.pack("<9i", *range(0, 45, 5))
    assert content.count(offsets) == 1
    file.write_bytes(content.replace(offsets, offsets[:-4] + struct.pack("<i", 2**30)))
    assert texts(folder) == [f"row {i}" for i in range(1, 7)]
    assert datasets.read(folder, "train").bad == [
        f"{folder}:8 is not a row that can be read (ArrowInvalid)"
    ]


def test_columns_of_another_type(tmp_path: Path) -> None:
    for name, column in {
        "numbers": pa.array([1961] * 5),
        "bytes": pa.array([CANARY.encode()] * 5),
        "times": pa.array([2**62] * 5, pa.timestamp("us")),
        "lists": pa.array([[CANARY]] * 5),
    }.items():
        parquet.write_table(pa.table({"text": column}), tmp_path / f"{name}.parquet")
        assert "5 of 5 samples cannot be read" in refusal(tmp_path / f"{name}.parquet")
    named = pa.array([CANARY] * 5).dictionary_encode()
    parquet.write_table(pa.table({"text": named}), tmp_path / "named.parquet")
    assert len(texts(tmp_path / "named.parquet")) == 4
    parquet.write_table(pa.table({"words": named}), tmp_path / "words.parquet")
    assert "a sample has 'text'" in refusal(tmp_path / "words.parquet")


# Places


HUB: dict[str, tuple[list[str], list[str]]] = {
    "shards": (
        ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
        ["data/validation-00000-of-00001.jsonl"],
    ),
    "folders": (["train/a.jsonl", "train/deep/b.jsonl"], ["validation/a.jsonl"]),
    "test": (["train.jsonl", "train_2.jsonl"], ["test.jsonl"]),
    "both": (["training.jsonl"], ["dev.jsonl"]),
    "deep": (["data/train/0000.jsonl"], ["data/test/0000.jsonl"]),
}


@pytest.mark.parametrize("layout", HUB)
def test_files_lie_as_on_the_hub(layout: str, tmp_path: Path) -> None:
    train, valid = HUB[layout]
    for name in (*train, *valid):
        write_rows(tmp_path / name, [{"text": name}])
    if layout == "both":
        write_rows(tmp_path / "test.jsonl", [{"text": "there is a split for validation"}])
    for other in ("trainer.jsonl", "README.md", "metrics.json", "LICENSE.txt"):
        (tmp_path / other).write_text("{}")
    assert texts(tmp_path) == train
    assert texts(tmp_path, "valid") == valid


@pytest.mark.parametrize(
    "name", ["train.jsonl", "data/train-00000-of-00001.jsonl", "train/a.jsonl"]
)
def test_validation_is_held_out_of_a_folder_without_it(name: str, tmp_path: Path) -> None:
    write_rows(tmp_path / name, ROWS)
    assert texts(tmp_path, "valid") == ["row 0", "row 10"]
    assert len(texts(tmp_path)) == 18


def _pipe(folder: Path) -> None:
    os.mkfifo(folder / "train.jsonl")


def _unreadable(folder: Path) -> None:
    """A regular file of which nobody can read the first byte, root neither."""
    (folder / "train.jsonl").symlink_to("/proc/self/mem")


def _cut_gzip(folder: Path) -> None:
    content = gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS * 99).encode())
    (folder / "train.jsonl.gz").write_bytes(content[:-20])


def _bad_gzip(folder: Path) -> None:
    (folder / "train.txt.gz").write_bytes(f"{CANARY}\n".encode() * 3)


def _cut_parquet(folder: Path) -> None:
    parquet.write_table(pa.Table.from_pylist(ROWS), folder / "train.parquet")
    os.truncate(folder / "train.parquet", 200)


def _twice(folder: Path, *names: str) -> None:
    for name in names:
        write_rows(folder / name, ROWS)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (_pipe, "is not a regular file"),
    "folder": (lambda f: (f / "train.jsonl").mkdir(), "is not a regular file"),
    "link to nothing": (lambda f: (f / "train.jsonl").symlink_to("gone"), "is not a regular file"),
    "unreadable": (_unreadable, r"is not a jsonl file that can be read \(Input/output error"),
    "cut gzip": (_cut_gzip, r"is not a jsonl file that can be read \(EOFError, after row \d+\)"),
    "no gzip": (_bad_gzip, r"is not a txt file that can be read \(BadGzipFile, after row 0\)"),
    "cut parquet": (_cut_parquet, r"is not a parquet file that can be read \(Arrow\w*, after"),
    "empty": (lambda f: (f / "train.jsonl").touch(), "is empty: it has no train sample"),
    "empty csv": (lambda f: (f / "train.csv").touch(), "a sample has 'text'"),
    "empty parquet": (lambda f: (f / "train.parquet").touch(), "is not a parquet file"),
    "nothing": (lambda f: f, r"has no train file: name files by their split, such as train.jsonl"),
    "shard": (
        lambda f: _twice(f, "train-00001-of-00003.jsonl", "train-00002-of-00003.jsonl"),
        "has 2 of 3 files train-…: bring the others",
    ),
    "here and in data": (
        lambda f: _twice(f, "train.jsonl", "data/train.jsonl"),
        "that may hold the same, train.jsonl and data/train.jsonl: leave one of them out",
    ),
    "named and inside": (lambda f: _twice(f, "train.jsonl", "train/a.jsonl"), "and train/a.jsonl"),
    "of two kinds": (
        lambda f: _twice(f, "train.csv", "train.d.jsonl", "train.jsonl"),
        "train.csv and train.jsonl",
    ),
    "packed beside": (lambda f: _twice(f, "train.JSONL", "train.JSONL.gz"), "may hold the same"),
    "inside, twice": (lambda f: _twice(f, "data/train/a.txt", "data/train/a.txt.gz"), "same, data"),
    "deep list": (lambda f: (f / "train.json").write_text("[" * 100_000), "RecursionError"),
    "saved": (lambda f: (f / "state.json").write_text(f"{{{CANARY}"), "is not a saved dataset"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_no_dataset_is_told_in_one_message(damage: str, tmp_path: Path) -> None:
    make, message = DAMAGE[damage]
    make(tmp_path)
    with pytest.raises(CrossFLError, match=message) as raised:
        datasets.read(tmp_path, "train")
    assert CANARY not in str(raised.value)


def test_links_inside_are_followed(tmp_path: Path) -> None:
    write_rows(tmp_path / "blobs" / "abc", ROWS)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "train.jsonl").symlink_to("../blobs/abc")
    assert len(texts(tmp_path / "snapshot")) == 18


# Whatever there is in a file


def _valid(ending: str) -> bytes:
    rows = [{"text": f"{CANARY} {i}", "task": "a"} for i in range(12)]
    if ending == ".parquet":
        sink = pa.BufferOutputStream()
        parquet.write_table(pa.Table.from_pylist(rows), sink)
        return bytes(sink.getvalue())
    lines = {
        ".txt": [row["text"] for row in rows],
        ".csv": ["text,task", *(f"{row['text']},a" for row in rows)],
        ".json": [json.dumps(rows)],
    }.get(ending, [json.dumps(row) for row in rows])
    return "\n".join(lines).encode()


PIECES = st.one_of(
    st.binary(max_size=6),
    st.sampled_from(
        [b'"', b"\n", b"\r", b",", b"{", b"}", b"[" * 2000, b"\\ud83d", b"\xe8", b"\0", b"NaN",
         b"9" * 5000, b'{"text":', b'{"pixels":[[[1e999]]],"label":1}', b'"messages":[{"role":'],
    ),
)  # fmt: skip


@example(name=".jsonl", zipped=True, cut=12, damage=[])
@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    name=st.sampled_from([kind.ending for kind in FORMATS]),
    zipped=st.booleans(),
    cut=st.none() | st.integers(0, 2000),
    damage=st.lists(st.tuples(st.integers(0, 2000), PIECES, st.booleans()), max_size=4),
)
def test_no_bytes_of_a_file_do_more_than_be_refused_and_none_is_quoted(
    tmp_path: Path, name: str, zipped: bool, cut: int | None, damage: list[tuple[int, bytes, bool]]
) -> None:
    content = _valid(name)
    if zipped and name != ".parquet":
        content, name = gzip.compress(content), f"{name}.gz"
    for where, piece, replaces in damage:
        where %= len(content) + 1
        content = content[:where] + piece + content[where + replaces * len(piece) :]
    path = tmp_path / f"d{name}"
    path.write_bytes(content[:cut])
    for split in ("train", "valid"):
        try:
            told = datasets.read(path, split).bad
        except CrossFLError as error:
            told = [str(error)]
        assert not any(part in words for words in told for part in (CANARY, "Rossi", "1961"))
