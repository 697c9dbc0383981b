"""Late updates with what else a federation may have, with and without the served mean."""

from pathlib import Path
from typing import Any

import pytest
import torch

from crossfl.protocol.layout import GLOBAL_MODEL, MEAN, STATE
from crossfl.protocol.manifest import ModelManifest, StateManifest
from crossfl.server.rounds import Averaged, Waiting
from crossfl.storage import manifest
from crossfl.storage.checkpoint import slots
from tests.server.test_late import EARLY, Turns
from tests.support.federation import facilities, master
from tests.support.keys import make_keys, sign

MEANS = pytest.mark.parametrize("mean", [0.0, 0.2])


def _whole(turns: Turns, mean: float) -> dict[str, torch.Tensor]:
    """The tensors after a turn, by slot, once all that was written is checked."""
    manifest.verify(turns.out / GLOBAL_MODEL, ModelManifest)
    manifest.verify(turns.out / STATE, StateManifest)
    families = slots(turns.out / STATE)
    assert (MEAN in families) == (mean > 0)
    return {name: family["w"].clone() for name, family in families.items()}


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A key for each of three facilities, and the file of signers beside them."""
    return make_keys(tmp_path_factory.mktemp("keys"), "abc")


@MEANS
def test_a_late_update_is_signed_or_does_not_count(
    tmp_path: Path, keys: dict[str, Path], mean: float
) -> None:
    signers = keys["a"].parent / "signers"
    turns = Turns(tmp_path, signers=str(signers), served_mean=mean, **EARLY)

    def signed(facility: str, number: int, key: str | None = None) -> Path:
        path = turns.delivery(facility, number)
        if key is not None:
            sign(path, keys[key])
        return path

    turns.turn({"a": signed("a", 1, "a")}, b="late", c="late")
    turns.turn({"a": signed("a", 2, "a"), "c": signed("c", 1)}, b="late")
    assert facilities(turns.out)["c"].status == "refused"
    turns.turn({"a": signed("a", 3, "a"), "c": signed("c", 1, "a")}, b="late")
    assert facilities(turns.out)["c"].status == "refused"  # nobody signs for another
    assert [task.round for task in turns.state.ledger_of("c").open] == [1]
    turns.turn({"c": signed("c", 1, "c")}, a="late", b="late")
    counted = facilities(turns.out)["c"]
    assert (counted.status, counted.staleness) == ("complete", 3)
    _whole(turns, mean)


@MEANS
@pytest.mark.parametrize("coding", ["bf16", "int8", "int4", "topk"])
def test_a_late_update_may_be_in_any_encoding(tmp_path: Path, coding: str, mean: float) -> None:
    plain = Turns(tmp_path / "plain", served_mean=mean, **EARLY)
    coded = Turns(tmp_path / "coded", served_mean=mean, **EARLY)
    # values of one size: every encoding but topk has nearly all of them as they are
    values = {"w": torch.full((6,), 0.5)}
    for turns, name in ((plain, "fp32"), (coded, coding)):
        turns.turn(a=1, b="late", c="late")
        base = {"round": 1, "base": turns.bases[1]}
        late = turns.federation.update("c", values, name, name="coded", **base)
        turns.turn({"c": late}, a="late", b="late")
        assert facilities(turns.out)["c"].staleness == 1
    one, other = _whole(plain, mean), _whole(coded, mean)
    for slot, tensor in one.items():
        if coding == "topk":
            assert not torch.equal(tensor, other[slot])
            kept = torch.isclose(tensor, other[slot])
            assert 1 <= int(kept.sum()) < 6
        else:
            assert torch.allclose(tensor, other[slot], rtol=1e-2)


@MEANS
def test_a_round_below_its_quorum_keeps_the_mean_until_it_ends(tmp_path: Path, mean: float) -> None:
    turns = Turns(tmp_path, served_mean=mean, quorum=2, **EARLY)
    turns.turn(a=1, b=1, c="late")
    before = _whole(turns, mean)
    assert isinstance(turns.turn(a=2, b="late", c="late"), Waiting)
    held = _whole(turns, mean)
    assert all(torch.equal(held[slot], before[slot]) for slot in before)
    assert isinstance(turns.turn(b="late", c=1), Averaged)  # with what is held of a
    assert {n for n, e in facilities(turns.out).items() if e.status == "complete"} == {"a", "c"}
    after = _whole(turns, mean)
    assert all((after[slot] != before[slot]).all() for slot in after)


@MEANS
def test_a_refused_update_leaves_no_trace_in_model_or_mean(tmp_path: Path, mean: float) -> None:
    rules: dict[str, Any] = {"served_mean": mean, "max_norm": 5.0, **EARLY}
    clean, beset = Turns(tmp_path / "clean", **rules), Turns(tmp_path / "beset", **rules)
    for turns in (clean, beset):
        turns.turn(a=1, b="late", c="late")
    base = {"round": 1, "base": beset.bases[1]}
    large = beset.federation.update("c", {"w": torch.full((6,), 9.0)}, name="large", **base)
    clean.turn(a=2, b=1, c="late")
    beset.turn({"c": large}, a=2, b=1)
    assert facilities(beset.out)["c"].status == "refused"
    one, other = _whole(clean, mean), _whole(beset, mean)
    assert all(torch.equal(one[slot], other[slot]) for slot in one)


@MEANS
def test_who_joins_and_leaves_changes_what_an_update_weighs(tmp_path: Path, mean: float) -> None:
    turns = Turns(tmp_path, served_mean=mean, **EARLY)
    turns.turn(a=1, b=1, c="late")
    turns.names = "ab"  # c leaves, its task still open
    turns.turn(a=2, b="late")
    turns.names = "abd"
    turns.turn(a="late", b=2, d=3)
    assert facilities(turns.out)["d"].status == "complete"
    tensors = _whole(turns, mean)
    newest = tensors["master"]
    assert torch.isfinite(newest).all()
    if mean:
        assert ((tensors[MEAN] > 0) & (tensors[MEAN] <= newest)).all()
    assert master(turns.out)["w"].equal(newest)
