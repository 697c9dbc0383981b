"""Manifests: what arrives is what was sent, or is refused by name."""

from collections.abc import Callable
from pathlib import Path

import pytest

from crossfl.errors import CrossFLError
from crossfl.protocol.manifest import ModelManifest, StateManifest, UpdateManifest
from crossfl.storage import manifest
from crossfl.storage.files import publish


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit flipped": (lambda d: _flip(d / "delta.safetensors"), "does not match its sha256"),
    "cut": (lambda d: _cut(d / "delta.safetensors"), "28407 bytes instead of 28408"),
    "a file missing": (lambda d: (d / "delta.safetensors").unlink(), "is missing"),
    "a file too many": (lambda d: (d / "extra").touch(), "is not in the manifest"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "has no manifest.json"),
    "manifest cut": (lambda d: _cut_half(d / "manifest.json"), "is not valid JSON"),
    "empty manifest": (lambda d: (d / "manifest.json").write_text("{}"), "kind"),
    "a digest changed": (lambda d: _replace_digest(d / "manifest.json"), "is corrupt"),
    "a count changed": (lambda d: _replace(d, '"tokens": ', '"tokens": 9'), "is corrupt"),
    "a newer format": (lambda d: _replace(d, '"format": 2', '"format": 3'), "has format 3"),
    "another kind": (lambda d: _replace(d, '"update"', '"model"'), "describes a model"),
}


def _cut_half(path: Path) -> None:
    path.write_text(path.read_text()[:100])


def _replace(directory: Path, old: str, new: str) -> None:
    path = directory / "manifest.json"
    path.write_text(path.read_text().replace(old, new, 1))


def _replace_digest(path: Path) -> None:
    lines = path.read_text().splitlines()
    path.write_text(
        "\n".join(' "digest": "' + 64 * "0" + '",' if '"digest"' in x else x for x in lines)
    )


def test_an_unchanged_directory_is_accepted(round_: Path) -> None:
    assert manifest.verify(round_ / "leonardo" / "update", UpdateManifest).facility == "leonardo"
    assert manifest.verify(round_ / "global_model", ModelManifest).round == 0
    assert manifest.verify(round_ / "state", StateManifest).round == 0


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(round_: Path, damage: str) -> None:
    update = round_ / "leonardo" / "update"
    change, message = DAMAGES[damage]
    change(update)
    with pytest.raises(CrossFLError, match=message):
        manifest.verify(update, UpdateManifest)


def test_a_directory_is_published_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), publish(tmp_path / "update") as directory:
        (directory / "half").touch()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    with publish(tmp_path / "update") as directory:
        (directory / "whole").touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["update", "whole"]
    with (
        pytest.raises(CrossFLError, match="exists already"),
        publish(tmp_path / "update"),
    ):
        pass
    assert (tmp_path / "update" / "whole").exists()
