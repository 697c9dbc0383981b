"""Batch normalisation in a federation: its statistics are told from weights by the model itself."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from crossfl.facility.savepoint import Savepoint
from crossfl.learning.models.loading import load
from crossfl.protocol.records import Aggregation, Facility, Task, Training
from crossfl.server import state as server_state
from crossfl.server.planning.fixed import plan
from crossfl.simulation.simulate import playing_every_facility, rounds
from crossfl.steps.initialise import initialise
from crossfl.steps.train import train
from crossfl.storage.checkpoint import Tensors
from crossfl.storage.job import Job
from tests.learning.test_vision import rows

RESNET = {
    "model_type": "resnet",
    "num_channels": 1,
    "num_labels": 2,
    "embedding_size": 8,
    "hidden_sizes": [8],
    "depths": [1],
    "layer_type": "basic",
}
TRAINING = Training(batch_size=8, learning_rate=0.01, threads=1)
FACILITIES = ("leonardo", "karolina")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, facility in enumerate(FACILITIES):
        folder = tmp_path / "data" / facility / "halves"
        folder.mkdir(parents=True)
        for split, part in (("train", rows(32, seed)), ("valid", rows(16, seed + 10))):
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    return tmp_path / "data"


def _config(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(RESNET))
    return tmp_path / "config.json"


@pytest.mark.parametrize("server_optimizer", ["diloco", "fedavgm", "fedadam"])
def test_a_federation_with_batch_normalisation_learns(
    server_optimizer: str, root: Path, tmp_path: Path
) -> None:
    job = Job(
        facilities=tuple(Facility(name=n, dataset="halves") for n in FACILITIES),
        rounds=4,
        local_steps=6,
        config=_config(tmp_path),
        training=TRAINING.replace(encoding="int8"),
        aggregation=Aggregation(server_optimizer=server_optimizer, model_dtype="bf16"),
    )
    with playing_every_facility(root):
        *_, (_, here) = rounds(job, tmp_path / "rounds")
    losses = [entry.loss for entry in server_state.history(here / "state")]
    assert losses[-1] < losses[0]
    weights = Tensors.of_model(here / "global_model")
    network = AutoModelForImageClassification.from_pretrained(here / "global_model")
    assert weights.buffers == {name for name, _ in network.named_buffers()}
    variances = [name for name in weights.buffers if name.endswith("running_var")]
    assert variances
    for name in variances:
        assert (weights[name] > 0).all()
        assert weights[name].dtype == torch.float32
        assert not weights[name].equal(torch.ones_like(weights[name]))


def _task(tmp_path: Path, training: Training) -> tuple[Path, Task]:
    initialise(None, _config(tmp_path), None, 0, 1, Aggregation(), tmp_path / "0")
    server = server_state.load(tmp_path / "0" / "state")
    facility = Facility(name="leonardo", dataset="halves")
    (task,) = plan(server, [facility], 6, training, "train").tasks
    return tmp_path / "0" / "global_model", task


def test_a_job_that_goes_on_has_the_statistics_it_had(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = TRAINING.replace(checkpoint_steps=2)
    model, task = _task(tmp_path, training)
    write = Savepoint.write

    def killed(self: Savepoint, *what: Any) -> None:
        write(self, *what)
        raise KeyboardInterrupt

    with playing_every_facility(root):
        train(model, task, training, tmp_path / "whole")
    with playing_every_facility(root):
        monkeypatch.setattr(Savepoint, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            train(model, task, training, tmp_path / "killed")
        monkeypatch.undo()
        monkeypatch.setenv("CROSSFL_PROGRESS", str(tmp_path / "progress"))
        train(model, task, training, tmp_path / "again")
    steps = [json.loads(line).get("step") for line in (tmp_path / "progress").open()]
    assert next(step for step in steps if step) == 3
    deltas = [(tmp_path / n / "update/delta.safetensors").read_bytes() for n in ("whole", "again")]
    assert deltas[0] == deltas[1]
    assert any(t.abs().max() > 0 for n, t in load_file(
        tmp_path / "again/update/delta.safetensors").items() if "running_mean" in n)  # fmt: skip


def test_a_language_model_without_them_is_as_it_was(tmp_path: Path) -> None:
    """No file of it says a word more."""
    from tests.support.paths import CWL

    initialise(None, CWL / "config.json", "bytes", 0, 1, Aggregation(), tmp_path)
    (file,) = Tensors.of_model(tmp_path / "global_model").files
    assert (file.buffers, dict(file.metadata)) == (frozenset(), {"format": "pt"})
    network, _ = load(tmp_path / "global_model", Training(sequence_length=32, threads=1))
    assert set(file.parameters()) == {name for name, _ in network.named_parameters()}
