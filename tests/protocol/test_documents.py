"""Manifests, history, state, events, schedule, participation: closed examples."""

import json
import math

import pytest

from crossfl.errors import CrossFLError
from crossfl.protocol import events, history, manifest, state
from crossfl.protocol.decoding import encode
from crossfl.protocol.events import Event
from crossfl.protocol.fields import fields_of
from crossfl.protocol.history import FacilityEntry, RoundEntry
from crossfl.protocol.manifest import (
    EvaluationManifest,
    FileEntry,
    Manifest,
    ModelManifest,
    UpdateManifest,
)
from crossfl.protocol.measurements import Metrics, PhaseSeconds, TaskMetrics, UpdateMetrics
from crossfl.protocol.participation import check_rounds, takes_part
from crossfl.protocol.records import Aggregation, Allowance, Facility, Schedule
from crossfl.protocol.schedule import effective_steps, learning_rate, rate_factor
from crossfl.protocol.seeds import derive_seed
from crossfl.protocol.state import FacilityLedger, PastNorm, ServerState
from crossfl.protocol.text import printable, quoted
from crossfl.protocol.variables import VARIABLES

FILES = {
    "delta.safetensors": FileEntry(bytes=3, sha256="1" * 64),
    "a/b.safetensors": FileEntry(bytes=4, sha256="2" * 64),
}
UPDATE = UpdateManifest(
    facility="leonardo", federation="f", round=2, base="0" * 64, status="complete", files=FILES,
    tokens=900, samples=30, steps=4,
).sealed()  # fmt: skip


def test_a_manifest_is_intact_until_it_is_changed() -> None:
    content = encode(UPDATE)
    assert manifest.decode(content, UpdateManifest, "it") == UPDATE
    assert UPDATE.is_intact()
    assert UPDATE.bytes == 7
    assert not UPDATE.replace(tokens=901).is_intact()
    assert not UPDATE.replace(files={}).is_intact()
    assert not UpdateManifest(**{n: getattr(UPDATE, n) for n in (
        "facility", "federation", "round", "base", "status"
    )}).is_intact()  # fmt: skip
    assert json.loads(content)["kind"] == "update"


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (encode(UPDATE), ModelManifest, "it describes an update, where a model was expected"),
        (
            encode(ModelManifest(round=1).sealed()),
            UpdateManifest,
            "it describes a model, where an update was expected",
        ),
        (
            encode(UPDATE).replace(b'"format": 2', b'"format": 3'),
            UpdateManifest,
            "it has format 3; this crossfl reads format 2",
        ),
        (b"{}", UpdateManifest, "it is not a manifest made by crossfl: it names no kind"),
        (encode(UPDATE)[:100], UpdateManifest, "it is not valid JSON"),
        (
            encode(UPDATE).replace(b'"complete"', b'"partial"'),
            UpdateManifest,
            "it: the update is partial and gives no reason",
        ),
        (
            encode(UPDATE).replace(b'"tokens": 900', b'"tokens": 9007199254740993'),
            UpdateManifest,
            "it: tokens: expected int <= 9007199254740992",
        ),
        (
            encode(UPDATE).replace(b'"queue"', b'"smoke"'),
            UpdateManifest,
            "it: seconds: object contains unknown field smoke",
        ),
    ],
)
def test_what_is_no_such_manifest_is_named(
    content: bytes, kind: type[Manifest], message: str
) -> None:
    with pytest.raises(CrossFLError) as refusal:
        manifest.decode(content, kind, "it")
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize("path", ["/a", "a/", "a//b", "../a", "a/../b", ".", "./a", "a\n", "\x1b"])
def test_a_manifest_lists_files_of_its_directory_only(path: str) -> None:
    with pytest.raises(CrossFLError, match="is no path of a file in the directory"):
        ModelManifest(round=1, files={path: FILES["delta.safetensors"]})


def test_an_evaluation_has_metrics_or_a_reason() -> None:
    def evaluation(**values: object) -> EvaluationManifest:
        return EvaluationManifest(
            facility="a", federation="f", dataset="it", round=1, model="0" * 64,
            status="complete", **values,  # type: ignore[arg-type]
        )  # fmt: skip

    evaluation(metrics=Metrics(loss=1.0, tokens=3))
    evaluation(reason="3 validation samples, fewer than 16")
    with pytest.raises(CrossFLError, match="neither metrics nor a reason"):
        evaluation()
    with pytest.raises(CrossFLError, match="files"):
        evaluation(reason="r", files=FILES)


def test_tasks_have_every_score_that_metrics_has() -> None:
    shared = {field.name for field in fields_of(Metrics)} - {"tasks"}
    assert shared <= {field.name for field in fields_of(TaskMetrics)}
    assert TaskMetrics(mcc=-1.0).mcc == -1.0
    with pytest.raises(CrossFLError, match=r"taskmetrics\.mcc is -1\.5"):
        TaskMetrics(mcc=-1.5)


def test_a_line_of_the_history_leaves_defaults_out() -> None:
    entry = RoundEntry(
        round=1, finished="2025-01-01T00:00:00+00:00", seconds=3.5, model="0" * 64,
        facilities={
            "lumi": FacilityEntry(status="absent", reason="queue"),
            "leonardo": FacilityEntry(
                status="complete", share=1.0, seconds=PhaseSeconds(train=2.0),
                metrics=UpdateMetrics(validation=Metrics(loss=0.5, tokens=9)),
            ),
        },
    )  # fmt: skip
    line = history.encode_line(entry)
    assert line.count(b"\n") == 1
    assert json.loads(line) == {
        "round": 1,
        "finished": "2025-01-01T00:00:00+00:00",
        "seconds": 3.5,
        "facilities": {
            "leonardo": {
                "share": 1.0,
                "status": "complete",
                "seconds": {"train": 2.0},
                "metrics": {"validation": {"loss": 0.5, "tokens": 9}},
            },
            "lumi": {"status": "absent", "reason": "queue"},
        },
        "model": "0" * 64,
    }
    assert history.decode_line(line, "it") == entry
    with pytest.raises(CrossFLError, match=r"it: facilities\[\.\.\.\]"):
        history.decode_line(line.replace(b'"absent"', b'"gone"'), "it")


def test_an_event_is_one_line() -> None:
    event = Event(time=3.5, phase="train", step=1, steps=4, loss=2.0, message="a\nb")
    line = events.encode_line(event)
    assert line.count(b"\n") == 1
    assert events.decode_line(line) == event
    with pytest.raises(CrossFLError, match="is not valid JSON"):
        events.decode_line(line[:20])


def _state(**aggregation: float) -> ServerState:
    return ServerState(
        rounds=3,
        started=100.0,
        model="0" * 64,
        aggregation=Aggregation(**aggregation),  # type: ignore[arg-type]
    )


def test_another_round_follows_while_rounds_time_and_target_allow() -> None:
    assert _state().more(1e9)
    assert not _state().replace(round=3).more(100.0)
    timed = _state(budget_seconds=10.0)
    assert timed.more(109.9)
    assert timed.out_of_time(110.0)
    assert not timed.more(110.0)
    aimed = _state(target_loss=1.0)
    assert aimed.more(100.0)
    assert aimed.replace(loss=1.1).more(100.0)
    assert not aimed.replace(loss=1.0).more(100.0)


def test_a_state_of_another_format_is_named() -> None:
    content = encode(_state())
    assert state.decode(content, "state.json") == _state()
    newer = content.replace(b'"format": 2', b'"format": 3').replace(b'"seed"', b'"root"')
    with pytest.raises(
        CrossFLError, match=r"^state\.json has format 3; this crossfl reads format 2"
    ):
        state.decode(newer, "state.json")


def test_a_ledger_remembers_the_last_norms() -> None:
    ledger = FacilityLedger()
    for norm in range(7):
        ledger = ledger.with_norm(PastNorm(norm=norm, effective_steps=1.0))
    assert [past.norm for past in ledger.recent] == [2.0, 3.0, 4.0, 5.0, 6.0]
    server = _state().replace(ledger={"a": ledger})
    assert server.ledger_of("a") == ledger
    assert server.ledger_of("b") == FacilityLedger()


def test_learning_rate() -> None:
    assert learning_rate(0, 3e-4, "cosine", 100, 10) == 3e-4 * 1 / 10
    assert learning_rate(9, 3e-4, "cosine", 100, 10) == 3e-4
    assert learning_rate(55, 3e-4, "linear", 100, 10) == 3e-4 * 0.5
    assert learning_rate(55, 3e-4, "cosine", 100, 10) == pytest.approx(1.5e-4)
    assert learning_rate(99, 3e-4, "constant", 100, 10) == 3e-4
    assert learning_rate(500, 3e-4, "linear", 100, 10) == 0.0
    assert learning_rate(0, 3e-4, "linear", 10, 10) == 3e-4 * 1 / 10


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_rate_is_its_factor_times_the_peak(schedule: Schedule) -> None:
    for position in range(10, 120):
        rate = learning_rate(position, 3e-4, schedule, 100, 10)
        assert rate == 3e-4 * rate_factor(position, schedule, 100, 10)


def test_effective_steps() -> None:
    def allowance(schedule: Schedule, step: int) -> Allowance:
        return Allowance(
            facility="a", steps=40, samples=320, tokens=9, schedule=schedule, schedule_step=step,
            schedule_steps=100, warmup_steps=4,
        )  # fmt: skip

    assert effective_steps(allowance("constant", 10), 40) == 40.0
    assert effective_steps(allowance("constant", 0), 4) == 0.25 + 0.5 + 0.75 + 1.0
    assert effective_steps(allowance("linear", 52), 1) == 0.5
    assert effective_steps(allowance("cosine", 200), 40) == 0.4
    assert effective_steps(allowance("cosine", 0), 0) == 0.0
    halves = [effective_steps(allowance("cosine", step), 20) for step in (20, 40)]
    assert math.isclose(sum(halves), effective_steps(allowance("cosine", 20), 40))


def test_participation() -> None:
    facility = Facility(name="a", dataset="it", joins=2, leaves=4, skips=(3,))
    assert [n for n in range(1, 7) if takes_part(facility, n, "train")] == [2, 4]
    assert [n for n in range(1, 7) if takes_part(facility, n, "evaluate")] == [2, 3, 4]
    check_rounds([facility, Facility(name="b", dataset="it")], range(1, 5), 1)
    with pytest.raises(CrossFLError, match="no facility takes part in round 3 of 4, which needs 1"):
        check_rounds([facility], range(2, 5), 1)
    with pytest.raises(CrossFLError, match="1 facility takes part in round 1 of 4"):
        check_rounds([facility, Facility(name="b", dataset="it")], range(1, 5), 2)


def test_seeds_are_those_of_earlier_versions() -> None:
    assert derive_seed(0, "leonardo", "1") == 2093090951
    assert derive_seed(0, "leonardo") != derive_seed(1, "leonardo")


def test_text_of_others_is_visible_and_short() -> None:
    assert printable("a\x1b]0;b\u202e\ud800\n") == r"a\x1b]0;b\u202e\ud800\n"
    assert printable("a\nb", keep="\n") == "a\nb"
    assert printable("é→") == "é→"
    assert printable("x" * 11, longest=10) == "x" * 9 + "…"
    assert printable("x" * 10, longest=10) == "x" * 10
    assert len(printable("\x00" * 10, longest=10)) == 10
    assert quoted("a'\x1b") == '"a\'\\x1b"'


def test_variables_are_named_once() -> None:
    names = [variable.name for variable in VARIABLES]
    assert len(set(names)) == len(names)
    assert all(name.startswith("CROSSFL_") for name in names)
    assert "CROSSFL_ALLOWED_SIGNERS" not in names
