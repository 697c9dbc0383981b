"""Split SMolInstruct among four facilities by group of tasks.

The rows are those of the data set (https://huggingface.co/datasets/osunlp/SMolInstruct): `task`,
`input` and `output`, tags included; other fields are left out.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GROUPS = {
    "perlmutter": "name_conversion-",
    "polaris": "property_prediction-",
    "aurora": ("forward_synthesis", "retrosynthesis"),
    "frontier": ("molecule_captioning", "molecule_generation"),
}
"""How the tasks of each facility begin."""
PROMPT = "[INST] {input} [/INST]"


def main() -> None:
    """Write `<out>/<facility>/smolinstruct/{train,valid}.jsonl`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write into")
    for split in ("train", "valid"):
        parser.add_argument(
            f"--{split}", type=Path, nargs="+", required=True, help="JSONL or Parquet files"
        )
    parser.add_argument("--prompt", default=PROMPT, help=f"default {PROMPT!r}")
    args = parser.parse_args()
    for split, files in (("train", args.train), ("valid", args.valid)):
        for facility, count in split_up(files, args.out, f"{split}.jsonl", args.prompt).items():
            print(f"{facility}  {split}  {count:,} samples")


def split_up(files: list[Path], out: Path, name: str, prompt: str) -> Counter[str]:
    """Write the rows of the files to the facilities that their tasks belong to; their numbers."""
    streams, counts = {}, Counter[str]()
    for facility in GROUPS:
        folder = out / facility / "smolinstruct"
        folder.mkdir(parents=True, exist_ok=True)
        streams[facility] = (folder / name).open("w", encoding="utf-8")
    for file in files:
        for number, row in enumerate(rows(file), 1):
            try:
                task, question, answer = row["task"], row["input"], row["output"]
                facility = next(f for f, begins in GROUPS.items() if task.startswith(begins))
            except (KeyError, StopIteration):
                raise SystemExit(
                    f"{file}, row {number}: no row of SMolInstruct, with one of its tasks, input "
                    "and output"
                ) from None
            sample = {"task": task, "input": prompt.replace("{input}", question), "output": answer}
            streams[facility].write(json.dumps(sample, ensure_ascii=False) + "\n")
            counts[facility] += 1
    for stream in streams.values():
        stream.close()
    return counts


def rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL or Parquet file, one after another."""
    if file.suffix == ".parquet":
        from pyarrow.parquet import ParquetFile

        for batch in ParquetFile(file).iter_batches(columns=["task", "input", "output"]):
            yield from batch.to_pylist()
    else:
        with file.open(encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())


if __name__ == "__main__":
    main()
