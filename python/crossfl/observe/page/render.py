"""The report: one HTML page that needs neither network nor script to be read.

Whatever was admitted can be rendered. The page stays small however long the federation was: it says
what it leaves out, and `history.jsonl` and `evaluation.json` have everything.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, islice
from operator import attrgetter, itemgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from crossfl import __version__
from crossfl.observe.page import plots
from crossfl.observe.page.about import About
from crossfl.observe.page.evaluations import Evaluations, completions, final_losses, mean_loss
from crossfl.observe.page.overview import Overview
from crossfl.observe.page.timeline import KINDS, Lane
from crossfl.protocol import formats
from crossfl.protocol.history import RoundEntry
from crossfl.protocol.measurements import TaskMetrics
from crossfl.protocol.state import ServerState

TEMPLATE = "report.html"
MOST_FACILITIES = 1000
"""Facilities that have a row in each table."""
MOST_ROWS = 500
"""Rows of the tables of tasks and of completions."""

T = TypeVar("T")


@dataclass(frozen=True)
class Benefit:
    """What the federation is worth to a facility: losses of several models, in nats per token."""

    final: float
    """The final global model, on the facility's own validation data."""
    local: float | None = None
    """The facility's local model of the last round, on the same."""
    alone: float | None = None
    """The model that was trained on the facility's data only, on the same."""
    alone_all: float | None = None
    """That model on the data of all facilities, their mean."""
    final_all: float | None = None
    """The final global model on the data of all facilities, their mean."""


@dataclass(frozen=True)
class TaskRow:
    """The metrics of one task at one facility."""

    facility: str
    task: str
    metrics: TaskMetrics

    @property
    def scores(self) -> str:
        """The metrics that are known, in words."""
        return ", ".join(
            f"{name.replace('_', ' ')} "
            + formats.number(score, "," if isinstance(score, int) else ".4g")
            for name in self.metrics.__struct_fields__
            if (score := getattr(self.metrics, name)) is not None
        )


@dataclass(frozen=True)
class CompletionRow:
    """One completion of a prompt, and the facilities where the model wrote it."""

    prompt: str
    completion: str
    facilities: list[str]


def render(
    state: ServerState,
    history: Iterable[RoundEntry],
    evaluations: Evaluations,
    alone: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
    about: About | None = None,
) -> str:
    """The page.

    Args:
        state: the state after the last round.
        history: the rounds, oldest first; read once and not kept.
        evaluations: what each facility that was asked found of the final model.
        alone: for each facility, the loss (nats per token) of the model that was trained on its
            data only, by the facility where it was measured.
        about: what else is known of the run.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    overview = Overview(history, state.round)
    names = sorted({*evaluations, *overview.facilities})
    listed = names[:MOST_FACILITIES]
    losses = final_losses(state, evaluations)
    task_rows, tasks_left = _first(_tasks(evaluations))
    completion_rows, completions_left = _first(_completions(evaluations))
    ledger = {name: loss for name in names if (loss := state.ledger_of(name).loss) is not None}
    known = losses or ledger
    about = about or About(configuration=_known(state))
    drawn = dict(plots.draw(overview, state, evaluations, names, about.timeline))
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters |= {
        "number": formats.number,
        "count": formats.count,
        "size": formats.size,
        "energy": formats.energy,
        "duration": formats.duration,
        "moment": formats.moment,
        "text": formats.text,
        "passage": formats.passage,
    }
    template = environment.from_string(Path(__file__).with_name(TEMPLATE).read_text("utf-8"))
    return template.render(
        version=__version__,
        state=state,
        overview=overview,
        names=names,
        listed=listed,
        keys={name: plots.key(i) for i, name in enumerate(names)},
        evaluations={name: evaluations[name] for name in listed if name in evaluations},
        mean_loss=mean_loss(state, evaluations),
        losses=losses,
        stale=[name for name in losses if evaluations[name].metrics is None],
        benefits=benefits(overview, evaluations, alone),
        tasks=task_rows,
        tasks_left=tasks_left,
        completions=[(p, list(rows)) for p, rows in groupby(completion_rows, attrgetter("prompt"))],
        completions_left=completions_left,
        kinds=KINDS,
        about=about,
        lanes={name: about.timeline.lanes.get(name, Lane()) for name in listed},
        worst=max(known.items(), key=itemgetter(1)) if known else None,
        most_drawn=plots.MOST_DRAWN,
        plots={name: Markup(svg) for name, svg in drawn.items()},  # noqa: S704
    )


def style_sheet() -> str:
    """The style sheet of the page, for what is to look like it."""
    from jinja2 import Environment

    text = Path(__file__).with_name(TEMPLATE).read_text("utf-8")
    sheet = text[text.index("<style>") + len("<style>") : text.index("</style>")]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(sheet).render(kinds=KINDS)


def _known(state: ServerState) -> dict[str, Any]:
    """The settings that a state knows by itself."""
    return {
        "rounds": state.rounds,
        "seed": state.seed,
        "aggregation": state.aggregation.asdict(),
        "retention": state.retention.asdict(),
    }


def benefits(
    overview: Overview, evaluations: Evaluations, alone: Mapping[str, Mapping[str, float]]
) -> dict[str, Benefit]:
    """What the federation is worth to each facility that evaluated the final model."""
    final = {n: m.loss for n in sorted(evaluations) if (m := evaluations[n].metrics) is not None}
    result = {}
    for name, loss in list(final.items())[:MOST_FACILITIES]:
        local = overview.local_loss(name)
        if name in alone and set(final) <= set(alone[name]):
            result[name] = Benefit(
                final=loss,
                local=local,
                alone=alone[name][name],
                alone_all=sum(alone[name][at] for at in final) / len(final),
                final_all=sum(final.values()) / len(final),
            )
        else:
            result[name] = Benefit(final=loss, local=local)
    return result


def _tasks(evaluations: Evaluations) -> Iterator[TaskRow]:
    for name in sorted(evaluations):
        metrics = evaluations[name].metrics
        tasks = metrics.tasks if metrics is not None else {}
        for task in sorted(tasks):
            yield TaskRow(name, task, tasks[task])


def _completions(evaluations: Evaluations) -> Iterator[CompletionRow]:
    for prompt, written in completions(evaluations).items():
        for completion, names in written.items():
            yield CompletionRow(prompt, completion, names)


def _first(rows: Iterator[T]) -> tuple[list[T], int]:
    """The first rows, and the number of those left out."""
    return list(islice(rows, MOST_ROWS)), sum(1 for _ in rows)
