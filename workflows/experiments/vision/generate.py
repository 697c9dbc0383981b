"""Write the data of the small vision experiment: scikit-learn's digits, split by class."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from sklearn.datasets import load_digits

CLASSES = {"marconi100": range(5), "cloud": range(5, 10)}
HELD_OUT = 5
"""Every fifth image of a class is for validation."""


def main() -> None:
    """Write `<root>/<facility>/{train,valid}.jsonl`: images of 8 by 8, values from 0 to 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="folder to write into")
    args = parser.parse_args()
    digits = load_digits()
    rows = [
        {"pixels": [(image / 16).tolist()], "label": int(label)}
        for image, label in zip(digits.images, digits.target, strict=True)
    ]
    for facility, classes in CLASSES.items():
        folder = args.root / facility
        folder.mkdir(parents=True, exist_ok=True)
        train, valid = [], []
        for number in classes:
            own = [row for row in rows if row["label"] == number]
            valid += own[::HELD_OUT]
            train += [row for i, row in enumerate(own) if i % HELD_OUT]
        write(folder / "train.jsonl", train)
        write(folder / "valid.jsonl", valid)


def write(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Write one row a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
