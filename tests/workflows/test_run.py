"""`crossfl run`: the real engine from a job and a folder of data, with one command."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from crossfl import cli
from crossfl.simulation.simulate import simulate
from crossfl.storage.job import Job
from tests.support.engine import heed_signals
from tests.support.federation import snapshot
from tests.support.paths import CWL, DATA
from tests.support.processes import Run


def command(out: Path, job: Path = CWL / "federation.yml") -> list[str]:
    return ["run", str(job), "--data", str(DATA), "--outdir", str(out)]


def test_it_leaves_what_a_simulation_leaves(
    run: Run, environment: Mapping[str, str], tmp_path: Path
) -> None:
    """In a folder with a blank in its name; interrupted once, and then to its end."""
    out = tmp_path / "my results"
    words = [sys.executable, "-m", "crossfl", *command(out)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            words, cwd=tmp_path, env=environment, stdout=log, stderr=log, preexec_fn=heed_signals
        )
        deadline = time.monotonic() + 120
        while not list(out.glob(".crossfl/federation/*/000001/state")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert "the same command goes on from there" in (tmp_path / "log").read_text()
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "goes on" in done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "model",
        "history",
        "scores",
        "report",
    ]
    simulate(Job.load(CWL / "federation.yml"), DATA, tmp_path / "simulated")
    weights = {k: v for k, v in snapshot(out / "global_model").items() if "safetensors" in k}
    simulated = snapshot(tmp_path / "simulated" / "global_model")
    assert weights and all(simulated[name] == content for name, content in weights.items())

    listed = run("streamflow", "list", "--file", out / "federation.yml", cwd=tmp_path)
    assert listed.returncode == 0 and listed.stdout.count("CWLWorkflow") == 2
    assert (out / ".crossfl/federation/engine.sqlite").stat().st_mode & 0o077 == 0

    again = run(*words, cwd=tmp_path)
    assert again.returncode == cli.BAD_INPUT
    assert "global_model exists already" in again.stderr


BAD = {
    "no such data": (["--data", "nowhere"], "nowhere/leonardo is no folder"),
    "no job": (["nothing.yml"], "nothing.yml cannot be read as a job file"),
    "a file in the way": ([], "federation.yml was not made by crossfl"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_message(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    more, message = BAD[case]
    monkeypatch.chdir(tmp_path)
    words = command(Path("out"))
    if more and more[0] == "--data":
        words += more
    elif more:
        words[1] = more[0]
    else:
        Path("out").mkdir()
        Path("out/federation.yml").write_text("mine: true\n")
    assert cli.main(words) == cli.BAD_INPUT
    assert message in capsys.readouterr().err
    assert not list(Path("out").glob("*[!l]"))


def test_an_adapter_needs_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init", str(tmp_path / "mine"), "--template", "lora"]) == 0
    words = command(tmp_path / "out", tmp_path / "mine" / "job.yml")
    words[words.index("--data") + 1] = str(tmp_path / "mine" / "data")
    assert cli.main(words) == cli.BAD_INPUT
    assert "name the folder that holds it with --models" in capsys.readouterr().err
    assert json.loads((tmp_path / "mine" / "models" / "base" / "config.json").read_text())
