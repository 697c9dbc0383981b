"""Datasets at a facility: read as samples, encoded for the model, drawn without repeats."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from crossfl.errors import CrossFLError
from crossfl.protocol.fields import is_name

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

Split = Literal["train", "valid"]
HELD_OUT = 10
"""Where a dataset has no validation split, every tenth sample is held out for it."""
IGNORED = -100
"""Label of a token that the loss leaves out."""


class Text(NamedTuple):
    """A text to learn, or a prompt and the completion to learn; and the task it is of, if named."""

    prompt: str | None
    text: str
    task: str | None = None


class Image(NamedTuple):
    """An image, as the model takes it, and the number of its class."""

    pixels: "np.ndarray[Any, np.dtype[np.float32]]"
    """fp32, [channels, height, width]."""
    label: int
    task: str | None = None


Sample = Text | Image


class Samples(list[Sample]):
    """The samples that could be read, and why others could not."""

    def __init__(self, samples: Iterable[Sample] = (), bad: Iterable[str] = ()) -> None:
        super().__init__(samples)
        self.bad = list(bad)
        """A reason for each sample that is left out; it may leave the facility: it quotes none."""


class Encoded(NamedTuple):
    """A sample as token ids, and the same ids as labels with those of the prompt ignored."""

    ids: list[int]
    labels: list[int]


def read(path: Path, split: Split) -> Samples:
    """Read one split of a dataset.

    The path is a `.txt` file (one sample a line), a `.jsonl` or `.parquet` file (`text`, or
    `prompt` and `completion`, or `input` and `output`, or `pixels` and `label`; and `task`, if
    there are several), a folder with `train` and `valid` files of these kinds (`train.jsonl`, or
    `train-00000.parquet` and so on, all of them), or a folder saved by Hugging Face `datasets`.

    A sample that cannot be read is left out and counted.

    Raises:
        CrossFLError: the dataset has no such split, is empty, or not even half of it can be read.
    """
    hold_out = False
    if path.is_dir() and _is_saved(path):
        rows, hold_out = _saved(path, split)
    elif path.is_dir():
        names = ("train",) if split == "train" else ("valid", "validation")
        files = [f for n in names for f in sorted(path.glob(f"{n}[.-]*")) if f.suffix in READERS]
        if not files:
            raise CrossFLError(f"dataset {path} has no {names[0]} file ({', '.join(READERS)})")
        parts = [READERS[file.suffix](file) for file in files]
        rows = Samples((s for part in parts for s in part), (b for part in parts for b in part.bad))
    elif path.suffix in READERS:
        rows, hold_out = READERS[path.suffix](path), True
    else:
        raise CrossFLError(f"dataset {path} is none of {', '.join(READERS)}, nor a folder of them")
    if len(rows.bad) > len(rows):
        raise CrossFLError(
            f"dataset {path}: {len(rows.bad)} of {len(rows) + len(rows.bad)} samples cannot be "
            f"read, the first because: {rows.bad[0]}"
        )
    if hold_out:
        kept = (s for i, s in enumerate(rows) if (i % HELD_OUT == 0) == (split == "valid"))
        rows = Samples(kept, rows.bad)
    if not rows:
        because = f"; {rows.bad[0]}" if rows.bad else ""
        raise CrossFLError(f"dataset {path} is empty: it has no {split} sample{because}")
    return rows


def row(sample: Sample) -> dict[str, Any]:
    """The sample as a row of a `.jsonl` file, which `read` reads as the same sample."""
    if isinstance(sample, Image):
        fields: dict[str, Any] = {"pixels": sample.pixels.tolist(), "label": sample.label}
    elif sample.prompt is None:
        fields = {"text": sample.text}
    else:
        fields = {"prompt": sample.prompt, "completion": sample.text}
    return fields if sample.task is None else fields | {"task": sample.task}


def encode(
    sample: Sample, tokenizer: "PreTrainedTokenizerBase | None", length: int
) -> Encoded | Image:
    """Token ids of a sample, cut at `length`, ending in the end-of-sequence token if it has one.

    An image is as the model takes it already.
    """
    if isinstance(sample, Image):
        return sample
    if tokenizer is None:
        raise CrossFLError("the dataset holds text, and the model has no tokenizer to read it")
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    prompt = start + (_ids(sample.prompt, tokenizer) if sample.prompt else [])
    ids = prompt + _ids(sample.text, tokenizer) + end
    masked = 0 if sample.prompt is None else len(prompt)
    return Encoded(ids[:length], ([IGNORED] * masked + ids[masked:])[:length])


def encode_prompt(prompt: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Token ids of a prompt that is to be completed; never none, even of an empty one."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = start + _ids(prompt, tokenizer)
    return ids or [tokenizer.eos_token_id or 0]


def order(size: int, seed: int, start: int, count: int) -> list[int]:
    """Indices of `count` samples after the first `start`: every sample once, then all again.

    The order of each pass over the data follows from the seed and the number of the pass, so a
    facility goes on where it stopped with nothing kept but the number of samples it has seen.
    """
    indices: list[int] = []
    while len(indices) < count:
        epoch, offset = divmod(start + len(indices), size)
        shuffled = list(range(size))
        random.Random(f"{seed}/{epoch}").shuffle(shuffled)  # noqa: S311 (not a secret)
        indices += shuffled[offset : offset + count - len(indices)]
    return indices


def _ids(text: str, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    except Exception as error:  # its text may quote the data, and of any class
        name = type(error).__name__
        raise CrossFLError(f"the model's tokenizer cannot read a sample ({name})") from None
    return ids


def _txt(path: Path) -> Samples:
    content = path.read_bytes()
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise CrossFLError(f"{path}:{number} is not UTF-8 text: save the file as UTF-8") from None
    return Samples(Text(None, line) for line in lines if line.strip())


def _jsonl(path: Path) -> Samples:
    samples = Samples()
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    samples.append(_sample(json.loads(line.decode()), f"{path}:{number}"))
                except (ValueError, RecursionError) as error:
                    samples.bad.append(f"{path}:{number} is not JSON ({type(error).__name__})")
                except CrossFLError as error:
                    samples.bad.append(str(error))
    return samples


def _parquet(path: Path) -> Samples:
    from pyarrow import ArrowException, parquet

    samples = Samples()
    try:
        # By batches: pixels take many times the memory as lists that they take as arrays.
        for batch in parquet.ParquetFile(path).iter_batches(1024):
            _add(samples, batch.to_pylist(), path)
    except (ArrowException, OSError, ValueError) as error:
        name, row = type(error).__name__, len(samples) + len(samples.bad)
        raise CrossFLError(
            f"{path} is not a parquet file, or is damaged ({name}, from row {row} on)"
        ) from None
    return samples


def _add(samples: Samples, rows: Iterable[Any], path: Path) -> Samples:
    """The samples, and those of further rows."""
    for i, row in enumerate(rows, len(samples) + len(samples.bad)):
        try:
            samples.append(_sample(row, f"{path} row {i}"))
        except CrossFLError as error:
            samples.bad.append(str(error))
    return samples


READERS = {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


def _saved(path: Path, split: Split) -> tuple[Samples, bool]:
    import datasets
    from pyarrow import ArrowException

    try:
        saved = datasets.load_from_disk(str(path))
    except (ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        raise CrossFLError(f"{path} is not a saved dataset ({type(error).__name__})") from None
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    valid = next((name for name in ("valid", "validation", "test") if name in splits), None)
    name = "train" if split == "train" or valid is None else valid
    if name not in splits:
        raise CrossFLError(f"saved dataset {path} has no split {name!r}: save it with one")
    samples = Samples()
    try:
        _add(samples, splits[name], path)
    except (ArrowException, OSError, ValueError) as error:
        raise CrossFLError(
            f"{path} row {len(samples) + len(samples.bad)} cannot be read ({type(error).__name__})"
        ) from None
    return samples, valid is None


def _sample(row: Any, where: str) -> Sample:
    if isinstance(row, dict):
        task = None if row.get("task") is None else str(row["task"])
        if task is not None and not is_name(task):
            raise CrossFLError(
                f"{where}: the name of its 'task' has more than letters, digits, '.', '_' and '-'"
            )
        if {"pixels", "label"} <= set(row):
            return _image(row, task, where)
        for prompt, text in ((None, "text"), ("prompt", "completion"), ("input", "output")):
            if text in row and (prompt is None or prompt in row):
                values = (row[text],) if prompt is None else (row[text], row[prompt])
                if all(isinstance(value, str) and _is_unicode(value) for value in values):
                    return Text(None if prompt is None else row[prompt], row[text], task)
    raise CrossFLError(
        f"{where}: a sample has 'text', or 'prompt' and 'completion', or 'input' and 'output', "
        "each a string of Unicode characters, or 'pixels' and 'label'"
    )


def _is_unicode(text: str) -> bool:
    """Whether a text has no lone surrogate, which JSON can write and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _image(row: dict[str, Any], task: str | None, where: str) -> Image:
    import numpy as np

    try:
        pixels = np.asarray(row["pixels"], np.float32)
    except (TypeError, ValueError, OverflowError):
        pixels = np.empty(0, np.float32)
    label = row["label"]
    if pixels.ndim != 3 or not pixels.size or not np.isfinite(pixels).all():
        raise CrossFLError(f"{where}: 'pixels' are finite numbers, [channels][height][width]")
    if isinstance(label, bool) or not isinstance(label, int) or label < 0:
        raise CrossFLError(f"{where}: 'label' is the number of a class, 0 or more")
    return Image(pixels, label, task)
