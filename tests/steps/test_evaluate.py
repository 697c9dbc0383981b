"""Evaluation at a facility: what it delivers, and what it writes only where it is allowed to."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from crossfl import cli
from crossfl.learning import evaluation
from crossfl.learning.models.tokenizers import byte_tokenizer
from crossfl.protocol.layout import EVALUATION, MANIFEST
from crossfl.protocol.manifest import EvaluationManifest
from crossfl.protocol.records import Task, Training
from crossfl.protocol.variables import DATA as DATA_ROOT
from crossfl.protocol.variables import FACILITY, PROMPTS
from crossfl.steps.evaluate import absent, evaluate
from crossfl.storage import manifest
from tests.support.paths import DATA, ROUND
from tests.support.processes import Run, flags

MODEL = ROUND / "global_model"
TRAINING = Training(batch_size=4, sequence_length=48, max_new_tokens=4, threads=1)
WORDS = ("it 3=", "cs 3=")


def _evaluate(task: Task, out: Path) -> EvaluationManifest:
    """Run the verb as the workflow does; what it delivered."""
    prompts = [f"--prompt={prompt}" for prompt in WORDS]
    words = ["evaluate", "--global-model", str(MODEL), "--outdir", str(out), *prompts]
    out.mkdir()
    assert cli.main([*words, "--on-failure", "absent", *flags(task, TRAINING)]) == 0
    return manifest.verify(out / "evaluation", EvaluationManifest)


def test_the_evaluation(task: Task, tmp_path: Path) -> None:
    written = evaluate(MODEL, task, TRAINING, WORDS, tmp_path)
    assert manifest.verify(tmp_path / "evaluation", EvaluationManifest) == written
    assert (written.facility, written.dataset, written.round) == ("leonardo", "words", 1)
    assert (written.federation, written.model) == (task.federation, task.base)
    assert (written.status, written.reason) == ("complete", None)
    assert written.metrics is not None
    assert written.metrics.exact_match is not None
    assert [completion.prompt for completion in written.completions] == list(WORDS)
    assert [path.name for path in (tmp_path / "evaluation").iterdir()] == [MANIFEST]


@pytest.mark.parametrize("value", [None, "", "0", "yes"])
def test_prompts_are_completed_only_where_the_facility_says_so(
    value: str | None,
    task: Task,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model that has learnt a sample by heart writes it behind a prompt that begins like it."""
    monkeypatch.delenv(PROMPTS)
    if value is not None:
        monkeypatch.setenv(PROMPTS, value)
    delivered = _evaluate(task, tmp_path / "out")
    assert delivered.completions == ()
    assert delivered.status == "complete"
    assert delivered.metrics is not None
    printed = capsys.readouterr().err
    assert "the job's prompts are not completed here: CROSSFL_PROMPTS is not 1" in printed


def test_prompts_are_completed_where_the_facility_says_so(
    task: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PROMPTS, "1")
    delivered = _evaluate(task, tmp_path / "out")
    assert [completion.prompt for completion in delivered.completions] == list(WORDS)
    assert PROMPTS not in capsys.readouterr().err


def test_an_absent_evaluation_is_only_a_reason(task: Task, tmp_path: Path) -> None:
    absent(task, "the disk is full", tmp_path)
    evaluation = manifest.verify(tmp_path / "evaluation", EvaluationManifest)
    assert (evaluation.status, evaluation.reason) == ("absent", "the disk is full")
    assert (evaluation.metrics, evaluation.completions) == (None, ())


def test_a_score_that_fails_is_missing_alone(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is measured by then, and is delivered."""

    def failing(*_: object) -> object:
        raise IndexError("secret")

    whole = evaluate(MODEL, task, TRAINING, WORDS, tmp_path / "whole")
    monkeypatch.setattr(evaluation, "complete", failing)
    lost = evaluate(MODEL, task, TRAINING, WORDS, tmp_path / "lost")
    assert (lost.status, lost.completions) == ("complete", ())
    assert whole.metrics is not None
    assert lost.metrics == whole.metrics.replace(exact_match=None)
    assert "what the model writes has no score: IndexError" in (lost.reason or "")
    assert "the job's prompts are not completed: IndexError" in (lost.reason or "")
    assert "secret" not in (lost.reason or "")


def test_a_prompt_beyond_the_positions_loses_its_beginning() -> None:
    """GPT-2 has a table of positions, and no place for a token more."""
    config = GPT2Config(vocab_size=384, n_positions=64, n_embd=8, n_layer=1, n_head=2)
    torch.manual_seed(0)
    model, tokenizer = GPT2LMHeadModel(config).eval(), byte_tokenizer()
    training = TRAINING.replace(max_new_tokens=8)
    prompt = "".join(chr(ord("a") + i % 26) for i in range(60))
    written = evaluation.complete(model, tokenizer, [prompt, prompt[-56:], "a"], training)
    assert written[0] == written[1]
    assert len(tokenizer(written[0]).input_ids) <= 8
    many = training.replace(max_new_tokens=1000)
    assert evaluation.complete(model, tokenizer, [prompt], many) == evaluation.complete(
        model, tokenizer, [prompt[-32:]], many
    )


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_ranks_evaluate_as_one_does(
    sharding: str, task: Task, run: Run, tmp_path: Path
) -> None:
    """The same metrics, scores of what is written and completions; one delivery."""
    site = {FACILITY: "leonardo", DATA_ROOT: str(DATA / "leonardo"), PROMPTS: "1"}
    training = TRAINING.replace(sharding=sharding)
    alone = evaluate(MODEL, task, training, WORDS, tmp_path / "alone")
    torchrun = f"{Path(sys.executable).with_name('torchrun')} --nproc-per-node=2"
    words = ["evaluate", "--global-model", MODEL, *(f"--prompt={w}" for w in WORDS)]
    there = tmp_path / "ranks"
    there.mkdir()
    result = run(
        sys.executable, "-m", "crossfl", *words, "--outdir", there, *flags(task, training),
        cwd=tmp_path, CROSSFL_LAUNCHER=torchrun, OMP_NUM_THREADS="1", **site,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert {path.name for path in there.iterdir()} == {EVALUATION, "cwl.output.json"}
    ranks = manifest.verify(there / EVALUATION, EvaluationManifest)
    assert alone.metrics is not None and ranks.metrics is not None
    assert ranks.completions == alone.completions
    assert ranks.metrics.exact_match == alone.metrics.exact_match
    assert (ranks.metrics.tokens, ranks.metrics.samples) == (
        alone.metrics.tokens, alone.metrics.samples,
    )  # fmt: skip
    assert ranks.metrics.loss == pytest.approx(alone.metrics.loss, abs=2e-4)
