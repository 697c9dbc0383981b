"""Signed updates: nobody speaks for another facility, for another round, or with other numbers."""

import json
import shutil
from pathlib import Path

import pytest

from crossfl.errors import CrossFLError
from crossfl.protocol.layout import MANIFEST
from crossfl.protocol.records import Task
from crossfl.protocol.variables import SIGNING_KEY
from crossfl.server import admission
from crossfl.server import state as server_state
from crossfl.steps.train import train
from crossfl.storage.checkpoint import Tensors
from tests.support.federation import write_document
from tests.support.keys import make_keys, sign
from tests.support.paths import ROUND

NAMES = ("karolina", "leonardo")

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen")


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Path]:
    """A key for each facility, all of them allowed."""
    return make_keys(tmp_path, NAMES)


def _admit(update: Path, signers: Path | None) -> dict[str, str | None]:
    """The facility of an update, with the reason if it is refused."""
    weights = Tensors.of_model(ROUND / "global_model")
    state = server_state.load(ROUND / "state")
    admitted, excluded = admission.admit([update], state, weights, signers=signers)
    reasons: dict[str, str | None] = {update.facility: None for update in admitted}
    return reasons | {exclusion.facility: exclusion.reason for exclusion in excluded}


def test_a_facility_signs_what_it_sends(
    tmp_path: Path, keys: dict[str, Path], task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crossfl.storage.job import Job

    training = Job.load(ROUND.parent / "federation.yml").training
    monkeypatch.setenv(SIGNING_KEY, str(keys["leonardo"]))
    train(ROUND / "global_model", task, training, tmp_path)
    assert _admit(tmp_path / "update", tmp_path / "signers") == {"leonardo": None}


def test_only_its_own_key_speaks_for_a_facility(
    tmp_path: Path, round_: Path, keys: dict[str, Path]
) -> None:
    update = round_ / "leonardo" / "update"
    assert "it is not signed" in str(_admit(update, tmp_path / "signers")["leonardo"])
    sign(update, keys["karolina"])
    assert "its signature is not by a key that the signers list for leonardo" in str(
        _admit(update, tmp_path / "signers")["leonardo"]
    )
    sign(update, keys["leonardo"])
    assert _admit(update, tmp_path / "signers") == {"leonardo": None}


def test_what_is_signed_cannot_be_changed(
    tmp_path: Path, round_: Path, keys: dict[str, Path]
) -> None:
    update = round_ / "leonardo" / "update"
    sign(update, keys["leonardo"])
    document = json.loads((update / MANIFEST).read_text())
    write_document(update, document | {"tokens": document["tokens"] * 9})
    assert "its signature is not by a key that the signers list for leonardo" in str(
        _admit(update, tmp_path / "signers")["leonardo"]
    )


def test_nobody_has_to_sign_where_nobody_is_asked_to(
    tmp_path: Path, round_: Path, keys: dict[str, Path]
) -> None:
    update = round_ / "leonardo" / "update"
    assert _admit(update, None) == {"leonardo": None}
    sign(update, keys["leonardo"])
    assert _admit(update, None) == {"leonardo": None}


def test_a_key_that_cannot_sign_is_named(
    tmp_path: Path, round_: Path, keys: dict[str, Path]
) -> None:
    with pytest.raises(CrossFLError, match=r"CROSSFL_SIGNING_KEY=.*absent cannot sign"):
        sign(round_ / "leonardo" / "update", round_ / "absent")
