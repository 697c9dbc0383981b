"""Records are checked however they are made, and what is wrong is named."""

import argparse
from typing import Any

import pytest

from crossfl.errors import CrossFLError
from crossfl.protocol.fields import Record, fields_of, is_name
from crossfl.protocol.flags import add_flags, flag, from_flags, from_flags_if_any, from_words
from crossfl.protocol.records import (
    Aggregation,
    Facility,
    Lora,
    Task,
    Training,
    allowance_of,
)
from crossfl.protocol.reference import RECORDS

HUGE = 10**400
TASK = Task(
    facility="leonardo", dataset="it", round=3, local_steps=40, seed=1, schedule_step=80,
    schedule_steps=400, samples_seen=640, data_seed=2, base="0" * 64, federation="f",
)  # fmt: skip


@pytest.mark.parametrize(
    ("record", "values", "message"),
    [
        (Training, {"batch_size": 0}, "training.batch_size is 0: it must be at least 1"),
        (Training, {"batch_size": "0"}, "training.batch_size is 0: it must be at least 1"),
        (Training, {"batch_size": 1.5}, "training.batch_size is 1.5: expected int"),
        (Training, {"batch_size": "1.5"}, "training.batch_size is '1.5': expected int"),
        (Training, {"batch_size": True}, "training.batch_size is True: expected int"),
        (Training, {"batch_size": 2**31}, "it must be at most 2147483647"),
        (Training, {"batch_size": float("inf")}, "training.batch_size is inf: give a finite"),
        (Training, {"learning_rate": float("nan")}, "training.learning_rate is nan: give a finite"),
        (Training, {"learning_rate": "inf"}, "training.learning_rate is inf: give a finite"),
        (Training, {"learning_rate": HUGE}, "it must be at most 1.79"),
        (Training, {"learning_rate": True}, "training.learning_rate is True: expected float"),
        (Training, {"schedule": "sawtooth"}, "choose one of constant, linear, cosine"),
        (Training, {"rate": 1}, "training: no field 'rate'; it has batch_size, "),
        (Training, {"packing": "yes"}, "training.packing is 'yes': expected bool"),
        (Training, [], "training is []: expected a record of named fields"),
        (Training, {"threads": int("f" * 5000, 16)}, "is a number of too many digits"),
        (Aggregation, {"server_optimizer": "newton"}, "choose one of fedavg, fedavgm, fedadam"),
        (Aggregation, {"max_norm_ratio": 0.5}, "it must be at least 1"),
        (Aggregation, {"server_momentum": 1}, "it must be below 1"),
        (Facility, {"name": "leonardo"}, "facility.dataset is missing"),
        (Facility, {"name": "a; rm -rf /", "dataset": "it"}, "facility.name is 'a; rm -rf /': use"),
        (Facility, {"name": "../x", "dataset": "it"}, "use letters, digits"),
        (Facility, {"name": "leonardo\n", "dataset": "it"}, "use letters, digits"),
        (Facility, {"name": 3, "dataset": "it"}, "facility.name is 3: expected str"),
        (Facility, {"name": "a", "dataset": "it" * 501}, "it must have at most 1000 characters"),
        (Facility, {"name": "a", "dataset": "it", "skips": [2, 0]}, "facility.skips is [2, 0]: it"),
        (Facility, {"name": "a", "dataset": "it", "skips": 2}, "expected a list"),
        (Facility, {"name": "a", "dataset": "it", "skips": "2,x"}, "expected int"),
        (Task, TASK.asdict() | {"dataset": None}, "task.dataset is missing"),
        (Lora, {"base_model": "b", "base_digest": "0"}, "expected a sha256"),
        (Aggregation, {"signers": ""}, "aggregation.signers is '': it must not be empty"),
    ],
)
def test_bad_values_are_named(record: type[Record], values: Any, message: str) -> None:
    with pytest.raises(CrossFLError) as refusal:
        record.parse(values)
    assert message in str(refusal.value)
    assert len(str(refusal.value)) < 600


def test_a_record_cannot_be_made_or_changed_around_its_limits() -> None:
    with pytest.raises(CrossFLError, match=r"training\.batch_size is 0: it must be at least 1"):
        Training(batch_size=0)
    with pytest.raises(CrossFLError, match=r"training\.learning_rate is nan"):
        Training(learning_rate=float("nan"))
    with pytest.raises(CrossFLError, match=r"training\.batch_size is '8': expected int"):
        Training(batch_size="8")  # type: ignore[arg-type]
    with pytest.raises(CrossFLError, match="at least 1"):
        Training().replace(batch_size=-1)
    with pytest.raises(AttributeError):
        Training().batch_size = 3  # type: ignore[misc]


def test_values_have_the_type_of_their_field() -> None:
    training = Training(learning_rate=1)
    assert isinstance(training.learning_rate, float)
    assert Facility(name="a", dataset="it", skips=[2]).skips == (2,)  # type: ignore[arg-type]
    assert Training.parse({"batch_size": 8.0}) == Training(batch_size=8)


def test_what_is_unset_is_left_out() -> None:
    facility = Facility(name="leonardo", dataset="it", joins=2)
    assert facility.asdict() == {
        "name": "leonardo", "dataset": "it", "joins": 2, "skips": [], "attempts": 2
    }  # fmt: skip
    assert Facility.parse(facility.asdict()) == facility
    assert Facility.parse({**facility.asdict(), "leaves": None}) == facility


def test_names() -> None:
    assert is_name("a-1_b.c")
    for name in ("", ".a", "a b", "a\n", "a" * 101, "é", "a/b"):
        assert not is_name(name)
        with pytest.raises(CrossFLError, match=r"^facility.name is .*: use letters, digits"):
            Facility.parse({"name": name, "dataset": "it"})


@pytest.mark.parametrize("record", RECORDS)
def test_every_field_has_a_flag_and_a_description(record: type[Record]) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, record)
    options = {action.option_strings[0]: action for action in parser._actions[1:]}
    assert list(options) == [flag(field.name) for field in fields_of(record)]
    for field in fields_of(record):
        assert field.doc.endswith(".")
        assert "Default" not in field.doc
        assert options[flag(field.name)].help == field.described
        assert options[flag(field.name)].required == field.required
    parser.format_help()


def test_flags_and_job_file_give_the_same_record() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Training)
    words = ["--learning-rate", "1e-3", "--schedule", "cosine", "--batch-size", "64"]
    values = {"learning_rate": 1e-3, "schedule": "cosine", "batch_size": 64}
    assert from_flags(parser.parse_args(words), Training) == Training.parse(values)
    with pytest.raises(SystemExit):
        parser.parse_args(["--schedule", "sawtooth"])


@pytest.mark.parametrize(
    ("words", "packing"),
    [
        ([], False),
        (["--packing"], True),
        (["--packing", "true"], True),
        (["--packing", "false"], False),
        (["--packing", "--compile"], True),
    ],
)
def test_a_boolean_flag_stands_alone_or_with_its_value(words: list[str], packing: bool) -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Training)
    assert from_flags(parser.parse_args(words), Training).packing is packing


def test_a_record_may_be_left_out_whole() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, Lora, optional=True)
    assert from_flags_if_any(parser.parse_args([]), Lora) is None
    lora = from_flags_if_any(parser.parse_args(["--base-model", "llama"]), Lora)
    assert lora == Lora(base_model="llama")
    with pytest.raises(CrossFLError, match=r"lora\.base_model is missing"):
        from_flags_if_any(parser.parse_args(["--rank", "4"]), Lora)


def test_words() -> None:
    facility = from_words(["name=leonardo", "dataset=a=b", "skips=2,5"], Facility)
    assert facility == Facility(name="leonardo", dataset="a=b", skips=(2, 5))
    with pytest.raises(CrossFLError, match="'joins' is not of the form field=value"):
        from_words(["name=leonardo", "joins"], Facility)
    with pytest.raises(CrossFLError, match="'name' is given twice"):
        from_words(["name=leonardo", "name=lumi"], Facility)


def test_an_allowance_is_what_the_steps_can_use() -> None:
    allowance = allowance_of(TASK, Training(batch_size=8, sequence_length=512, warmup_steps=5))
    assert (allowance.steps, allowance.samples, allowance.tokens) == (40, 320, 163840)
    assert (allowance.schedule_step, allowance.schedule_steps) == (80, 400)
    assert allowance.warmup_steps == 5
    large = allowance_of(TASK.replace(local_steps=2**31 - 1), Training())
    assert (large.samples, large.tokens) == (8 * (2**31 - 1), 8 * 512 * (2**31 - 1))
