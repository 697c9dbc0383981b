"""The kinds of files: each gives the rows of a file, one by one, as values by column.

`datasets` and pyarrow have readers of JSON lines, CSV and text as well. They give up the whole file
for one bad row, so rows are read by hand where a file can have bad ones.
"""

import csv
import gzip
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from crossfl.errors import CrossFLError
from crossfl.learning.datasets.columns import COLUMNS, EXPECTED, IMAGE, TEXTS

if TYPE_CHECKING:
    from pyarrow import Array, RecordBatch

Rows = Iterator[tuple[int, Callable[[], object]]]
"""The number of each row, from 1 on, and a function that reads it and may fail."""

BOM = b"\xef\xbb\xbf"
GZIP = ".gz"
BATCH = 1024
"""Rows of a table that are in memory at once: lists take many times the memory of arrays."""


class Format(NamedTuple):
    """A kind of file."""

    ending: str
    noun: str
    """What a row is not that cannot be read."""
    rows: Callable[[Path], Rows]


def format_of(path: Path) -> Format | None:
    """The kind of a file by its name, in letters of either case; None of any other."""
    name = path.name.lower()
    return next((f for f in FORMATS if name.endswith((f.ending, f.ending + GZIP))), None)


def read_file(path: Path, kind: Format) -> Rows:
    """The rows of a file.

    Raises:
        CrossFLError: it is no regular file, or cannot be read to its end.
    """
    if not path.is_file():  # to open a pipe would wait for ever
        raise CrossFLError(f"{path} is not a regular file: give one, or leave it out")
    return guarded(path, kind.rows(path), f"a {kind.ending[1:]} file")


def guarded(path: Path, rows: Rows, noun: str) -> Rows:
    """The rows, and one message for whatever goes wrong between them.

    Raises:
        CrossFLError: something did.
    """
    row = 0
    try:
        for row, read in rows:
            yield row, read
    except CrossFLError:
        raise
    except Exception as error:  # of whatever library; its text may quote the data
        reason = error.strerror if isinstance(error, OSError) and error.strerror else None
        raise CrossFLError(
            f"{path} is not {noun} that can be read ({reason or type(error).__name__}, after row "
            f"{row}): look whether it is whole, and at its permissions"
        ) from None


def table_rows(batches: Iterator["RecordBatch"]) -> Rows:
    """The rows of a table; each is read apart, so that a bad cell costs its row alone."""
    number = 0
    for batch in batches:
        sound = _is_sound(batch)
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        for i in range(len(batch)):
            number += 1
            yield number, partial(_cells, columns, i, sound)


def _is_sound(batch: "RecordBatch") -> bool:
    """Whether a batch may be read as it is: pyarrow follows a damaged offset out of its memory."""
    try:
        batch.validate(full=True)
    except Exception:  # of whatever damage
        return False
    return True


def _cells(columns: Mapping[str, "Array[Any]"], row: int, sound: bool) -> object:
    if not sound:
        for column in columns.values():
            column.slice(row, 1).validate(full=True)
    return {name: column[row].as_py() for name, column in columns.items()}


def wanted(names: Sequence[str], path: Path) -> list[str]:
    """The columns to read of a table.

    Raises:
        CrossFLError: there are none, or one of them is there twice.
    """
    for name in COLUMNS:
        if names.count(name) > 1:
            raise CrossFLError(f"{path} has two columns {name!r}: rename one of them")
    if not set(names) & {*TEXTS, *IMAGE}:
        raise CrossFLError(f"{path}: {EXPECTED}")
    return [name for name in COLUMNS if name in names]


def _open(path: Path) -> BinaryIO:
    if path.name.lower().endswith(GZIP):
        return gzip.open(path)  # type: ignore[return-value]
    return path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    r"""Lines that are not blank. They end at \n or \r\n: other breaks are part of a text."""
    with _open(path) as stream:
        for number, line in enumerate(stream, 1):
            text = line.removeprefix(BOM) if number == 1 else line
            if text.strip():
                yield number, text.removesuffix(b"\n").removesuffix(b"\r")


def _txt(path: Path) -> Rows:
    for number, line in _lines(path):
        yield number, partial(_text, line)


def _text(line: bytes) -> object:
    return {"text": line.decode()}


def _jsonl(path: Path) -> Rows:
    for number, line in _lines(path):
        yield number, partial(_parse, line)


def _json(path: Path) -> Rows:
    """A list of rows, or one row a line, as `.json` files of the hub are either."""
    with _open(path) as stream:
        content = stream.read().removeprefix(BOM)
    if not content.lstrip().startswith(b"["):
        yield from _jsonl(path)
        return
    # A bad byte becomes a lone surrogate, which makes its row a bad one.
    rows = DECODER.decode(content.decode(errors="surrogateescape"))
    for number, row in enumerate(rows, 1):
        yield number, partial(_same, row)


def _same(row: object) -> object:
    return row


def _parse(line: bytes) -> object:
    row: object = DECODER.decode(line.decode())
    return row


def _object(pairs: list[tuple[str, object]]) -> object:
    """An object of JSON; one with a key twice is none, as it would lose a value."""
    mapping = dict(pairs)
    return mapping if len(mapping) == len(pairs) else pairs


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _csv(path: Path) -> Rows:
    csv.field_size_limit(sys.maxsize)
    with _open(path) as stream:
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(text, strict=True)
        header = next(reader, [])
        columns = wanted(header, path)
        while True:
            begin = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                if "end of data" in str(error):
                    raise CrossFLError(
                        f"{path}:{begin} begins a quoted value that never ends: close the quote"
                    ) from None
                yield begin, partial(_raise, error)
                continue
            if cells is None:
                return
            if cells:
                yield begin, partial(_csv_row, header, cells, columns)


def _csv_row(header: Sequence[str], cells: Sequence[str], columns: Sequence[str]) -> object:
    if len(cells) != len(header):
        raise CrossFLError(f"it has {len(cells)} values, and the first row has {len(header)}")
    row = dict(zip(header, cells, strict=True))
    return {name: row[name] for name in columns}


def _raise(error: Exception) -> object:
    raise error


def _parquet(path: Path) -> Rows:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        columns = wanted(file.schema_arrow.names, path)
        yield from table_rows(file.iter_batches(BATCH, columns=columns))


FORMATS = (
    Format(".txt", "UTF-8 text", _txt),
    Format(".jsonl", "JSON", _jsonl),
    Format(".json", "JSON", _json),
    Format(".csv", "CSV", _csv),
    Format(".parquet", "a row that can be read", _parquet),
)
NAMES = ", ".join(kind.ending for kind in FORMATS)
"""The endings, in words."""
