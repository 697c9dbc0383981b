"""A federation that asks for signatures, under both engines: who did not sign costs its own part.

The environment has the key of leonardo for everybody, so what karolina delivers is not signed by
karolina.
"""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from crossfl.protocol.layout import SIGNATURE
from tests.support.copies import copy_federation
from tests.support.keys import make_keys
from tests.support.paths import DATA
from tests.support.processes import PRESERVE, Run

COMMANDS = {
    "streamflow": ("streamflow", "run", "--outdir", "out", "streamflow.yml"),
    "cwltool": (
        *("cwltool", "--enable-ext", *PRESERVE, "--preserve-environment=CROSSFL_SIGNING_KEY"),
        *("--outdir", "out", "../../workflows/federated.cwl", "federation.yml"),
    ),
}
REASON = "its signature is not by a key that the signers list for karolina"

pytestmark = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen")


@pytest.mark.parametrize("engine", COMMANDS)
def test_only_what_is_signed_counts(engine: str, run: Run, tmp_path: Path) -> None:
    federation = copy_federation(tmp_path)
    keys = make_keys(federation, ("karolina", "leonardo"))
    job = yaml.safe_load((federation / "federation.yml").read_text())
    job["aggregation"] |= {"quorum": 1, "signers": {"class": "File", "path": "signers"}}
    (federation / "federation.yml").write_text(yaml.safe_dump(job | {"rounds": 1}))
    result = run(
        *COMMANDS[engine],
        cwd=federation,
        CROSSFL_FACILITY="*",
        CROSSFL_DATA=str(DATA),
        CROSSFL_SIGNING_KEY=str(keys["leonardo"]),
        CROSSFL_ALLOWED_SIGNERS="",  # which switched it off once
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    out = federation / "out"
    (line,) = (out / "history.jsonl").read_text().splitlines()
    entries, evaluations = (
        json.loads(text)["facilities"] for text in (line, (out / "evaluation.json").read_text())
    )
    assert {name: entry["status"] for name, entry in entries.items()} == {
        "karolina": "refused",
        "leonardo": "complete",
    }
    assert entries["karolina"]["reason"] == REASON
    assert evaluations["karolina"] == {"status": "not evaluated", "reason": REASON}
    assert evaluations["leonardo"]["status"] == "complete"
    assert REASON in (out / "report.html").read_text()
    assert not list(out.rglob(SIGNATURE))  # the model is nobody's delivery
