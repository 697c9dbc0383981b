"""The command: quick to start, clear about bad input, and nothing half-written."""

import errno
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from crossfl import cli
from crossfl.protocol.exits import Exit
from crossfl.protocol.manifest import UpdateManifest
from crossfl.storage import manifest
from tests.support.paths import CWL, DATA, ROUND
from tests.support.processes import Run

HEAVY = {
    "plan": {"torch", "numpy", "transformers", "accelerate"},
    "report": {"torch", "transformers", "accelerate"},
    "aggregate": {"transformers", "accelerate"},
    "train": {"torch", "transformers", "accelerate"},
    "evaluate": {"torch", "transformers", "accelerate"},
}


@pytest.mark.parametrize("verb", HEAVY)
def test_start_up_is_light(verb: str, run: Run, tmp_path: Path) -> None:
    loaded = f"import sys, crossfl.steps.{verb}; print(*sys.modules)"
    result = run(sys.executable, "-c", loaded, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert not HEAVY[verb] & set(result.stdout.split())


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([verb, "--help"])
    assert ended.value.code == 0
    assert f"usage: crossfl {verb}" in capsys.readouterr().out


INITIALISE = ["initialise", "--rounds", "2", "--tokenizer", "bytes"]
CONFIG = ["--config", str(CWL / "config.json")]


def _train(tmp_path: Path, **changes: str) -> list[str]:
    update = manifest.read(ROUND / "leonardo" / "update", UpdateManifest)
    values = {"facility": "leonardo", "dataset": "words", "round": "1", "local_steps": "2"} | {
        "seed": "1",
        "schedule_step": "0",
        "schedule_steps": "4",
        "samples_seen": "0",
        "data_seed": "1",
        "base": update.base,
        "federation": update.federation,
        "global_model": str(ROUND / "global_model"),
        **changes,
    }
    flags = [word for k, v in values.items() for word in (f"--{k.replace('_', '-')}", v)]
    return ["train", *flags]


def _model_without_config(tmp_path: Path) -> list[str]:
    (tmp_path / "m").mkdir()
    return [*INITIALISE, "--model", str(tmp_path / "m")]


def _pickled_model(tmp_path: Path) -> list[str]:
    words = _model_without_config(tmp_path)
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "m" / "pytorch_model.bin").touch()
    return words


def _corrupt_model(tmp_path: Path) -> list[str]:
    words = _model_without_config(tmp_path)
    (tmp_path / "m" / "config.json").write_text((CWL / "config.json").read_text())
    (tmp_path / "m" / "model.safetensors").write_bytes(
        b"\x10" + b"\0" * 7 + b"{not a header at all"
    )
    return words


def _small_vocabulary(tmp_path: Path) -> list[str]:
    values = json.loads((CWL / "config.json").read_text()) | {"vocab_size": 100}
    (tmp_path / "small.json").write_text(json.dumps(values))
    return [*INITIALISE, "--config", str(tmp_path / "small.json")]


def _not_a_model(tmp_path: Path) -> list[str]:
    (tmp_path / "c.json").write_text('{"model_type": "nothing"}')
    return [*INITIALISE, "--config", str(tmp_path / "c.json")]


def _empty_dataset(tmp_path: Path) -> list[str]:
    folder = tmp_path / "data" / "leonardo"
    folder.mkdir(parents=True)
    (folder / "empty.txt").touch()
    return _train(tmp_path, dataset="empty.txt")


def _nothing_as_a_model(tmp_path: Path) -> list[str]:
    (tmp_path / "nothing").mkdir()
    return _train(tmp_path, global_model=str(tmp_path / "nothing"))


def _round_zero(tmp_path: Path) -> list[str]:
    return ["initialise", "--rounds", "0", "--tokenizer", "bytes", *CONFIG]


TWO = ["--facility", "name=a", "dataset=d", "--facility", "name=b", "dataset=d"]
PLAN = ["plan", "--state", str(ROUND / "state"), "--local-steps", "2"]
SITE = ["--facility", "name=leonardo", "dataset=words"]

BAD: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "rounds 0": (_round_zero, "rounds is 0"),
    "model and config": (
        lambda _: [*INITIALISE, *CONFIG, "--model", str(ROUND / "global_model")],
        "not both",
    ),
    "a quorum of more than all": (
        lambda _: [*INITIALISE, *CONFIG, *TWO, "--quorum", "3"],
        "2 facilities take part in round 1 of 2, which needs 3",
    ),
    "too few for krum": (
        lambda _: [*INITIALISE, *CONFIG, *TWO, "--aggregation-rule", "krum"],
        "which needs 5",
    ),
    "decay of 1": (
        lambda _: [*INITIALISE, *CONFIG, "--beta2", "1"],
        "aggregation.beta2 is 1: it must be below 1",
    ),
    "no tau": (
        lambda _: [*INITIALISE, *CONFIG, "--tau", "0"],
        "aggregation.tau is 0: it must be at least 1e-18",
    ),
    "infinite quorum": (
        lambda _: [*INITIALISE, *CONFIG, "--quorum", "inf"],
        "aggregation.quorum is 'inf': expected int",
    ),
    "no tokenizer": (lambda _: ["initialise", "--rounds", "1", *CONFIG], "give a tokenizer"),
    "no such tokenizer": (
        lambda _: ["initialise", "--rounds", "1", *CONFIG, "--tokenizer", "nothing"],
        "nothing has no tokenizer_config.json",
    ),
    "wrong tokenizer size": (_small_vocabulary, "259 tokens, the model's vocab_size is 100"),
    "model folder without config": (_model_without_config, "has no config.json"),
    "pickled weights": (_pickled_model, "pickled weights are never read"),
    "corrupt safetensors": (_corrupt_model, "is not a valid safetensors file"),
    "not a model": (_not_a_model, "describes neither a causal language model"),
    "missing config": (
        lambda _: [*INITIALISE, "--config", "nothing.json"],
        "nothing.json",
    ),
    "duplicate facility": (lambda _: [*PLAN, *SITE, *SITE], "'leonardo' is named twice"),
    "hostile facility": (
        lambda _: [*PLAN, "--facility", "name=$(id)", "dataset=d"],
        "use letters, digits",
    ),
    "unknown field": (lambda _: [*PLAN, *SITE, "steps=3"], "no field 'steps'"),
    "no local steps": (lambda _: [*PLAN[:-1], "0", *SITE], "local_steps is 0"),
    "not a state": (
        lambda _: ["plan", "--state", str(DATA), "--local-steps", "2", *SITE],
        "has no manifest.json",
    ),
    "missing dataset": (lambda p: _train(p, dataset="nothing"), "dataset 'nothing' is not in"),
    "dataset that climbs out": (lambda p: _train(p, dataset="../x"), "without '..'"),
    "empty dataset": (_empty_dataset, "is empty"),
    "another model": (lambda p: _train(p, base="0" * 64), "is not the model that round 1"),
    "no model": (_nothing_as_a_model, "has no manifest.json"),
    "no digest": (
        lambda p: _train(p, base="00"),
        "task.base is '00': expected a sha256, 64 hexadecimal digits",
    ),
    "bad number": (lambda p: _train(p, seed="x"), "task.seed is 'x': expected int"),
    "no updates": (
        lambda _: (
            [
                "aggregate",
                "--global-model",
                str(ROUND / "global_model"),
                "--state",
                str(ROUND / "state"),
            ]
        ),
        "no update was given",
    ),
    "no job file": (
        lambda p: ["simulate", str(p / "job.yml"), "--data", str(DATA)],
        "cannot be read as a job file",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, message = BAD[case]
    words, out = make(tmp_path), tmp_path / "out"
    if (tmp_path / "data").exists():
        monkeypatch.setenv("CROSSFL_DATA", str(tmp_path / "data"))
    out.mkdir()
    begun = time.monotonic()
    assert cli.main([*words, "--outdir", str(out)]) == cli.BAD_INPUT
    assert time.monotonic() - begun < 30
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("crossfl ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert list(out.iterdir()) == []


def test_a_full_disk_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "out/state.json")

    monkeypatch.setattr("crossfl.steps.plan.main", full)
    assert cli.main([*PLAN, *SITE, "--outdir", str(tmp_path)]) == cli.BAD_INPUT
    assert "out/state.json: the disk has no room left: free some" in capsys.readouterr().err


FOLDERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a file": (lambda p: p / "file", "name another"),
    "of a system that refuses": (lambda _: Path("/proc/1/ns"), ": "),
}


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("verb", ["report", "plan", "simulate"])
def test_a_folder_that_cannot_be_written(
    folder: str, verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = FOLDERS[folder]
    (tmp_path / "file").touch()
    words = {
        "report": ["report", "--state", str(ROUND / "state")],
        "plan": [*PLAN, *SITE],
        "simulate": ["simulate", str(CWL / "federation.yml"), "--data", str(DATA)],
    }[verb]
    assert cli.main([*words, "--outdir", str(make(tmp_path))]) == cli.BAD_INPUT
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("crossfl ")]
    assert message in line and str(make(tmp_path)) in line
    assert ".partial" not in line


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "x", "data"), OSError(24, "x")])
def test_an_error_of_the_system_is_said_with_its_remedy(
    error: OSError, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(args: object) -> None:
        raise error

    monkeypatch.setattr("crossfl.sites.digest.main", fail)
    assert cli.main(["digest", "model"]) == cli.BAD_INPUT
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert ("data: permission denied" in printed) or ("ulimit -n" in printed)


def test_a_bug_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(args: object) -> None:
        raise ValueError("\x1b[2J of somebody")

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("crossfl.sites.digest.main", fail)
    assert cli.main(["digest", "model"]) == Exit.FAILED
    (file,) = tmp_path.iterdir()
    line = rf"this is a bug in crossfl: \x1b[2J of somebody. Please report it with {file}"
    assert capsys.readouterr().err == f"crossfl digest: {line} [CFL5]\n"
    details = file.read_text(encoding="utf-8")
    assert "Traceback" in details and "ValueError" in details and "digest" in details
    assert file.stat().st_mode & 0o077 == 0


def test_a_bug_in_a_step_is_a_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(args: object) -> None:
        raise ValueError

    monkeypatch.setattr("crossfl.steps.plan.main", fail)
    with pytest.raises(ValueError):
        cli.main([*PLAN, *SITE, "--outdir", str(tmp_path)])


def test_output_that_nobody_reads(run: Run, tmp_path: Path) -> None:
    done = run("sh", "-c", f"{sys.executable} -m crossfl --help | true", cwd=tmp_path)
    assert done.stderr == ""


def test_wrong_usage_exits_with_2() -> None:
    for words in (
        [],
        ["dance"],
        ["initialise", *CONFIG, "--server-optimizer", "newton", "--rounds", "1"],
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 2
