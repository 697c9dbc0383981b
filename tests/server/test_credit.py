"""The credit of facilities: what it promises, for any history of arrivals."""

from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from crossfl.server import credit
from crossfl.server.credit import Arrival, Rules

NAMES = "abcdefgh"


@st.composite
def histories(draw: st.DrawFn) -> tuple[dict[str, float], list[list[tuple[str, int]]], Rules]:
    """Shares, and for each turn who arrives with how old an update."""
    amounts = draw(st.lists(st.floats(0.05, 1), min_size=1, max_size=len(NAMES)))
    names = NAMES[: len(amounts)]
    shares = {name: amount / sum(amounts) for name, amount in zip(names, amounts, strict=True)}
    turn = st.dictionaries(st.sampled_from(names), st.integers(0, 40), max_size=3)
    turns = draw(st.lists(turn, max_size=60))
    rules = draw(st.builds(Rules, st.floats(0.2, 2), st.floats(0, 1), st.sampled_from([0.5, 1.0])))
    return shares, [sorted(t.items()) for t in turns], rules


def _run(
    shares: dict[str, float], turns: list[list[tuple[str, int]]], rules: Rules, cached: Any = ()
) -> tuple[int, dict[str, float], float, dict[str, float]]:
    """Merges, what each facility was given, what was discarded and what is left."""
    left, version, discarded = credit.init(shares), 0, 0.0
    given_ = dict.fromkeys(shares, 0.0)
    for turn in turns:
        arrivals = [Arrival(name, max(0, version - age)) for name, age in turn]
        merged = credit.apply(left, arrivals, version, shares, cached, rules)
        left, version = merged.credit, version + len(arrivals)
        discarded += merged.discarded
        for weights in (merged.weights, merged.cached):
            for name, weight in weights.items():
                assert weight >= 0
                given_[name] += weight
        if arrivals:
            assert all(0 <= held <= rules.cap for held in left.values())
    return version, given_, discarded, left


@settings(max_examples=60, deadline=None)
@given(histories())
def test_no_credit_is_made_or_lost(
    history: tuple[dict[str, float], list[list[tuple[str, int]]], Rules],
) -> None:
    shares, turns, rules = history
    merges, given_, discarded, left = _run(shares, turns, rules, cached=shares)
    total = sum(left.values()) + sum(given_.values()) + discarded
    assert total == pytest.approx(1 + merges / len(shares))


@settings(max_examples=60, deadline=None)
@given(histories())
def test_nobody_is_forgotten(
    history: tuple[dict[str, float], list[list[tuple[str, int]]], Rules],
) -> None:
    """With its last delta kept, and fresh models, each is heard by its share but for a constant."""
    shares, turns, rules = history
    assume(rules.cap >= max(shares.values()) / len(shares))  # what one merge brings is not lost
    fresh = [[(name, 0) for name, _ in turn] for turn in turns]
    rules = rules._replace(guard=1.0)
    merges, given_, _, _ = _run(shares, fresh, rules, cached=shares)
    for name, share in shares.items():
        least = rules.half * (share * merges / len(shares) - rules.cap)
        assert given_[name] >= least - 1e-9


@settings(max_examples=40, deadline=None)
@given(histories(), st.permutations(NAMES))
def test_a_name_is_only_a_name(
    history: tuple[dict[str, float], list[list[tuple[str, int]]], Rules], order: list[str]
) -> None:
    """Of facilities that arrive one at a time, names do not matter."""
    shares, turns, rules = history
    alone = [turn[:1] for turn in turns]
    other = dict(zip(NAMES, order, strict=True))
    _, given_, _, left = _run(shares, alone, rules)
    renamed = {other[name]: share for name, share in shares.items()}
    _, given_2, _, left_2 = _run(
        renamed, [[(other[name], age) for name, age in turn] for turn in alone], rules
    )
    assert {other[n]: w for n, w in given_.items()} == pytest.approx(given_2)
    assert {other[n]: w for n, w in left.items()} == pytest.approx(left_2)


@settings(max_examples=20, deadline=None)
@given(histories())
def test_the_same_history_gives_the_same_weights(
    history: tuple[dict[str, float], list[list[tuple[str, int]]], Rules],
) -> None:
    assert _run(*history) == _run(*history)


def test_equal_rates_and_fresh_models_are_fedavg() -> None:
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    left, version = credit.init(shares), 0
    for _ in range(30):
        start = version
        total: dict[str, float] = {}
        for name in shares:
            merged = credit.apply(left, [Arrival(name, start)], version, shares)
            left, version = merged.credit, version + 1
            total |= merged.weights
    assert total == pytest.approx(shares)


def test_who_was_long_away_is_heard_with_all_of_its_credit_up_to_the_cap() -> None:
    shares = {"a": 0.5, "b": 0.5}
    left = credit.init(shares)
    for version in range(40):
        left = credit.apply(left, [Arrival("a", version)], version, shares).credit
    assert left["b"] == 1.0
    merged = credit.apply(left, [Arrival("b", 40)], 40, shares)
    assert merged.weights == {"b": 1.0}
    assert merged.credit["b"] == 0.0
    old = credit.apply(left, [Arrival("b", 0)], 40, shares)
    assert old.weights["b"] == pytest.approx(2 / 41)


def test_a_last_delta_speaks_for_who_is_away() -> None:
    shares = {"a": 0.5, "b": 0.5}
    left = {"a": 0.25, "b": 1.0}
    merged = credit.apply(left, [Arrival("a", 0)], 0, shares, cached={"b"})
    assert merged.cached == {"b": pytest.approx(0.125)}
    assert merged.discarded == pytest.approx(0.125)
    assert credit.apply(left, [Arrival("a", 0)], 0, shares).cached == {}
