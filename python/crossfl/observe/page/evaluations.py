"""The evaluations of the final model: as one document, as one line each, as one mean."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from crossfl.protocol.formats import number, text
from crossfl.protocol.manifest import EvaluationManifest
from crossfl.protocol.state import ServerState

MERGED = ("dataset", "status", "reason", "metrics", "completions", "seconds")
"""Fields of an evaluation that differ between facilities."""
SCORES = (("perplexity", ".4g"), ("accuracy", ".3f"), ("exact_match", ".3f"))
"""Metrics that a line shows beside the loss."""


@dataclass(frozen=True)
class NotEvaluated:
    """A facility whose evaluation is missing or was refused."""

    facility: str
    reason: str
    status: Literal["not evaluated"] = "not evaluated"
    dataset: None = None
    metrics: None = None
    seconds: None = None
    completions: tuple[()] = ()


Evaluations = Mapping[str, EvaluationManifest | NotEvaluated]
"""By facility."""


def merged(state: ServerState, evaluations: Evaluations) -> dict[str, Any]:
    """The document `evaluation.json`: round, model, and what each facility found of it."""
    return {
        "round": state.round,
        "model": state.model,
        "facilities": {name: _facts(evaluations[name]) for name in sorted(evaluations)},
    }


def final_losses(state: ServerState, evaluations: Evaluations) -> dict[str, float]:
    """The loss (nats per token) of each facility that was asked to evaluate.

    A facility that did not evaluate has the last loss it gave, if any: without it, a facility with
    a high loss would lower the mean by staying away.
    """
    losses = {}
    for name in sorted(evaluations):
        metrics = evaluations[name].metrics
        loss = state.ledger_of(name).loss if metrics is None else metrics.loss
        if loss is not None:
            losses[name] = loss
    return losses


def mean_loss(state: ServerState, evaluations: Evaluations) -> float | None:
    """Mean of the `final_losses`, in nats per token; None without any."""
    losses = final_losses(state, evaluations)
    return sum(losses.values()) / len(losses) if losses else None


def completions(evaluations: Evaluations) -> dict[str, dict[str, list[str]]]:
    """The facilities that wrote each completion of each prompt, prompts in the order given."""
    written: dict[str, dict[str, list[str]]] = {}
    for name in sorted(evaluations):
        for pair in evaluations[name].completions:
            by_completion = written.setdefault(pair.prompt, {})
            by_completion.setdefault(pair.completion, []).append(name)
    return written


def summary(facility: str, evaluation: EvaluationManifest | NotEvaluated) -> str:
    """One line of text for one evaluation."""
    metrics = evaluation.metrics
    if metrics is None:
        status = "no metrics" if evaluation.status == "complete" else evaluation.status
        return f"{facility} {status}: {text(evaluation.reason)}"
    parts = [f"{facility} loss {number(metrics.loss, '.4f')}"]
    for name, form in SCORES:
        score = getattr(metrics, name)
        if score is not None:
            parts.append(f"{name.replace('_', ' ')} {number(score, form)}")
    if evaluation.reason:
        parts.append(text(evaluation.reason))
    return ", ".join(parts)


def _facts(evaluation: EvaluationManifest | NotEvaluated) -> dict[str, Any]:
    if isinstance(evaluation, NotEvaluated):
        return {"status": evaluation.status, "reason": evaluation.reason}
    values = evaluation.asdict()
    return {name: values[name] for name in MERGED if name in values}
