"""`simulate` goes on, waits, skips and ends as the workflow does."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest

from crossfl import cli
from crossfl.errors import CrossFLError
from crossfl.protocol.fields import Record
from crossfl.simulation import simulate as module
from crossfl.simulation.compare import _without_pauses, compare
from crossfl.simulation.simulate import MOST_WAITS, simulate
from crossfl.steps.aggregate import conclude
from crossfl.steps.train import train
from crossfl.storage.job import Job
from tests.support.paths import CWL, DATA


def without_karolina(job: Job, rounds: int = 1, **rules: Any) -> Job:
    """The federation, whose facility karolina has no such dataset."""
    leonardo, karolina = job.facilities
    return dataclasses.replace(
        job,
        facilities=(leonardo, karolina.replace(dataset="nothing")),
        rounds=rounds,
        prompts=(),
        aggregation=job.aggregation.replace(**rules),
    )


def history(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


def test_a_facility_that_fails_is_absent(job: Job, tmp_path: Path) -> None:
    simulate(without_karolina(job, 2, quorum=1), DATA, tmp_path)
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    for record in [*history(tmp_path), evaluation]:
        assert record["facilities"]["leonardo"]["status"] == "complete"
        assert record["facilities"]["karolina"]["status"] == "absent"
        assert "dataset 'nothing'" in record["facilities"]["karolina"]["reason"]
    assert len(history(tmp_path)) == 2


def test_below_the_quorum_it_ends_with_the_reason(job: Job, tmp_path: Path) -> None:
    with pytest.raises(CrossFLError, match="quorum is 2: karolina is absent: dataset 'nothing'"):
        simulate(without_karolina(job), DATA, tmp_path)
    assert not (tmp_path / "global_model").exists()


def test_a_round_is_skipped(job: Job, tmp_path: Path) -> None:
    simulate(without_karolina(job, quorum=2, below_quorum="skip"), DATA, tmp_path)
    (entry,) = history(tmp_path)
    assert "the quorum is 2" in entry["skipped"]
    assert entry["facilities"]["leonardo"]["status"] == "unused"


def test_a_round_waits_and_then_ends(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its pauses, only for who is missing, and not for ever."""
    trained: list[str] = []

    def counted(model: Path, task: Any, *more: Any) -> Record | None:
        trained.append(task.facility)
        return train(model, task, *more)

    monkeypatch.setattr(module, "train", counted)
    begun = time.monotonic()
    rules = {"quorum": 2, "below_quorum": "wait", "wait_seconds": 0.2}
    with pytest.raises(CrossFLError, match=rf"'nothing'.*has waited {MOST_WAITS} times"):
        simulate(without_karolina(job, **rules), DATA, tmp_path)
    assert time.monotonic() - begun > MOST_WAITS * 0.2
    assert trained == ["karolina", "leonardo", *["karolina"] * MOST_WAITS]


def test_a_round_that_waits_ends_with_its_budget(job: Job, tmp_path: Path) -> None:
    rules = {"quorum": 2, "below_quorum": "wait", "wait_seconds": 1.6, "budget_seconds": 1.5}
    with pytest.raises(CrossFLError, match="budget_seconds ran out while round 1 waited"):
        simulate(without_karolina(job, **rules), DATA, tmp_path)


def test_a_round_goes_on_when_who_was_missing_comes(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def mended(*arguments: Any) -> None:
        """Put the dataset where it was looked for, while the round waits."""
        (tmp_path / "data" / "karolina" / "nothing").symlink_to("words")
        monkeypatch.setattr(module, "conclude", conclude)
        conclude(*arguments)

    for facility in job.facilities:
        (tmp_path / "data" / facility.name).mkdir(parents=True)
        for path in (DATA / facility.name / "words").iterdir():
            target = tmp_path / "data" / facility.name / "words" / path.name
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    monkeypatch.setattr(module, "conclude", mended)
    rules = {"quorum": 2, "below_quorum": "wait", "wait_seconds": 0.0}
    simulate(without_karolina(job, **rules), tmp_path / "data", tmp_path / "late")
    simulate(dataclasses.replace(job, rounds=1, prompts=()), DATA, tmp_path / "whole")
    weights = [tmp_path / n / "global_model" / "model.safetensors" for n in ("late", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_budget_that_is_over_trains_nothing(job: Job, tmp_path: Path) -> None:
    rules = job.aggregation.replace(budget_seconds=0.0)
    simulate(dataclasses.replace(job, aggregation=rules, prompts=()), DATA, tmp_path)
    assert history(tmp_path) == []


def test_too_few_facilities_are_said_before_any_training(job: Job, tmp_path: Path) -> None:
    rules = job.aggregation.replace(aggregation_rule="krum")
    with pytest.raises(CrossFLError, match="in round 1 of 2, which needs"):
        simulate(dataclasses.replace(job, aggregation=rules), DATA, tmp_path)


def test_a_comparison_needs_every_facility(job: Job, tmp_path: Path) -> None:
    """Its arms see equally many samples, whatever quorum the federation has."""
    with pytest.raises(CrossFLError, match="dataset 'nothing'"):
        compare(without_karolina(job, quorum=1), DATA, tmp_path, 1)
    rules = {"quorum": 1, "quorum_share": 0.1, "below_quorum": "skip"}
    compared = _without_pauses(without_karolina(job, **rules)).aggregation
    assert (compared.quorum, compared.quorum_share, compared.below_quorum) == (None, None, "stop")


def test_a_job_is_checked_before_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.yml"
    path.write_text((CWL / "federation.yml").read_text())
    assert cli.main(["simulate", str(path), "--data", str(DATA)]) == cli.BAD_INPUT
    assert f"{path}: config is {tmp_path / 'config.json'}, which cannot" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [path]
