"""Mixtures: a folder with datasets, and a file that says how much is drawn of each."""

import json
import math
from pathlib import Path

from crossfl.errors import CrossFLError

FILE = "mixture.json"
"""In the folder: the weight of each dataset in it, by name."""
MOST_PARTS = 100


def weights_of(path: Path) -> dict[str, float] | None:
    """The weights of a mixture's parts by name, in the order of the file; None of other datasets.

    Raises:
        CrossFLError: the file is none that says them.
    """
    file = path / FILE
    if not file.is_file():
        return None
    try:
        weights = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        weights = None
    if (
        not isinstance(weights, dict)
        or not 1 <= len(weights) <= MOST_PARTS
        or not all(type(w) in (int, float) and 0 < w < math.inf for w in weights.values())
    ):
        raise CrossFLError(
            f"{file} has to name 1 to {MOST_PARTS} datasets of its folder, each with a positive "
            'number: {"web": 0.7, "books": 0.3}'
        )
    for name in weights:
        if Path(name).name != name or not (path / name).exists():
            raise CrossFLError(f"{file} names {name!r}, which is not in its folder")
        if (path / name / FILE).exists():
            raise CrossFLError(f"{path / name} is a mixture, which a mixture cannot hold")
    return {name: float(weight) for name, weight in weights.items()}


def parts_of(path: Path) -> list[Path]:
    """The datasets of a mixture, or the dataset itself."""
    weights = weights_of(path)
    return [path] if weights is None else [path / name for name in weights]
