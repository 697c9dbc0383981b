"""From admission to page: whatever is admitted can be rendered, at the ends of all limits."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from crossfl.protocol.fields import LARGEST_COUNT, Record
from crossfl.protocol.manifest import EvaluationManifest, UpdateManifest
from crossfl.steps.report import report
from crossfl.storage import manifest
from tests.protocol.strategies import records
from tests.support.federation import Federation, Values, facilities
from tests.support.page import Page

MODEL: Values = {"a": torch.zeros(4, 3)}
NAMES = ("a" * 100, "karolina", "0")


def _update(federation: Federation, facility: str, stated: UpdateManifest) -> Path:
    """An update that states what it may of itself, and nothing that would keep it out."""
    path = federation.update(facility, federation.deltas(len(facility)))
    if stated.status == "absent":
        (path / "delta.safetensors").unlink()
    manifest.write(
        path,
        stated.replace(
            facility=facility,
            federation=federation.server.federation,
            round=1,
            base=federation.server.model,
            tokens=max(1, stated.tokens),
            steps=max(1, stated.steps),
        ),
    )
    return path


def _evaluation(federation: Federation, facility: str, stated: EvaluationManifest) -> Path:
    path = federation.folder / f"evaluation-{facility}"
    path.mkdir()
    state = federation.server
    changes = {"federation": state.federation, "round": state.round, "model": state.model}
    manifest.write(path, stated.replace(facility=facility, **changes))
    return path


def _three(kind: type[Record]) -> st.SearchStrategy[list[Record]]:
    return st.lists(records(kind), min_size=len(NAMES), max_size=len(NAMES))


@pytest.mark.slow
@settings(
    max_examples=12,
    phases=[Phase.generate],
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(updates=_three(UpdateManifest), evaluations=_three(EvaluationManifest))
def test_whatever_is_admitted_is_on_the_page(
    updates: list[UpdateManifest], evaluations: list[EvaluationManifest]
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        federation = Federation(Path(scratch), MODEL, quorum=1, max_norm_ratio=1e300)
        paths = [federation.update("good", federation.deltas(0))]
        paths += [_update(federation, *pair) for pair in zip(NAMES, updates, strict=True)]
        out = federation.run(paths)
        statuses = {name: e.status for name, e in facilities(out).items()}
        assert statuses == {"good": "complete"} | {
            name: stated.status for name, stated in zip(NAMES, updates, strict=True)
        }
        federation.go_on(out)
        given = [_evaluation(federation, *pair) for pair in zip(NAMES, evaluations, strict=True)]
        report(federation.state, given, out)
        page = Page((out / "report.html").read_text("utf-8"))
        assert "karolina" in page.text
        document = json.loads((out / "evaluation.json").read_text(), parse_constant=pytest.fail)
        statuses = {name: said["status"] for name, said in document["facilities"].items()}
        assert statuses == {n: e.status for n, e in zip(NAMES, evaluations, strict=True)}


def test_the_largest_counts_of_all_are_on_the_page(tmp_path: Path) -> None:
    federation = Federation(tmp_path, MODEL, quorum=1)
    most = LARGEST_COUNT
    metrics = {"loss": float(most), "tokens": most, "perplexity": 1.7976931348623157e308}
    for number in range(2):
        updates = [
            federation.update(
                facility, federation.deltas(number), name=f"{facility}-{number}", tokens=most,
                samples=most, steps=most, seconds=dict.fromkeys(("queue", "train", "save"), 1e9),
                metrics={"validation": metrics, "local": metrics},
            )
            for facility in ("a", "b")
        ]  # fmt: skip
        out = federation.run(updates, f"out{number}")
        assert [e.status for e in facilities(out).values()] == ["complete"] * 2
        federation.go_on(out)
    report(federation.state, [], out)
    Page((out / "report.html").read_text("utf-8"))
