"""Ten thousand documents at each door: a value within its limits, or a sentence, and no third."""

import argparse
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from crossfl.errors import CrossFLError
from crossfl.facility import place
from crossfl.protocol import manifest as documents
from crossfl.protocol.decoding import encode
from crossfl.protocol.flags import add_flags, flag, from_flags, from_words
from crossfl.protocol.layout import MANIFEST
from crossfl.protocol.manifest import EvaluationManifest, ModelManifest, UpdateManifest
from crossfl.protocol.records import Allowance, Facility, Task, Training
from crossfl.server.deliveries import Exclusion, admit_evaluation
from crossfl.steps.report import report
from crossfl.storage import manifest
from crossfl.storage.model_folder import ModelFolder
from tests.support import fuzz
from tests.support.federation import Federation, write_document
from tests.support.page import Page

pytestmark = pytest.mark.slow
TRIES = 10_000
MODEL = {"a": torch.zeros(4, 3)}
METRICS = {
    "loss": 2.5, "tokens": 900, "samples": 20, "perplexity": 12.2, "exact_match": 0.5,
    "tasks": {"esol": {"loss": 1.0, "rmse": 2.0, "coverage": 1.0}},
}  # fmt: skip
UPDATE = {
    "kind": "update", "format": 2, "facility": "evil", "federation": "f", "round": 1,
    "files": {"delta.safetensors": {"bytes": 3, "sha256": "0" * 64}}, "base": "1" * 64,
    "status": "partial", "reason": "3 of 5 steps", "tokens": 9, "samples": 8, "steps": 3,
    "seconds": {"queue": 1.0, "train": 2.0},
    "metrics": {"validation": METRICS, "training": {"ranks": 2, "joules": {"gpu": 12.5}}},
}  # fmt: skip


def check_sentence(error: CrossFLError) -> None:
    sentence = str(error)
    assert sentence
    assert not {c for c in sentence if not c.isprintable() and c != "\n"}, repr(sentence)


def test_an_update_is_a_value_or_a_sentence() -> None:
    """As decoded; through the whole of aggregation and report, `tests/server/test_fuzz.py`."""
    outcomes = Counter[str]()
    for document in fuzz.hostile_documents(UPDATE, seed=11, tries=TRIES):
        content = document if isinstance(document, bytes) else json.dumps(document).encode()
        try:
            stated = documents.decode(content, UpdateManifest, "it")
        except CrossFLError as error:
            check_sentence(error)
            outcomes["refused"] += 1
        else:
            json.loads(encode(stated.sealed()), parse_constant=pytest.fail)
            outcomes["read"] += 1
    assert outcomes.total() == TRIES
    assert min(outcomes.values()) > TRIES / 50, outcomes


def test_an_evaluation_counts_or_is_not_evaluated(tmp_path: Path) -> None:
    federation = Federation(tmp_path, MODEL, quorum=1)
    out = federation.run([federation.update("evil", federation.deltas(0))])
    federation.go_on(out)
    state = federation.server
    good = {
        "kind": "evaluation", "format": 2, "facility": "evil", "federation": state.federation,
        "dataset": "it", "round": 1, "model": state.model, "status": "complete", "metrics": METRICS,
        "completions": [{"prompt": "p", "completion": "c"}], "seconds": 3.0, "files": {},
    }  # fmt: skip
    path = tmp_path / "evaluation"
    path.mkdir()
    asked = federation.allowances({"evil": 0})
    outcomes = Counter[str]()
    for document in fuzz.hostile_documents(good, seed=12, tries=TRIES):
        if isinstance(document, bytes):
            (path / MANIFEST).write_bytes(document)
        else:
            write_document(path, document, EvaluationManifest)
        admitted = admit_evaluation(path, "evil", state)
        verdict = "refused" if isinstance(admitted, Exclusion) else "admitted"
        if isinstance(admitted, Exclusion):
            assert admitted.facility == "evil"
            assert admitted.reason.isprintable()
            assert str(tmp_path) not in admitted.reason
        if outcomes[verdict] < 4:
            report(federation.state, [path], tmp_path, allowances=asked)
            Page((tmp_path / "report.html").read_text("utf-8"))
            text = (tmp_path / "evaluation.json").read_text()
            (told,) = json.loads(text, parse_constant=pytest.fail)["facilities"].values()
            assert (told["status"] == "not evaluated") is (verdict == "refused")
        outcomes[verdict] += 1
    assert outcomes.total() == TRIES
    assert min(outcomes.values()) > TRIES / 50, outcomes


FOLLOWED = (
    "auto_map", "_name_or_path", "quantization_config", "vocab_file", "dtype", "tokenizer_class",
    "target_modules", "modules_to_save", "model_type", "id2label", "base_model_name_or_path",
)  # fmt: skip
REFERENCES: tuple[Any, ...] = (
    "../x", "/etc/passwd", "a" * 300, "é" * 90, "a/b", "http://x", {"a": "b.c"}, ["x", ["y"]],
    10**400, 2**63, float("nan"),
)  # fmt: skip


def _settings(adapted: bool) -> dict[str, dict[str, Any]]:
    if adapted:
        lora = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q"]}
        return {"adapter_config.json": lora, "lora.json": {"base_model": "b", "rank": 4}}
    config = {"model_type": "llama", "hidden_size": 8, "dtype": "float32", "id2label": {"0": "a"}}
    return {
        "config.json": config | {"rope": {"type": "linear", "factors": [1.0, 2.0]}},
        "generation_config.json": {"eos_token_id": 1, "temperature": 0.5},
        "tokenizer_config.json": {"tokenizer_class": "ByT5Tokenizer", "eos_token": "</s>"},
        "special_tokens_map.json": {"pad_token": {"content": "<pad>", "lstrip": False}},
        "added_tokens.json": {"<a>": 259},
        "model.safetensors.index.json": {"weight_map": {"a": "model.safetensors"}},
    }


def _damage_settings(good: dict[str, Any], chance: random.Random) -> bytes:
    record = json.loads(json.dumps(good))
    if chance.random() < 0.4:
        record[chance.choice(FOLLOWED)] = chance.choice(REFERENCES)
    else:
        fuzz.damage_record(record, chance)
    content = bytearray(json.dumps(record).encode())
    if chance.random() < 0.2:
        at = chance.randrange(len(content))
        content[at : at + chance.randrange(9)] = chance.choice(fuzz.WORDS)
    return bytes(content)


def _try_folder(folder: Path) -> str:
    try:
        model = ModelFolder.received(folder)
    except CrossFLError as error:
        assert str(folder) in str(error)
        return "refused"
    assert {path.name for path in model.weights} <= {
        "model.safetensors",
        "adapter_model.safetensors",
    }
    return "received"


@pytest.mark.parametrize("adapted", [False, True], ids=["model", "adapter"])
def test_a_model_folder_is_received_or_refused(tmp_path: Path, adapted: bool) -> None:
    """Its settings are damaged, its weights, and its manifest, which is sealed anew or not."""
    folder = Federation(tmp_path, MODEL, adapted).model
    settings = _settings(adapted)
    single = folder / ("adapter_model.safetensors" if adapted else "model.safetensors")
    weights, chance = single.read_bytes(), random.Random(13)
    outcomes = Counter[str]()
    files = [name for name in settings if not name.endswith("index.json")]
    for name in files:
        (folder / name).write_text(json.dumps(settings[name]))
    for _ in range(TRIES // 2):
        name = chance.choice([*settings, single.name, MANIFEST])
        (folder / MANIFEST).unlink(missing_ok=True)
        if name == MANIFEST:
            stated = json.loads(encode(manifest.write(folder, ModelManifest(round=0))))
            fuzz.damage_record(stated, chance)
            write_document(folder, stated, ModelManifest)
        else:
            content = (
                fuzz.damaged(weights, chance)
                if name == single.name
                else _damage_settings(settings[name], chance)
            )
            (folder / name).unlink(missing_ok=True)
            (folder / name).write_bytes(content)
            manifest.write(folder, ModelManifest(round=0))
        outcomes[_try_folder(folder)] += 1
        if name == single.name:
            single.unlink()
            single.write_bytes(weights)
        elif name in files:
            (folder / name).write_text(json.dumps(settings[name]))
        else:
            (folder / name).unlink()
    assert outcomes["refused"] > TRIES / 4, outcomes
    assert outcomes["received"] > TRIES / 200, outcomes


class Parser(argparse.ArgumentParser):
    """The parser of a step; what is wrong usage to it ends the step."""

    def error(self, message: str) -> NoReturn:
        raise SystemExit(2)


TASK = Task(
    facility="evil", dataset="it/words", round=1, local_steps=4, seed=1, schedule_step=0,
    schedule_steps=8, samples_seen=0, data_seed=3, base="0" * 64, federation="f",
)  # fmt: skip
STRINGS = (
    "", " ", "0", "-1", "1.5", "1e9", "2147483648", "9" * 5000, "nan", "inf", "-inf", "true",
    "None", "[]", "{}", "../x", "/etc", ".", "..", "it/../..", "a" * 300, "a\0b", "\ud800",
    "\x1b[2J", "it", "\u202e", "link", "loop", "it/words/", "--help", "-", "--", "constant",
    "fp32", "\n", "é" * 500,
)  # fmt: skip


def test_the_task_of_a_step_is_done_or_refused(tmp_path: Path) -> None:
    """What a server may put behind the flags of `train` and `evaluate`."""
    (tmp_path / "it" / "words").mkdir(parents=True)
    (tmp_path / "link").symlink_to("/etc")
    (tmp_path / "loop").symlink_to("loop")
    parser, chance, outcomes = Parser(), random.Random(14), Counter[str]()
    add_flags(parser, Task)
    add_flags(parser, Training)
    good = {flag(k): str(v) for r in (TASK, Training()) for k, v in r.asdict().items() if v != ""}
    for _ in range(TRIES):
        given = dict(good)
        for _ in range(chance.randint(1, 2)):
            name = "--dataset" if chance.random() < 0.3 else chance.choice(list(good))
            if chance.random() < 0.1:
                given.pop(name, None)
            else:
                given[name] = chance.choice(STRINGS)
        words = [f"{name}={value}" for name, value in given.items()]
        try:
            args = parser.parse_args(words)
            task, training = from_flags(args, Task), from_flags(args, Training)
            assert Task.parse(task.asdict()) == task
            assert Training.parse(training.asdict()) == training
            folder = place.resolve(task.dataset, tmp_path)
        except CrossFLError as error:
            check_sentence(error)
            outcomes["refused"] += 1
        except SystemExit:
            outcomes["wrong usage"] += 1
        else:
            assert folder.is_relative_to(tmp_path / "it")
            outcomes["done"] += 1
    assert outcomes.total() == TRIES
    assert min(outcomes.values()) > TRIES / 50, outcomes


@pytest.mark.parametrize("record", [Facility, Allowance])
def test_words_are_a_record_or_a_sentence(record: type[Facility] | type[Allowance]) -> None:
    chance, outcomes = random.Random(15), Counter[str]()
    fields = [field.replace("-", "_") for field in record.__struct_fields__]
    good = {"name": "a", "dataset": "it", "facility": "a", "steps": "1", "samples": "1"}
    good["tokens"] = "1"
    for _ in range(TRIES // 10):
        words = [f"{name}={good[name]}" for name in fields if name in good]
        for _ in range(chance.randint(1, 2)):
            word = f"{chance.choice(fields)}={chance.choice(STRINGS)}"
            words[chance.randrange(len(words))] = chance.choice(
                [word, word, chance.choice(STRINGS)]
            )
        try:
            assert from_words(words, record).asdict()
            outcomes["read"] += 1
        except CrossFLError as error:
            check_sentence(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 5, outcomes
