"""Records of a federation as the report is given them, and a parser that checks the page."""

from html.parser import HTMLParser
from typing import Any

from crossfl.protocol.history import FacilityEntry, RoundEntry
from crossfl.protocol.manifest import Completion, EvaluationManifest
from crossfl.protocol.measurements import Metrics, PhaseSeconds, TrainingMetrics, UpdateMetrics
from crossfl.protocol.records import Aggregation
from crossfl.protocol.state import FacilityLedger, ServerState

HOSTILE = '<script>alert("gone")</script><img src=http://evil.example/x>'
MODEL = "ab" * 32
FINISHED = "2026-01-02T03:04:05+00:00"
VOID = {"meta", "link", "br", "img", "input", "hr"}


def server_state(rounds: int = 3, **others: Any) -> ServerState:
    """A state after some rounds of five; polaris gave a loss of 1.25 last."""
    values: dict[str, Any] = {
        "rounds": 5,
        "seed": 7,
        "aggregation": Aggregation(),
        "started": 0.0,
        "model": MODEL,
        "round": rounds,
        "ledger": {"polaris": FacilityLedger(loss=1.25)},
    }
    return ServerState(**values | others)


def update(loss: float, tokens: int = 1000, **others: Any) -> FacilityEntry:
    """An update that counted, of 2.5 MB."""
    values: dict[str, Any] = {
        "share": 0.5,
        "status": "complete",
        "tokens": tokens,
        "samples": 16,
        "steps": 2,
        "bytes": 2_500_000,
        "seconds": PhaseSeconds(queue=30.0, load=1.0, evaluate=0.5, train=8.0, save=0.5),
        "metrics": UpdateMetrics(
            validation=Metrics(loss=loss, perplexity=2.5, tokens=100),
            local=Metrics(loss=loss / 2, perplexity=1.5, tokens=100),
            training=TrainingMetrics(first_loss=loss, last_loss=loss, tokens_per_second=125.0),
        ),
    }
    return FacilityEntry(**values | others)


def absent(reason: str) -> FacilityEntry:
    """No update."""
    return FacilityEntry(status="absent", reason=reason)


def round_entry(number: int, facilities: dict[str, FacilityEntry], **others: Any) -> RoundEntry:
    """A finished round."""
    values: dict[str, Any] = {
        "round": number,
        "finished": FINISHED,
        "seconds": 90.5,
        "loss": 5.0 / number,
        "model": MODEL,
        "facilities": facilities,
    }
    return RoundEntry(**values | others)


def history(rounds: int = 3) -> list[RoundEntry]:
    """Three facilities: leonardo skips round 1, polaris is absent from round 2."""
    entries = []
    for number in range(1, rounds + 1):
        facilities = {
            "karolina": update(6.0 / number),
            "leonardo": update(5.0 / number),
            "polaris": update(4.0 / number, tokens=3000),
        }
        if number == 1:
            del facilities["leonardo"]
        if number == 2:
            facilities["polaris"] = absent(HOSTILE)
        entries.append(round_entry(number, facilities))
    return entries


def evaluation(facility: str, loss: float | None, **others: Any) -> EvaluationManifest:
    """An evaluation of the model after round 3; without a loss, there is none, for a reason."""
    values: dict[str, Any] = {
        "facility": facility,
        "federation": "none-7",
        "dataset": "numbers",
        "round": 3,
        "model": MODEL,
    }
    if loss is None:
        values |= {"status": "absent", "reason": HOSTILE}
    else:
        values |= {
            "status": "complete",
            "metrics": Metrics(loss=loss, perplexity=2.0, tokens=100, exact_match=0.5),
            "completions": (Completion(prompt="it 42=", completion="quarantadue"),),
            "seconds": 1.5,
        }
    return EvaluationManifest(**values | others)


class Page(HTMLParser):
    """Checks that what is opened is closed; collects tags, ids, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        controls = {c for c in text if not c.isprintable() and c != "\n"}
        assert controls == set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
