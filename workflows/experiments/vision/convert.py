"""Turn encoded images into a dataset of pixels: grey, of one size, from 0 to 1.

The files are Parquet with a column of images (`image`, as Hugging Face `datasets` writes them: a
record whose `bytes` are those of an image file) and one of classes (`label`).
"""

import argparse
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

SCHEMA = pa.schema([("pixels", pa.list_(pa.list_(pa.list_(pa.float32())))), ("label", pa.int64())])


def main() -> None:
    """Write `<out>/{train,valid}.parquet`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the dataset to write")
    for split in ("train", "valid"):
        parser.add_argument(f"--{split}", type=Path, nargs="+", required=True, help="Parquet files")
    parser.add_argument("--size", type=int, default=32, help="height and width; default 32")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for split, files in (("train", args.train), ("valid", args.valid)):
        count = 0
        with parquet.ParquetWriter(args.out / f"{split}.parquet", SCHEMA) as writer:
            for batch in batches(files, args.size):
                writer.write_batch(batch)
                count += len(batch)
        print(f"{split}  {count:,} images")


def batches(files: list[Path], size: int) -> Iterator[pa.RecordBatch]:
    """The images of the files, some at a time."""
    for file in files:
        for batch in parquet.ParquetFile(file).iter_batches(512, columns=["image", "label"]):
            pixels = [grey(image["bytes"], size) for image in batch.column("image").to_pylist()]
            yield pa.record_batch([pixels, batch.column("label").to_pylist()], schema=SCHEMA)


def grey(encoded: bytes, size: int) -> list[list[list[float]]]:
    """Pixels [1, size, size] of an image file."""
    image = Image.open(io.BytesIO(encoded)).convert("L").resize((size, size))
    return [(np.asarray(image, np.float32) / 255).tolist()]


if __name__ == "__main__":
    main()
