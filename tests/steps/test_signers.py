"""Signatures in a federation: asked for by the aggregation record, and by nothing else."""

import shutil
from pathlib import Path

import pytest
import torch

from crossfl.errors import CrossFLError
from crossfl.protocol.layout import GLOBAL_MODEL, SIGNERS, STATE
from crossfl.protocol.records import Aggregation
from crossfl.protocol.variables import VARIABLES
from crossfl.server import state as server_state
from crossfl.steps.initialise import initialise
from tests.support.federation import Federation, Values, facilities
from tests.support.keys import make_keys, sign
from tests.support.paths import CWL

NAMES = ("karolina", "leonardo")
MODEL: Values = {"w": torch.zeros(3)}
ONES: Values = {"w": torch.ones(3)}

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen")


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Path]:
    return make_keys(tmp_path, NAMES)


def _initialise(signers: Path, out: Path) -> Path:
    aggregation = Aggregation(signers=str(signers))
    initialise(None, CWL / "config.json", "bytes", 1, 1, aggregation, out)
    return out / STATE


def test_the_state_keeps_who_may_sign(keys: dict[str, Path], tmp_path: Path) -> None:
    content = (tmp_path / "signers").read_bytes()
    state = _initialise(tmp_path / "signers", tmp_path / "out")
    (tmp_path / "signers").write_text("* anybody")
    assert server_state.load(state).aggregation.signers == SIGNERS  # no path of this machine
    assert (state / SIGNERS).read_bytes() == content
    (state / SIGNERS).write_text("* anybody")
    with pytest.raises(CrossFLError, match=f"{SIGNERS} has 9 bytes instead of"):
        server_state.load(state)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "which cannot be read: No such file"), ("", "lists nobody"), ("# none\n", "nobody")],
)
def test_a_file_that_lists_nobody_is_refused(
    content: str | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "signers").write_text(content)
    with pytest.raises(CrossFLError, match=f"aggregation.signers is .*{message}"):
        _initialise(tmp_path / "signers", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_no_variable_switches_it_off(
    keys: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = Federation(tmp_path / "f", MODEL, signers=str(tmp_path / "signers"), quorum=1)
    karolina, leonardo = (federation.update(name, ONES) for name in NAMES)
    sign(leonardo, keys["leonardo"])
    for name in ("CROSSFL_ALLOWED_SIGNERS", *(variable.name for variable in VARIABLES)):
        monkeypatch.setenv(name, "")
    allowances = federation.allowances(dict.fromkeys(NAMES, 5))
    out = federation.run([karolina, leonardo], allowances=allowances)
    entries = facilities(out)
    assert entries["leonardo"].status == "complete"
    assert entries["karolina"].status == "refused"
    assert entries["karolina"].reason == "it is not signed: karolina has to set CROSSFL_SIGNING_KEY"
    assert (out / STATE / SIGNERS).read_bytes() == (tmp_path / "signers").read_bytes()

    # In the next round they are asked for, too.
    federation.model, federation.state = out / GLOBAL_MODEL, out / STATE
    federation.server = server_state.load(out / STATE)
    updates = [federation.update(name, ONES, name=f"{name}-2") for name in NAMES]
    sign(updates[0], keys["karolina"])
    sign(updates[1], keys["karolina"])
    entries = facilities(federation.run(updates, "second", allowances=allowances))
    assert entries["karolina"].status == "complete"
    assert entries["leonardo"].status == "refused"
    assert "not by a key that the signers list for leonardo" in str(entries["leonardo"].reason)
