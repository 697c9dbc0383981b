"""Write the data of the default job: numbers in words, one language for each facility."""

import argparse
import json
import random
from pathlib import Path

from num2words import num2words

LANGUAGES = {"leonardo": "it", "karolina": "cs"}


def main() -> None:
    """Write `<root>/<facility>/numbers/{train,valid}.jsonl`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="folder to write into")
    parser.add_argument("--size", type=int, default=3000, help="numbers; default 3000")
    parser.add_argument("--held-out", type=int, default=300, help="of these, for validation")
    args = parser.parse_args()
    numbers = random.Random(0).sample(range(10_000), args.size)  # noqa: S311 (not a secret)
    for facility, language in LANGUAGES.items():
        folder = args.root / facility / "numbers"
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps(
                {"prompt": f"{language} {n}=", "completion": num2words(n, lang=language)},
                ensure_ascii=False,
            )
            for n in numbers
        ]
        for split, part in (("valid", lines[: args.held_out]), ("train", lines[args.held_out :])):
            (folder / f"{split}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
