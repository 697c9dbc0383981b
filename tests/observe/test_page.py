"""The page: what it shows, how it stays small, and that whatever was admitted can be rendered."""

import json
import random
import re
from collections.abc import Iterator
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crossfl.observe.page.evaluations import (
    Evaluations,
    NotEvaluated,
    completions,
    final_losses,
    mean_loss,
    merged,
    summary,
)
from crossfl.observe.page.overview import MOST_POINTS, MOST_ROWS, MOST_ROWS_OF_ROUND, Overview
from crossfl.observe.page.render import Benefit, benefits, render
from crossfl.protocol.history import FacilityEntry, FacilityStatus, RoundEntry
from crossfl.protocol.manifest import Completion, EvaluationManifest
from crossfl.protocol.measurements import Metrics, PhaseSeconds, TaskMetrics, UpdateMetrics
from crossfl.protocol.state import FacilityLedger, ServerState
from tests.protocol.strategies import records
from tests.support.page import (
    HOSTILE,
    MODEL,
    Page,
    absent,
    evaluation,
    history,
    round_entry,
    server_state,
    update,
)

EVALUATIONS: Evaluations = {
    "karolina": evaluation("karolina", 0.75),
    "leonardo": evaluation("leonardo", 0.25),
    "polaris": NotEvaluated("polaris", HOSTILE),
}
NASTY = HOSTILE + "\x1b[2J\u202e\x00\ud800\n]]>&amp;" + "\U000e0001" * 1900
ALONE = {
    "karolina": {"karolina": 1.0, "leonardo": 4.0},
    "leonardo": {"karolina": 3.0, "leonardo": 0.125},
}


def words(page: Page) -> str:
    return re.sub(r"\s+", " ", page.text)


def test_the_page_shows_what_happened() -> None:
    page = Page(render(server_state(), history(), EVALUATIONS))
    text = words(page)
    for shown in ("3 of 5", "fedavg", "0.7500", "quarantadue", "2 of 3", "17.5 MB", "11,000"):
        assert shown in text
    assert "mean of 3 facilities; 2 evaluated the final model" in text
    assert f"not evaluated: {HOSTILE}" in text
    assert text.count(HOSTILE) == 2
    labels = [value for name, value in page.attributes if name == "aria-label" and value]
    assert any("karolina from 6 to 0.75; leonardo from 2.5 to 0.25" in label for label in labels)


def test_the_page_needs_nothing_else_and_runs_nothing() -> None:
    html = render(server_state(), history(), EVALUATIONS)
    page = Page(html)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base", "image"}
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "data", "action"):
            assert str(value).startswith("#")
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_several_plots_do_not_clash() -> None:
    html = render(server_state(), history(), EVALUATIONS)
    ids = [value for name, value in Page(html).attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert html.count('role="img"') == 5
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', html)) <= set(ids)


def test_same_input_gives_same_bytes() -> None:
    forwards = render(server_state(), history(), EVALUATIONS)
    backwards = render(server_state(), iter(history()), dict(reversed([*EVALUATIONS.items()])))
    assert forwards == backwards


@pytest.mark.parametrize("rounds", [1, 40, 5000])
def test_short_and_long_federations(rounds: int) -> None:
    page = Page(render(server_state(rounds), history(rounds), {}))
    assert "No facility has evaluated it." in page.text
    assert any("all rounds together" in str(v) for _, v in page.attributes)
    assert ("has the rounds from" in page.text) is (rounds == 5000)


def test_a_state_before_the_first_round_has_no_plots() -> None:
    assert "svg" not in Page(render(server_state(0), [], {})).tags


def test_the_mean_is_over_all_facilities_that_were_asked() -> None:
    state = server_state()
    assert final_losses(state, EVALUATIONS) == {
        "karolina": 0.75,
        "leonardo": 0.25,
        "polaris": 1.25,  # its last one: it cannot lower the mean by staying away
    }
    assert mean_loss(state, EVALUATIONS) == 0.75
    stranger = {"nobody": NotEvaluated("nobody", "late")}
    assert mean_loss(state, {**EVALUATIONS, **stranger}) == 0.75
    assert mean_loss(state, stranger) is None


def test_evaluations_are_one_document() -> None:
    document = merged(server_state(), {**EVALUATIONS, "vega": evaluation("vega", None)})
    assert (document["round"], document["model"]) == (3, MODEL)
    assert list(document["facilities"]) == ["karolina", "leonardo", "polaris", "vega"]
    assert document["facilities"]["polaris"] == {"status": "not evaluated", "reason": HOSTILE}
    assert document["facilities"]["vega"]["status"] == "absent"
    assert document["facilities"]["leonardo"] == {
        "dataset": "numbers",
        "status": "complete",
        "metrics": {
            "loss": 0.25,
            "tokens": 100,
            "perplexity": 2.0,
            "exact_match": 0.5,
            "tasks": {},
        },
        "completions": [{"prompt": "it 42=", "completion": "quarantadue"}],
        "seconds": 1.5,
    }


def test_an_evaluation_is_one_line() -> None:
    line = "leonardo loss 0.2500, perplexity 2, exact match 0.500"
    assert summary("leonardo", EVALUATIONS["leonardo"]) == line
    late = NotEvaluated("polaris", "late\x1b[2J")
    assert summary("polaris", late) == "polaris not evaluated: late\\x1b[2J"
    few = evaluation("polaris", 1.0, metrics=None, reason="fewer than 16 samples")
    assert summary("polaris", few) == "polaris no metrics: fewer than 16 samples"
    assert "no metrics: fewer than 16 samples" in words(
        Page(render(server_state(), history(), {"polaris": few}))
    )


def test_completions_are_grouped_by_prompt() -> None:
    pairs = (Completion(prompt="b", completion="1"), Completion(prompt="a", completion="2"))
    both = {name: evaluation(name, 1.0, completions=pairs) for name in ("leonardo", "karolina")}
    both["polaris"] = evaluation("polaris", 1.0, completions=(pairs[0].replace(completion="3"),))
    assert completions(both) == {
        "b": {"1": ["karolina", "leonardo"], "3": ["polaris"]},
        "a": {"2": ["karolina", "leonardo"]},
    }
    assert list(completions(both)) == ["b", "a"]
    assert "b1● karolina ■ leonardo 3▲ polaris" in words(Page(render(server_state(), [], both)))


def test_benefit_per_facility() -> None:
    overview = Overview(history(), 3)
    assert benefits(overview, EVALUATIONS, ALONE) == {
        "karolina": Benefit(final=0.75, local=1.0, alone=1.0, alone_all=2.5, final_all=0.5),
        "leonardo": Benefit(
            final=0.25, local=5 / 3 / 2, alone=0.125, alone_all=1.5625, final_all=0.5
        ),
    }
    text = words(Page(render(server_state(), history(), EVALUATIONS, ALONE)))
    assert "karolina1.00000.7500-0.25001.0000-0.25002.50000.5000-2.0000" in text
    assert "on its own and on all data" in text
    assert "+0.1250" in text
    assert "on the data of all" in text
    without = words(Page(render(server_state(), history(), EVALUATIONS)))
    assert "crossfl compare" in without
    assert "Federation helped" not in without


def test_tasks_are_shown() -> None:
    task = TaskMetrics(loss=1.5, tokens=1200, validity=0.25)
    metrics = Metrics(loss=1.0, tokens=10, tasks={"retrosynthesis": task})
    given = {"karolina": evaluation("karolina", 1.0, metrics=metrics)}
    page = Page(render(server_state(), history(), given))
    assert "loss 1.5, tokens 1,200, validity 0.25" in page.text


def test_what_a_refused_update_claims_is_not_counted_as_training() -> None:
    claims = {"polaris": update(1.0, tokens=2**53, status="refused", reason="too large")}
    overview = Overview([round_entry(1, {"karolina": update(2.0)} | claims)], 1)
    assert overview.tokens == 1000
    assert overview.bytes == 5_000_000  # it crossed the wire all the same


def test_the_page_tells_skipped_rounds_and_waits() -> None:
    entries = [
        round_entry(1, {}, skipped="nobody came"),
        round_entry(2, {"karolina": update(1.0)}, waits=2),
        round_entry(3, {}),
    ]
    text = words(Page(render(server_state(), entries, {})))
    assert "skipped: nobody came" in text
    assert "waited 2 times for its quorum" in text
    assert "no facility was asked" in text


def long_history(facilities: int, rounds: int) -> Iterator[RoundEntry]:
    """All complete, but one facility that is absent from every 50th round."""
    good = {f"facility{i:03}": update(2.0 + i) for i in range(facilities)}
    for number in range(1, rounds + 1):
        late = {"facility007": absent("late")} if number % 50 == 0 else {}
        yield round_entry(number, good | late)


def test_a_long_history_is_thinned_and_the_page_says_so() -> None:
    overview = Overview(long_history(20, 1010), 1010)
    rounds = overview.list.rounds()
    numbers = [1, *range(50, 1001, 50), 1010]
    assert [listed.entry.round for listed in rounds] == numbers
    assert [len(rounds[i].facilities) for i in (0, 1, -1)] == [20, 1, 20]
    assert rounds[1].unlisted == 19
    assert (overview.stride, len(overview.points)) == (6, 169)
    text = words(Page(render(server_state(1010), long_history(20, 1010), {})))
    assert "One round in 6 is drawn." in text
    assert "Listed are the first and the last round." in text
    assert "history.jsonl has all rounds" in text
    assert "19 updates not listed" in text
    assert "20,180 of 20,200" in text  # the sums are of all rounds


def test_the_oldest_notable_rounds_are_left_out() -> None:
    late = {f"facility{i}": absent("late") for i in range(9)}
    entries = [round_entry(number, late) for number in range(1, 301)]
    listed = Overview(entries, 300).list
    assert (listed.notable, listed.listed_notable) == (300, MOST_ROWS // 10)
    assert [r.entry.round for r in listed.rounds()] == [1, *range(201, 301)]
    assert "the last 100 of 300 such rounds" in words(Page(render(server_state(300), entries, {})))


@pytest.mark.slow
def test_a_round_of_thousands_of_facilities_is_cut() -> None:
    crowd = {f"facility{i:05}": update(1.0) for i in range(2000)}
    entries = [round_entry(1, crowd)]
    html = render(server_state(1), entries, {name: evaluation(name, 1.0) for name in crowd})
    text = words(Page(html))
    assert f"{2000 - MOST_ROWS_OF_ROUND:,} updates not listed" in text
    assert "The tables show the first 1,000 facilities by name." in text
    assert "The first 64 facilities by name are drawn." in text
    assert len(html.encode()) < 5e6


@pytest.mark.slow
def test_a_federation_of_64_facilities_and_2000_rounds_has_a_small_page() -> None:
    """Also where every update has the longest reason, which no byte of it makes shorter."""
    reason = "<\x1b" * 1000
    partial = {f"facility{i:02}": update(2.0, status="partial", reason=reason) for i in range(64)}
    entry = round_entry(1, partial)
    entries = (entry.replace(round=number) for number in range(1, 2001))
    text = "&\u202e" * 50_000
    both = (Completion(prompt=text, completion=text), Completion(prompt="a", completion=text))
    given = {name: evaluation(name, 1.0, completions=both) for name in partial}
    html = render(server_state(2000), entries, given)
    Page(html)
    assert len(html.encode()) < 5e6


def test_plots_keep_no_more_than_some_points() -> None:
    for rounds in (0, 1, MOST_POINTS, MOST_POINTS + 1, 2000, 2**31 - 1):
        overview = Overview([], rounds)
        assert len(overview.points) <= MOST_POINTS
        assert (overview.stride == 1) is (rounds <= MOST_POINTS)


SOMEONE = st.sampled_from(["karolina", "a" * 100, "0", "Z.-_9"])


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    state=records(ServerState),
    rounds=st.lists(records(RoundEntry), max_size=4),
    updates=st.dictionaries(SOMEONE, records(FacilityEntry)),
    evaluated=st.dictionaries(
        SOMEONE,
        records(EvaluationManifest) | st.builds(NotEvaluated, SOMEONE, st.just(NASTY)),
    ),
    alone=st.dictionaries(SOMEONE, st.dictionaries(SOMEONE, st.floats(0, 2**53))),
)
def test_whatever_was_admitted_can_be_rendered(
    state: ServerState,
    rounds: list[RoundEntry],
    updates: dict[str, FacilityEntry],
    evaluated: dict[str, EvaluationManifest | NotEvaluated],
    alone: dict[str, dict[str, float]],
) -> None:
    entries = [*rounds, round_entry(1, updates)]
    Page(render(state, entries, evaluated, alone))
    check_strict(merged(state, evaluated))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_thousands_of_extreme_records_can_be_rendered(seed: int) -> None:
    rng = random.Random(seed)
    names = [*(f"{i:02}" + "a" * 98 for i in range(24)), "b"]
    entries = [
        round_entry(
            number,
            {name: extreme_update(rng) for name in names if rng.random() < 0.9},
            seconds=rng.choice([0.0, 1e9]),
            loss=rng.choice([None, *LOSSES]),
            finished=rng.choice(["\x1b]0;\x07", "T" * 40, "2026-01-02T03:04:05+00:00"]),
            skipped=rng.choice([None, NASTY[:2000]]),
            waits=rng.choice([0, 2**31 - 1]),
        )
        for number in range(1, 61)
    ]
    evaluated = {name: extreme_evaluation(rng, name) for name in names}
    state = server_state(60, ledger={n: FacilityLedger(loss=rng.choice(LOSSES)) for n in names})
    for length in (0, 1, 60):
        Page(render(state.replace(round=length), entries[:length], evaluated))
    check_strict(merged(state, evaluated))


LOSSES = (0.0, 5e-324, 1e-4, 1.0, 2.0**53)
COUNTS = (0, 1, 2**53)
AMOUNTS = (0.0, 5e-324, 1.0, 1.7976931348623157e308)


def extreme_metrics(rng: random.Random) -> Metrics | None:
    task = TaskMetrics(loss=rng.choice(LOSSES), mcc=-1.0, rmse=rng.choice(AMOUNTS))
    return rng.choice(
        [
            None,
            Metrics(
                loss=rng.choice(LOSSES),
                tokens=rng.choice(COUNTS),
                perplexity=rng.choice([None, *AMOUNTS]),
                bits_per_byte=rng.choice([None, *AMOUNTS]),
                accuracy=rng.choice([None, 0.0, 1.0]),
                tasks={"t" * 100: task, "u": TaskMetrics()},
            ),
        ]
    )


def extreme_update(rng: random.Random) -> FacilityEntry:
    return FacilityEntry(
        share=rng.choice(AMOUNTS),
        norm=rng.choice([None, *AMOUNTS]),
        status=rng.choice(get_args(FacilityStatus)),
        reason=rng.choice([None, "", NASTY[:2000]]),
        tokens=rng.choice(COUNTS),
        samples=rng.choice(COUNTS),
        steps=rng.choice(COUNTS),
        bytes=rng.choice(COUNTS),
        seconds=PhaseSeconds(queue=rng.choice([0.0, 1e9]), train=rng.choice([0.0, 5e-324, 1e9])),
        metrics=UpdateMetrics(validation=extreme_metrics(rng), local=extreme_metrics(rng)),
    )


def extreme_evaluation(rng: random.Random, name: str) -> EvaluationManifest | NotEvaluated:
    if rng.random() < 0.3:
        return NotEvaluated(name, NASTY)
    return evaluation(
        name,
        1.0,
        dataset=NASTY[:1000],
        reason=NASTY[:2000],
        metrics=extreme_metrics(rng),
        completions=(Completion(prompt=NASTY, completion=NASTY),),
        seconds=rng.choice([0.0, 1e9]),
    )


def check_strict(document: object) -> None:
    """The document is strict JSON."""
    text = json.dumps(document)
    json.loads(text, parse_constant=pytest.fail)
