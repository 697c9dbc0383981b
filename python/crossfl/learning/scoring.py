"""Scores of written answers, by what kind of answer a task asks for.

The kinds and the tasks are those of SMolInstruct (Yu et al. 2024,
https://arxiv.org/abs/2402.09391). Where its answers stand between tags, as in
`<NUMBER> -0.36 </NUMBER>`, an answer without them counts as none.
"""

import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from crossfl.errors import CrossFLError
from crossfl.learning.datasets import Text
from crossfl.learning.disclosure import groups_of, rounded
from crossfl.protocol.measurements import Metrics

FILE = "metrics.json"
"""In a dataset's folder: an object that names the metric of each of its tasks."""
TAGGED = re.compile(r"<([A-Z]+)>\s*(.*?)\s*</\1>", re.DOTALL)
WORDS = re.compile(r"\w+|[^\w\s]")
YES, NO = ("yes", "true"), ("no", "false")

Pairs = Sequence[tuple[str, str]]
"""What the model wrote, and what it was to write."""
Scores = dict[str, float]


def score(metric: str, pairs: Pairs, least: int = 1) -> Scores:
    """The scores of one metric; pairs whose expected answer is none of its kind are left out.

    A score of fewer than `least` pairs is left out, too.
    """
    return METRICS[metric]([(answer(w, like=e), answer(e, like=e)) for w, e in pairs], least)


def score_completions(
    metrics: Metrics,
    completions: Sequence[str],
    samples: Sequence[Text],
    metric_of: Mapping[str, str],
    least: int,
) -> Metrics:
    """Metrics with those of what the model wrote: `exact_match`, and the scores of each task.

    Args:
        metrics: what was measured of the samples before; tasks that it leaves out get no scores.
        completions: what the model wrote behind the prompt of each sample.
        samples: samples that have a prompt.
        metric_of: the metric of each task, from `metrics_of`.
        least: samples that a score is of at least.
    """
    if len(samples) < least:
        return metrics
    right = [w.strip() == s.text.strip() for w, s in zip(completions, samples, strict=True)]
    pairs = [
        (s.task if s.task in metrics.tasks else None, (w, s.text))
        for w, s in zip(completions, samples, strict=True)
    ]
    tasks = dict(metrics.tasks)
    for task, group in groups_of(pairs, lambda group: len(group) >= least).items():
        if task is not None and task in metric_of:
            scores = rounded(score(metric_of[task], group, least))
            tasks[task] = tasks[task].replace(**scores)
    return metrics.replace(**rounded({"exact_match": _mean(right)}), tasks=tasks)


def metrics_of(tasks: Iterable[str | None], declared: Mapping[str, str]) -> dict[str, str]:
    """The metric of each task: what the dataset declares, else that of SMolInstruct, else none.

    Raises:
        CrossFLError: a package that one of them needs is not installed.
    """
    metrics = {
        task: metric for task in tasks if task and (metric := ({**TASKS, **declared}).get(task))
    }
    for metric in metrics.values():
        if (package := PACKAGES.get(metric)) and find_spec(package) is None:
            raise CrossFLError(
                f"the metric {metric!r} needs {package}, which is not installed here: "
                "pip install 'crossfl[chemistry]'"
            )
    return metrics


def declared(dataset: Path) -> dict[str, str]:
    """The metrics that a dataset declares for its tasks, in `metrics.json` in its folder.

    Raises:
        CrossFLError: the file is not an object that names known metrics.
    """
    path = dataset / FILE
    if not path.is_file():
        return {}
    try:
        metrics = json.loads(path.read_text("utf-8"))
        known = all(metric in METRICS for metric in metrics.values())
    except (ValueError, AttributeError, TypeError):
        known = False
    if not known:
        raise CrossFLError(
            f"{path} is no object that names the metric of each task: choose of "
            f"{', '.join(METRICS)}"
        )
    return dict(metrics)


def answer(text: str, like: str) -> str:
    """What stands between the tags that `like` has; empty where the text lacks them."""
    wanted = TAGGED.search(like)
    if wanted is None:
        return text.strip()
    return next((m[2] for m in TAGGED.finditer(text) if m[1] == wanted[1]), "")


def exact(pairs: Pairs, least: int = 1) -> Scores:
    """`exact_match`: the share of answers that are the expected ones, character by character."""
    if len(pairs) < least:
        return {}
    return {"exact_match": _mean([written == expected for written, expected in pairs])}


def number(pairs: Pairs, least: int = 1) -> Scores:
    """`coverage`: the share of answers that are numbers; `rmse` of those, if there are any."""
    wanted = [(w, e) for w, text in pairs if (e := _number(text)) is not None]
    numbers = [(w, e) for text, e in wanted if (w := _number(text)) is not None]
    if len(wanted) < least:
        return {}
    scores = {"coverage": len(numbers) / len(wanted)}
    if len(numbers) >= least:
        # math.dist scales, where squares of absurd answers would overflow.
        distance = math.dist([w for w, _ in numbers], [e for _, e in numbers])
        scores["rmse"] = min(distance / math.sqrt(len(numbers)), 1e300)
    return scores


def boolean(pairs: Pairs, least: int = 1) -> Scores:
    """`accuracy` and `mcc` (Matthews correlation); `coverage`: the share that is yes or no.

    An answer that is neither counts as the wrong one of the two.
    """
    wanted = [(w, e) for w, text in pairs if (e := _truth(text)) is not None]
    if len(wanted) < least:
        return {}
    written = [_truth(w) for w, _ in wanted]
    guesses = [(not e if w is None else w, e) for w, (_, e) in zip(written, wanted, strict=True)]
    tp, tn = guesses.count((True, True)), guesses.count((False, False))
    fp, fn = guesses.count((True, False)), guesses.count((False, True))
    square = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return {
        "accuracy": (tp + tn) / len(guesses),
        "mcc": (tp * tn - fp * fn) / math.sqrt(square) if square else 0.0,
        "coverage": _mean([w is not None for w in written]),
    }


def text(pairs: Pairs, least: int = 1) -> Scores:
    """`bleu2` and `bleu4` of the corpus, `rouge1`, `rouge2` and `rougeL` (F-measure).

    BLEU, Papineni et al. 2002, https://aclanthology.org/P02-1040, over words and punctuation marks,
    unsmoothed; ROUGE, Lin 2004, https://aclanthology.org/W04-1013, mean over the samples.
    """
    if len(pairs) < least:
        return {}
    from nltk.translate.bleu_score import corpus_bleu
    from rouge_score.rouge_scorer import RougeScorer

    references = [[WORDS.findall(expected)] for _, expected in pairs]
    hypotheses = [WORDS.findall(written) for written, _ in pairs]
    scores: Scores = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing matches is a score, 0
        for n in (2, 4):
            bleu = corpus_bleu(references, hypotheses, weights=(1 / n,) * n)
            scores[f"bleu{n}"] = float(bleu)
    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names)
    overlaps = [scorer.score(expected, written) for written, expected in pairs]
    return scores | {
        name: _mean([overlap[name].fmeasure for overlap in overlaps]) for name in names
    }


def smiles(pairs: Pairs, least: int = 1) -> Scores:
    """`exact_match` of molecules, `validity`, and `tanimoto` similarity of fingerprints.

    Molecules are the same if RDKit writes the same canonical SMILES of them, in whatever order
    their parts stand (a semicolon separates parts, too). Fingerprints are those of Morgan, radius
    2, 2,048 bits. An answer that is no molecule has the similarity 0.
    """
    from rdkit import Chem, DataStructs, rdBase
    from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator

    generator = GetMorganGenerator(radius=2, fpSize=2048)

    def molecule(written: str) -> "Chem.Mol | None":
        parsed = Chem.MolFromSmiles(written.replace(";", "."))
        return parsed if parsed is not None and parsed.GetNumAtoms() else None

    same: list[bool] = []
    valid: list[bool] = []
    similar: list[float] = []
    with rdBase.BlockLogs():
        for written, expected in pairs:
            if (wanted := molecule(expected)) is None:
                continue
            proposed = molecule(written)
            valid.append(proposed is not None)
            same.append(
                proposed is not None and Chem.MolToSmiles(proposed) == Chem.MolToSmiles(wanted)
            )
            prints = [generator.GetFingerprint(m) for m in (proposed, wanted) if m is not None]
            similar.append(DataStructs.TanimotoSimilarity(*prints) if len(prints) == 2 else 0.0)
    if len(valid) < least:
        return {}
    return {"exact_match": _mean(same), "validity": _mean(valid), "tanimoto": _mean(similar)}


METRICS: dict[str, Callable[[Pairs, int], Scores]] = {
    "smiles": smiles,
    "number": number,
    "boolean": boolean,
    "text": text,
    "exact": exact,
}
PACKAGES = {"smiles": "rdkit", "text": "rouge_score"}
"""What must be installed for a metric."""
TASKS = {
    "forward_synthesis": "smiles",
    "retrosynthesis": "smiles",
    "molecule_generation": "smiles",
    "molecule_captioning": "text",
    "name_conversion-i2s": "smiles",
    "name_conversion-i2f": "exact",
    "name_conversion-s2f": "exact",
    "name_conversion-s2i": "exact",
    "property_prediction-esol": "number",
    "property_prediction-lipo": "number",
    "property_prediction-bbbp": "boolean",
    "property_prediction-clintox": "boolean",
    "property_prediction-hiv": "boolean",
    "property_prediction-sider": "boolean",
}
"""The tasks of SMolInstruct and the metric of each."""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _number(written: str) -> float | None:
    try:
        value = float(written)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _truth(written: str) -> bool | None:
    word = written.lower().rstrip(".")
    return word in YES if word in (*YES, *NO) else None
