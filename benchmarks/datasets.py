"""Measure what a job needs for data that do not fit into memory: memory of each rank, first step.

    python benchmarks/datasets.py --work /tmp/benchmark
    python benchmarks/datasets.py --work /tmp/benchmark --tokenized-gb 20 --megabytes 16 64

Two things are measured.

* *Tokenizing*: a first job on datasets of several sizes, of generated text. Memory that does not
  grow with the size is memory that does not hold the data.
* *The second job* on a tokenized dataset of `--tokenized-gb`, on two ranks: seconds from its start
  to the end of its first step, and the most memory that a rank held, beside those of a job on a
  small dataset. The file has the form and size of a tokenized dataset, and it is sparse: its token
  ids are zeros that lie on no disk, its offsets are written. It takes the place of the small
  dataset's file in the cache. Tokenizing so much text takes hours, and the second job does not see
  what it was made from.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from crossfl.learning.datasets import tables
from crossfl.protocol import variables
from crossfl.protocol.flags import flag
from crossfl.protocol.layout import MANIFEST
from crossfl.protocol.manifest import ModelManifest
from crossfl.protocol.records import Aggregation, Task, Training
from crossfl.steps.initialise import initialise
from crossfl.storage import manifest

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "vocab_size": 384,
    "max_position_embeddings": 512,
    "dtype": "float32",
}
LENGTH, STEPS = 512, 20


def words(megabytes: float) -> str:
    """One text of so many megabytes, of words in no order."""
    generator = np.random.default_rng(0)
    letters = generator.integers(97, 123, (int(megabytes * 1e6 / 6), 6), dtype=np.uint8)
    letters[:, 5] = 32
    return letters.tobytes().decode()


def dataset(folder: Path, megabytes: float) -> None:
    """A dataset of texts of 10,000 letters."""
    folder.mkdir(parents=True)
    text = words(1)
    with (folder / "train.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(int(megabytes * 100)):
            start = number % 99 * 10_000
            stream.write(json.dumps({"text": f"{number} {text[start : start + 10_000]}"}) + "\n")
    row = json.dumps({"text": text[:1000]}) + "\n"
    (folder / "valid.jsonl").write_text(row * 4, encoding="utf-8")


class Sparse:
    """A file of which the large pieces, token ids that are zeros, take no room on the disk."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("wb")
        self.closed = False

    def write(self, piece: bytes) -> int:
        """Write a piece, or leave a hole of its size."""
        if len(piece) > 1 << 20:
            self._stream.truncate(self._stream.tell() + len(piece))
            self._stream.seek(0, os.SEEK_END)
        else:
            self._stream.write(piece)
            self._stream.flush()
        return len(piece)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Close the file."""
        self.closed = True
        self._stream.close()


def enlarge(entry: Path, gigabytes: float) -> int:
    """Put a large tokenized dataset in place of a small one; its number of samples."""
    rows = tables.BATCH_VALUES // LENGTH
    ends = pa.array(np.arange(rows + 1, dtype=np.int32) * LENGTH)
    columns = {
        "values": pa.ListArray.from_arrays(ends, pa.array(np.zeros(rows * LENGTH, np.uint16))),
        "marks": pa.ListArray.from_arrays(
            pa.array(np.zeros(rows + 1, np.int32)), pa.array([], pa.int64())
        ),
    }
    batch = pa.record_batch(columns)
    count = int(gigabytes * 1e9 / (rows * LENGTH * 2))
    file = Sparse(entry / "large")
    with pa.ipc.new_stream(pa.PythonFile(file, "w"), batch.schema) as writer:
        for _ in range(count):
            writer.write_batch(batch)
    file.close()
    (entry / "large").rename(entry / tables.ROWS)
    return count * rows


def job(work: Path, name: str, ranks: int) -> dict[str, Any]:
    """Run `crossfl train` on a dataset; what it took."""
    task = Task(
        facility="here", dataset=name, round=1, local_steps=STEPS, seed=1, schedule_step=0,
        schedule_steps=STEPS, samples_seen=0, data_seed=1, federation="benchmark",
        base=manifest.read(work / "global_model", ModelManifest).digest,
    )  # fmt: skip
    training = Training(batch_size=8, sequence_length=LENGTH, threads=1)
    out, events = work / "out", work / "events"
    shutil.rmtree(out, ignore_errors=True)
    events.unlink(missing_ok=True)
    out.mkdir()
    torchrun = Path(sys.executable).with_name("torchrun")
    site = {
        variables.FACILITY: "here",
        variables.DATA: str(work / "data"),
        variables.STATE: str(work / "state"),
        variables.PROGRESS: str(events),
        variables.LAUNCHER: f"{torchrun} --nproc-per-node={ranks}",
    }
    command = [sys.executable, "-m", "crossfl", "train", "--global-model", work / "global_model"]
    command += ["--outdir", out]
    command += [w for r in (task, training) for k, v in r.asdict().items() for w in (flag(k), v)]
    begun = time.time()
    process = subprocess.Popen([str(w) for w in command], env={**os.environ, **site})
    first = None
    while process.poll() is None:
        if first is None and events.is_file() and '"train"' in events.read_text("utf-8"):
            first = time.time() - begun
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"the job on {name} failed")
    document = json.loads((out / "update" / MANIFEST).read_bytes())
    memory = document["metrics"]["training"]["peak_memory"] / 2**20
    return {"first_step_s": first, "load_s": document["seconds"]["load"], "peak_MiB": memory}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--work", type=Path, required=True, help="folder to work in")
    parser.add_argument("--megabytes", type=float, nargs="+", default=[4, 16, 64])
    parser.add_argument("--tokenized-gb", type=float, default=20.0)
    args = parser.parse_args()
    work: Path = args.work
    work.mkdir(parents=True)
    (work / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    initialise(None, work / "config.json", "bytes", 0, 1, Aggregation(), work)
    print(
        "| tokenized by the job | first step after, s | peak memory of a rank, MiB |\n|---|---|---|"
    )
    for megabytes in args.megabytes:
        name = f"text-{megabytes:g}"
        dataset(work / "data" / name, megabytes)
        for what in (f"{megabytes:g} MB of text, first job", "the same, second job"):
            found = job(work, name, 2)
            print(f"| {what} | {found['first_step_s']:.1f} | {found['peak_MiB']:.0f} |", flush=True)
    entries = (work / "state" / "here" / "samples").iterdir()
    entry = max((e for e in entries if e.is_dir()), key=lambda e: e.stat().st_mtime)
    samples = enlarge(entry, args.tokenized_gb)
    size = (entry / tables.ROWS).stat().st_size / 1e9
    found = job(work, name, 2)
    print(
        f"| {size:.1f} GB of token ids ({samples:,} samples), second job | "
        f"{found['first_step_s']:.1f} | {found['peak_MiB']:.0f} |"
    )


if __name__ == "__main__":
    main()
