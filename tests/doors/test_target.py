"""`target_loss` and `keep_best` look at the losses of all members, whoever sends one and whoever
does not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.federation import STARTED, Federation, Values

MODEL: Values = {"a": torch.zeros(4, 3)}
NAMES = ("easy", "hard")


class Losses:
    """A federation of an easy and a hard facility, of which only the losses matter."""

    def __init__(self, folder: Path, target: float) -> None:
        self.federation = Federation(folder, MODEL, quorum=1, target_loss=target)

    def round(self, **losses: float | None) -> None:
        """One round in which each gives a loss or is absent."""
        number = self.federation.server.round
        updates = [self._update(name, f"{name}-{number}", losses[name]) for name in NAMES]
        allowances = self.federation.allowances(dict.fromkeys(NAMES, 5))
        out = self.federation.run(updates, f"out{number}", allowances=allowances)
        self.federation.go_on(out)

    def _update(self, facility: str, name: str, loss: float | None) -> Path:
        said: dict[str, Any] = {"tokens": 100, "name": name}
        if loss is None:
            return self.federation.update(facility, status="absent", reason="queue", **said)
        metrics = {"validation": {"loss": loss, "tokens": 50}}
        deltas = self.federation.deltas(0)
        return self.federation.update(facility, deltas, metrics=metrics, **said)

    @property
    def goes_on(self) -> bool:
        return self.federation.server.more(STARTED + 60)

    @property
    def best(self) -> list[float]:
        return [loss for _, loss in self.federation.server.best]


def test_both_decide(tmp_path: Path) -> None:
    losses = Losses(tmp_path, target=1.0)
    losses.round(easy=0.5, hard=2.0)
    assert losses.goes_on
    losses.round(easy=0.9, hard=1.0)
    assert not losses.goes_on


def test_a_loss_of_nothing_by_one_of_two_ends_nothing(tmp_path: Path) -> None:
    losses = Losses(tmp_path, target=1.0)
    losses.round(easy=0.0, hard=1.9)
    assert losses.goes_on
    assert losses.best == [pytest.approx((0.475 + 1.9) / 2)]


def test_an_absent_facility_counts_with_its_last_loss(tmp_path: Path) -> None:
    losses = Losses(tmp_path, target=1.0)
    losses.round(easy=0.8, hard=2.0)
    losses.round(easy=0.9, hard=None)
    assert losses.goes_on
    assert losses.best == [pytest.approx(1.4), pytest.approx(1.45)]


def test_nothing_is_decided_before_all_have_been_heard(tmp_path: Path) -> None:
    losses = Losses(tmp_path, target=1.0)
    for _ in range(3):
        losses.round(easy=0.5, hard=None)
        assert losses.goes_on
        assert losses.best == []
    losses.round(easy=0.5, hard=1.0)
    assert not losses.goes_on
