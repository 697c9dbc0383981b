"""Whatever a job is made of, and whatever happens to its run: the same command goes on.

A table: the columns are kinds of jobs, the rows what happens, one after the other, to one run of
each. At its end it has the weights of a run to which nothing happened, bit for bit.
"""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crossfl import cli
from crossfl.errors import CrossFLError
from crossfl.learning.training import Trainer
from crossfl.protocol import variables
from crossfl.protocol.layout import RUN
from crossfl.protocol.records import Facility
from crossfl.server.journal import journal
from crossfl.storage.weight_files import weights_digest
from tests.learning.test_vision import VGG, rows
from tests.support.keys import make_keys
from tests.support.loop import TRAINING, Cut, Federation
from tests.support.paths import CWL, ROUND

NAMES = ("karolina", "leonardo")
Kind = Callable[[Path, pytest.MonkeyPatch], dict[str, Any]]


def full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {}


def lora(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    shutil.copytree(ROUND / "global_model", folder / "models" / "tiny")
    monkeypatch.setenv(variables.MODELS, str(folder / "models"))
    digest = weights_digest(ROUND / "global_model")
    record = ("--base-model", "tiny", "--base-digest", digest, "--rank", "2")
    config = ("--config", CWL / "config.json", "--tokenizer", "bytes")
    return {"first": (*config, *record), "rules": ("--server-optimizer", "fedavg")}


def vision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for seed, facility in enumerate(NAMES):
        data = folder / "data" / facility / "words"
        data.mkdir(parents=True)
        for split, part in (("train", rows(8, seed)), ("valid", rows(4, seed + 10))):
            (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    monkeypatch.setenv(variables.DATA, str(folder / "data"))
    (folder / "vgg.json").write_text(json.dumps(VGG))
    return {"first": ("--config", folder / "vgg.json")}


def signed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    keys = make_keys(folder, NAMES)
    rules = ("--server-optimizer", "diloco", "--signers", folder / "signers")
    return {"keys": keys, "rules": rules}


def error_feedback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"training": (*TRAINING, "--encoding", "int4")}


def kept_optimizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    keeping = ("--local-optimizer", "keep", "--checkpoint-steps", "1")
    return {"training": (*TRAINING, *keeping), "local_steps": 2}


def skips_and_joins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    facilities = [
        Facility(name="karolina", dataset="words", joins=2),
        Facility(name="leonardo", dataset="words", skips=(3,), local_steps=2),
    ]
    return {"facilities": facilities}


def prompts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"prompts": ["it 3=", "cs 3="], "training": (*TRAINING, "--max-new-tokens", "2")}


KINDS: list[Kind] = [
    full,
    lora,
    vision,
    signed,
    error_feedback,
    kept_optimizer,
    skips_and_joins,
    prompts,
]


def weights(here: Path) -> dict[str, bytes]:
    """The bytes of every file with weights, of the model and of the server."""
    return {p.name: p.read_bytes() for p in here.rglob("*.safetensors") if "updates" not in p.parts}


def interrupt_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the next step of the optimizer interrupted, as Ctrl-C does."""
    step = Trainer._step

    def interrupted(*arguments: Any) -> float:
        monkeypatch.setattr(Trainer, "_step", step)
        heeded = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored under nohup
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.signal(signal.SIGINT, heeded)
        return step(*arguments)

    monkeypatch.setattr(Trainer, "_step", interrupted)


def as_an_earlier_version_left_it(run: journal.Run) -> None:
    """Take from the description of a run the fields whose value is the default."""
    path = run.path / RUN
    document = json.loads(path.read_text())
    configuration = document["configuration"]
    records = [configuration[name] for name in ("aggregation", "training")]
    records += [*configuration["facilities"].values(), configuration["lora"] or {}]
    for record in records:
        for field in ("tau", "max_norm", "wait_seconds", "attempts", "weight_decay", "factors"):
            record.pop(field, None)
        for field in [name for name, value in record.items() if value == []]:
            del record[field]
    if configuration["lora"] is None:
        del configuration["lora"]
    path.write_text(json.dumps(document))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_same_command_goes_on(
    kind: Kind,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = {"rounds": 3, **kind(tmp_path, monkeypatch)}
    fresh = weights(Federation(tmp_path / "fresh", **job).run())
    place = tmp_path / "journal"
    monkeypatch.setenv(variables.JOURNAL, str(place))
    federation = Federation(tmp_path / "run", **job | {"rounds": 2})

    def only_run() -> journal.Run:
        (run,) = journal.runs(place)
        return run

    def printed() -> str:
        return capsys.readouterr().err

    # Failed before its first round: no facility has such a dataset.
    right = federation.facilities
    federation.facilities = [f.replace(dataset="nubmers") for f in right]
    with pytest.raises(CrossFLError, match="aggregate ended with 4"):
        federation.run()
    assert "dataset 'nubmers'" in printed()
    failed = only_run().path.name

    # Corrected: it is replaced, and one line says so. Then interrupted, while it trains.
    federation.facilities = right
    interrupt_training(monkeypatch)
    with pytest.raises(CrossFLError, match="train ended with 130"):
        federation.run()
    assert f"begins, in place of {failed}, which had finished no round" in printed()

    # Goes on from the model that it began with. Then killed, after it had published a round.
    run = only_run().path
    with pytest.raises(Cut):
        federation.run("after aggregate 1")
    assert f"{run} goes on after round 0" in printed()
    (run / ".000002.partial-1" / "state").mkdir(parents=True)

    # Goes on after that round, by a version that knows more fields. Then killed before the next.
    as_an_earlier_version_left_it(only_run())
    with pytest.raises(Cut):
        federation.run("before aggregate 1")
    assert f"{run} goes on after round 1" in printed()

    # Another configuration is refused; unlocked, it goes on with it to the end.
    federation.rounds = 3
    with pytest.raises(CrossFLError, match="initialise ended with 4"):
        federation.run()
    assert "rounds: 2 → 3" in printed()
    assert cli.main(["runs", "unlock", run.name]) == 0
    last = federation.run()
    assert f"{run} goes on after round 1" in printed()
    assert weights(last) == fresh
    assert only_run().description.finished
    twice = [each for each in federation.trained if federation.trained.count(each) > 1]
    assert {round_ for _, round_ in twice} <= {1, 2}
