"""What steps at a deployment of type `crossfl.local` are told of their facility."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import Engine
from tests.support.processes import Run

PROMPTS, SAMPLES, TOKENS = NAMES = (
    "CROSSFL_PROMPTS",
    "CROSSFL_MIN_VALIDATION_SAMPLES",
    "CROSSFL_MIN_VALIDATION_TOKENS",
)
STEP = """\
cwlVersion: v1.2
class: CommandLineTool
inputs: {}
baseCommand: [python, -c, "import json, os; print(json.dumps(dict(os.environ)))"]
stdout: environment.json
outputs: {environment: stdout}
"""


def start(run: Run, folder: Path, config: dict[str, Any], **variables: str) -> Any:
    (folder / "step.cwl").write_text(STEP)
    path = Engine(folder).write(
        str(folder / "step.cwl"),
        {},
        {"place": {"type": "crossfl.local", "config": config}},
        {"deployment": "place"},
        step="/",
    )
    return run("streamflow", "run", "--outdir", "out", path, cwd=folder, **variables)


@pytest.mark.parametrize(
    ("config", "variables", "seen"),
    [
        ({"facility": "leonardo"}, {}, ("1", "", "")),
        ({"facility": "leonardo"}, {SAMPLES: "30"}, ("1", "30", "")),
        (
            {
                "facility": "leonardo",
                "prompts": False,
                "min_validation_samples": 5,
                "min_validation_tokens": 70,
                "models": "bases",
            },
            {PROMPTS: "1", SAMPLES: "30"},
            ("", "5", "70"),
        ),
        ({}, {PROMPTS: "1"}, ("", "", "")),
    ],
    ids=["by default", "a floor of the machine", "in the deployment", "no facility"],
)
def test_what_may_leave(
    run: Run,
    tmp_path: Path,
    config: dict[str, Any],
    variables: dict[str, str],
    seen: tuple[str, ...],
) -> None:
    result = start(run, tmp_path, config, **{SAMPLES: "", TOKENS: ""} | variables)
    assert result.returncode == 0, result.stderr
    environment = json.loads((tmp_path / "out" / "environment.json").read_text())
    assert tuple(environment.get(name) for name in NAMES) == seen
    own = str(tmp_path / config["models"]) if "models" in config else None
    assert environment.get("CROSSFL_MODELS") == own


def test_a_floor_is_at_least_one(run: Run, tmp_path: Path) -> None:
    result = start(run, tmp_path, {"facility": "leonardo", "min_validation_samples": 0})
    assert result.returncode == 1
    assert "0 is less than the minimum of 1" in result.stderr
