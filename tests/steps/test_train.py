"""Training at a facility: what it sends, what it refuses, and what it repeats bit for bit."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from crossfl.errors import CrossFLError
from crossfl.facility.place import Disclosure
from crossfl.learning.batching import batch_of
from crossfl.learning.datasets import Sample, Text, encode, read
from crossfl.learning.evaluation import Validation, complete, summed_loss
from crossfl.learning.models.loading import load
from crossfl.learning.optimizer import learning_rate
from crossfl.protocol import variables
from crossfl.protocol.manifest import UpdateManifest
from crossfl.protocol.measurements import Metrics, TaskMetrics
from crossfl.protocol.records import Task, Training
from crossfl.steps.evaluate import evaluate
from crossfl.steps.train import absent, train
from crossfl.storage import manifest
from crossfl.storage.checkpoint import Tensors
from tests.support.paths import DATA, ROUND

MODEL = ROUND / "global_model"
TRAINING = Training(batch_size=4, sequence_length=48, learning_rate=0.01, threads=1)
EVERYTHING = Disclosure(min_samples=1, min_tokens=1)
DIGITS = 1e-4
"""What rounding leaves of a loss."""


def _train(task: Task, out: Path, training: Training = TRAINING) -> UpdateManifest:
    update = train(MODEL, task, training, out)
    assert update is not None
    return update


def _measured(
    samples: Sequence[Sample],
    training: Training = TRAINING,
    disclosure: Disclosure = EVERYTHING,
    network: torch.nn.Module | None = None,
) -> Metrics:
    """Metrics of samples, by the model of the round unless told otherwise."""
    loaded, tokenizer = load(MODEL, training)
    metrics = Validation(samples, tokenizer, training, disclosure).measure(network or loaded)
    assert metrics is not None
    return metrics


def test_the_update(task: Task, tmp_path: Path) -> None:
    written = _train(task, tmp_path)
    assert manifest.verify(tmp_path / "update", UpdateManifest) == written
    assert (written.facility, written.round, written.base) == ("leonardo", 1, task.base)
    assert written.federation == task.federation
    assert (written.status, written.steps, written.samples) == ("complete", 2, 8)
    assert written.seconds.train > 0
    assert written.seconds.load > 0
    delta, base = Tensors(list(tmp_path.glob("update/*.safetensors"))), Tensors.of_model(MODEL)
    assert set(delta) == set(base)
    assert all(delta[name].dtype == torch.float32 for name in delta)
    assert any(delta[name].abs().max() > 0 for name in delta)


def test_the_delta_is_what_adamw_does(task: Task, tmp_path: Path) -> None:
    """One step of AdamW from rest is −lr·sign(g)·(1 − ε'), whatever the gradient."""
    one = task.replace(local_steps=1, schedule_steps=2)
    _train(one, tmp_path)
    delta = Tensors(list(tmp_path.glob("update/*.safetensors")))
    moved = torch.cat([delta[name].abs().flatten() for name in delta])
    assert moved.max() <= TRAINING.learning_rate * 1.001
    assert moved[moved > 0].median() == pytest.approx(TRAINING.learning_rate, rel=0.01)


def test_the_same_task_gives_the_same_bytes(task: Task, tmp_path: Path) -> None:
    digests = [_train(task, tmp_path / str(i)).digest for i in range(2)]
    other = task.replace(data_seed=task.data_seed + 1)
    assert digests[0] == digests[1] != _train(other, tmp_path / "o").digest


def test_bf16_deltas_have_half_the_bytes(task: Task, tmp_path: Path) -> None:
    whole = _train(task, tmp_path / "whole")
    half = _train(task, tmp_path / "half", TRAINING.replace(encoding="bf16"))
    assert half.bytes < 0.6 * whole.bytes


def test_nothing_of_the_data_is_in_the_update(task: Task, tmp_path: Path) -> None:
    canary = "CANARY-7f3a"
    (tmp_path / "leonardo").mkdir()
    rows = [{"prompt": f"{canary} {i}", "completion": canary} for i in range(20)]
    (tmp_path / "leonardo" / "words.jsonl").write_text("\n".join(map(json.dumps, rows)))
    os.environ[variables.DATA] = str(tmp_path)
    task = task.replace(dataset="words.jsonl")
    _train(task, tmp_path / "out")
    evaluate(MODEL, task, TRAINING, ["it 3="], tmp_path / "out")
    crossing = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert {p.parent.name for p in crossing} == {"update", "evaluation"}
    for path in crossing:
        assert canary.encode() not in path.read_bytes()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({variables.FACILITY: "karolina"}, "this is karolina .* but the task is for leonardo"),
        ({variables.FACILITY: ""}, "CROSSFL_FACILITY is not set"),
        ({variables.DATA: ""}, "CROSSFL_DATA is not set at leonardo"),
        ({variables.DATA: "/nowhere"}, "which is not a folder"),
    ],
)
def test_it_trains_only_where_it_belongs(
    task: Task, tmp_path: Path, variables: dict[str, str], message: str
) -> None:
    os.environ.update(variables)
    with pytest.raises(CrossFLError, match=message):
        train(MODEL, task, TRAINING, tmp_path)
    with pytest.raises(CrossFLError, match=message):
        evaluate(MODEL, task, TRAINING, [], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_facility_sees_only_its_own_folder(task: Task, tmp_path: Path) -> None:
    os.environ.update({variables.FACILITY: "leonardo", variables.DATA: str(DATA / "leonardo")})
    assert _train(task, tmp_path).status == "complete"


def test_a_loss_that_is_not_finite_ends_with_a_reason(task: Task, tmp_path: Path) -> None:
    wild = TRAINING.replace(learning_rate=1e30, max_grad_norm=0.0)
    longer = task.replace(local_steps=8)
    with pytest.raises(CrossFLError, match=r"the loss of leonardo is .* lower training.learning"):
        train(MODEL, longer, wild, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_absent_update_is_only_a_reason(task: Task, tmp_path: Path) -> None:
    absent(task, "the disk is full", tmp_path)
    update = manifest.verify(tmp_path / "update", UpdateManifest)
    assert (update.status, update.reason) == ("absent", "the disk is full")
    assert [p.name for p in (tmp_path / "update").iterdir()] == ["manifest.json"]


def test_the_schedule_spans_the_federation(task: Task) -> None:
    training = Training(learning_rate=1.0, schedule="cosine", warmup_steps=2)
    rates = [
        learning_rate(step, task.replace(schedule_step=start, schedule_steps=12), training)
        for start in (0, 4, 8)
        for step in range(4)
    ]
    cosine = [0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(10)]
    assert rates == pytest.approx([0.5, 1.0, *cosine])
    linear = training.replace(schedule="linear", warmup_steps=0)
    assert learning_rate(3, task.replace(schedule_steps=12), linear) == 0.75


def test_loss_counts_only_labelled_tokens() -> None:
    model, tokenizer = load(MODEL, TRAINING)
    samples = read(DATA / "leonardo" / "words", "valid")
    losses = []
    for sample in samples:
        batch = batch_of([[encode(sample, tokenizer, 48)]], torch.device("cpu"))
        ids, count = batch.inputs, batch.tokens
        loss = summed_loss(model, batch)
        own = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
        start = len(sample.prompt or "")
        picked = [own[i - 1, ids[0, i]] for i in range(start, ids.shape[1])]
        assert count == len(picked) == len(sample.text.encode()) + 1
        assert loss.item() == pytest.approx(-sum(picked).item(), rel=1e-5)
        losses.append((loss.item(), count))
    metrics = _measured(samples)
    expected = sum(x for x, _ in losses) / sum(n for _, n in losses)
    assert metrics.loss == pytest.approx(expected, abs=DIGITS)
    assert metrics.perplexity == pytest.approx(math.exp(expected), rel=1e-3)
    assert (metrics.tokens, metrics.samples) == (sum(n for _, n in losses), len(samples))


def test_bits_per_byte_count_the_bytes_that_are_predicted() -> None:
    """A model that gives each of 384 tokens the same odds needs log2 384 bits for each of them."""
    network, _ = load(MODEL, TRAINING)
    with torch.no_grad():
        network.get_output_embeddings().weight.zero_()  # type: ignore[operator]
    bits = math.log2(384)
    training = TRAINING.replace(sequence_length=6)

    def measured(prompt: str | None, text: str) -> float | None:
        return _measured([Text(prompt, text)], training, network=network).bits_per_byte

    once = pytest.approx(bits, abs=DIGITS)
    assert measured("it 3=", "tre") == once  # cut: only t is predicted
    with_end = pytest.approx(bits * 4 / 3, abs=DIGITS)
    assert measured("3=", "tre") == with_end  # with the end of sequence
    assert measured("3=", "tři") == once  # 4 bytes, and the end is cut
    without_first = pytest.approx(bits * 3 / 2, abs=DIGITS)
    assert measured(None, "tre") == without_first  # no prompt: t is not predicted
    assert measured("3=", "") is None


def test_tasks_are_measured_apart() -> None:
    groups = {name: [Text("3=", name * n) for n in range(1, 4)] for name in ("a", "b")}
    groups["c"] = [Text("4=", "c")]
    samples = [sample._replace(task=n) for n, group in groups.items() for sample in group]
    metrics = _measured(samples)
    assert list(metrics.tasks) == ["a", "b", "c"]
    for name, group in groups.items():
        alone = _measured(group)
        assert metrics.tasks[name] == TaskMetrics(
            loss=alone.loss,
            tokens=alone.tokens,
            samples=alone.samples,
            perplexity=alone.perplexity,
            bits_per_byte=alone.bits_per_byte,
        )
    assert (metrics.tokens, metrics.samples) == (2 * (2 + 3 + 4) + 2, 7)
    single = _measured([sample._replace(task=None) for sample in samples])
    nats = sum((t.loss or 0) * (t.tokens or 0) for t in metrics.tasks.values())
    assert single.loss == metrics.loss == pytest.approx(nats / metrics.tokens, abs=DIGITS)


def test_no_task_of_too_few_samples_is_measured_apart_nor_told_by_the_others() -> None:
    """What a small task has could be worked out from the whole, were all others given."""
    samples = [Text("3=", name * n, name) for name in ("a", "b") for n in range(1, 4)]
    samples.append(Text("4=", "c", "c"))
    metrics = _measured(samples, disclosure=Disclosure(min_samples=2, min_tokens=1))
    assert list(metrics.tasks) == ["b"]
    assert (metrics.tokens, metrics.samples) == (2 * (2 + 3 + 4) + 2, 7)


def test_tasks_are_scored_by_their_metrics(task: Task, tmp_path: Path) -> None:
    rows = [{"input": "a", "output": "<BOOLEAN> Yes </BOOLEAN>", "task": "property_prediction-hiv"}]
    rows += [{"input": "a", "output": "1.5", "task": "weights"}] * 2
    rows += [{"input": "a", "output": "b", "task": "greetings"}]
    (tmp_path / "leonardo" / "d").mkdir(parents=True)
    for split in ("train", "valid"):
        path = tmp_path / "leonardo" / "d" / f"{split}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "leonardo" / "d" / "metrics.json").write_text('{"weights": "number"}')
    os.environ[variables.DATA] = str(tmp_path)
    metrics = evaluate(MODEL, task.replace(dataset="d"), TRAINING, [], tmp_path).metrics
    assert metrics is not None
    assert metrics.samples == 4
    tasks = {name: set(measured.asdict()) for name, measured in metrics.tasks.items()}
    common = {"loss", "perplexity", "bits_per_byte", "tokens", "samples"}
    assert tasks["property_prediction-hiv"] == common | {"accuracy", "mcc", "coverage"}
    assert metrics.tasks["weights"].coverage == 0.0
    assert tasks["greetings"] == common


def test_a_dataset_names_few_tasks() -> None:
    with pytest.raises(CrossFLError, match="names 65 tasks"):
        _measured([Text(None, "a", str(i)) for i in range(65)])


def test_the_local_model_is_measured_beside_the_one_received(task: Task, tmp_path: Path) -> None:
    metrics = _train(task, tmp_path).metrics
    network, _ = load(MODEL, TRAINING)
    valid = read(DATA / "leonardo" / "words", "valid")
    assert metrics.validation == _measured(valid)
    delta = Tensors(list(tmp_path.glob("update/*.safetensors")))
    for name, parameter in network.state_dict().items():
        parameter += delta[name]
    assert metrics.local is not None
    assert metrics.local.loss == pytest.approx(_measured(valid, network=network).loss, abs=DIGITS)
    assert metrics.local.loss != metrics.validation.loss


def test_completions_do_not_depend_on_the_batch() -> None:
    model, tokenizer = load(MODEL, TRAINING)
    training = TRAINING.replace(max_new_tokens=6)
    prompts = ["it 3=", "it 12345=", "a", "it 7="]
    together = complete(model, tokenizer, prompts, training)
    alone = [complete(model, tokenizer, [prompt], training)[0] for prompt in prompts]
    assert together == alone
