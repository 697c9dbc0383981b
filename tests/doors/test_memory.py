"""The worst that a door is sent costs it less than 256 MiB, beyond what its imports take."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from crossfl.protocol.decoding import encode_compact
from crossfl.protocol.layout import MANIFEST
from crossfl.protocol.manifest import (
    LIMITS,
    FileEntry,
    ModelManifest,
    UpdateManifest,
)

pytestmark = pytest.mark.slow
MOST = 256
"""MiB."""
PROBE = """\
import resource, sys
from pathlib import Path
from crossfl.errors import CrossFLError
from crossfl.protocol.manifest import EvaluationManifest, UpdateManifest
from crossfl.storage import manifest
from crossfl.storage.tensorfile import TensorFile
from crossfl.storage.model_folder import ModelFolder

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

doors = {
    "update": lambda path: manifest.verify(path, UpdateManifest, only=()),
    "evaluation": lambda path: manifest.verify(path, EvaluationManifest, only=()),
    "folder": ModelFolder.received,
    "header": lambda path: TensorFile(path / "model.safetensors"),
}
before = peak()
for path in sorted(Path(sys.argv[2]).iterdir()):
    try:
        doors[sys.argv[1]](path)
        raise SystemExit(f"{path.name} was admitted")
    except CrossFLError as error:
        print(path.name, peak() - before, str(error)[:60])
"""
DIGEST = "0" * 64


def _deep_paths(kind: type[UpdateManifest] | type[ModelManifest]) -> bytes:
    """A sealed manifest as long as may be, of files in folders that lie as deep as may be."""
    count = (LIMITS[kind] - 1000) // (255 + 95)
    files = {
        f"{i:06}/{'a/' * 123}a": FileEntry(bytes=0, sha256=DIGEST)
        for i in range(min(count, 9999 if kind is UpdateManifest else count))
    }
    if kind is ModelManifest:
        return encode_compact(ModelManifest(round=0, files=files).sealed().asdict())
    update = UpdateManifest(
        facility="a", federation="f", round=1, base=DIGEST, status="complete", files=files
    )
    return encode_compact(update.sealed().asdict())


def _documents(kind: str) -> dict[str, bytes]:
    head = f'{{"kind": "{kind}", "format": 2, '.encode()
    return {
        "arrays": b"[]," * (20 << 20),
        "depth": head + b'"x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
        "digits": head + b'"round": 1' + b"0" * 400 + b"}",
        "more digits": head + b'"round": ' + b"9" * 1_000_000 + b"}",
        "keys": head + b",".join(b'"%x":"%x"' % (i, i) for i in range(1_000_000)) + b"}",
        "keys within the limit": head + b",".join(b'"%x":1' % i for i in range(90_000)) + b"}",
        "wide characters": head + '"reason": "\U0001f600'.encode() + b"a" * 1_000_000 + b'"}',
    }


def _header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _headers() -> dict[str, bytes]:
    pairs = b",".join(b'"%x":"%x"' % (i, i) for i in range(900_000))
    return {
        "lists": _header(b'{"a":[' + b"[]," * 5_000_000 + b"[]]}"),
        "keys": _header(b"{" + pairs + b"}"),
        "keys within the limit": _header(b"{" + pairs[: pairs.index(b',"7a0')] + b"}"),
        "wide characters": _header('{"\U0001f600":"'.encode() + b"a" * 16_000_000 + b'"}'),
        "depth": _header(b'{"a":' + b"[" * 200_000),
    }


def _measure(door: str, documents: dict[str, bytes], name: str, folder: Path) -> None:
    for case, content in documents.items():
        (folder / "cases" / case).mkdir(parents=True)
        (folder / "cases" / case / name).write_bytes(content)
    command = [sys.executable, "-c", PROBE, door, str(folder / "cases")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(documents)
    grown = [
        int(line.removeprefix(case).split()[0])
        for case, line in zip(sorted(documents), lines, strict=True)
    ]
    assert max(grown) < MOST, done.stdout


@pytest.mark.parametrize("door", ["update", "evaluation"])
def test_a_manifest(door: str, tmp_path: Path) -> None:
    documents = _documents(door)
    if door == "update":
        documents["deep paths"] = _deep_paths(UpdateManifest)
    _measure(door, documents, MANIFEST, tmp_path)


def test_the_manifest_of_a_model(tmp_path: Path) -> None:
    documents = _documents("model")
    documents["deep paths"] = _deep_paths(ModelManifest)
    documents["wide characters"] = '{"x": "\U0001f600'.encode() + b"a" * 16_000_000 + b'"}'
    _measure("folder", documents, MANIFEST, tmp_path)


def test_the_settings_of_a_model(tmp_path: Path) -> None:
    documents = {
        "arrays": b"[" + b"[]," * 249_000 + b"[]]",
        "depth": b"[" * 200_000,
        "keys": b"{" + b",".join(b'"%x":"%x"' % (i, i) for i in range(490_000)) + b"}",
        "digits": json.dumps({"hidden_size": 10**400}).encode(),
    }
    _measure("folder", documents, "config.json", tmp_path)


def test_the_header_of_a_file_of_tensors(tmp_path: Path) -> None:
    _measure("header", _headers(), "model.safetensors", tmp_path)
