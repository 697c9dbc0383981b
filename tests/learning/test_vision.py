"""Image classifiers in the same loop as language models: from a config.json to a round."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crossfl.errors import CrossFLError
from crossfl.learning import datasets
from crossfl.learning.batching import batch_of
from crossfl.learning.datasets import Image
from crossfl.learning.models.loading import load
from crossfl.learning.models.vision import VGGConfig, VGGForImageClassification
from crossfl.protocol.manifest import UpdateManifest
from crossfl.protocol.records import Aggregation, Facility, Task, Training
from crossfl.server import state as server_state
from crossfl.simulation.simulate import playing_every_facility, rounds
from crossfl.steps.evaluate import evaluate
from crossfl.steps.initialise import initialise
from crossfl.steps.train import train
from crossfl.storage import manifest
from crossfl.storage.checkpoint import Tensors
from crossfl.storage.job import Job
from tests.support.validation import measured

VGG = {
    "model_type": "crossfl_vgg",
    "num_channels": 1,
    "image_size": 8,
    "stages": [[8], [16, 16]],
    "groups": 4,
    "hidden_size": 16,
    "num_labels": 2,
}
VIT = {
    "model_type": "vit",
    "architectures": ["ViTForImageClassification"],
    "num_channels": 1,
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_labels": 2,
}
TRAINING = Training(batch_size=8, learning_rate=0.01, threads=1)


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Images whose left half is bright (class 0) or whose right half is (class 1)."""
    draw = np.random.default_rng(seed)
    found = []
    for i in range(count):
        pixels = draw.random((1, 8, 8)) * 0.2
        pixels[:, :, 4 * (i % 2) : 4 * (i % 2) + 4] += 0.8
        found.append({"pixels": pixels.tolist(), "label": i % 2})
    return found


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, facility in enumerate(("leonardo", "karolina")):
        folder = tmp_path / "data" / facility / "halves"
        folder.mkdir(parents=True)
        for split, part in (("train", rows(64, seed)), ("valid", rows(16, seed + 10))):
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    return tmp_path / "data"


def federation(config: dict[str, Any], tmp_path: Path, count: int) -> Job:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return Job(
        facilities=tuple(Facility(name=n, dataset="halves") for n in ("leonardo", "karolina")),
        rounds=count,
        local_steps=8,
        config=tmp_path / "config.json",
        training=TRAINING,
    )


def start(config: dict[str, Any], tmp_path: Path) -> tuple[Path, Task]:
    job = federation(config, tmp_path, 1)
    initialise(None, job.config, None, 0, 1, Aggregation(), tmp_path)
    base = server_state.load(tmp_path / "state").model
    task = Task(
        facility="leonardo", dataset="halves", federation="f", round=1, local_steps=8, base=base,
        seed=1, schedule_step=0, schedule_steps=8, samples_seen=0, data_seed=2,
    )  # fmt: skip
    return tmp_path / "global_model", task


@pytest.mark.parametrize(("config", "count"), [(VGG, 2), (VIT, 4)], ids=["vgg", "vit"])
def test_a_federation_learns_to_tell_images_apart(
    config: dict[str, Any], count: int, root: Path, tmp_path: Path
) -> None:
    job = federation(config, tmp_path, count)
    with playing_every_facility(root):
        *_, (state, here) = rounds(job, tmp_path / "rounds")
        task = start(config, tmp_path)[1].replace(base=state.model)
        record = evaluate(here / "global_model", task, TRAINING, ["not for images"], tmp_path)
    (entry, *_) = server_state.history(here / "state")
    received = entry.facilities["leonardo"].metrics.validation
    assert received.tokens == 16
    assert received.accuracy < 1
    assert record.metrics.accuracy == 1
    assert record.completions == ()
    assert not (here / "global_model" / "tokenizer_config.json").exists()


def test_the_model_is_a_hugging_face_checkpoint(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    model, _ = start(VGG, tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(model)
    assert isinstance(loaded, VGGForImageClassification)
    assert loaded.config.stages == [[8], [16, 16]]
    weights = Tensors.of_model(model)
    assert set(weights) == set(loaded.state_dict())
    initialise(model, None, None, 0, 1, Aggregation(), tmp_path / "again")
    again = Tensors.of_model(tmp_path / "again" / "global_model")
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_the_delta_travels(root: Path, tmp_path: Path) -> None:
    model, task = start(VGG, tmp_path)
    with playing_every_facility(root):
        written = train(model, task, TRAINING, tmp_path)
    assert manifest.verify(tmp_path / "update", UpdateManifest) == written
    assert (written.tokens, written.samples) == (64, 64)  # one label for each image
    assert written.metrics.local.loss < written.metrics.validation.loss


def test_vgg16_has_the_parameters_of_the_paper() -> None:
    """Configuration D with 1,000 classes has 138,357,544; GroupNorm adds 2 per output channel."""
    config = VGGConfig(image_size=224, hidden_size=4096, num_labels=1000)
    with torch.device("meta"):
        network = VGGForImageClassification(config)
    norms = 2 * sum(sum(stage) for stage in config.stages)
    assert norms == 2 * 4224
    assert sum(p.numel() for p in network.parameters()) == 138_357_544 + norms


def test_accuracy_and_loss_of_known_logits(root: Path, tmp_path: Path) -> None:
    """With all weights 0 but the last bias (0, ln 3), class 1 has probability 3/4."""
    network, tokenizer = load(start(VGG, tmp_path)[0], TRAINING)
    assert tokenizer is None
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        list(network.parameters())[-1].copy_(torch.tensor([0.0, math.log(3)]))
    samples = [Image(np.ones((1, 8, 8), np.float32), label) for label in (1, 1, 1, 0)]
    metrics = measured(network, None, samples, TRAINING.replace(batch_size=3))
    assert metrics.accuracy == 0.75
    assert metrics.loss == round(-(3 * math.log(0.75) + math.log(0.25)) / 4, 4)
    assert metrics.tokens == 4


def test_images_are_read_and_written(tmp_path: Path) -> None:
    from datasets import Dataset

    table = rows(20)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, table)))
    Dataset.from_list(table).to_parquet(tmp_path / "rows.parquet")
    read = datasets.read(tmp_path / "rows.jsonl", "train")
    for one, other in zip(read, datasets.read(tmp_path / "rows.parquet", "train"), strict=True):
        assert datasets.row(one) == datasets.row(other)
    assert isinstance(read[0], Image)
    assert read[0].pixels.shape == (1, 8, 8)
    batch = batch_of([[image] for image in read[:3]], torch.device("cpu"))
    pixels, labels = batch.inputs, batch.labels
    assert (pixels.shape, labels.tolist()) == ((3, 1, 8, 8), [1, 0, 1])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"pixels": [[1, 2]], "label": 0}, "finite numbers"),
        ({"pixels": [[[1, 2], [1]]], "label": 0}, "finite numbers"),
        ({"pixels": [[[1, float("nan")]]], "label": 0}, "finite numbers"),
        ({"pixels": [[["x"]]], "label": 0}, "finite numbers"),
        ({"pixels": [[[1]]], "label": -1}, "number of a class"),
        ({"pixels": [[[1]]], "label": "cat"}, "number of a class"),
    ],
)
def test_bad_images_are_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    with pytest.raises(CrossFLError, match=rf"d\.jsonl:1: .*{message}"):
        datasets.read(tmp_path / "d.jsonl", "train")


def test_an_image_beyond_the_classes_of_the_model_is_left_out(root: Path, tmp_path: Path) -> None:
    """A whole dataset of them is refused, with the remedy."""
    model, task = start(VGG, tmp_path)
    path = root / "leonardo" / "halves" / "train.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[0].replace('"label": 0', '"label": 2')]))
    with playing_every_facility(root):
        written = train(model, task, TRAINING, tmp_path)
        assert written is not None and written.metrics.training is not None
        assert (written.samples, written.metrics.training.bad_samples) == (64, 1)
        path.write_text("\n".join(lines).replace('"label": 0', '"label": 2') * 2)
        with pytest.raises(CrossFLError, match=r"its label is beyond the model's 2 classes: raise"):
            train(model, task, TRAINING, tmp_path / "again")


def test_a_config_of_neither_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    with pytest.raises(CrossFLError, match="neither a causal language model nor an image"):
        initialise(None, tmp_path / "config.json", None, 0, 1, Aggregation(), tmp_path)
    assert not (tmp_path / "global_model").exists()
