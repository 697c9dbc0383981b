"""Runs in a journal that failed, were changed, or were left by an earlier version."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crossfl import cli
from crossfl.protocol import variables
from crossfl.protocol.layout import RUN, STATE
from crossfl.protocol.records import Training
from crossfl.server import state as server_state
from crossfl.server.journal import journal
from crossfl.server.journal.configuration import differences
from crossfl.storage import locks
from tests.support.paths import CWL

BEGIN = ("--config", str(CWL / "config.json"), "--tokenizer", "bytes", "--rounds", "3")
FACILITY = ("--facility", "name=leonardo", "dataset=words")
COMMAND = re.compile(r"'(crossfl runs [^']+)'")


class Journal:
    """A journal, and `crossfl initialise` as an engine runs it, in a new folder each time."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.place, self._capsys = folder, folder / "journal", capsys
        self.begun = 0

    def initialise(self, *words: str) -> tuple[int, str]:
        """The exit status, and what was printed."""
        self.begun += 1
        own = () if "--facility" in words else FACILITY
        optimizer = ("--server-optimizer", "diloco")
        out = ("--outdir", str(self.out))
        status = cli.main(["initialise", *out, *BEGIN, *optimizer, *own, *words])
        return status, self._capsys.readouterr().err

    @property
    def out(self) -> Path:
        """Where the last command left what it made."""
        return self.folder / f"out-{self.begun}"

    @property
    def run(self) -> journal.Run:
        """The only run."""
        (run,) = journal.runs(self.place)
        return run

    def finish_round(self) -> None:
        """Publish round 1, as aggregate does."""
        last = self.run.rounds()[-1]
        state = self.folder / "state"
        shutil.copytree(last / STATE, state)
        (state / "manifest.json").unlink()
        server = server_state.load(last / STATE)
        server_state.save(server.replace(round=server.round + 1), state)
        self.run.publish(last / "global_model", state, server.retention)
        shutil.rmtree(state)

    def change(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Change the saved description of the run."""
        path = self.run.path / RUN
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    def obey(self, message: str, action: str) -> None:
        """Do what a message says, to the letter, in another folder."""
        (command,) = [c for c in COMMAND.findall(message) if shlex.split(c)[2] == action]
        assert cli.main(shlex.split(command)[1:]) == 0
        self._capsys.readouterr()


@pytest.fixture
def kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Journal:
    monkeypatch.setenv(variables.JOURNAL, str(tmp_path / "journal"))
    return Journal(tmp_path, capsys)


# --- a run that got nowhere ---


@pytest.mark.parametrize("wrong", [("--rounds", "-3"), ("--aggregation-rule", "krum")])
def test_what_is_refused_leaves_no_run(kept: Journal, wrong: tuple[str, ...]) -> None:
    status, _ = kept.initialise(*wrong)
    assert status == cli.BAD_INPUT
    assert journal.runs(kept.place) == []
    assert kept.initialise()[0] == 0
    assert kept.run.description.configuration["rounds"] == 3


def test_a_run_without_a_finished_round_is_replaced(kept: Journal) -> None:
    wrong, right = (("--facility", "name=karolina", f"dataset={d}") for d in ("nubmers", "numbers"))
    kept.initialise(*wrong)
    before = kept.run.path.name
    status, printed = kept.initialise(*right, "--seed", "7")
    assert status == 0
    assert kept.run.path.name != before
    lines = [line for line in printed.splitlines() if before in line]
    assert len(lines) == 1
    assert f"begins, in place of {before}, which had finished no round" in lines[0]
    assert server_state.load(kept.out / STATE).seed == 7
    # Unchanged, it is the same run, whose facilities may have savepoints.
    kept.initialise(*right, "--seed", "7")
    assert server_state.load(kept.out / STATE).run == kept.run.path.name


def test_training_may_be_corrected_before_a_round_is_finished(
    kept: Journal, capsys: pytest.CaptureFixture[str]
) -> None:
    kept.initialise()

    def plan(*words: str) -> tuple[int, str]:
        facility = ("--facility", "name=leonardo", "dataset=words", "--local-steps", "1")
        state = ("--state", str(kept.out / STATE), "--outdir", str(kept.folder / "plan"))
        return cli.main(["plan", *state, *facility, *words]), capsys.readouterr().err

    assert plan("--batch-size", "4")[0] == 0
    status, printed = plan("--batch-size", "8")
    assert status == 0
    assert "the run takes on training.batch_size: 4 → 8" in printed
    assert plan("--batch-size", "8", "--threads", "2")[1].count("takes on") == 0
    kept.finish_round()
    status, printed = plan("--batch-size", "4")
    assert status == cli.BAD_INPUT
    assert "training.batch_size: 8 → 4" in printed
    assert plan("--batch-size", "8", "--threads", "4", "--max-new-tokens", "9")[0] == 0


def test_a_run_that_holds_an_update_is_not_replaced(kept: Journal) -> None:
    kept.initialise()
    held = kept.run.path / "000000-000001"
    shutil.copytree(kept.run.path / "000000", held)
    (held / STATE / "updates" / "leonardo").mkdir(parents=True)
    status, printed = kept.initialise("--rounds", "4")
    assert status == cli.BAD_INPUT
    assert "rounds: 3 → 4" in printed


# --- a run folder is whole ---


def test_a_journal_that_cannot_be_written_leaves_nothing(kept: Journal) -> None:
    """A file is where the journal is to be; once it is away, the same command goes on."""
    kept.place.write_text("")
    status, printed = kept.initialise()
    assert status == cli.BAD_INPUT
    assert "the journal cannot be written" in printed
    assert list(kept.out.iterdir()) == []
    kept.place.unlink()
    assert kept.initialise()[0] == 0


def test_folders_that_are_no_runs_are_skipped(
    kept: Journal, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("2026-01-01T00-00-00-aaaa", "notes", ".2026-01-01T00-00-00-bbbb.partial-1"):
        (kept.place / name / "000000").mkdir(parents=True)
    assert kept.initialise()[0] == 0
    assert kept.run.rounds()
    assert cli.main(["runs"]) == 0
    printed = capsys.readouterr().out
    assert kept.run.path.name in printed
    assert "aaaa" not in printed and "notes" not in printed
    assert not list(kept.place.glob(".*.partial-*"))


@pytest.mark.parametrize("content", ["", "{", "{}", '{"format": 2, "configuration": []}', "[1]"])
def test_a_damaged_description(
    kept: Journal, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kept.initialise()
    (kept.run.path / RUN).write_text(content)
    assert cli.main(["runs"]) == 0
    assert "damaged" in capsys.readouterr().out
    status, printed = kept.initialise()
    assert status == cli.BAD_INPUT
    kept.obey(printed, "rm")
    assert kept.initialise()[0] == 0


# --- what may change, and what not ---


def test_the_ways_out_of_a_changed_configuration(kept: Journal) -> None:
    kept.initialise()
    kept.finish_round()
    for action in ("unlock", "rm"):
        status, printed = kept.initialise("--rounds", "4")
        assert status == cli.BAD_INPUT
        assert "rounds: 3 → 4" in printed or "rounds: 4 → 3" in printed
        kept.obey(printed, action)
        assert kept.initialise("--rounds", "4")[0] == 0
        assert server_state.load(kept.out / STATE).rounds == 4
        assert kept.run.description.configuration["rounds"] == 4
        assert not kept.run.description.unlocked
        if action == "unlock":
            assert server_state.load(kept.out / STATE).round == 1
            kept.change(lambda d: d["configuration"].update(rounds=3))
    assert server_state.load(kept.out / STATE).round == 0


def _other_model(folder: Path) -> tuple[str, ...]:
    document = json.loads((CWL / "config.json").read_text())
    document["hidden_size"] *= 2
    (folder / "other.json").write_text(json.dumps(document))
    return "--config", str(folder / "other.json")


@pytest.mark.parametrize(
    ("words", "change"),
    [
        (("--seed", "7"), "seed: 0 → 7"),
        (("--server-optimizer", "fedadam"), 'aggregation.server_optimizer: "diloco" → "fedadam"'),
        (("--model-dtype", "bf16"), 'aggregation.model_dtype: "keep" → "bf16"'),
        (("--base-model", "llama", "--base-digest", "0" * 64), "lora: null → "),
        ((), "config.hidden_size: "),
    ],
)
def test_what_an_unlocked_run_cannot_change(
    kept: Journal, words: tuple[str, ...], change: str
) -> None:
    """It is refused by name, and the run is as it was."""
    kept.initialise()
    kept.finish_round()
    kept.run.save(unlocked=True)
    before = kept.run.description
    status, printed = kept.initialise(*(words or _other_model(kept.folder)))
    assert status == cli.BAD_INPUT
    assert "cannot go on with" in printed and change in printed
    assert "crossfl runs unlock" not in printed
    assert kept.run.description == before
    assert kept.initialise()[0] == 0
    kept.obey(printed, "rm")


def test_a_command_that_fails_changes_nothing_in_an_unlocked_run(kept: Journal) -> None:
    kept.initialise()
    kept.finish_round()
    kept.run.save(unlocked=True)
    before = kept.run.description
    assert kept.initialise("--rounds", "4", "--quorum", "9")[0] == cli.BAD_INPUT
    assert kept.initialise("--rounds", "-1")[0] == cli.BAD_INPUT
    assert kept.run.description == before


def test_a_finished_run_is_not_unlocked(kept: Journal, capsys: pytest.CaptureFixture[str]) -> None:
    kept.initialise()
    kept.run.save(finished=True)
    assert cli.main(["runs", "unlock", kept.run.path.name]) == cli.BAD_INPUT
    assert "is finished: the next command begins a new run" in capsys.readouterr().err
    assert not kept.run.description.unlocked


def test_a_journal_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["runs", "--journal", str(tmp_path / "nothing")]) == cli.BAD_INPUT
    assert "there is no journal" in capsys.readouterr().err


def test_remedies_wait_for_the_run_that_goes_on(kept: Journal) -> None:
    kept.initialise()
    with locks.acquire(kept.place):
        assert cli.main(["runs", "rm", kept.run.path.name]) == cli.BAD_INPUT
    assert kept.run.rounds()


# --- an earlier version ---


def _forget(document: dict[str, Any]) -> None:
    """Take out what has a default, as a version that did not know it left it."""
    configuration = document["configuration"]
    configuration["aggregation"] = {"server_optimizer": "diloco"}
    configuration["facilities"]["leonardo"] = {"name": "leonardo", "dataset": "words"}
    del configuration["lora"]


def test_fields_that_a_run_does_not_know_have_their_defaults(kept: Journal) -> None:
    kept.initialise()
    kept.finish_round()
    kept.change(_forget)
    assert kept.initialise()[0] == 0
    assert server_state.load(kept.out / STATE).round == 1
    status, printed = kept.initialise("--tau", "0.1")
    assert status == cli.BAD_INPUT
    assert "aggregation.tau: 0.001 → 0.1" in printed


@pytest.mark.parametrize(
    "words",
    [
        ("--keep-last", "5"),
        ("--wait-seconds", "1"),
        ("--facility", "name=leonardo", "dataset=words", "attempts=5", "queue_timeout=60"),
    ],
)
def test_what_decides_no_outcome_may_change(kept: Journal, words: tuple[str, ...]) -> None:
    kept.initialise()
    kept.finish_round()
    assert kept.initialise(*words)[0] == 0
    assert server_state.load(kept.out / STATE).round == 1


def test_every_option_of_training_decides_the_outcome_or_does_not() -> None:
    """Lists, defaults and absent records compare as what they mean."""
    known = {"lora": {"base_model": "b", "target_modules": []}, "training": {}}
    assert differences(known, known | {"lora": {"base_model": "b"}}) == {}
    assert differences({"lora": None}, {}) == {}
    for field in ("threads", "max_seconds", "reserve_seconds", "checkpoint_steps"):
        assert differences(known, known | {"training": {field: 9}}) == {}
    assert set(Training.__struct_fields__) >= {"threads", "max_seconds"}
    changed = differences(known, known | {"training": {"learning_rate": 1.0}})
    assert changed == {"training.learning_rate": "0.0003 → 1.0"}
