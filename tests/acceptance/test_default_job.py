"""The default federation for real: what `make run` leaves, and what each facility learns alone."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT


def make(*words: str) -> None:
    subprocess.run(["make", *words], cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    make("run", f"OUTDIR={out}")
    return out


def test_both_languages_are_learnt(results: Path) -> None:
    evaluation = json.loads((results / "evaluation.json").read_text())
    matches = {f: r["metrics"]["exact_match"] for f, r in evaluation["facilities"].items()}
    assert set(matches) == {"leonardo", "karolina"}
    assert min(matches.values()) >= 0.5, matches


def test_the_model_is_a_hugging_face_checkpoint(results: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(results / "global_model")
    tokenizer = AutoTokenizer.from_pretrained(results / "global_model")
    assert len(tokenizer) <= model.config.vocab_size
    assert (results / "report.html").read_text().rstrip().endswith("</html>")
    assert len((results / "history.jsonl").read_text().splitlines()) == 12


def test_the_code_of_the_readme_writes_what_was_evaluated(results: Path, tmp_path: Path) -> None:
    """Plain transformers: the tokenizer puts nothing behind a prompt."""
    page = (ROOT / "README.md").read_text("utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "results").symlink_to(results)
    words = [sys.executable, "-c", block]
    printed = subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, text=True)
    evaluation = json.loads((results / "evaluation.json").read_text())
    for facility in evaluation["facilities"].values():
        written = [pair["prompt"] + pair["completion"] for pair in facility["completions"]]
        assert printed.stdout.splitlines() == written
        assert len(written) == 4


def test_a_bare_run_leaves_the_same_model(results: Path, tmp_path: Path) -> None:
    """`streamflow run streamflow.yml`, with no variable and no option: outputs where it stands."""
    for name in ("streamflow.yml", "workflows", "steps", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    streamflow = ROOT / ".venv" / "bin" / "streamflow"
    subprocess.run([streamflow, "run", "streamflow.yml"], cwd=tmp_path, check=True)
    models = [d / "global_model" / "model.safetensors" for d in (results, tmp_path)]
    assert models[0].read_bytes() == models[1].read_bytes()


def test_alone_no_facility_learns_the_other_language(tmp_path: Path) -> None:
    make("compare", f"OUTDIR={tmp_path}")
    result = json.loads((tmp_path / "compare" / "comparison.json").read_text())
    final = {arm: outcome["final"] for arm, outcome in result["arms"].items()}
    assert final["leonardo"]["karolina"]["exact_match"] <= 0.05
    assert final["karolina"]["leonardo"]["exact_match"] <= 0.05
    for facility in ("leonardo", "karolina"):
        assert final["federated"][facility]["exact_match"] >= 0.5
