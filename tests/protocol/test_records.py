"""CWL records, dataclasses and flags are one declaration; values from outside are checked."""

import argparse
import dataclasses
from typing import Any

import pytest
import yaml

from crossfl.errors import CrossFLError
from crossfl.protocol.records import (
    Aggregation,
    Facility,
    Lora,
    Record,
    Retention,
    Task,
    Training,
    add_flags,
    choices_of,
    flag,
    from_flags,
    from_words,
    scalar_of,
)
from tests.support.paths import ROOT

RECORDS = [Facility, Task, Training, Lora, Aggregation, Retention]
CWL_TYPE = {int: "int", float: "double", str: "string"}


def _cwl_type(field: "dataclasses.Field[Any]") -> Any:
    optional = field.default is not dataclasses.MISSING
    if choices := choices_of(field):
        enum = {"type": "enum", "name": field.name, "symbols": list(choices)}
        return ["null", enum] if optional else enum
    many = "[]" if "tuple" in str(field.type) else ""
    return CWL_TYPE[scalar_of(field)] + many + ("?" if optional else "")


@pytest.mark.parametrize("record", RECORDS)
def test_cwl_dataclass_and_flags_agree(record: type[Record]) -> None:
    name = record.__name__.lower()
    declared = yaml.safe_load((ROOT / "steps" / "types" / f"{name}.yml").read_text())
    assert declared["name"] == name
    fields = {field.name: field for field in dataclasses.fields(record)}
    assert list(declared["fields"]) == list(fields)
    for field_name, entry in declared["fields"].items():
        field = fields[field_name]
        assert entry["type"] == _cwl_type(field)
        assert entry["doc"] == field.metadata["doc"]
        if field.default not in (dataclasses.MISSING, None, ()):
            assert f"Default {field.default}." in entry["doc"]
        prefix = entry["inputBinding"]["prefix"]
        assert prefix == (f"{field_name}=" if record is Facility else flag(field_name))
    parser = argparse.ArgumentParser()
    add_flags(parser, record)
    assert {a.option_strings[0] for a in parser._actions[1:]} == {flag(n) for n in fields}


def test_flags_and_job_file_give_the_same_record() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Training)
    words = ["--learning-rate", "1e-3", "--schedule", "cosine", "--batch-size", "64"]
    values = {"learning_rate": 1e-3, "schedule": "cosine", "batch_size": 64}
    assert from_flags(parser.parse_args(words), Training) == Training.parse(values)


def test_words() -> None:
    facility = from_words(["name=leonardo", "dataset=it", "skips=2,5"], Facility)
    assert facility == Facility(name="leonardo", dataset="it", skips=(2, 5))


@pytest.mark.parametrize(
    ("record", "values", "message"),
    [
        (Training, {"batch_size": 0}, "training.batch_size is 0: it must be at least 1"),
        (Training, {"batch_size": 1.5}, "training.batch_size is 1.5: expected int"),
        (Training, {"batch_size": True}, "training.batch_size is True: expected int"),
        (Training, {"learning_rate": float("nan")}, "training.learning_rate is nan"),
        (Training, {"schedule": "sawtooth"}, "choose one of constant, linear, cosine"),
        (Training, {"rate": 1}, "training: no field 'rate'"),
        (Aggregation, {"strategy": "newton"}, "choose one of fedavg, fedavgm"),
        (Facility, {"name": "leonardo"}, "facility.dataset is missing"),
        (Facility, {"name": "a; rm -rf /", "dataset": "it"}, "use letters, digits"),
        (Facility, {"name": "../x", "dataset": "it"}, "use letters, digits"),
        (Facility, {"name": 3, "dataset": "it"}, "facility.name is 3: expected str"),
    ],
)
def test_bad_values_are_named(record: type[Record], values: dict[str, Any], message: str) -> None:
    with pytest.raises(CrossFLError, match=message.replace(".", r"\.")):
        record.parse(values)
