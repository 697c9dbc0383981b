"""A federation of one facility is plain training: to the bit where the optimizer is kept."""

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, ByT5Tokenizer

from crossfl.errors import CrossFLError
from crossfl.facility.carryover import CarriedState
from crossfl.learning.datasets import IGNORED, encode, order, read
from crossfl.learning.optimizer import learning_rate
from crossfl.learning.training import KEPT, ROUNDING
from crossfl.protocol import variables
from crossfl.protocol.records import Aggregation, Facility, Task, Training
from crossfl.server.planning.fixed import plan
from crossfl.simulation.simulate import rounds
from crossfl.steps.train import train
from crossfl.storage.job import Job
from tests.support.paths import CWL, DATA, ROUND

ROUNDS, STEPS = 5, 4
TRAINING = Training(
    batch_size=4, sequence_length=48, learning_rate=0.02, schedule="cosine", warmup_steps=3,
    weight_decay=0.1, threads=1, local_optimizer="keep",
)  # fmt: skip


def _alone(rounds_: int, steps: int, training: Training) -> Job:
    return dataclasses.replace(
        Job.load(CWL / "federation.yml"),
        facilities=(Facility(name="leonardo", dataset="words"),),
        rounds=rounds_,
        local_steps=steps,
        training=training,
        aggregation=Aggregation(server_optimizer="fedavg"),
    )


def _local_weights(job: Job, folder: Path) -> tuple[dict[str, torch.Tensor], Task]:
    """The facility's own weights at the end, from the model and what rounding took of it."""
    folder.mkdir()
    tasks: list[Task] = []
    for state, _ in rounds(job, folder):
        tasks += plan(state, job.facilities, job.local_steps, job.training, "evaluate").tasks
    weights = load_file(folder / str(job.rounds) / "global_model" / "model.safetensors")
    root = Path(os.environ[variables.STATE], "leonardo")
    (kept,) = root.glob(f"optimizer-*/*-{job.rounds}/{KEPT}")
    saved = load_file(kept)
    return {name: w + saved[ROUNDING + name] for name, w in weights.items()}, tasks[-1]


def test_rounds_of_one_facility_are_training_without_a_break(tmp_path: Path) -> None:
    job = _alone(ROUNDS, STEPS, TRAINING)
    weights, last = _local_weights(job, tmp_path / "rounds")
    assert last.samples_seen == ROUNDS * STEPS * 4

    (tmp_path / "start").mkdir()
    first = next(iter(rounds(_alone(1, 1, TRAINING), tmp_path / "start")))  # for the state's seed
    (task,) = plan(first[0], job.facilities, ROUNDS * STEPS, TRAINING, "evaluate").tasks
    task = task.replace(schedule_step=0, schedule_steps=ROUNDS * STEPS)
    expected = _plain_training(tmp_path / "model", task)
    assert [name for name, w in weights.items() if not torch.equal(w, expected[name])] == []


def _plain_training(folder: Path, task: Task) -> dict[str, torch.Tensor]:
    """The same steps as a loop that knows of no rounds."""
    from crossfl.steps.initialise import initialise

    job = _alone(1, 1, TRAINING)
    folder.mkdir()
    initialise(None, job.config, job.tokenizer, job.seed, 1, job.aggregation, folder)
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder / "global_model", dtype=torch.float32)
    tokenizer, samples = ByT5Tokenizer(), read(DATA / "leonardo" / "words", "train")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, fused=True)
    drawn = order(len(samples), task.data_seed, 0, ROUNDS * STEPS * 4)
    model.train()
    for step in range(ROUNDS * STEPS):
        batch = [encode(samples[i], tokenizer, 48) for i in drawn[step * 4 : step * 4 + 4]]
        longest = max(len(s.ids) for s in batch)
        ids = torch.tensor([s.ids + [0] * (longest - len(s.ids)) for s in batch])
        labels = torch.tensor([s.labels + [IGNORED] * (longest - len(s.ids)) for s in batch])
        labels[:, 0] = IGNORED
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        (loss * (1 / int((labels != IGNORED).sum()))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(step, task, TRAINING)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def test_an_optimizer_that_is_reset_is_another(tmp_path: Path) -> None:
    """What the test above would not see, were the state not used, or the rounding not kept."""
    kept, _ = _local_weights(_alone(2, STEPS, TRAINING), tmp_path / "keep")
    folder = tmp_path / "reset"
    folder.mkdir()
    reset = TRAINING.replace(local_optimizer="reset")
    last = [round_ for _, round_ in rounds(_alone(2, STEPS, reset), folder)][-1]
    other = load_file(last / "global_model" / "model.safetensors")
    assert any((kept[name] - other[name]).abs().max() > 1e-3 for name in kept)
    sent = load_file(tmp_path / "keep" / "2" / "global_model" / "model.safetensors")
    assert any(not torch.equal(sent[name], kept[name]) for name in kept)


def test_what_is_kept_stays_at_the_facility(tmp_path: Path) -> None:
    for _, folder in rounds(_alone(1, 1, TRAINING), tmp_path):
        names = {p.name for p in folder.rglob("*") if p.is_file()}
    assert KEPT not in names
    assert not any("optimizer" in name for name in names)


def test_the_state_of_another_model_is_refused(tmp_path: Path, task: Task) -> None:
    with CarriedState(task.replace(round=1), "optimizer").after() as folder:
        save_file({"x//exp_avg": torch.zeros(1)}, folder / KEPT)
    later = task.replace(round=2, samples_seen=8, counted=1)
    with pytest.raises(CrossFLError, match=r"kept.safetensors is of another model: remove"):
        train(ROUND / "global_model", later, TRAINING, tmp_path)
