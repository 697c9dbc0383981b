"""The report: what it hands on unchanged, what it shows, and what it refuses."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from crossfl import cli
from crossfl.errors import CrossFLError
from crossfl.protocol.records import Aggregation
from crossfl.server.state import ServerState
from crossfl.steps import report

HOSTILE = '<script>alert("gone")</script><img src=http://evil.example/x>'
MODEL = "ab" * 32
GOOD = {"loss": 1.0, "perplexity": 2.7, "tokens": 10}
VOID = {"meta", "link", "br", "img", "input", "hr"}

Federation = Callable[..., tuple[Path, list[Path]]]


def update(loss: float, tokens: int = 1000) -> dict[str, Any]:
    return {
        "share": 0.5,
        "status": "complete",
        "tokens": tokens,
        "samples": 16,
        "steps": 2,
        "seconds": {"load": 1.0, "evaluate": 0.5, "train": 8.0, "save": 0.5, "queue": 30.0},
        "metrics": {
            "validation": {"loss": loss, "perplexity": 2.5, "tokens": 100},
            "local": {"loss": loss / 2, "perplexity": 1.5, "tokens": 100},
            "training": {"first_loss": loss, "last_loss": loss, "tokens_per_second": 125.0},
        },
        "bytes": 2_500_000,
    }


def evaluation(facility: str, loss: float, **others: Any) -> dict[str, Any]:
    return {
        "facility": facility,
        "dataset": "numbers",
        "round": 3,
        "model": MODEL,
        "status": "complete",
        "reason": None,
        "metrics": {"loss": loss, "perplexity": 2.0, "tokens": 100, "exact_match": 0.5},
        "completions": [{"prompt": "it 42=", "completion": "quarantadue"}],
        "seconds": 1.5,
    } | others


def absent(facility: str, reason: str) -> dict[str, Any]:
    record = evaluation(facility, 0.0, status="absent", reason=reason)
    return {k: v for k, v in record.items() if k not in ("metrics", "completions", "seconds")}


@pytest.fixture
def federation(tmp_path: Path) -> Federation:
    """Three facilities: one is absent from round 2 and at the end, one skips round 1."""

    def make(
        records: list[dict[str, Any]] | None = None, rounds: int = 3
    ) -> tuple[Path, list[Path]]:
        state = ServerState(
            rounds=5, seed=7, aggregation=Aggregation(), started=0.0, model=MODEL, round=rounds
        )
        for number in range(1, rounds + 1):
            facilities = {"karolina": update(6.0 / number), "leonardo": update(5.0 / number)}
            facilities["polaris"] = update(4.0 / number, tokens=3000)
            if number == 1:
                del facilities["leonardo"]
            if number == 2:
                facilities["polaris"] = {"status": "absent", "reason": HOSTILE}
            entry = {"round": number, "finished": "2026-01-02T03:04:05+00:00", "seconds": 90.5}
            state.history.append(entry | {"loss": 5.0 / number, "facilities": facilities})
        folder = tmp_path / "state"
        folder.mkdir()
        state.save(folder)
        if records is None:
            records = [evaluation("leonardo", 0.25), absent("polaris", HOSTILE)]
            records.insert(0, evaluation("karolina", 0.75))
        paths = [tmp_path / f"{i}.json" for i in range(len(records))]
        for path, record in zip(paths, records, strict=True):
            path.write_text(json.dumps(record))
        return folder, paths

    return make


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


class Page(HTMLParser):
    """Checks that what is opened is closed; collects tags, ids, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(folder: Path) -> Page:
    return Page((folder / "report.html").read_text("utf-8"))


def test_history_is_copied_and_evaluations_are_merged(federation: Federation, out: Path) -> None:
    state, files = federation()
    report.report(state, list(reversed(files)), out)
    assert (out / "history.jsonl").read_bytes() == (state / "history.jsonl").read_bytes()
    merged = json.loads((out / "evaluation.json").read_text())
    assert (merged["round"], merged["model"]) == (3, MODEL)
    assert list(merged["facilities"]) == ["karolina", "leonardo", "polaris"]
    assert merged["facilities"]["polaris"] == {
        "dataset": "numbers",
        "status": "absent",
        "reason": HOSTILE,
    }
    assert merged["facilities"]["leonardo"]["metrics"]["loss"] == 0.25
    assert not {"facility", "round", "model"} & set(merged["facilities"]["leonardo"])
    assert report.mean_loss(merged) == 0.5
    assert sorted(p.name for p in out.iterdir()) == [
        "evaluation.json",
        "history.jsonl",
        "report.html",
    ]


def test_page_shows_what_happened(federation: Federation, out: Path) -> None:
    state, files = federation()
    report.report(state, files, out)
    page = page_of(out)
    for said in (
        "3 of 5",
        "fedavg",
        "0.5000",
        "quarantadue",
        "mean of 2 of 3",
        "2 of 3",
        "17.5 MB",
    ):
        assert said in page.text
    assert page.text.count(HOSTILE) == 2
    labels = [value for name, value in page.attributes if name == "aria-label" and value]
    assert any("karolina from 6 to 0.75; leonardo from 2.5 to 0.25" in label for label in labels)


def comparison(path: Path) -> Path:
    """Alone, karolina is worse on its own data, leonardo better; both are worse on all data."""
    losses = {
        "federated": (0.75, 0.25),
        "karolina": (1.0, 4.0),
        "leonardo": (3.0, 0.125),
        "pooled": (0.5, 0.5),
    }
    arms = {
        arm: {"final": {"karolina": {"loss": k}, "leonardo": {"loss": n}}}
        for arm, (k, n) in losses.items()
    }
    path.write_text(json.dumps(arms))
    return path


def test_it_says_what_each_facility_has_of_it(
    federation: Federation, out: Path, tmp_path: Path
) -> None:
    state, files = federation()
    others = report.alone(comparison(tmp_path / "comparison.json"))
    assert set(others) == {"karolina", "leonardo"}
    evaluated = {"round": 3, "facilities": {"karolina": {"metrics": {"loss": 0.75}}}}
    evaluated["facilities"] |= {"leonardo": {"metrics": {"loss": 0.25}}, "polaris": {}}
    found = report.benefit(ServerState.load(state), evaluated, others)
    assert found == {
        "karolina": {"local": 1.0, "final": 0.75, "alone": 1.0, "alone_all": 2.5, "final_all": 0.5},
        "leonardo": {
            "local": pytest.approx(5 / 6),
            "final": 0.25,
            "alone": 0.125,
            "alone_all": 1.5625,
            "final_all": 0.5,
        },
    }
    report.report(state, files, out, tmp_path / "comparison.json")
    text = re.sub(r"\s+", " ", page_of(out).text)
    assert "karolina1.00000.7500-0.25001.0000-0.25002.50000.5000-2.0000" in text
    assert "on its own and on all data" in text
    assert "0.8333" in text
    assert "+0.1250" in text
    assert "on the data of all" in text
    report.report(state, files, out)
    assert "crossfl compare" in page_of(out).text
    assert "Federation helped" not in page_of(out).text


def test_tasks_are_shown(federation: Federation, out: Path) -> None:
    scores = {"retrosynthesis": {"loss": 1.5, "tokens": 1200, "validity": 0.25}}
    record = evaluation("karolina", 1.0, metrics=GOOD | {"tasks": scores})
    state, files = federation([record])
    report.report(state, files, out)
    assert "loss 1.5, tokens 1,200, validity 0.25" in page_of(out).text


@pytest.mark.parametrize("content", ["{", '{"karolina": {}}', '{"a": {"final": {"b": {}}}}', "[1]"])
def test_a_damaged_comparison_leaves_nothing(
    content: str, federation: Federation, out: Path, tmp_path: Path
) -> None:
    state, files = federation()
    (tmp_path / "comparison.json").write_text(content)
    with pytest.raises(CrossFLError, match=r"comparison\.json is not a comparison"):
        report.report(state, files, out, tmp_path / "comparison.json")
    assert list(out.iterdir()) == []


def test_page_needs_nothing_else_and_runs_nothing(federation: Federation, out: Path) -> None:
    state, files = federation()
    report.report(state, files, out)
    page = page_of(out)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "image"}
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "data", "action"):
            assert str(value).startswith("#")
    text = (out / "report.html").read_text("utf-8")
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))


def test_several_plots_do_not_clash(federation: Federation, out: Path) -> None:
    state, files = federation()
    report.report(state, files, out)
    page = page_of(out)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    text = (out / "report.html").read_text("utf-8")
    assert text.count('role="img"') == 2
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', text)) <= set(ids)
    assert "#0000" not in text


def test_same_input_gives_same_bytes(federation: Federation, out: Path) -> None:
    state, files = federation()
    written = []
    for given in (files, list(reversed(files))):
        report.report(state, given, out)
        written.append((out / "report.html").read_bytes())
    assert written[0] == written[1]


@pytest.mark.parametrize("rounds", [1, 40])
def test_short_and_long_federations(rounds: int, federation: Federation, out: Path) -> None:
    state, _ = federation([], rounds)
    report.report(state, [], out)
    page = page_of(out)
    assert "No facility has evaluated it." in page.text
    assert any("all rounds together" in str(v) for _, v in page.attributes) is (rounds == 40)


def test_state_before_the_first_round(federation: Federation, out: Path) -> None:
    state, _ = federation([], 0)
    report.report(state, [], out)
    assert "svg" not in page_of(out).tags


def test_what_cannot_be_printed_is_shown() -> None:
    assert report.shown("a\x1b[2J\n\u202e\ud800è") == "a\\x1b[2J\\n\\u202e\\ud800è"
    assert report.shown("a\nb", "\n") == "a\nb"


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 B"), (999, "999 B"), (1627816, "1.63 MB"), (53e9, "53.0 GB")]
)
def test_sizes(value: float, text: str) -> None:
    assert report.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(7.94, "7.9 s"), (200, "3 min 20 s"), (9900, "2 h 45 min"), (None, "–")],
)
def test_durations(value: float | None, text: str) -> None:
    assert report.duration(value) == text


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            [evaluation("karolina", 1.0), absent("karolina", "late")],
            "second evaluation of karolina",
        ),
        ([evaluation("karolina", 1.0, model="cd" * 32)], "does not evaluate the model"),
        ([evaluation("karolina", 1.0, round=2)], "does not evaluate the model"),
        ([evaluation("<b>", 1.0)], "use letters"),
        ([evaluation("karolina", 1.0, metrics={"loss": 1.0})], "not an evaluation"),
        ([evaluation("karolina", 1.0, metrics=GOOD | {"exact_match": "x"})], "not an evaluation"),
        ([evaluation("karolina", 1.0, metrics=[1])], "not an evaluation"),
        ([evaluation("karolina", 1.0, metrics=GOOD | {"tasks": [1]})], "not an evaluation"),
        (
            [evaluation("karolina", 1.0, metrics=GOOD | {"tasks": {"a": {"rmse": "x"}}})],
            "not an evaluation",
        ),
        ([evaluation("karolina", 1.0, metrics=GOOD | {"tasks": {"<b>": {}}})], "use letters"),
        ([evaluation("karolina", 1.0, completions=[{"prompt": "it"}])], "not an evaluation"),
        ([evaluation("karolina", 1.0) | {"facility": 3}], "not an evaluation"),
        ([{"facility": "karolina", "status": "absent"}], "not an evaluation"),
        ([[1, 2]], "not an evaluation"),
        (["facility"], "not an evaluation"),
        ([None], "not an evaluation"),
    ],
)
def test_bad_evaluations_leave_nothing(
    records: list[Any], message: str, federation: Federation, out: Path
) -> None:
    state, files = federation(records)
    with pytest.raises(CrossFLError, match=message):
        report.report(state, files, out)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b'{"facility": "kar', "not JSON"), (b"\xff\xfe", "not JSON")],
)
def test_damaged_evaluations_leave_nothing(
    content: bytes | None, message: str, federation: Federation, out: Path, tmp_path: Path
) -> None:
    state, files = federation()
    cut = tmp_path / "cut.json"
    if content is not None:
        cut.write_bytes(content)
    with pytest.raises(CrossFLError, match=message):
        report.report(state, [*files, cut], out)
    assert list(out.iterdir()) == []


def test_failed_report_keeps_the_one_before(federation: Federation, out: Path) -> None:
    state, files = federation()
    report.report(state, files, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with (state / "history.jsonl").open("a") as history:
        history.write("{}\n")
    with pytest.raises(CrossFLError, match=r"history\.jsonl"):
        report.report(state, files, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_command_says_how_it_went(
    federation: Federation, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, files = federation()
    events = tmp_path / "events.jsonl"
    monkeypatch.chdir(out)
    monkeypatch.setenv("CROSSFL_PROGRESS", str(events))
    flags = [word for file in files for word in ("--evaluation", str(file))]
    assert cli.main(["report", "--state", str(state), *flags]) == 0
    said = [json.loads(line) for line in events.read_text().splitlines()]
    assert [e["phase"] for e in said] == ["report", "completion"]
    assert said[0]["loss"] == 0.5
    assert "leonardo loss 0.2500, perplexity 2, exact match 0.500" in said[0]["message"]
    assert "polaris absent: <script>" in said[0]["message"]
    assert said[1]["message"] == "it 42= → quarantadue"
    handed = json.loads((out / "cwl.output.json").read_text())
    assert {name: value["path"] for name, value in handed.items()} == {
        "history": "history.jsonl",
        "evaluation": "evaluation.json",
        "report": "report.html",
    }


def test_command_reports_bad_input(
    federation: Federation, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, files = federation()
    monkeypatch.chdir(out)
    flags = ["--evaluation", str(files[0]), "--evaluation", str(files[0])]
    assert cli.main(["report", "--state", str(state), *flags]) == cli.BAD_INPUT
    assert list(out.iterdir()) == []


def test_import_is_light() -> None:
    heavy = ("torch", "transformers", "matplotlib", "jinja2")
    code = f"import sys, crossfl.steps.report; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
