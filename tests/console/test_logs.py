"""`crossfl logs`: only where the facility's job script allows it, and only what is known."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from crossfl.console import logs
from crossfl.console.run import find
from crossfl.errors import CrossFLError
from tests.console.test_status import event, journal

STORY = (
    event("running", 9, "alpha", round=1, job="7", nodes=1),
    event("ended", 8, "alpha", round=1, job="7", nodes=1, seconds=1.0, log="/scratch/one"),
    event("ended", 4, "alpha", round=2, job="8", nodes=1, seconds=1.0, log="/scratch/two"),
    event("queued", 2, "beta", round=2, job="9"),
)


def test_the_last_log_or_that_of_a_round(tmp_path: Path) -> None:
    found = find(journal(tmp_path, *STORY))
    assert logs.path_of(found, "alpha", None) == "/scratch/two"
    assert logs.path_of(found, "alpha", 1) == "/scratch/one"
    with pytest.raises(CrossFLError, match="for round 3; rounds with one: 1, 2"):
        logs.path_of(found, "alpha", 3)
    with pytest.raises(CrossFLError, match="no log of a job of beta is known"):
        logs.path_of(found, "beta", None)
    with pytest.raises(CrossFLError, match="no facility 'gamma'; it has alpha, beta"):
        logs.path_of(found, "gamma", None)


@pytest.mark.parametrize(
    ("script", "is_allowed"),
    [
        ("", False),
        ("# export CROSSFL_LOGS=1\n", False),
        ("export CROSSFL_LOGS=\n", False),
        ("export CROSSFL_LOGS=10\n", False),
        ("umask 077\nexport CROSSFL_LOGS=1 # logs: yes\n", True),
    ],
)
def test_a_facility_has_to_allow_it(
    script: str, is_allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "alpha.sh"
    file.write_text(script)
    site = SimpleNamespace(name="alpha", script=file, setting=lambda name: f"--set alpha.{name}=…")
    load = SimpleNamespace(load=lambda _: SimpleNamespace(sites=(site,)))
    monkeypatch.setattr("crossfl.console.logs.Federation", load)
    if is_allowed:
        assert logs.allowed(tmp_path, "alpha").name == "alpha"
    else:
        with pytest.raises(CrossFLError, match="does not let its logs be fetched"):
            logs.allowed(tmp_path, "alpha")
    with pytest.raises(CrossFLError, match="no facility 'beta'"):
        logs.allowed(tmp_path, "beta")
