"""The report step: an evaluation that does not count costs its own facility, and is told why."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crossfl import cli
from crossfl.protocol.layout import MANIFEST, SIGNERS
from crossfl.protocol.manifest import EvaluationManifest
from crossfl.server import state as server_state
from crossfl.storage import manifest
from tests.support.keys import make_keys, sign
from tests.support.page import Page
from tests.support.paths import ROUND

NAMES = ("karolina", "leonardo")
SIGNED = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen")


@pytest.fixture
def evaluations(tmp_path: Path) -> dict[str, Path]:
    """Two evaluations of the model of the round, both good."""
    paths = {}
    for name in NAMES:
        path = tmp_path / name
        path.mkdir()
        good = manifest.read(ROUND / "leonardo" / "evaluation", EvaluationManifest)
        manifest.write(path, good.replace(facility=name))
        paths[name] = path
    return paths


def _change(**changes: Any) -> Callable[[Path], None]:
    """Deliver another evaluation, whole."""

    def change(path: Path) -> None:
        manifest.write(path, manifest.read(path, EvaluationManifest).replace(**changes))

    return change


def _write(content: bytes, name: str = MANIFEST) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        (path / name).write_bytes(content)

    return write


def _link(path: Path) -> None:
    (path / "more").symlink_to("/etc/passwd")


BAD: dict[str, tuple[Callable[[Path], None], str]] = {
    "garbled": (_write(b"\x93\xff{]" * 40), "manifest.json is not valid JSON"),
    "empty": (_write(b""), "manifest.json is not valid JSON"),
    "nested": (_write(b'{"x": ' + b"[" * 500_000), "manifest.json is nested too deep"),
    "60 MB": (_write(b"[]" * 30_000_000), "has 60000000 bytes: it is not a manifest"),
    "another facility's": (
        _change(facility="leonardo"),
        "it is made in the name of leonardo, and karolina was asked for it",
    ),
    "of another model": (
        _change(model="ab" * 32),
        "it does not evaluate the model of this state: evaluate again",
    ),
    "of another federation": (_change(federation="other"), "it is of federation other, this is"),
    "with a file more": (_write(b"more", "more"), "more is not in the manifest"),
    "with a link": (_link, "more is a link or a device"),
    "not there": (shutil.rmtree, "has no manifest.json"),
    "absent with metrics": (
        _change(status="absent", reason="no node"),
        "it is absent, and yet has metrics or completions",
    ),
}


def _report(state: Path, evaluations: dict[str, Path], out: Path) -> int:
    words: list[str] = []
    for name, path in evaluations.items():
        words += ["--allowance", f"facility={name}", "steps=0", "samples=0", "tokens=0"]
        words += ["--evaluation", str(path)]
    out.mkdir()
    return cli.main(["report", "--state", str(state), "--outdir", str(out), *words])


def _check(out: Path, reason: str, printed: str) -> None:
    """Check that the report is there, with leonardo's evaluation, and the reason for karolina."""
    facilities = json.loads((out / "evaluation.json").read_text())["facilities"]
    assert list(facilities) == list(NAMES)
    karolina, leonardo = (facilities[name] for name in NAMES)
    assert leonardo["metrics"]["loss"] == 5.9313
    assert set(karolina) == {"status", "reason"}
    assert karolina["status"] == "not evaluated"
    assert reason in karolina["reason"]
    assert str(out.parent) not in karolina["reason"]  # where things lie here is nobody's business
    text = Page((out / "report.html").read_text()).text
    assert "not evaluated" in text
    assert reason in text
    assert (out / "history.jsonl").is_file()
    outputs = json.loads((out / "cwl.output.json").read_text())
    assert set(outputs) == {"history", "evaluation", "report"}
    assert f"karolina not evaluated: {karolina['reason']}" in " ".join(printed.split())


@pytest.mark.parametrize("case", BAD)
def test_a_bad_evaluation(
    case: str, evaluations: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harm, reason = BAD[case]
    harm(evaluations["karolina"])
    assert _report(ROUND / "state", evaluations, tmp_path / "out") == 0
    _check(tmp_path / "out", reason, capsys.readouterr().err)


@SIGNED
@pytest.mark.parametrize(
    ("key", "reason"),
    [
        (None, "it is not signed: karolina has to set CROSSFL_SIGNING_KEY"),
        ("leonardo", "its signature is not by a key that the signers list for karolina"),
    ],
)
def test_an_evaluation_that_its_facility_did_not_sign(
    key: str | None,
    reason: str,
    round_: Path,
    evaluations: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file of signers is the state's, whatever the environment says."""
    keys = make_keys(tmp_path, NAMES)
    state = server_state.load(round_ / "state")
    aggregation = state.aggregation.replace(signers=str(tmp_path / "signers"))
    server_state.write_signers(aggregation, round_ / "state")
    server_state.save(
        state.replace(aggregation=server_state.without_path(aggregation)), round_ / "state"
    )
    (tmp_path / "signers").unlink()
    assert (round_ / "state" / SIGNERS).is_file()
    for variable in ("CROSSFL_ALLOWED_SIGNERS", "CROSSFL_SIGNERS", "CROSSFL_SIGNING_KEY"):
        monkeypatch.setenv(variable, "")
    sign(evaluations["leonardo"], keys["leonardo"])
    if key is not None:
        sign(evaluations["karolina"], keys[key])
    assert _report(round_ / "state", evaluations, tmp_path / "out") == 0
    _check(tmp_path / "out", reason, capsys.readouterr().err)


def test_an_absent_evaluation_says_why(evaluations: dict[str, Path], tmp_path: Path) -> None:
    """It needs no signature: nothing of it counts."""
    stated = manifest.read(evaluations["karolina"], EvaluationManifest)
    absent = stated.replace(status="absent", reason="no node", metrics=None, completions=())
    manifest.write(evaluations["karolina"], absent)
    assert _report(ROUND / "state", evaluations, tmp_path / "out") == 0
    facilities = json.loads((tmp_path / "out" / "evaluation.json").read_text())["facilities"]
    assert (facilities["karolina"]["status"], facilities["karolina"]["reason"]) == (
        "absent",
        "no node",
    )
    assert facilities["leonardo"]["status"] == "complete"
