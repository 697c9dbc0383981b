"""The one decoder of documents that another party wrote, and its inverse."""

import json
import re
from collections.abc import Mapping
from typing import TypeVar

import msgspec

from crossfl.errors import CrossFLError
from crossfl.protocol.fields import DEMANDS, Count, Record
from crossfl.protocol.text import printable, quoted

T = TypeVar("T", bound=msgspec.Struct)
TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"(\s*+:)?|[{}]', re.DOTALL)
"""The tokens of a JSON document that tell which keys each of its objects has."""
PATH = re.compile(r"(.*) - at `(.*)`", re.DOTALL)
EXPRESSION = re.compile(r"Expected `str` matching regex '(.*)'", re.DOTALL)
LONGEST_MESSAGE = 90
"""Characters of the decoder's message that are shown; few of them can be the document's."""


class Head(msgspec.Struct):
    """What is read of a document before the rest, for messages that say what it is instead."""

    kind: str = ""
    format: Count = 0


def decode(content: bytes, kind: type[T], what: str, limit: int) -> T:
    """Read one JSON document as a value of its type.

    Memory stays within a small multiple of `limit`, whatever the document holds.

    Args:
        content: the document.
        kind: the type that it must have.
        what: name of the document, for the message.
        limit: largest size in bytes.

    Raises:
        CrossFLError: the document is too large, malformed, or not of its type and limits. The
            message names the place in the document and what was expected there.
    """
    value = _parse(content, kind, what, limit)
    try:
        _check_keys(content)
    except CrossFLError as error:
        raise CrossFLError(f"{what}: {error}") from None
    return value


def decode_own(content: bytes, kind: type[T], what: str, limit: int) -> T:
    """Read a document that this machine has written, and has checked by its sha256.

    It is `decode` but for looking for keys that are given twice, which takes most of the time.

    Raises:
        CrossFLError: as `decode`.
    """
    return _parse(content, kind, what, limit)


def read_head(content: bytes, what: str, limit: int) -> Head:
    """Read kind and format of a document, whose other fields are skipped.

    Raises:
        CrossFLError: as `decode`.
    """
    return _parse(content, Head, what, limit)


def check_format(head: Head, known: int, what: str) -> None:
    """Refuse a document of another format than this version reads.

    Raises:
        CrossFLError: it has another one.
    """
    if head.format != known:
        raise CrossFLError(f"{what} has format {head.format}; this crossfl reads format {known}")


def _parse(content: bytes, kind: type[T], what: str, limit: int) -> T:
    if len(content) > limit:
        raise CrossFLError(f"{what} has {len(content)} bytes: at most {limit} are read")
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        raise CrossFLError(f"{what}: {_located(str(error))}") from None
    except RecursionError:
        raise CrossFLError(f"{what} is nested too deep") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise CrossFLError(f"{what} is not valid JSON: transfer or write it again") from None
    except CrossFLError as error:
        raise CrossFLError(f"{what}: {error}") from None


def encode(record: Record) -> bytes:
    """The document of a record: indented JSON that ends in a newline, the same for equal records.

    Raises:
        CrossFLError: a text in it is not Unicode.
    """
    return msgspec.json.format(encode_compact(record.asdict()), indent=1) + b"\n"


def encode_compact(values: Mapping[str, object]) -> bytes:
    """JSON without any space, keys in the order given.

    Raises:
        CrossFLError: a text in it is not Unicode.
    """
    try:
        return msgspec.json.encode(values)
    except UnicodeEncodeError as error:
        raise CrossFLError(f"{quoted(error.object)} is not Unicode text: rename it") from None


def _located(message: str) -> str:
    """The decoder's message as `place: what was expected`, printable and short."""
    place = ""
    if match := PATH.fullmatch(message):
        message, path = match.groups()
        place = path.removeprefix("$").removeprefix(".")
        place = "a key: " if path.startswith("key") else f"{place}: " if place else ""
    if expression := EXPRESSION.fullmatch(message):
        message = DEMANDS.get(expression[1].replace("\\\\", "\\"), message)
    return place + printable(
        message[:1].lower() + message[1:].replace("`", ""), longest=LONGEST_MESSAGE
    )


def _check_keys(content: bytes) -> None:
    """Refuse an object that names a key twice: readers differ in which of the two counts.

    Raises:
        CrossFLError: there is one.
    """
    objects: list[set[str]] = []
    for match in TOKEN.finditer(content):
        token = match[0]
        if token == b"{":
            objects.append(set())
        elif token == b"}":
            objects.pop()
        elif match[1] is not None:
            name = token[:-1].rstrip()
            key = json.loads(name) if b"\\" in name else name[1:-1].decode()
            if key in objects[-1]:
                raise CrossFLError(f"the key {quoted(key)} is given twice")
            objects[-1].add(key)
