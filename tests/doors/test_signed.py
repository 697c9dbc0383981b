"""Where signatures are asked for, nothing without one counts, and none counts elsewhere."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from crossfl.errors import CrossFLError
from crossfl.protocol.manifest import EvaluationManifest
from crossfl.protocol.measurements import Metrics
from crossfl.protocol.records import Allowance
from crossfl.protocol.variables import SIGNING_KEY
from crossfl.server import state as server_state
from crossfl.server.deliveries import Exclusion, admit_evaluation
from crossfl.storage import manifest, signature
from tests.support.federation import Federation, Values, facilities, write_document

MODEL: Values = {"a": torch.zeros(4, 3)}
NAMES = ("good", "evil")

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen")

Sign = Callable[[Path, str], Path]


@pytest.fixture
def signers(tmp_path: Path) -> Path:
    lines = []
    for name in NAMES:
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", tmp_path / name]
        subprocess.run(command, check=True)
        lines.append(f"{name} {(tmp_path / name).with_suffix('.pub').read_text()}")
    (tmp_path / "signers").write_text("".join(lines))
    return tmp_path / "signers"


@pytest.fixture
def sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sign:
    def by(path: Path, facility: str) -> Path:
        monkeypatch.setenv(SIGNING_KEY, str(tmp_path / facility))
        signature.sign(path)
        monkeypatch.delenv(SIGNING_KEY)
        return path

    return by


def evaluation(federation: Federation, facility: str, **changes: Any) -> Path:
    path = federation.folder / f"evaluation-{facility}"
    path.mkdir()
    values: dict[str, Any] = {
        "facility": facility,
        "federation": federation.server.federation,
        "dataset": "words",
        "round": 0,
        "model": federation.server.model,
        "status": "complete",
        "metrics": Metrics(loss=0.5, tokens=100),
    }
    manifest.write(path, EvaluationManifest(**values | changes))
    return path


def test_only_what_its_facility_signed_counts(tmp_path: Path, signers: Path, sign: Sign) -> None:
    federation = Federation(tmp_path / "f", MODEL, quorum=1, signers=str(signers))
    good = sign(federation.update("good", federation.deltas(0)), "good")
    evil = sign(federation.update("good", federation.deltas(1), name="evil"), "evil")
    for update, status in ((good, "complete"), (evil, "refused")):
        honest = sign(federation.update("evil", federation.deltas(2), name=status), "evil")
        allowances = [Allowance(facility=n, steps=5, samples=10, tokens=100) for n in NAMES]
        out = federation.run([update, honest], f"out-{status}", allowances=allowances)
        assert facilities(out)["good"].status == status
    unsigned = federation.update("good", federation.deltas(1), name="unsigned")
    with pytest.raises(CrossFLError, match="it is not signed: good has to set"):
        federation.run([unsigned], allowances=allowances[:1])


def test_no_environment_turns_signatures_off(
    tmp_path: Path, signers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may sign is a matter of the state, from the first round on."""
    federation = Federation(tmp_path / "f", MODEL, quorum=1, signers=str(signers))
    signers.write_text("")
    monkeypatch.setenv("CROSSFL_ALLOWED_SIGNERS", "")
    kept = server_state.signers(federation.server, federation.state)
    assert kept == federation.state / "signers"
    assert "good ssh-ed25519" in kept.read_text()
    assert federation.server.aggregation.signers == "signers"


def test_signers_who_are_nobody_are_refused(tmp_path: Path, signers: Path) -> None:
    signers.write_text("\n# nobody\n")
    with pytest.raises(CrossFLError, match="lists nobody who may sign"):
        Federation(tmp_path / "f", MODEL, signers=str(signers))


def test_an_update_of_another_run_of_the_same_seed_does_not_count(
    tmp_path: Path, signers: Path, sign: Sign
) -> None:
    first, second = (
        Federation(tmp_path / name, MODEL, quorum=1, signers=str(signers)) for name in "ab"
    )
    second.server = second.server.replace(started=second.server.started + 1)
    assert second.server.seed == first.server.seed
    assert second.server.model == first.server.model
    replayed = sign(second.update("good", second.deltas(0)), "good")
    with pytest.raises(CrossFLError, match="it is of federation"):
        first.run([replayed])


def test_an_evaluation_needs_a_signature_too(tmp_path: Path, signers: Path, sign: Sign) -> None:
    federation = Federation(tmp_path / "f", MODEL, signers=str(signers))
    path = evaluation(federation, "good")
    refused = admit_evaluation(path, "good", federation.server, signers)
    assert isinstance(refused, Exclusion)
    assert "it is not signed" in refused.reason
    sign(path, "evil")
    assert isinstance(admit_evaluation(path, "good", federation.server, signers), Exclusion)
    (path / "manifest.json.sig").unlink()
    sign(path, "good")
    assert isinstance(
        admit_evaluation(path, "good", federation.server, signers), EvaluationManifest
    )


@pytest.mark.parametrize("said", ["metrics", "completions"])
def test_who_is_absent_and_signs_nothing_says_nothing(
    tmp_path: Path, signers: Path, said: str
) -> None:
    """Else metrics without a signature would count, by the word that there are none."""
    federation = Federation(tmp_path / "f", MODEL, signers=str(signers))
    path = federation.folder / "evaluation"
    path.mkdir()
    values = {
        "metrics": {"loss": 0.0, "tokens": 9},
        "completions": [{"prompt": "p", "completion": "c"}],
    }
    document = {
        "kind": "evaluation", "format": 2, "facility": "good", "dataset": "words", "round": 0,
        "federation": federation.server.federation, "model": federation.server.model,
        "status": "absent", "reason": "queue", said: values[said],
    }  # fmt: skip
    write_document(path, document, EvaluationManifest)
    refused = admit_evaluation(path, "good", federation.server, signers)
    assert isinstance(refused, Exclusion)
    assert "is absent and has metrics or completions" in refused.reason
