"""Encodings: bytes on the wire, bounds on what is lost, and error feedback that gives it back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from crossfl.errors import CrossFLError
from crossfl.facility.carryover import Residual
from crossfl.learning.optimizer import pull_back
from crossfl.protocol import variables
from crossfl.protocol.records import Task
from crossfl.storage import delta, encodings
from crossfl.storage.checkpoint import Tensors
from crossfl.storage.delta import Delta, Difference
from crossfl.storage.encodings import BLOCK, CELL
from crossfl.storage.tensorfile import Entry, TensorFile

NAMES = ("fp32", "bf16", "fp16", "int8", "int4", "topk")


def _through(name: str, values: Tensor, folder: Path, topk_fraction: float = 0.05) -> Tensor:
    """Values written to a file and read back cell by cell."""
    folder.mkdir(exist_ok=True)
    delta.write(folder / "delta.safetensors", {"w": values}, encodings.of(name, topk_fraction))
    read = Delta(folder)
    read.check({"w": Entry(torch.float32, tuple(values.shape), 0, 0)})
    cells = [
        read.span("w", start, min(CELL, values.numel() - start))
        for start in range(0, values.numel(), CELL)
    ]
    return torch.cat(cells).reshape(values.shape)


@pytest.mark.parametrize(("name", "most"), [("int8", 0.27), ("int4", 0.14), ("bf16", 0.51)])
def test_bytes_on_the_wire(tmp_path: Path, name: str, most: float) -> None:
    values = torch.randn(1000, 300)
    _through(name, values, tmp_path)
    assert (tmp_path / "delta.safetensors").stat().st_size <= most * values.nbytes


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.sampled_from([1, 2, 63, 64, 65, 1001, CELL - 1, CELL, CELL + 1, 2 * CELL + 77]),
    st.integers(0, 2**31),
    st.sampled_from([1e-6, 1.0, 1e3]),
)
def test_what_is_lost_is_bounded(
    tmp_path_factory: Any, name: str, count: int, seed: int, scale: float
) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * scale
    got = _through(name, values, tmp_path_factory.mktemp("x"))
    assert got.shape == values.shape
    if name == "fp32":
        assert got.equal(values)
    elif name in ("bf16", "fp16"):
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
        assert got.equal(values.to(dtype).float())
    elif name == "topk":
        kept = got != 0
        assert kept.sum() >= 0.05 * count
        torch.testing.assert_close(got[kept], values[kept], rtol=2**-8, atol=0)
    else:
        steps = 127 if name == "int8" else 7
        blocks = torch.nn.functional.pad(values, (0, -count % BLOCK)).view(-1, BLOCK)
        largest = blocks.abs().amax(1).repeat_interleave(BLOCK)[:count]
        # Half a step, and what the bf16 scale is off by at the end of its range.
        assert ((got - values).abs() <= largest * (0.51 / steps + 2**-8)).all()


def _task(round_: int, counted: int) -> Task:
    return Task(
        facility="a",
        dataset="d",
        round=round_,
        local_steps=1,
        seed=1,
        schedule_step=0,
        schedule_steps=9,
        samples_seen=0,
        data_seed=5,
        base="0" * 64,
        federation="f",
        counted=counted,
    )


@pytest.mark.parametrize("name", ["int8", "int4", "topk"])
def test_error_feedback_gives_back_what_was_lost(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variables.STATE, str(tmp_path / "state"))
    truth, sent = torch.zeros(5000), torch.zeros(5000)
    save_file({"w": torch.zeros(5000)}, tmp_path / "model.safetensors")
    base = TensorFile(tmp_path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for round_ in range(1, 30):
        change = torch.randn(5000, generator=generator)
        truth += change
        save_file({"w": change}, tmp_path / "local.safetensors")
        local = Tensors([tmp_path / "local.safetensors"])
        for attempt in range(2):  # the second attempt finds what the first did
            residual = Residual(_task(round_, round_ - 1))
            folder = tmp_path / f"update-{round_}-{attempt}"
            folder.mkdir()
            with residual.after() as lost:
                difference = Difference(local, base, residual.before(base))
                rest = lost / base.path.name
                delta.write(folder / "delta.safetensors", difference, encodings.of(name, 0.2), rest)
        first, second = (
            (tmp_path / f"update-{round_}-{i}" / "delta.safetensors").read_bytes() for i in (0, 1)
        )
        assert first == second
        sent += Delta(folder).span("w", 0, 5000)
    left = TensorFile(tmp_path / f"state/a/residual-5/f-29/{base.path.name}").tensor("w")
    torch.testing.assert_close(sent + left, truth, rtol=1e-4, atol=1e-4)
    assert sorted(p.name for p in (tmp_path / "state/a/residual-5").iterdir()) == [
        "f-28",
        "f-29",
    ]


def test_a_new_federation_starts_without_residuals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variables.STATE, str(tmp_path))
    save_file({"w": torch.zeros(3)}, tmp_path / "model.safetensors")
    base = TensorFile(tmp_path / "model.safetensors")
    with Residual(_task(1, 0)).after() as lost:
        save_file({"w": torch.ones(3)}, lost / "model.safetensors")
    assert Residual(_task(2, 1)).before(base) is not None
    assert Residual(_task(3, 0)).before(base) is None


def test_a_facility_without_a_folder_for_its_state_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(variables.STATE, raising=False)
    with pytest.raises(CrossFLError, match="CROSSFL_STATE is not set at a"):
        Residual(_task(1, 0))


def test_numbers_that_are_not_finite_do_not_leave(tmp_path: Path) -> None:
    with pytest.raises(CrossFLError, match="not finite"):
        _through("int8", torch.tensor([1.0, float("nan")]), tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [("fp16", 1e5), ("bf16", 3.4e38), ("topk", -3.4e38), ("int8", 3.4e38)]
)
def test_numbers_too_large_for_an_encoding_do_not_leave(
    tmp_path: Path, name: str, value: float
) -> None:
    values = torch.full((3,), value)
    if name == "int8":
        assert torch.allclose(_through(name, values, tmp_path), values, rtol=0.01)
        return
    with pytest.raises(CrossFLError, match="'w' has values too large for its encoding"):
        _through(name, values, tmp_path)


def test_the_proximal_term_is_its_gradient() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    anchors = [torch.randn_like(p) for p in model.parameters()]
    expected = []
    for parameter, anchor in zip(model.parameters(), anchors, strict=True):
        loss = 0.3 / 2 * (parameter - anchor).square().sum()
        (gradient,) = torch.autograd.grad(loss, parameter)
        expected.append(gradient + 1)
        parameter.grad = torch.ones_like(parameter)
    pull_back(model, anchors, 0.3)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
