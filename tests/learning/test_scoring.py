"""Scores against values worked out by hand."""

import json
import math
from pathlib import Path

import pytest

from crossfl.errors import CrossFLError
from crossfl.learning import scoring
from crossfl.learning.scoring import answer, boolean, exact, number, score, smiles, text


def test_answers_stand_between_their_tags() -> None:
    wanted = "<SMILES> CCO </SMILES>"
    assert answer("It is <SMILES>OCC</SMILES> .", wanted) == "OCC"
    assert answer("<IUPAC> a </IUPAC> <SMILES> C </SMILES> <SMILES> N </SMILES>", wanted) == "C"
    assert answer("<SMILES> OCC", wanted) == ""  # cut before its end
    assert answer("OCC", wanted) == ""
    assert answer(" The molecule. ", "A molecule.") == "The molecule."


def test_molecules() -> None:
    """Ethanol in two writings; propanol for ethanol; no molecule; parts in another order."""
    pairs = [
        ("OCC", "CCO"),
        ("CCCO", "CCO"),
        ("C(C", "CCO"),
        ("", "C"),
        ("[Cl-].[Na+]", "[Na+];[Cl-]"),
    ]
    scores = smiles(pairs)
    assert scores["exact_match"] == 2 / 5
    assert scores["validity"] == 3 / 5
    # Ethanol has 6 environments: CH3, CH2, OH, and what is around each. Propanol has 8: the same
    # three, what is around CH3, either CH2 and OH, and, at radius 2, the whole. Shared are CH3,
    # CH2, OH, and what is around CH3 and around OH.
    assert scores["tanimoto"] == pytest.approx((1 + 5 / (6 + 8 - 5) + 1) / 5)
    assert smiles([("CCO", "not one")]) == {}


def test_similarity_of_fingerprints() -> None:
    """Methane has 1 environment, C; ammonia has 1, N: none is shared. Water is like itself."""
    assert smiles([("N", "C")])["tanimoto"] == 0.0
    assert smiles([("O", "O")])["tanimoto"] == 1.0


def test_numbers() -> None:
    """Off by 3 and by 4: √(25/2). The third is none, and one of three is not covered."""
    pairs = [("-0.5", "2.5"), ("6", "2.0"), ("nan", "1.0")]
    assert number(pairs) == {"coverage": 2 / 3, "rmse": pytest.approx(math.sqrt(12.5))}
    assert number([("abc", "1"), ("", "2")]) == {"coverage": 0.0}
    assert number([("1", "unknown")]) == {}
    json.dumps(number([("1e308", "-1e308")]), allow_nan=False)


def test_yes_or_no() -> None:
    """6 true positives, 1 false negative, 2 false positives, 3 true negatives."""
    pairs = [("Yes", "Yes")] * 6 + [("No", "Yes")] + [("Yes", "No")] * 2 + [("no.", "No")] * 3
    scores = boolean(pairs)
    assert scores["accuracy"] == 9 / 12
    assert scores["mcc"] == pytest.approx((6 * 3 - 2 * 1) / math.sqrt(8 * 7 * 5 * 4))
    assert scores["coverage"] == 1.0


def test_neither_yes_nor_no_is_wrong() -> None:
    assert boolean([("maybe", "Yes"), ("", "No"), ("Yes", "Yes"), ("No", "No")]) == {
        "accuracy": 0.5,
        "mcc": 0.0,
        "coverage": 0.5,
    }
    assert boolean([("Yes", "Yes")] * 3)["mcc"] == 0.0  # one class alone


def test_bleu_and_rouge() -> None:
    """`the cat sat on the mat` against `the cat on the mat`, longer than it by one word.

    Of the 6 words written 5 are in the reference, of the 5 bigrams 3 (the cat, on the, the mat), of
    the 4 trigrams 1 (on the mat), of the 3 quadrigrams none. The longest common subsequence has 5.
    """
    scores = text([("the cat sat on the mat", "the cat on the mat")])
    assert scores["bleu2"] == pytest.approx(math.sqrt(5 / 6 * 3 / 5))
    assert scores["bleu4"] == pytest.approx(0, abs=1e-60)
    assert scores["rouge1"] == pytest.approx(2 * (5 / 6) * 1 / (5 / 6 + 1))
    assert scores["rouge2"] == pytest.approx(2 * (3 / 5) * (3 / 4) / (3 / 5 + 3 / 4))
    assert scores["rougeL"] == pytest.approx(10 / 11)


def test_bleu_is_of_the_corpus() -> None:
    """All 10 words and 7 of 8 bigrams are right; the brevity penalty is of 10 words for 13."""
    pairs = [("a b c d e", "a b c d e"), ("a b c d f", "a b c d e f g h")]
    bigrams, words = (4 + 3) / 8, 10 / 10
    penalty = math.exp(1 - 13 / 10)
    assert text(pairs)["bleu2"] == pytest.approx(penalty * math.sqrt(words * bigrams))


def test_text_that_says_nothing() -> None:
    assert set(text([("", "a molecule")]).values()) == {0.0}


def test_exact_match() -> None:
    assert exact([("C6H6", "C6H6"), ("c6h6", "C6H6")]) == {"exact_match": 0.5}


def test_scores_look_between_the_tags() -> None:
    pair = ("<NUMBER> 1.5 </NUMBER>", "<NUMBER> 1 </NUMBER>")
    assert score("number", [pair, ("1.5", pair[1])]) == {"coverage": 0.5, "rmse": 0.5}


def test_every_task_of_smolinstruct_has_a_metric() -> None:
    assert len(scoring.TASKS) == 14
    assert set(scoring.TASKS.values()) == set(scoring.METRICS)


def test_a_dataset_declares_its_metrics(tmp_path: Path) -> None:
    assert scoring.declared(tmp_path) == {}
    (tmp_path / "metrics.json").write_text('{"weights": "number", "retrosynthesis": "exact"}')
    declared = scoring.declared(tmp_path)
    tasks = ["weights", "retrosynthesis", "forward_synthesis", "greetings", None]
    assert scoring.metrics_of(tasks, declared) == {
        "weights": "number",
        "retrosynthesis": "exact",
        "forward_synthesis": "smiles",
    }


def test_a_package_that_is_lacking_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "PACKAGES", {"smiles": "no_such_package"})
    with pytest.raises(CrossFLError, match=r"'smiles' needs no_such_package.* pip install"):
        scoring.metrics_of(["retrosynthesis"], {})
    assert scoring.metrics_of(["molecule_captioning"], {}) == {"molecule_captioning": "text"}


@pytest.mark.parametrize("content", ['{"a": "beauty"}', '["number"]', "{", '{"a": ["number"]}'])
def test_a_metric_that_is_not_known_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(CrossFLError, match=r"metrics\.json is no object .* smiles, number"):
        scoring.declared(tmp_path)
