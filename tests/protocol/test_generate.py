"""CWL types, reference pages and schemas are what the records say."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from msgspec import inspect

from crossfl.protocol import reference
from crossfl.protocol.fields import Field, Record, fields_of, label_of
from crossfl.protocol.flags import flag
from crossfl.protocol.generate import WORDED, documents, main
from crossfl.protocol.records import Aggregation, Task, Training
from tests.support.paths import ROOT

NAMES = {"IntType": "int", "FloatType": "double", "StrType": "string", "BoolType": "boolean"}


def _cwl_type(field: Field) -> Any:
    if field.choices:
        enum = {"type": "enum", "name": field.name, "symbols": list(field.choices)}
        return enum if field.required else ["null", enum, *(["int"] if field.counts else [])]
    name = "File" if field.name == "signers" else NAMES[type(field.item).__name__]
    if field.name in ("samples_seen", "samples", "tokens"):
        name = "long"  # an int of CWL ends at 2³¹ − 1
    return name + ("[]" if field.many else "") + ("" if field.required else "?")


@pytest.mark.parametrize("record", reference.RECORDS)
def test_cwl_has_the_fields_of_the_record(record: type[Record]) -> None:
    name = label_of(record)
    declared = yaml.safe_load((ROOT / "steps" / "types" / f"{name}.yml").read_text("utf-8"))
    assert (declared["type"], declared["name"]) == ("record", name)
    assert declared["doc"] == (record.__doc__ or "").partition("\n")[0]
    assert list(declared["fields"]) == [field.name for field in fields_of(record)]
    for field in fields_of(record):
        entry = declared["fields"][field.name]
        assert entry["type"] == _cwl_type(field)
        assert entry["doc"].startswith(field.doc)
        binding = entry["inputBinding"]
        worded = record in WORDED
        assert binding["prefix"] == (f"{field.name}=" if worded else flag(field.name))
        assert binding.get("separate", True) is not worded
        assert ("itemSeparator" in binding) == isinstance(field.kind, inspect.VarTupleType)


def test_defaults_end_the_descriptions() -> None:
    def doc(record: type[Record], name: str) -> str:
        path = ROOT / "steps" / "types" / f"{label_of(record)}.yml"
        return str(yaml.safe_load(path.read_text("utf-8"))["fields"][name]["doc"])

    assert doc(Training, "batch_size").endswith("over all ranks. Default 8.")
    assert doc(Training, "packing").endswith("see each other. Default false.")
    assert doc(Aggregation, "max_norm").endswith("may have. Default 1000000.0.")
    assert doc(Training, "threads").endswith("every core.")
    assert doc(Task, "dataset").endswith("dataset.")


def test_generated_files_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "--root", str(ROOT)]) == 0
    assert capsys.readouterr().err == ""


def test_a_file_that_was_edited_or_lost_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--root", str(tmp_path)]
    assert main(root) == 0
    assert main(["--check", *root]) == 0
    edited, lost = tmp_path / "steps/types/task.yml", tmp_path / "docs/reference/history.md"
    edited.write_text(edited.read_text().replace("int?", "long?"))
    lost.unlink()
    assert main(["--check", *root]) == 1
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == [
        str(edited),
        str(lost),
    ]
    assert not lost.exists()
    assert main(root) == 0
    assert main(["--check", *root]) == 0


def test_schemas_are_closed_and_pages_tell_every_field() -> None:
    texts = {path.name: text for path, text in documents().items()}
    schema = json.loads(texts["update-manifest.json"])
    update = schema["$defs"]["UpdateManifest"]
    assert update["additionalProperties"] is False
    assert {"facility", "federation", "round", "base", "status", "kind"} == set(update["required"])
    for record in reference.RECORDS:
        for field in fields_of(record):
            assert f"| `{field.name}` | " in texts["records.md"]
    assert "| `packing` | boolean | `false` |" in texts["records.md"]
    assert "| `CROSSFL_PROMPTS` |" in texts["variables.md"]
    assert "| 130 |" in texts["exit-codes.md"]
