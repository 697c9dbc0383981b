"""The order of samples: each once before any twice, from a seed and a position alone."""

import itertools
import tracemalloc
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossfl.learning.datasets.drawing import (
    CYCLE,
    LISTED,
    Feistel,
    Groups,
    Mixture,
    Passes,
    order,
    shares,
)


@given(size=st.integers(1, 3000), seed=st.text(max_size=5))
def test_a_feistel_network_is_a_permutation(size: int, seed: str) -> None:
    found = Feistel(size, seed)
    assert sorted(map(found, range(size))) == list(range(size))


def test_it_looks_random() -> None:
    """Each number is equally often in each tenth of the places, and no neighbour of the last."""
    size, seeds = 50, 4000
    table = Counter((i, Feistel(size, str(s))(i) // 5) for s in range(seeds) for i in (0, 1, 49))
    for count in (table[i, tenth] for i in (0, 1, 49) for tenth in range(10)):
        assert abs(count - seeds / 10) < 5 * (seeds / 10) ** 0.5
    large = [Feistel(10**9, "0")(i) for i in range(2000)]
    assert sum(abs(a - b) < 10**6 for a, b in itertools.pairwise(large)) < 20


def test_a_billion_samples_take_no_memory() -> None:
    """Positions beyond 32 bits, in several passes."""
    size = 10**9
    drawn = Passes(size, "7")
    drawn[0]
    tracemalloc.start()
    ahead = [drawn[position] for position in range(5 * 10**9 - 500, 5 * 10**9 + 500)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert ahead == order(size, 7, 5 * 10**9 - 500, 1000)
    for part in (ahead[:500], ahead[500:]):  # of two passes
        assert len(set(part)) == 500 and min(part) >= 0 and max(part) < size
    assert Passes(2**40, "7")[2**62 + 3] < 2**40


def test_a_pass_just_beyond_a_list() -> None:
    size = LISTED + 1
    drawn = Passes(size, "0")
    assert sorted(drawn[size + i] for i in range(size)) == list(range(size))


def test_the_order_of_a_small_dataset_is_the_one_that_federations_began_with() -> None:
    assert order(8, 1, 0, 8) == [1, 5, 4, 2, 7, 0, 3, 6]
    assert order(8, 1, 3, 10) == order(8, 1, 0, 13)[3:]


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    ranks=st.sampled_from([1, 2, 3]),
    rounds=st.lists(st.integers(1, 20), min_size=1, max_size=5),
)
def test_groups_are_drawn_before_samples(sizes: list[int], ranks: int, rounds: list[int]) -> None:
    """Over rounds and ranks: every group once before any twice, and so the samples of each."""
    ends = [0, *(sum(sizes[: i + 1]) for i in range(len(sizes)))]
    members = list(range(ends[-1]))[::-1]
    drawn = [-1] * (ranks * sum(rounds))
    seen = 0
    for batches in rounds:  # a round begins where the last one ended
        for rank in range(ranks):
            mine = Groups(ends, members, "0")
            for position in range(seen + rank, seen + batches * ranks, ranks):
                drawn[position] = mine[position]
        seen += batches * ranks
    group_of = {members[i]: g for g in range(len(sizes)) for i in range(ends[g], ends[g + 1])}
    for count in range(len(drawn) + 1):
        groups = Counter(dict.fromkeys(range(len(sizes)), 0))
        groups.update(group_of[i] for i in drawn[:count])
        assert max(groups.values()) - min(groups.values()) <= 1
    samples = Counter(drawn)
    for g in range(len(sizes)):
        times = [samples[members[i]] for i in range(ends[g], ends[g + 1])]
        assert max(times) - min(times) <= 1


def test_a_mixture_has_its_shares_and_no_sample_of_a_part_comes_twice() -> None:
    weights = {"a": 7.0, "b": 2.0, "c": 1.0}
    assert shares(weights) == [700, 200, 100]
    sizes = (800, 5000, 50)
    begins = [0, 800, 5800]
    parts = [Passes(size, name) for size, name in zip(sizes, weights, strict=True)]
    mixture = Mixture(parts, shares(weights), begins, "0")
    drawn = [mixture[i] for i in range(2 * CYCLE)]
    parts_of = [sum(i >= begin for begin in begins) - 1 for i in drawn]
    assert Counter(parts_of[:CYCLE]) == Counter(parts_of[CYCLE:]) == {0: 700, 1: 200, 2: 100}
    assert 50 < Counter(parts_of[:100])[0] < 90  # and not one part after the other
    for part, (begin, size) in enumerate(zip(begins, sizes, strict=True)):
        seen = Counter(i for i, p in zip(drawn, parts_of, strict=True) if p == part)
        times = [seen[i] for i in range(begin, begin + size)]
        assert max(times) - min(times) <= 1


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 1e9, "b": 1e-9}, {"a": 1, "b": 1, "c": 1}])
def test_every_part_of_a_mixture_is_drawn(weights: dict[str, float]) -> None:
    counts = shares(weights)
    assert min(counts) >= 1 and CYCLE <= sum(counts) <= CYCLE + len(counts)
