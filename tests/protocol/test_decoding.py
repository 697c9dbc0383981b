"""Documents of the other side: a value within its limits, or one short sentence."""

import copy
import json
import random
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crossfl.errors import CrossFLError
from crossfl.protocol import events, history, manifest, reference
from crossfl.protocol.decoding import decode, encode
from crossfl.protocol.fields import Record
from crossfl.protocol.generate import DOCUMENTS
from crossfl.protocol.manifest import EvaluationManifest, UpdateManifest
from crossfl.protocol.records import Facility

from .strategies import records

LIMIT = 1 << 20
RECORDS = [*reference.RECORDS, *DOCUMENTS.values()]
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 2**53, 2**53 + 1, 2**64, 10**400, 1.5, 1e308, -0.0, float("nan"),
    float("inf"), "", "\x1b]0;x\x07", "\u202e", "\ud800", "a\n", "../..", "x" * 3000, "nan", [], {},
    [[]] * 50, {"": {}}, {"loss": -1}, {"joules": {"gpu": "1"}}, [0] * 300, {"a": {"a": {"a": {}}}},
)  # fmt: skip


@pytest.mark.parametrize("kind", RECORDS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_what_is_encoded_is_decoded(kind: type[Record], data: st.DataObject) -> None:
    record = data.draw(records(kind))
    content = encode(record)
    decoded = decode(content, kind, "it", LIMIT)
    assert decoded == record
    assert encode(decoded) == content
    assert content.endswith(b"}\n")


def test_equal_records_have_one_document() -> None:
    entries = {name: manifest.FileEntry(bytes=1, sha256="0" * 64) for name in ("a", "b")}
    forwards = manifest.ModelManifest(round=1, files=entries).sealed()
    backwards = manifest.ModelManifest(round=1, files=dict(reversed(entries.items()))).sealed()
    assert encode(forwards) == encode(backwards)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not valid JSON"),
        (b"\xff", "is not valid JSON"),
        (b'{"name": "\xff", "dataset": "it"}', "is not valid JSON"),
        (b'{"name": "a", "dataset": "\\ud800"}', "is not valid JSON"),
        (b'{"name": "a", "dataset": "it"', "is not valid JSON"),
        (b'{"name": "a", "dataset": "it"} x', "is not valid JSON"),
        (b'{"name": "a", "dataset": "it", "joins": NaN}', "is not valid JSON"),
        (b"[" * 100_000, "expected object, got array"),
        (b'{"name":' * 100_000, "name: expected str, got object"),
        (b'{"x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, "unknown field x"),
        (b'{"name": "a"}', "missing required field dataset"),
        (b'{"name": "a\\n", "dataset": "it"}', "name: use letters, digits"),
        (b'{"name": "a", "dataset": "it", "joins": 0}', "joins: expected int >= 1"),
        (b'{"name": "a", "dataset": "it", "joins": 1.0}', "joins: expected int, got float"),
        (b'{"name": "a", "dataset": "it", "joins": "1"}', "joins: expected int, got str"),
        (b'{"name": "a", "dataset": "it", "joins": true}', "joins: expected int, got bool"),
        (b'{"name": "a", "dataset": "it", "skips": [1, 0]}', "skips[1]: expected int >= 1"),
        (b'{"name": "a", "dataset": "it", "joins": %s}' % (b"9" * 5000), "out of range"),
        (b'{"name": "a", "dataset": "it", "name": "b"}', "the key 'name' is given twice"),
        (b'{"name": "a", "dataset": "it", "n\\u0061me": "b"}', "the key 'name' is given twice"),
        (b'{"name": "a", "dataset": "it", "name" : "b"}', "the key 'name' is given twice"),
        (b'{"name": "a", "dataset": "it", "\\u001b]0;' + b"x" * 9000 + b'": 1}', r"field \x1b]0;x"),
    ],
)
def test_a_bad_document_is_named_in_one_short_line(content: bytes, message: str) -> None:
    with pytest.raises(CrossFLError) as refusal:
        decode(content, Facility, "facility.json", LIMIT)
    sentence = str(refusal.value)
    assert sentence.startswith("facility.json")
    assert message in sentence
    assert len(sentence) < 200
    assert sentence.isprintable()


def test_braces_and_colons_in_a_text_are_no_keys() -> None:
    content = rb'{"name": "a", "dataset": "\"}: {\"name\": {\\"}'
    assert decode(content, Facility, "it", LIMIT).dataset == '"}: {"name": {\\'


def _bombs() -> Iterator[tuple[str, bytes]]:
    head = b'{"kind": "update", "format": 2, '
    yield "arrays", b"[]" * (30 << 20)
    yield "arrays within the limit", b"[" + b"[]," * 340_000 + b"[]]"
    yield "one key many times", head + b'"tokens":1,' * 90_000 + b'"tokens":1}'
    yield "unknown keys", head + b",".join(b'"k%d":[]' % i for i in range(80_000)) + b"}"
    yield "files", head + b'"files":{' + b",".join(b'"%d":{}' % i for i in range(80_000)) + b"}}"
    yield (
        "energies",
        head + b'"metrics":{"training":{"joules":{' + b'"a":1,' * 150_000 + b'"b":1}}}}',
    )
    yield "an escaped text", head + b'"reason":"' + b"\\u0001" * 170_000 + b'"}'
    yield "depth", head + b'"x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001
    yield "digits", head + b'"round":' + b"9" * 1_000_000 + b"}"


@pytest.mark.parametrize(("name", "content"), [*_bombs()], ids=[name for name, _ in _bombs()])
def test_memory_is_bounded(name: str, content: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CrossFLError):
            manifest.decode(content, UpdateManifest, name)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * manifest.LARGEST_REPORT


def test_memory_of_the_largest_evaluation_is_bounded() -> None:
    written = manifest.Completion(prompt="p", completion="\u0001" * 3_000)
    evaluation = EvaluationManifest(
        facility="a", federation="f", dataset="it", round=1, model="0" * 64, status="complete",
        reason="too few samples", completions=(written,) * 57,
    ).sealed()  # fmt: skip
    content = encode(evaluation)
    assert 0.9 * manifest.LARGEST_REPORT < len(content) <= manifest.LARGEST_REPORT
    tracemalloc.start()
    try:
        assert manifest.decode(content, EvaluationManifest, "it") == evaluation
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * manifest.LARGEST_REPORT


def _valid() -> list[dict[str, Any]]:
    metrics = {
        "loss": 2.5, "tokens": 900, "samples": 20, "perplexity": 12.2, "exact_match": 0.5,
        "tasks": {"esol": {"loss": 1.0, "rmse": 2.0, "coverage": 1.0}},
    }  # fmt: skip
    cost = {"first_loss": 3.0, "tokens_per_second": 8.0, "ranks": 2, "joules": {"gpu": 12.5}}
    update = {
        "kind": "update", "format": 2, "facility": "a", "federation": "f", "round": 1,
        "files": {"delta.safetensors": {"bytes": 3, "sha256": "0" * 64}}, "base": "1" * 64,
        "status": "partial", "reason": "3 of 5 steps", "tokens": 9, "samples": 8, "steps": 3,
        "seconds": {"queue": 1.0, "train": 2.0},
        "metrics": {"validation": metrics, "local": None, "training": cost},
    }  # fmt: skip
    evaluation = {
        "kind": "evaluation", "format": 2, "facility": "a", "federation": "f", "dataset": "it",
        "round": 1, "model": "1" * 64, "status": "complete", "metrics": metrics, "seconds": 3.0,
        "completions": [{"prompt": "p", "completion": "c"}],
    }  # fmt: skip
    line = {
        "round": 1, "finished": "2025-01-01T00:00:00+00:00", "seconds": 3.5, "model": "1" * 64,
        "facilities": {"a": {"share": 1.0, "status": "complete", "metrics": {"local": metrics}}},
    }  # fmt: skip
    event = {"time": 3.0, "phase": "train", "step": 1, "steps": 4, "loss": 2.0, "message": "m"}
    return [update, evaluation, line, event]


def _mutate(draw: random.Random, document: Any) -> bytes:
    """A document with some of its values, keys or bytes replaced."""
    document = copy.deepcopy(document)
    for _ in range(draw.randint(1, 3)):
        places = list(_places(document))
        container, key = draw.choice(places)
        action = draw.random()
        if action < 0.6:
            container[key] = copy.deepcopy(draw.choice(HOSTILE))
        elif action < 0.8:
            del container[key]
        elif isinstance(container, dict):
            container[draw.choice(("", "kind", "format", "x\n", "\ud800", "loss"))] = 1
    content = bytearray(json.dumps(document).encode())
    if draw.random() < 0.3:
        start = draw.randrange(len(content))
        content[start : start + draw.randint(0, 20)] = draw.randbytes(draw.randint(0, 4))
    return bytes(content)


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    items = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
    for key, value in items:
        yield node, key
        if isinstance(value, dict | list):
            yield from _places(value)


def test_a_hostile_document_is_a_value_or_a_sentence() -> None:
    draw = random.Random(7)
    accepted = refused = 0
    documents = _valid()
    for _ in range(6_000):
        which = draw.randrange(len(documents))
        content = _mutate(draw, documents[which])
        try:
            value: Record
            if which == 0:
                value = manifest.decode(content, UpdateManifest, "it")
            elif which == 1:
                value = manifest.decode(content, EvaluationManifest, "it")
            elif which == 2:
                value = history.decode_line(content, "it")
            else:
                value = events.decode_line(content, "it")
        except CrossFLError as refusal:
            refused += 1
            assert str(refusal).startswith("it")
            assert str(refusal).isprintable()
            assert len(str(refusal)) < 300
        else:
            accepted += 1
            json.loads(encode(value), parse_constant=pytest.fail)
    assert accepted > 300
    assert refused > 3_000


def test_the_documents_that_are_mutated_are_valid() -> None:
    update, evaluation, line, event = (json.dumps(document).encode() for document in _valid())
    manifest.decode(update, UpdateManifest, "it")
    manifest.decode(evaluation, EvaluationManifest, "it")
    history.decode_line(line, "it")
    events.decode_line(event)
