"""`crossfl export` and the page of a run that goes on: from a journal alone."""

import csv
import fcntl
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from crossfl import cli
from crossfl.console.export import as_csv, page_of, plots_of, rounds_table, write_page
from crossfl.console.run import find
from crossfl.observe.page.about import About
from crossfl.observe.page.render import render
from crossfl.observe.page.timeline import Timeline
from crossfl.protocol.events import encode_line
from crossfl.protocol.exits import Exit
from crossfl.protocol.layout import JOURNAL_LOCK, STATE
from crossfl.server import state as server_state
from tests.console.test_status import STORY, journal
from tests.support import page as made
from tests.support.page import HOSTILE, Page, absent, history, round_entry


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A journal with one run of one round."""
    place = journal(tmp_path, *STORY)
    (run,) = [path for path in place.iterdir() if path.is_dir()]
    folder = run / "000001" / STATE
    folder.mkdir(parents=True)
    before = tmp_path / "before"
    before.mkdir()
    server_state.save(made.server_state(0), before)
    state = made.server_state(1, started=STORY[0].time, run=run.name)
    server_state.save(state, folder, before=before, entry=history(1)[0])
    return place


def test_the_page_of_a_run_that_goes_on_says_so_and_loads_itself_anew(place: Path) -> None:
    with (place / JOURNAL_LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = page_of(find(place))
    assert "The run goes on." in Page(text).text
    assert '<meta http-equiv="refresh" content="20">' in text
    ended = page_of(find(place))
    assert "The run goes on." not in Page(ended).text
    assert 'http-equiv="refresh"' not in ended
    assert "streamflow run federation.yml" in Page(ended).text


def test_the_page_is_written_into_the_run(place: Path) -> None:
    assert cli.main(["export", str(place), "--page"]) == 0
    path = write_page(find(place))
    assert path.parent.parent == place
    Page(path.read_text())


def test_plots_and_tables_stand_alone(place: Path, tmp_path: Path) -> None:
    assert cli.main(["export", str(place), "--outdir", str(tmp_path / "out")]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"loss.svg", "clock.svg", "gantt.svg", "time.svg", "share.svg", "report.html"} < names
    for path in (tmp_path / "out").glob("*.svg"):
        text = path.read_text()
        assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"  # noqa: S314
        defined = set(re.findall(r"(--[\w-]+):", text))
        assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= defined
    with (tmp_path / "out" / "rounds.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["round"], r["facility"], r["validation_loss"]) for r in rows] == [
        ("1", "karolina", "6.0"),
        ("1", "polaris", "4.0"),
    ]
    events = (tmp_path / "out" / "events.csv").read_text()
    assert "PartitionDown" in events
    assert len(events.splitlines()) == len(STORY) + 1


def test_a_spreadsheet_takes_no_text_for_a_formula() -> None:
    entry = round_entry(1, {"a": absent("=HYPERLINK(1)"), "b": absent("x,\ny")})
    text = as_csv(rounds_table([entry])).decode()
    assert "'=HYPERLINK(1)" in text
    assert '"x,\ny"' in text


def test_a_journal_without_a_round_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(journal(tmp_path))]) == Exit.BAD_INPUT
    assert "has no round" in capsys.readouterr().err


def test_damaged_events_leave_the_page(place: Path) -> None:
    events = find(place).events
    events.write_bytes(b"\x00" * 5000 + b"\n" + encode_line(STORY[0]) + b"{" * 9000)
    Page(page_of(find(place)))


def test_settings_and_commands_are_escaped() -> None:
    about = About(
        timeline=Timeline([STORY[0].replace(message=HOSTILE)]),
        configuration={HOSTILE: {"a": [HOSTILE], "empty": None}, "lora": {"rank": 8}},
        parameters=12_000_000_000,
    )
    page = Page(render(made.server_state(), history(), {}, about=about))
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) >= 3
    assert "12.0 billion" in page.text
    assert "of the adapter" in page.text


def test_what_events_tell_is_drawn_and_summed() -> None:
    timeline = Timeline(STORY)
    lane = timeline.lanes["leonardo"]
    assert [(s.kind, round(s.end - s.start)) for s in lane.spans] == [("queue", 600)]
    assert (lane.nodes, lane.node_seconds) == (4, 1600.0)
    assert [span.kind for span in timeline.merges] == ["merge"]
    drawn = dict(plots_of(made.server_state(1, started=STORY[0].time), history(1), timeline))
    assert {"loss", "clock", "gantt", "time", "share"} <= set(drawn)
