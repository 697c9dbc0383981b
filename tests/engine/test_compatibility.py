"""An engine that is not the one the plugin was written for is refused before anything runs."""

import importlib.metadata
import locale
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from crossfl.engine import compatibility, shutdown
from crossfl.engine.recovery import replay
from crossfl.errors import CrossFLError


def doctor(monkeypatch: pytest.MonkeyPatch, change: Callable[[str], str]) -> None:
    """Let the sources of the engine read as if they had been changed."""
    for module in (replay, shutdown):
        monkeypatch.setattr(module, "source_of", lambda name: change(compatibility.source_of(name)))


def test_the_installed_engine_has_all_that_is_used() -> None:
    compatibility.check_version()
    compatibility.check_names([*replay.missing_names(), *shutdown.missing_names()])


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.2.0")
    with pytest.raises(CrossFLError, match=r"0\.2\.0 is .* pip install 'streamflow==0\.2\.0rc3'"):
        compatibility.check_version()


@pytest.mark.parametrize(
    ("old", "new", "missing"),
    [
        (
            "logger.",
            "log.",
            {f"the error messages of {name}" for name in shutdown.FINAL},
        ),
        (
            "FAILED Job",
            "Job failed",
            {"the message 'FAILED Job' of streamflow.workflow.step"},
        ),
    ],
)
def test_what_was_renamed_is_named(
    monkeypatch: pytest.MonkeyPatch, old: str, new: str, missing: set[str]
) -> None:
    doctor(monkeypatch, lambda text: text.replace(old, new))
    assert {*replay.missing_names(), *shutdown.missing_names()} == missing
    with pytest.raises(CrossFLError, match="pip install --force-reinstall"):
        compatibility.check_names(missing)


def test_a_method_that_is_gone_or_no_longer_wrapped_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for owner, name in replay.PRIVATE:
        with monkeypatch.context() as patch:
            patch.delattr(owner, name)
            assert [f"{owner.__module__}.{owner.__name__}.{name}"] == list(replay.missing_names())
    for owner, name in replay.RECOVERABLE:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, getattr(owner, name).__wrapped__)
            (missing,) = replay.missing_names()
            assert missing.startswith("the decorator @recoverable") and missing.endswith(name)


@pytest.mark.parametrize(("encoding", "lines"), [("UTF-8", 0), ("utf8", 0), ("ISO-8859-1", 1)])
def test_a_locale_that_is_not_utf8_is_said(
    encoding: str,
    lines: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(locale, "getpreferredencoding", lambda _: encoding)
    monkeypatch.setattr("crossfl.engine.compatibility.logger.warning", warnings.append)
    compatibility.warn_of_encoding()
    assert len(warnings) == lines
    assert all("ISO-8859-1" in line and "PYTHONUTF8=1" in line for line in warnings)


@pytest.mark.engine
def test_a_run_with_another_version_ends_with_one_message(tmp_path: Path) -> None:
    """The real command, which takes the version from the metadata of the distribution."""
    code = (
        "import importlib.metadata as m, sys; v = m.version\n"
        "m.version = lambda name: '0.3.0' if name == 'streamflow' else v(name)\n"
        "from streamflow.main import main; sys.exit(main(['run', 'streamflow.yml']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 1
    assert "StreamFlow 0.3.0 is installed" in run.stderr
    assert "pip install 'streamflow==0.2.0rc3'" in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stderr.count("\n") == 1
