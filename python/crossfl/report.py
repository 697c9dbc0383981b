"""Turn the history and the evaluations of a federation into one HTML page that opens offline."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crossfl import __version__, journal, outputs, plots
from crossfl.errors import CrossFLError
from crossfl.progress import Progress
from crossfl.records import check_name
from crossfl.state import HISTORY, ServerState

EVALUATION = "evaluation.json"
REPORT = "report.html"
METRICS = ("loss", "perplexity", "tokens")
COMPLETION = ("prompt", "completion")


def report(state: Path, evaluations: Sequence[Path], out: Path) -> None:
    """Write `history.jsonl`, `evaluation.json` and `report.html` into `out`.

    Everything is read and rendered before the first file is written. The same input gives the same
    bytes.

    Raises:
        CrossFLError: the state or an evaluation is damaged, an evaluation is of another model, or
            two are of one facility; nothing was written.
    """
    server = ServerState.load(state)
    history = (state / HISTORY).read_bytes()
    evaluation = merge(server, evaluations)
    page = render(server, evaluation)
    outputs.write_bytes(out / HISTORY, history)
    outputs.write_json(out / EVALUATION, evaluation)
    outputs.write_bytes(out / REPORT, page.encode("utf-8", "replace"))


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


def render(state: ServerState, evaluation: dict[str, Any]) -> str:
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
        totals={name: _total(each) for name, each in updates.items()},
        total=_total([update for each in updates.values() for update in each]),
        keys={name: plots.key(i) for i, name in enumerate(names)},
        phases=plots.PHASES,
        plots={n: Markup(svg) for n, svg in plots.draw(state, evaluation, names)},  # noqa: S704
    )


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
        numbers = all(isinstance(value, int | float) for value in metrics.values())
        if not numbers or not set(METRICS) <= set(metrics):
            raise TypeError
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


def main(args: argparse.Namespace) -> None:
    """Write `history`, `evaluation` and `report` for the engine, and say how it went."""
    here = args.outdir
    report(args.state, args.evaluation, here)
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
    outputs.write(here, history=here / HISTORY, evaluation=here / EVALUATION, report=here / REPORT)


def _summary(facility: str, record: dict[str, Any]) -> str:
    metrics = record.get("metrics")
    if not metrics:
        return shown(f"{facility} {record['status']}: {record.get('reason')}")
    matched = f", exact match {metrics['exact_match']:.3f}" if "exact_match" in metrics else ""
    return f"{facility} loss {metrics['loss']:.4f}, perplexity {metrics['perplexity']:.4g}{matched}"
