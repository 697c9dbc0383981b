"""Whatever a step prints or a log is told, the terminal shows it and does not obey it."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from crossfl.engine.terminal import Printable, guard
from tests.support.engine import Engine
from tests.support.processes import Run

HOSTILE = "\x1b[2J\x1b]0;title\x07 \u202egnp.exe\u202c\r\x9b31m\u2066"
ESCAPED = r"\x1b[2J\x1b]0;title\x07 \u202egnp.exe\u202c\r\x9b31m\u2066"
STEP = """\
cwlVersion: v1.2
class: CommandLineTool
inputs: {words: string}
baseCommand: [sh, -c, 'printf "%s\\n%s\\n" "$0" second; exit 3']
arguments: [$(inputs.words)]
outputs: {}
"""


def unprintable(text: str) -> set[str]:
    return {c for c in text if not c.isprintable() and c not in "\n\t"}


@pytest.mark.parametrize("kind", ["crossfl.local", "local"])
@pytest.mark.parametrize("flags", [[], ["--debug"]], ids=["quiet", "debug"])
def test_a_step_that_fails_with_hostile_words(
    run: Run, tmp_path: Path, kind: str, flags: list[str]
) -> None:
    (tmp_path / "step.cwl").write_text(STEP)
    path = Engine(tmp_path).write(
        str(tmp_path / "step.cwl"),
        {"words": HOSTILE},
        {"this-machine": {"type": kind, "config": {}}},
        {"deployment": "this-machine"},
        step="/",
    )
    result = run("streamflow", "run", *flags, "--outdir", "out", path, cwd=tmp_path)
    assert result.returncode == 1
    assert f"{ESCAPED}\nsecond" in result.stderr
    assert not unprintable(result.stderr)
    assert not unprintable(result.stdout)


@pytest.fixture
def guarded() -> Iterator[None]:
    """The filter where libraries print, for the length of a test."""
    guard()
    yield
    last = logging.lastResort
    assert last is not None
    for name in (logging.getLogger("streamflow"), last):
        for item in [f for f in name.filters if isinstance(f, Printable)]:
            name.removeFilter(item)


def test_the_log_of_a_library(
    guarded: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    try:
        raise ValueError(HOSTILE)
    except ValueError as error:
        logging.getLogger("asyncio").error("%s was lost", error, exc_info=True)
    printed = capsys.readouterr().err
    assert f"{ESCAPED} was lost\n" in printed
    assert f"ValueError: {ESCAPED}" in printed
    assert not unprintable(printed)


def test_it_is_installed_once_and_before_the_colours(guarded: None) -> None:
    guard()
    engine = logging.getLogger("streamflow")
    assert [isinstance(f, Printable) for f in engine.filters].count(True) == 1
    assert isinstance(engine.filters[0], Printable)
