"""When a round closes, without an engine and without waiting."""

import pytest

from crossfl.engine.recovery.closing import Rounds, Stage, Turn


class Watch:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def turns(closes: str | int, needed: int = 1, grace: float = 10) -> list[Turn]:
    return [
        Turn(
            federation="f", facility=name, round=1, closes=closes, grace_seconds=grace,
            needed=needed,
        )
        for name in ("a", "b", "c")
    ]  # fmt: skip


def opened(asked: list[Turn], watch: Watch) -> Rounds:
    rounds = Rounds(watch)
    for turn in asked:
        rounds.enter(turn)
    return rounds


@pytest.mark.parametrize("closes", ["running", "first", 5])
def test_no_round_closes_before_an_update_is_in(closes: str | int) -> None:
    a, b, c = turns(closes)
    watch = Watch()
    rounds = opened([a, b, c], watch)
    rounds.note(a, Stage.ABSENT)
    watch.now += 1e6
    assert not rounds.is_over(c)
    rounds.note(b, Stage.DELIVERED)
    rounds.is_over(c)
    watch.now += 10
    assert rounds.is_over(c)


@pytest.mark.parametrize("closes", ["running", "first", 5])
def test_a_round_waits_for_as_many_updates_as_it_needs(closes: str | int) -> None:
    a, b, c = turns(closes, needed=2)
    watch = Watch()
    rounds = opened([a, b, c], watch)
    rounds.note(a, Stage.DELIVERED)
    for _ in range(3):
        assert not rounds.is_over(c)
        watch.now += 100
    rounds.note(b, Stage.DELIVERED)
    rounds.is_over(c)
    watch.now += 10
    assert rounds.is_over(c)


def test_first_closes_a_grace_after_the_first() -> None:
    a, b, c = turns("first")
    watch = Watch()
    rounds = opened([a, b, c], watch)
    rounds.note(b, Stage.RUNNING)
    rounds.note(a, Stage.DELIVERED)
    assert not rounds.is_over(b)
    watch.now += 9
    assert not rounds.is_over(c)
    watch.now += 1
    assert rounds.is_over(b)
    assert rounds.is_over(c)


def test_running_waits_for_a_job_that_runs_and_not_for_one_that_is_queued() -> None:
    a, b, c = turns("running")
    watch = Watch()
    rounds = opened([a, b, c], watch)
    rounds.note(b, Stage.RUNNING)
    rounds.note(a, Stage.DELIVERED)
    watch.now += 1000
    assert not rounds.is_over(c)
    rounds.note(b, Stage.DELIVERED)
    assert not rounds.is_over(c)
    watch.now += 5
    rounds.note(c, Stage.RUNNING)  # within the grace: the round waits for it, too
    assert not rounds.is_over(c)
    rounds.note(c, Stage.WAITING)  # the scheduler took its node away
    assert not rounds.is_over(c)
    watch.now += 10
    assert rounds.is_over(c)


def test_seconds_count_from_the_first_that_is_asked() -> None:
    a, b, c = turns(60)
    watch = Watch()
    rounds = opened([a], watch)
    watch.now += 50
    rounds.enter(b)
    rounds.enter(c)
    rounds.note(a, Stage.DELIVERED)
    assert not rounds.is_over(c)
    watch.now += 10
    assert rounds.is_over(c)


def test_a_round_that_is_asked_again_goes_on() -> None:
    """After a failed attempt, or where the engine asks for the same task once more."""
    a, b, _ = turns("first")
    watch = Watch()
    rounds = opened([a, b], watch)
    rounds.note(a, Stage.DELIVERED)
    rounds.enter(a)
    rounds.is_over(b)
    watch.now += 10
    assert rounds.is_over(b)
