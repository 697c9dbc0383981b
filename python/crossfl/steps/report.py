"""Turn the history and the evaluations of a federation into one HTML page that opens offline."""

import argparse
import contextlib
import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from crossfl.errors import CrossFLError
from crossfl.observe.events import Progress
from crossfl.observe.page.about import about_run
from crossfl.observe.page.evaluations import (
    Evaluations,
    NotEvaluated,
    completions,
    mean_loss,
    merged,
    summary,
)
from crossfl.observe.page.render import render
from crossfl.protocol.comparison import read_alone
from crossfl.protocol.flags import from_words
from crossfl.protocol.layout import EVALUATIONS, HISTORY_LINES, REPORT
from crossfl.protocol.manifest import EvaluationManifest
from crossfl.protocol.records import Allowance
from crossfl.protocol.state import ServerState
from crossfl.protocol.text import printable
from crossfl.server import state as server_state
from crossfl.server.deliveries import Exclusion, admit_evaluation
from crossfl.server.journal import journal
from crossfl.steps import outputs
from crossfl.storage.files import write_bytes, write_json


def report(
    state: Path,
    evaluations: Sequence[Path],
    out: Path,
    comparison: Path | None = None,
    *,
    allowances: Sequence[Allowance] | None = None,
    run: journal.Run | None = None,
) -> Evaluations:
    """Write `history.jsonl`, `evaluation.json` and `report.html` into `out`.

    Everything is read and rendered before the first file is written, and none of the three takes
    its name before all are written. The same input gives the same bytes. A facility whose
    evaluation is missing or refused is listed with the reason.

    Args:
        state: server state after the last round (directory).
        evaluations: one directory for each facility, in the order of the allowances.
        out: folder to write into.
        comparison: what `crossfl compare` measured, for how the facilities fare alone.
        allowances: who was asked for an evaluation; unset, an evaluation may be anyone's.
        run: the run in the journal, which knows times and settings, and gets the page as well.

    Returns:
        The evaluations by facility.

    Raises:
        CrossFLError: the state or the comparison is damaged; nothing was written.
    """
    server = server_state.load(state)
    admitted = _admitted(server, state, evaluations, allowances)
    alone: Mapping[str, Mapping[str, float]] = read_alone(comparison) if comparison else {}
    about = about_run(run.path, run.description.configuration, state) if run else None
    page = render(server, server_state.history(state), admitted, alone, about)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".report-", dir=out) as scratch:
        server_state.write_history(state, Path(scratch, HISTORY_LINES))
        write_json(Path(scratch, EVALUATIONS), merged(server, admitted))
        write_bytes(Path(scratch, REPORT), page.encode("utf-8", "replace"))
        for name in (HISTORY_LINES, EVALUATIONS, REPORT):
            Path(scratch, name).rename(out / name)
    if run:
        with contextlib.suppress(OSError):  # a copy, for who looks into the journal
            write_bytes(run.path / REPORT, page.encode("utf-8", "replace"))
    return admitted


def _admitted(
    server: ServerState,
    state: Path,
    paths: Sequence[Path],
    allowances: Sequence[Allowance] | None,
) -> Evaluations:
    """The evaluations by facility; of one that does not count, the reason."""
    names = [allowance.facility for allowance in allowances or ()]
    if allowances is not None and len(names) < len(paths):
        raise CrossFLError(
            f"{len(paths)} evaluations were given, and {len(names)} facilities were asked for one: "
            "give one for each, in the order of the allowances"
        )
    evaluations: dict[str, EvaluationManifest | NotEvaluated] = {
        name: NotEvaluated(name, "no evaluation came from it") for name in names
    }
    signers = server_state.signers(server, state)
    strangers = (f"unknown-{i}" for i in itertools.count(1))
    for path, name in itertools.zip_longest(paths, names):
        if path is None:
            continue
        evaluation = admit_evaluation(path, name, server, signers)
        facility = evaluation.facility or next(strangers)
        if name is None and facility in evaluations:
            evaluations[facility] = NotEvaluated(facility, "more than one evaluation is its")
        elif isinstance(evaluation, Exclusion):
            evaluations[facility] = NotEvaluated(facility, evaluation.reason)
        else:
            evaluations[facility] = evaluation
    return dict(sorted(evaluations.items()))


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
        help="evaluation of one facility (directory; repeat for each, in the order of --allowance)",
    )
    parser.add_argument(
        "--allowance",
        action="append",
        nargs="+",
        metavar="FIELD=VALUE",
        help="a facility that was asked for an evaluation, as plan says (repeat for each); unset, "
        "an evaluation may be anyone's",
    )
    parser.add_argument(
        "--comparison", type=Path, help="comparison.json, for how each facility fares alone"
    )


def main(args: argparse.Namespace) -> None:
    """Write `history`, `evaluation` and `report` for the engine, and say how it went."""
    folder = args.outdir
    allowances = args.allowance and [from_words(words, Allowance) for words in args.allowance]
    state, place = server_state.load(args.state), journal.here()
    run = journal.Run.load(place / state.run) if state.run and place else None
    evaluations = report(
        args.state, args.evaluation, folder, args.comparison, allowances=allowances, run=run
    )
    if run:
        run.save(finished=True)
    with Progress(round=state.round, rounds=state.rounds) as progress:
        lines = [summary(name, evaluation) for name, evaluation in evaluations.items()]
        progress("report", loss=mean_loss(state, evaluations), message="; ".join(lines))
    with Progress() as progress:
        for prompt, written in completions(evaluations).items():
            progress("completion", message=printable(f"{prompt} → {' | '.join(written)}"))
    outputs.write(
        folder,
        history=folder / HISTORY_LINES,
        evaluation=folder / EVALUATIONS,
        report=folder / REPORT,
    )
