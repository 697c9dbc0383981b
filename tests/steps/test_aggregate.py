"""Aggregation: closed-form numbers, what is refused, and what is left when it is."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from crossfl.errors import CrossFLError
from crossfl.protocol.layout import MANIFEST
from crossfl.protocol.manifest import ModelManifest, StateManifest
from crossfl.protocol.records import Aggregation
from crossfl.server import state as server_state
from crossfl.server.optimizers import OPTIMIZERS
from crossfl.server.rounds import Averaged, aggregate
from crossfl.storage import checkpoint, delta, manifest
from crossfl.storage.checkpoint import Tensors
from tests.support.federation import write_document

NOW = 2_000_000_000.0


def _updates(round_: Path) -> list[Path]:
    return [round_ / name / "update" for name in ("leonardo", "karolina")]


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a file in place of one that may still be mapped."""
    path.write_bytes(save(tensors, {"format": "pt"}))


def _rewrite(update: Path, **fields: Any) -> None:
    """Change an update as a site could: its manifest agrees with what it holds."""
    document = json.loads((update / MANIFEST).read_text())
    document["files"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": manifest.sha256(path)}
        for path in update.glob("*.safetensors")
    }
    write_document(update, document | fields)


def test_fedavg_of_one_site_is_its_model() -> None:
    x, delta = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.25])
    stepped, slots = OPTIMIZERS["fedavg"].apply(x, delta, {}, Aggregation())
    assert stepped.tolist() == [1.5, -1.75]
    assert slots == {}


def test_diloco_is_sgd_with_nesterov_momentum() -> None:
    aggregation = Aggregation(
        server_optimizer="diloco", server_learning_rate=0.7, server_momentum=0.9
    )
    parameter = torch.nn.Parameter(torch.randn(7))
    reference = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    ours = parameter.detach().clone()
    slots = OPTIMIZERS["diloco"].init(ours, aggregation)
    for _ in range(5):
        delta = torch.randn(7)
        parameter.grad = -delta
        reference.step()
        ours, slots = OPTIMIZERS["diloco"].apply(ours, delta, slots, aggregation)
        torch.testing.assert_close(ours, parameter.detach())


def test_a_round(round_: Path, tmp_path: Path) -> None:
    now = time.time()
    outcome = aggregate(round_ / "global_model", round_ / "state", _updates(round_), tmp_path, now)
    assert isinstance(outcome, Averaged)
    assert outcome.state.more(now)
    before, after = (Tensors.of_model(d / "global_model") for d in (round_, tmp_path))
    deltas = [Tensors([update / "delta.safetensors"]) for update in _updates(round_)]
    for name in before:
        expected = before[name] + (deltas[0][name] + deltas[1][name]) / 2
        torch.testing.assert_close(after[name], expected)
        master = checkpoint.slots(tmp_path / "state")["master"][name]
        assert torch.equal(master, after[name])
    state = server_state.load(tmp_path / "state")
    assert state == outcome.state
    assert state.round == 1
    model = manifest.verify(tmp_path / "global_model", ModelManifest)
    assert (model.digest, model.round) == (state.model, 1)
    assert list(server_state.history(tmp_path / "state")) == [outcome.entry]
    assert outcome.entry.model == state.model
    assert [f.share for f in outcome.entry.facilities.values()] == [0.5, 0.5]


def test_the_order_of_arrival_does_not_matter(round_: Path, tmp_path: Path) -> None:
    for i, updates in enumerate([_updates(round_), _updates(round_)[::-1]]):
        aggregate(round_ / "global_model", round_ / "state", updates, tmp_path / str(i), NOW)
    first, second = (
        (tmp_path / str(i) / "global_model" / "model.safetensors").read_bytes() for i in range(2)
    )
    assert first == second


def test_bf16_models_keep_fp32_masters(round_: Path, tmp_path: Path) -> None:
    """A delta far below bf16's resolution is not lost: it adds up in the master weights."""
    model, state = round_ / "global_model", round_ / "state"
    weights = Tensors.of_model(model)
    _save(model / "model.safetensors", {n: weights[n].bfloat16() for n in list(weights)})
    base = manifest.write(model, ModelManifest(round=0)).digest
    server_state.save(server_state.load(state).replace(model=base), state)
    for update in _updates(round_):
        ones = {n: torch.full_like(weights[n], 1e-5) for n in weights}
        _save(update / "delta.safetensors", ones)
        _rewrite(update, base=base)
    aggregate(model, state, _updates(round_), tmp_path, NOW)
    old, new = (checkpoint.slots(d)["master"] for d in (state, tmp_path / "state"))
    name = "lm_head.weight"
    torch.testing.assert_close(
        new[name] - old[name], torch.full_like(old[name], 1e-5), rtol=0.02, atol=1e-9
    )
    assert Tensors.of_model(tmp_path / "global_model")[name].dtype == torch.bfloat16


def _nan(update: Path) -> None:
    tensors = Tensors([update / "delta.safetensors"])
    broken = {n: tensors[n].clone() for n in tensors}
    broken["lm_head.weight"][0, 0] = float("nan")
    _save(update / "delta.safetensors", broken)
    _rewrite(update)


def _reshape(update: Path) -> None:
    tensors = Tensors([update / "delta.safetensors"])
    broken = {n: tensors[n].clone() for n in tensors}
    broken["lm_head.weight"] = broken["lm_head.weight"][:-1]
    _save(update / "delta.safetensors", broken)
    _rewrite(update)


def _rename(update: Path) -> None:
    tensors = Tensors([update / "delta.safetensors"])
    _save(update / "delta.safetensors", {f"x.{n}": tensors[n] for n in tensors})
    _rewrite(update)


def _corrupt(update: Path) -> None:
    path = update / "delta.safetensors"
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])
    _rewrite(update)


def _flip(update: Path) -> None:
    path = update / "delta.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")


HOSTILE = {
    "a bit flipped": (_flip, "does not match its sha256"),
    "not safetensors": (_corrupt, "is not a valid safetensors file"),
    "not a number": (_nan, "values that are not finite"),
    "another shape": (_reshape, r"'lm_head.weight' has shape \[383, 8\]"),
    "other tensors": (_rename, "is missing"),
    "no tokens": (lambda u: _rewrite(u, samples=0), "reports 0 samples; with weighting: samples"),
    "negative weight": (lambda u: _rewrite(u, samples=-5), "samples: expected int >= 0"),
    "another round": (lambda u: _rewrite(u, round=7), "is for round 7"),
    "another base": (lambda u: _rewrite(u, base="0" * 64), "from another model"),
    "absent": (
        lambda u: _rewrite(u, status="absent", reason="no node"),
        "karolina is absent: no node",
    ),
    "its neighbour's name": (lambda u: _rewrite(u, facility="leonardo"), "2 updates"),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_updates_are_refused_and_nothing_is_written(
    round_: Path, tmp_path: Path, attack: str
) -> None:
    change, message = HOSTILE[attack]
    change(round_ / "karolina" / "update")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CrossFLError, match=message):
        aggregate(round_ / "global_model", round_ / "state", _updates(round_), out, NOW)
    assert list(out.iterdir()) == []
    manifest.verify(round_ / "global_model", ModelManifest)
    manifest.verify(round_ / "state", StateManifest)


def test_a_state_of_another_model_is_refused(round_: Path, tmp_path: Path) -> None:
    other = server_state.load(round_ / "state").replace(model="0" * 64)
    server_state.save(other, round_ / "state")
    with pytest.raises(CrossFLError, match="is not the model that"):
        aggregate(round_ / "global_model", round_ / "state", _updates(round_), tmp_path, NOW)


@pytest.mark.parametrize(
    ("rules", "round_number", "expected"),
    [
        ({}, 1, True),
        ({}, 2, False),
        ({"target_loss": 1.5}, 1, False),
        ({"target_loss": 0.5}, 1, True),
        ({"budget_seconds": 0.0}, 1, False),
        ({"budget_seconds": 1e9}, 1, True),
    ],
)
def test_when_to_stop(
    round_: Path, rules: dict[str, float], round_number: int, expected: bool
) -> None:
    state = server_state.load(round_ / "state").replace(
        round=round_number, loss=1.0, aggregation=Aggregation.parse(rules)
    )
    assert state.more(time.time()) is expected


def test_shards_stay_shards(round_: Path, tmp_path: Path) -> None:
    model, state = round_ / "global_model", round_ / "state"
    server, weights = server_state.load(state), Tensors.of_model(model)
    names = list(weights)
    parts = {
        "model-00001-of-00002.safetensors": names[:3],
        "model-00002-of-00002.safetensors": names[3:],
    }
    tensors = {n: weights[n] for n in names}
    (model / "model.safetensors").unlink()
    (state / "master.model.safetensors").unlink()
    for file, part in parts.items():
        _save(model / file, {n: tensors[n] for n in part})
        _save(state / f"master.{file}", {n: tensors[n] for n in part})
    index = {"metadata": {}, "weight_map": {n: f for f, part in parts.items() for n in part}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    base = manifest.write(model, ModelManifest(round=0)).digest
    server_state.save(server.replace(model=base), state)
    for update in _updates(round_):
        deltas = Tensors([update / "delta.safetensors"])
        for file, part in parts.items():
            _save(update / delta.file_name(file), {n: deltas[n] for n in part})
        (update / "delta.safetensors").unlink()
        _rewrite(update, base=base)
    aggregate(model, state, _updates(round_), tmp_path, NOW)
    assert {p.name for p in (tmp_path / "global_model").glob("*.safetensors")} == set(parts)
    shutil.rmtree(round_)
    assert set(Tensors.of_model(tmp_path / "global_model")) == set(names)
