"""The report step: what it hands on unchanged, what it admits, and what it refuses."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from crossfl import cli
from crossfl.errors import CrossFLError
from crossfl.protocol.comparison import Arm, Comparison
from crossfl.protocol.decoding import encode
from crossfl.protocol.events import decode_line
from crossfl.protocol.history import encode_line
from crossfl.protocol.manifest import EvaluationManifest
from crossfl.protocol.measurements import Metrics
from crossfl.protocol.records import Allowance
from crossfl.protocol.variables import PROGRESS
from crossfl.server import state as server_state
from crossfl.steps.report import report
from crossfl.storage import manifest
from tests.support import page
from tests.support.page import HOSTILE, MODEL, Page

NAMES = ("karolina", "leonardo", "polaris")

Federation = Callable[..., tuple[Path, list[Path]]]


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    """The state after three rounds, and an evaluation of each facility; polaris has none."""

    def make(**changes: EvaluationManifest) -> tuple[Path, list[Path]]:
        state = page.server_state(0)
        folder = tmp_path / "state0"
        folder.mkdir()
        server_state.save(state, folder)
        for entry in page.history():
            before, folder = folder, tmp_path / f"state{entry.round}"
            folder.mkdir()
            state = state.replace(round=entry.round)
            server_state.save(state, folder, before=before, entry=entry)
        paths = []
        for name, loss in zip(NAMES, (0.75, 0.25, None), strict=True):
            evaluation = page.evaluation(name, loss, federation=state.federation)
            paths.append(tmp_path / f"evaluation-{name}")
            paths[-1].mkdir()
            manifest.write(paths[-1], changes.get(name, evaluation))
        return folder, paths

    return make


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def allowances() -> list[Allowance]:
    return [Allowance(facility=name, steps=0, samples=0, tokens=0) for name in NAMES]


def outcome(folder: Path) -> dict[str, dict[str, object]]:
    """By facility, what `evaluation.json` says."""
    document = json.loads((folder / "evaluation.json").read_text(), parse_constant=pytest.fail)
    facilities: dict[str, dict[str, object]] = document["facilities"]
    return facilities


def test_history_is_copied_and_evaluations_are_merged(federation: Federation, out: Path) -> None:
    state, paths = federation()
    report(state, list(reversed(paths)), out)
    assert (out / "history.jsonl").read_bytes() == b"".join(map(encode_line, page.history()))
    document = json.loads((out / "evaluation.json").read_text())
    assert (document["round"], document["model"]) == (3, MODEL)
    assert list(document["facilities"]) == list(NAMES)
    assert document["facilities"]["polaris"]["reason"] == HOSTILE
    assert document["facilities"]["leonardo"]["metrics"]["loss"] == 0.25
    Page((out / "report.html").read_text("utf-8"))
    assert len(list(out.iterdir())) == 3


def _cut(path: Path) -> None:
    content = (path / "manifest.json").read_bytes()
    (path / "manifest.json").write_bytes(content[: len(content) // 2])


def _infinite(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"seconds": 1.5', '"seconds": Infinity'))


def _huge_loss(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"loss": 0.75', f'"loss": {10**400}'))


def _bomb(path: Path) -> None:
    (path / "manifest.json").write_bytes(b"[]," * 20_000_000)


def _missing(path: Path) -> None:
    (path / "manifest.json").unlink()


def _named_as(facility: str) -> Callable[[Path], None]:
    def rename(path: Path) -> None:
        stated = manifest.read(path, EvaluationManifest)
        manifest.write(path, stated.replace(facility=facility))

    return rename


def _of_round_2(path: Path) -> None:
    manifest.write(path, manifest.read(path, EvaluationManifest).replace(round=2))


@pytest.mark.parametrize(
    "harm", [_cut, _infinite, _huge_loss, _bomb, _missing, _named_as("leonardo"), _of_round_2]
)
def test_a_bad_evaluation_harms_nobody_else(
    harm: Callable[[Path], None], federation: Federation, out: Path
) -> None:
    state, paths = federation()
    before = (paths[0] / "manifest.json").read_bytes()
    harm(paths[0])
    assert (
        not (paths[0] / "manifest.json").exists()
        or before != (paths[0] / "manifest.json").read_bytes()
    )
    report(state, paths, out, allowances=allowances())
    facilities = outcome(out)
    assert facilities["karolina"]["status"] == "not evaluated"
    assert facilities["leonardo"]["status"] == "complete"
    assert "not evaluated: " in Page((out / "report.html").read_text("utf-8")).text


def test_who_sent_nothing_is_listed(federation: Federation, out: Path) -> None:
    state, paths = federation()
    report(state, paths[:2], out, allowances=allowances())
    assert outcome(out)["polaris"]["status"] == "not evaluated"


def test_same_input_gives_same_bytes(federation: Federation, out: Path) -> None:
    state, paths = federation()
    written = []
    for given in (paths, list(reversed(paths))):
        report(state, given, out)
        written.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert written[0] == written[1]


def test_a_comparison_is_shown(federation: Federation, out: Path, tmp_path: Path) -> None:
    state, paths = federation()
    final = {name: Metrics(loss=1.0, tokens=1) for name in NAMES}
    arms = {name: Arm(rounds=(), final=final) for name in ("federated", "karolina", "pooled")}
    (tmp_path / "comparison.json").write_bytes(encode(Comparison(arms=arms)))
    report(state, paths, out, tmp_path / "comparison.json")
    assert "on its own and on all data" in (out / "report.html").read_text("utf-8")


@pytest.mark.parametrize("content", ["{", '{"karolina": {}}', '{"arms": {"a": {}}}', "[1]"])
def test_a_damaged_comparison_leaves_nothing(
    content: str, federation: Federation, out: Path, tmp_path: Path
) -> None:
    state, paths = federation()
    (tmp_path / "comparison.json").write_text(content)
    with pytest.raises(CrossFLError, match=r"comparison\.json"):
        report(state, paths, out, tmp_path / "comparison.json")
    assert list(out.iterdir()) == []


def test_a_damaged_history_keeps_the_report_before(federation: Federation, out: Path) -> None:
    state, paths = federation()
    report(state, paths, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (segment,) = (state / "history").iterdir()
    segment.write_bytes(segment.read_bytes().replace(b'"round":3', b'"round":4'))
    with pytest.raises(CrossFLError, match=segment.name):
        report(state, paths, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_command_tells_the_outcome(
    federation: Federation, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, paths = federation()
    events = tmp_path / "events"
    monkeypatch.chdir(out)
    monkeypatch.setenv(PROGRESS, str(events))
    flags = [word for path in paths for word in ("--evaluation", str(path))]
    assert cli.main(["report", "--state", str(state), *flags]) == 0
    told = [decode_line(line) for line in events.read_bytes().splitlines()]
    assert [event.phase for event in told] == ["report", "completion"]
    assert (told[0].round, told[0].rounds, told[0].loss) == (3, 5, 0.75)
    assert told[0].message is not None
    assert "leonardo loss 0.2500, perplexity 2, exact match 0.500" in told[0].message
    assert "polaris absent: <script>" in told[0].message
    assert told[1].message == "it 42= → quarantadue"
    outputs = json.loads((out / "cwl.output.json").read_text())
    assert {name: value["path"] for name, value in outputs.items()} == {
        "history": "history.jsonl",
        "evaluation": "evaluation.json",
        "report": "report.html",
    }


def test_the_import_is_light() -> None:
    heavy = ("torch", "transformers", "jinja2")
    code = f"import sys, crossfl.steps.report; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
