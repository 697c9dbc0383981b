"""Job files: what is wrong is named, with the file, before anything is done with it."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from schema_salad.utils import yaml_no_ts

from crossfl.errors import CrossFLError
from crossfl.storage.job import Job, _Loader
from tests.support.paths import CWL

Document = dict[str, Any]
Change = Callable[[Document], object]


def checked(document: Document | str, path: Path) -> Job:
    """Read a job and check it, as `crossfl check` and a run do."""
    text = document if isinstance(document, str) else yaml.safe_dump(document)
    path.write_text(text, "utf-8")
    job = Job.load(path)
    job.check(path)
    return job


@pytest.fixture
def document(tmp_path: Path) -> Document:
    """The job of the tests, beside its config."""
    (tmp_path / "config.json").write_text((CWL / "config.json").read_text())
    values: Document = yaml.safe_load((CWL / "federation.yml").read_text())
    return values


def with_training(**values: Any) -> Change:
    return lambda d: d["training"].update(values)


def with_rules(**values: Any) -> Change:
    return lambda d: d["aggregation"].update(values)


def with_facility(**values: Any) -> Change:
    return lambda d: d["facilities"][0].update(values)


def having(**values: Any) -> Change:
    return lambda d: d.update(values)


def folder(path: str) -> Document:
    return {"class": "Directory", "path": path}


def file(path: str) -> Document:
    return {"class": "File", "path": path}


WRONG: dict[str, tuple[Change, str]] = {
    "unknown input": (having(agregation={}), "no field 'agregation'; a job has facilities"),
    "unknown field": (with_training(batch_siz=4), "training: no field 'batch_siz'; it has"),
    "unknown field of a facility": (with_facility(datset="x"), "facility: no field 'datset'"),
    "key of another kind": (having(**{"7": 1}), "no field '7'"),
    "missing": (lambda d: d.pop("rounds"), "field 'rounds' is missing"),
    "no value": (having(local_steps=None), "field 'local_steps' is missing"),
    "missing in a facility": (lambda d: d["facilities"][1].pop("dataset"), "dataset is missing"),
    "negative": (having(rounds=-3), "rounds is -3: it must be from 1 to"),
    "no steps": (having(local_steps=0), "local_steps is 0: it must be from 1 to"),
    "too large": (having(seed=2**40), "seed is 1099511627776: it must be from"),
    "word for a number": (having(rounds="twelve"), "rounds is 'twelve': give a whole number"),
    "truth for a number": (having(rounds=True), "rounds is True: give a whole number"),
    "word in a record": (with_training(batch_size="many"), "training.batch_size is 'many'"),
    "list for a record": (having(training=[]), "training is []: expected a record"),
    "word for a record": (having(aggregation="fedavg"), "aggregation is 'fedavg': expected"),
    "empty record": (having(lora={}), "lora.base_model is missing"),
    "choice": (with_rules(server_optimizer="newton"), "server_optimizer is 'newton': choose one"),
    "no facilities": (having(facilities=[]), "facilities is []: give a list of records"),
    "facilities by name": (having(facilities={"a": 1}), "give a list of records"),
    "facilities as words": (having(facilities=["leonardo"]), "facility is 'leonardo': expected"),
    "facility twice": (with_facility(name="karolina"), "facility 'karolina' is named twice"),
    "prompts": (having(prompts="it 3="), "prompts is 'it 3=': give a list of strings"),
    "tokenizer": (having(tokenizer="byte"), "tokenizer is 'byte': give bytes, or {class: Direc"),
    "config as a word": (having(config="config.json"), "config is 'config.json': give {class: Fi"),
    "config of another class": (having(config=folder(".")), "give {class: File, path: …}"),
    "far away": (having(config={"class": "File", "location": "https://x/c"}), "on this machine"),
    "no config": (having(config=file("nothing.json")), "nothing.json, which cannot be read: No su"),
    "config that is a folder": (having(config=file("data")), "data, which cannot be read: Is a d"),
    "config that is no JSON": (having(config=file("words.txt")), "words.txt, which is not JSON"),
    "config without fields": (having(config=file("list.json")), "list.json, which holds no fields"),
    "neither": (lambda d: d.pop("config"), "give either model, a directory, or config"),
    "both": (having(model=folder("data")), "give either model, a directory, or config"),
    "no model": (
        lambda d: d.update(config=None, model=folder("nothing")),
        "nothing, which is no folder on this machine",
    ),
    "model without config": (
        lambda d: d.update(config=None, model=folder("data")),
        "data, which has no config.json",
    ),
    "no tokenizer": (having(tokenizer=folder("data")), "data, which has no tokenizer_config.json"),
    "no signers": (with_rules(signers=file("signers")), "signers, which cannot be read: No such"),
    "signers as a word": (with_rules(signers="signers"), "aggregation.signers is 'signers': give"),
    "quorum": (with_rules(quorum=3), "2 facilities take part in round 1 of 2, which needs 3"),
    "nobody": (with_facility(joins=2), "1 facility takes part in round 1 of 2, which needs 2"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named(what: str, document: Document, tmp_path: Path) -> None:
    change, message = WRONG[what]
    (tmp_path / "data").mkdir()
    (tmp_path / "words.txt").write_text("words")
    (tmp_path / "list.json").write_text("[]")
    if what == "nobody":
        document["aggregation"]["quorum"] = 2
    change(document)
    path = tmp_path / "job.yml"
    with pytest.raises(CrossFLError, match=re.escape(message)) as raised:
        checked(document, path)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a job file: it holds no fields"),
        ("- a", "is not a job file: it holds no fields"),
        ("a: [", "cannot be read as a job file"),
        ("rounds: 2\nrounds: 3\n", "'rounds' is given twice"),
        ("training: {batch_size: 2, batch_size: 4}\n", "'batch_size' is given twice"),
        ("a: !!python/object:os.system x\n", "cannot be read as a job file"),
    ],
)
def test_what_is_no_job_file(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CrossFLError, match=message):
        checked(text, tmp_path / "job.yml")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "job.yml"
    path.write_bytes(b"\xff\xfe\x00")
    for file in (path, tmp_path, tmp_path / "nothing.yml"):
        with pytest.raises(CrossFLError, match="cannot be read as a job file"):
            Job.load(file)


def test_what_is_right(document: Document, tmp_path: Path) -> None:
    """Keys for a CWL engine, inputs of a larger workflow, anchors, and very many rounds."""
    document |= {"$namespaces": {"cwltool": "x"}, "cwl:requirements": [], "rounds": 2**31 - 1}
    path = tmp_path / "job.yml"
    begun = time.monotonic()
    job = checked(document, path)
    assert time.monotonic() - begun < 5
    assert job.config == tmp_path / "config.json"
    path.write_text(yaml.safe_dump(document | {"corpus": 1}))
    assert Job.load(path, {"corpus"}) == job
    checked(
        "base: &base {batch_size: 4}\n".replace("base: ", "$base: ")
        + "training: {<<: *base, batch_size: 8}\n"
        + yaml.safe_dump({k: v for k, v in document.items() if k != "training"}),
        path,
    )
    assert Job.load(path).training.batch_size == 8


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("2026-11-21", "2026-11-21"),
        ("1:30", "1:30"),
        ("012", "012"),
        ("true", True),
        ("1e-3", 0.001),
        ("-3", -3),
        (".5", 0.5),
        ("~", None),
        ("", None),
        ("null", None),
        ("nothing", "nothing"),
        ("'1'", "1"),
    ],
)
def test_plain_values_are_what_the_engine_takes_them_for(text: str, value: object) -> None:
    """Where the two differed, a dataset `no`, of Norwegian, was refused or trained as `False`."""
    engines = yaml_no_ts().load(f"value: {text}")["value"]
    own = yaml.load(f"value: {text}", Loader=_Loader)["value"]  # noqa: S506
    assert own == engines or text == "012"  # there a number, which no field of a job wants
    assert own == value and type(own) is type(value)


def test_a_dataset_that_is_named_like_a_truth(document: Document, tmp_path: Path) -> None:
    text = yaml.safe_dump(document).replace("dataset: words", "dataset: no", 1)
    assert checked(text, tmp_path / "job.yml").facilities[0].dataset == "no"
