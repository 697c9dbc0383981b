"""Turn the history and the evaluations of a federation into one HTML page that opens offline."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from crossfl import __version__
from crossfl.errors import CrossFLError
from crossfl.observe.events import Progress
from crossfl.observe.page import plots
from crossfl.protocol.records import check_name
from crossfl.server.journal import journal
from crossfl.server.state import HISTORY, ServerState
from crossfl.storage import files

EVALUATION = "evaluation.json"
REPORT = "report.html"
COMPARISON = "comparison.json"
FEDERATED, POOLED = "federated", "pooled"
"""Arms of a comparison; each other one is of the facility whose name it has, alone."""
METRICS = ("loss", "tokens")
COMPLETION = ("prompt", "completion")


def report(
    state: Path, evaluations: Sequence[Path], out: Path, comparison: Path | None = None
) -> None:
    """Write `history.jsonl`, `evaluation.json` and `report.html` into `out`.

    Everything is read and rendered before the first file is written. The same input gives the same
    bytes. With the comparison that `crossfl compare` made, the page also says how the facilities
    fare alone.

    Raises:
        CrossFLError: the state, an evaluation or the comparison is damaged, an evaluation is of
            another model, or two are of one facility; nothing was written.
    """
    server = ServerState.load(state)
    history = (state / HISTORY).read_bytes()
    evaluation = merge(server, evaluations)
    page = render(server, evaluation, alone(comparison) if comparison else {})
    files.write_bytes(out / HISTORY, history)
    files.write_json(out / EVALUATION, evaluation)
    files.write_bytes(out / REPORT, page.encode("utf-8", "replace"))


def merge(state: ServerState, paths: Sequence[Path]) -> dict[str, Any]:
    """The evaluations as one document, by facility; what they all share is said once."""
    records: dict[str, dict[str, Any]] = {}
    for path in paths:
        record = _read(path)
        facility = record.pop("facility")
        if facility in records:
            raise CrossFLError(f"{path} is a second evaluation of {facility}: give one for each")
        if (record.pop("round"), record.pop("model")) != (state.round, state.model):
            raise CrossFLError(f"{path} does not evaluate the model of this state: evaluate again")
        records[facility] = record
    return {"round": state.round, "model": state.model, "facilities": dict(sorted(records.items()))}


def completions(evaluation: dict[str, Any]) -> dict[str, dict[str, list[str]]]:
    """The facilities that wrote each completion of each prompt, prompts in the order given."""
    found: dict[str, dict[str, list[str]]] = {}
    for facility, record in evaluation["facilities"].items():
        for each in record.get("completions", ()):
            found.setdefault(each["prompt"], {}).setdefault(each["completion"], []).append(facility)
    return found


def mean_loss(evaluation: dict[str, Any]) -> float | None:
    """Mean loss (nats per token) of the facilities that evaluated the model, each counted alike."""
    losses = [r["metrics"]["loss"] for r in evaluation["facilities"].values() if r.get("metrics")]
    return sum(losses) / len(losses) if losses else None


def alone(comparison: Path) -> dict[str, dict[str, float]]:
    """The loss of each facility's model that was trained alone, at every facility.

    Raises:
        CrossFLError: the file is no comparison.
    """
    try:
        arms = json.loads(comparison.read_text("utf-8"))
        return {
            arm: {at: float(metrics["loss"]) for at, metrics in outcome["final"].items()}
            for arm, outcome in arms.items()
            if arm not in (FEDERATED, POOLED)
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CrossFLError(
            f"{comparison} is not a comparison made by crossfl compare: {error!r}"
        ) from None


def benefit(
    state: ServerState, evaluation: dict[str, Any], others: Mapping[str, Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """What the federation is worth to each facility: losses (nats per token) of several models.

    On the facility's own validation data, those of the `local` model of the last round, of the
    `final` global one and of the one trained `alone`; and the mean over the data of all facilities
    of the final one, `final_all`, and of the one alone, `alone_all`. What is not known is not
    there.
    """
    final = {
        f: r["metrics"]["loss"] for f, r in evaluation["facilities"].items() if r.get("metrics")
    }
    found: dict[str, dict[str, float]] = {}
    for name, loss in final.items():
        losses = {"final": loss}
        if state.history and (last := state.history[-1]["facilities"].get(name, {}).get("metrics")):
            losses |= {"local": last["local"]["loss"]} if last.get("local") else {}
        if set(final) <= set(others.get(name, ())):
            losses["alone"] = others[name][name]
            losses["alone_all"] = sum(others[name][at] for at in final) / len(final)
            losses["final_all"] = sum(final.values()) / len(final)
        found[name] = losses
    return found


def render(
    state: ServerState,
    evaluation: dict[str, Any],
    others: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
) -> str:
    """The page; needs neither network nor script to be read."""
    from jinja2 import ChainableUndefined, Environment
    from markupsafe import Markup

    names = sorted(
        {*evaluation["facilities"], *(f for h in state.history for f in h["facilities"])}
    )
    updates = {name: state.updates(name) for name in names}
    # Chainable: an absent facility has no metrics, and its cells stay empty.
    environment = Environment(autoescape=True, trim_blocks=True, undefined=ChainableUndefined)
    environment.filters |= {"number": number, "size": size, "duration": duration, "shown": shown}
    template = environment.from_string(Path(__file__).with_name(REPORT).read_text("utf-8"))
    return template.render(
        version=__version__,
        state=state,
        evaluation=evaluation,
        completions=completions(evaluation),
        mean_loss=mean_loss(evaluation),
        benefit=benefit(state, evaluation, others),
        tasks=tasks(evaluation),
        totals={name: _total(each) for name, each in updates.items()},
        total=_total([update for each in updates.values() for update in each]),
        keys={name: plots.key(i) for i, name in enumerate(names)},
        phases=plots.PHASES,
        plots={n: Markup(svg) for n, svg in plots.draw(state, evaluation, names)},  # noqa: S704
    )


def tasks(evaluation: dict[str, Any]) -> list[tuple[str, str, dict[str, float]]]:
    """Facility, task and metrics, for each task of each facility."""
    return [
        (facility, task, metrics)
        for facility, record in evaluation["facilities"].items()
        for task, metrics in (record.get("metrics") or {}).get("tasks", {}).items()
    ]


def _total(updates: Sequence[dict[str, Any]]) -> dict[str, int]:
    present = [update for update in updates if update.get("bytes")]
    total = {key: sum(update.get(key, 0) for update in updates) for key in ("bytes", "tokens")}
    return total | {"asked": len(updates), "present": len(present)}


def number(value: Any, form: str = ",") -> str:
    """A number in a format of Python, or a dash where there is none."""
    return format(value, form) if isinstance(value, int | float) else "–"


def size(count: float) -> str:
    """Bytes in decimal units."""
    value, units = count, ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.{0 if units[0] == 'B' else 3 - len(str(int(value)))}f} {units[0]}"


def duration(seconds: Any) -> str:
    """Seconds for people, or a dash where there are none."""
    if not isinstance(seconds, int | float):
        return "–"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def shown(text: Any, keep: str = "") -> str:
    """Text with what cannot be printed escaped, so that it is seen, and no terminal obeys it."""
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode()
        for c in str(text)
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CrossFLError(f"the evaluation {path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CrossFLError(f"{path} is not JSON: it is damaged, evaluate again") from None
    try:
        _check(record, path)
    except (AttributeError, KeyError, TypeError):
        raise CrossFLError(f"{path} is not an evaluation made by crossfl: evaluate again") from None
    return dict(record)


def _check(record: dict[str, Any], path: Path) -> None:
    check_name(f"the facility in {path},", record["facility"])
    if missing := {"dataset", "round", "model", "status"} - set(record):
        raise KeyError(*missing)
    if record["status"] != "absent" or record.get("metrics"):
        metrics = record["metrics"]
        named = metrics.get("tasks", {})
        for each in ({k: v for k, v in metrics.items() if k != "tasks"}, *named.values()):
            if not all(isinstance(value, int | float) for value in each.values()):
                raise TypeError
        if not set(METRICS) <= set(metrics):
            raise TypeError
        for task in named:
            check_name(f"the task in {path},", task)
        if not all(isinstance(c[k], str) for c in record["completions"] for k in COMPLETION):
            raise TypeError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `crossfl report`."""
    parser.add_argument(
        "--state", type=Path, required=True, help="server state after the last round (directory)"
    )
    parser.add_argument(
        "--evaluation",
        type=Path,
        action="append",
        default=[],
        help="evaluation of one facility (file; repeat for each)",
    )
    parser.add_argument(
        "--comparison", type=Path, help="comparison.json, for how each facility fares alone"
    )


def main(args: argparse.Namespace) -> None:
    """Write `history`, `evaluation` and `report` for the engine, and say how it went."""
    here = args.outdir
    report(args.state, args.evaluation, here, args.comparison)
    state = ServerState.load(args.state)
    if state.run and (place := journal.here()):
        journal.Run.load(place / state.run).save(finished=True)
    evaluation = json.loads((here / EVALUATION).read_text())
    with Progress() as progress:
        progress(
            "report",
            round=state.round,
            rounds=state.rounds,
            loss=mean_loss(evaluation),
            message="; ".join(_summary(f, r) for f, r in evaluation["facilities"].items()),
        )
        for prompt, written in completions(evaluation).items():
            progress("completion", message=shown(f"{prompt} → {' | '.join(written)}"))
    files.write(here, history=here / HISTORY, evaluation=here / EVALUATION, report=here / REPORT)


def _summary(facility: str, record: dict[str, Any]) -> str:
    metrics = record.get("metrics")
    if not metrics:
        return shown(f"{facility} {record['status']}: {record.get('reason')}")
    said = [f"{facility} loss {metrics['loss']:.4f}"]
    for name, form in (("perplexity", ".4g"), ("accuracy", ".3f"), ("exact_match", ".3f")):
        if name in metrics:
            said.append(f"{name.replace('_', ' ')} {metrics[name]:{form}}")
    return ", ".join(said)
