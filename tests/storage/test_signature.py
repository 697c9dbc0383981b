"""Signed updates: nobody speaks for another facility, for another round, or with other numbers."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from crossfl.errors import CrossFLError
from crossfl.protocol.records import Task
from crossfl.server import admission
from crossfl.server.state import ServerState
from crossfl.steps.train import train
from crossfl.storage import manifest, signature
from crossfl.storage.checkpoint import Tensors
from crossfl.storage.manifest import FILE, SIGNATURE
from tests.support.paths import ROUND

NAMES = ("karolina", "leonardo")

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen")


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A key for each facility, all of them allowed."""
    keys = {name: tmp_path / f"key-{name}" for name in NAMES}
    lines = []
    for name, key in keys.items():
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", key]
        subprocess.run(command, check=True)
        lines.append(f"{name} {key.with_suffix('.pub').read_text()}")
    (tmp_path / "signers").write_text("".join(lines))
    monkeypatch.setenv(signature.SIGNERS, str(tmp_path / "signers"))
    return keys


def _admit(*updates: Path) -> dict[str, str | None]:
    """The facilities of these updates, each with the reason why it is refused."""
    weights = Tensors.of_model(ROUND / "global_model")
    admitted, excluded = admission.admit(updates, ServerState.load(ROUND / "state"), weights)
    found: dict[str, str | None] = {update.facility: None for update in admitted}
    return found | {each.facility: each.reason for each in excluded}


def _sign(update: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (update / SIGNATURE).unlink(missing_ok=True)
    monkeypatch.setenv(signature.KEY, str(key))
    signature.sign(update)


def test_a_facility_signs_what_it_sends(
    tmp_path: Path, keys: dict[str, Path], task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crossfl.storage.job import Job

    training = Job.load(ROUND.parent / "federation.yml").training
    monkeypatch.setenv(signature.KEY, str(keys["leonardo"]))
    train(ROUND / "global_model", task, training, tmp_path)
    assert _admit(tmp_path / "update") == {"leonardo": None}


def test_only_its_own_key_speaks_for_a_facility(
    round_: Path, keys: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    update = round_ / "leonardo" / "update"
    assert "it is not signed" in str(_admit(update)["leonardo"])
    _sign(update, keys["karolina"], monkeypatch)
    assert "its signature is not leonardo's" in str(_admit(update)["leonardo"])
    _sign(update, keys["leonardo"], monkeypatch)
    assert _admit(update) == {"leonardo": None}


def test_what_is_signed_cannot_be_changed(
    round_: Path, keys: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    update = round_ / "leonardo" / "update"
    _sign(update, keys["leonardo"], monkeypatch)
    said = json.loads((update / FILE).read_text())
    said["tokens"] *= 9
    (update / FILE).write_text(json.dumps(said | {"seal": manifest.seal(said)}))
    assert "its signature is not leonardo's" in str(_admit(update)["leonardo"])


def test_nobody_has_to_sign_where_nobody_is_asked_to(
    round_: Path, keys: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    update = round_ / "leonardo" / "update"
    monkeypatch.delenv(signature.SIGNERS)
    assert _admit(update) == {"leonardo": None}
    _sign(update, keys["leonardo"], monkeypatch)
    assert _admit(update) == {"leonardo": None}


def test_a_key_that_cannot_sign_is_named(
    round_: Path, keys: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CrossFLError, match=r"CROSSFL_SIGNING_KEY=.*absent cannot sign"):
        _sign(round_ / "leonardo" / "update", round_ / "absent", monkeypatch)
