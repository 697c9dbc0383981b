"""Feed the reader damaged files: whatever it is given, it reads within the file or refuses.

    python -m tests.support.fuzz --seconds 600
    python -m tests.support.fuzz --seconds 36000 --tries 10000 --manifests

What the reader takes of a delta, the safetensors library must take too, with the same bytes. A
manifest is damaged and sealed anew, as a facility that means harm would: its update is averaged, or
refused and the others averaged as if it had not come. One in so many federations is reported on.
"""

import argparse
import copy
import json
import math
import random
import shutil
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from crossfl.errors import CrossFLError
from crossfl.protocol.layout import MANIFEST
from crossfl.server.averaging import kernel
from crossfl.steps.report import report
from crossfl.storage.delta import Delta
from crossfl.storage.tensorfile import Entry
from tests.support.federation import Federation, facilities, snapshot, write_document
from tests.support.page import Page

SHAPES = {"a": (4, 3), "b": (5,), "c": (0, 2)}
PARAMETERS = {name: Entry(torch.float32, shape, 0, 0) for name, shape in SHAPES.items()}
WORDS = (
    b'{', b'}', b'[', b']', b'"', b':', b',', b'-1', b'0', b'1e9', b'9' * 30, b'null', b'true',
    b'NaN', b'Infinity', b'"F32"', b'"BF16"', b'"I8"', b'"U16"', b'"dtype"', b'"shape"', b'"a"',
    b'"data_offsets"', b'"__metadata__"', b'"encoding"', b'"topk"', b'"int4"', b'\\ud800', b'\xff',
    b' ' * 7, b'\0',
)  # fmt: skip


def seeds() -> list[bytes]:
    """Good files, one in each encoding."""
    plain = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    codes = {"a": torch.ones(12).char(), "b": torch.ones(5).char(), "c": torch.ones(0).char()}
    nibbles = {"a": torch.ones(6).byte(), "b": torch.ones(3).byte(), "c": torch.ones(0).byte()}
    scales = {f"{n}//scale": torch.ones(int(n != "c")).bfloat16() for n in SHAPES}
    kept = {f"{n}//position": torch.zeros(int(n != "c"), dtype=torch.uint16) for n in SHAPES}
    kept |= {f"{n}//value": torch.ones(int(n != "c")).bfloat16() for n in SHAPES}
    return [
        save(plain),
        save({n: t.bfloat16() for n, t in plain.items()}, {"format": "pt"}),
        save(codes | scales, {"encoding": "int8"}),
        save(nibbles | scales, {"encoding": "int4"}),
        save(kept, {"encoding": "topk", "topk_fraction": "0.05"}),
    ]


def damaged(good: bytes, chance: random.Random) -> bytes:
    """A copy with one to four changes, most of them in the header."""
    data = bytearray(good)
    for _ in range(chance.randint(1, 4)):
        header = 8 + int.from_bytes(good[:8], "little")
        at = chance.randrange(min(header, len(data)) if chance.random() < 0.9 else len(data))
        match chance.randrange(7):
            case 0:
                data[at] ^= 1 << chance.randrange(8)
            case 1:
                data[at] = chance.randrange(256)
            case 2:
                data[at:at] = chance.choice(WORDS)
            case 3:
                data[at : at + chance.randint(1, 9)] = chance.choice(WORDS)
            case 4:
                del data[at : at + chance.randint(1, 30)]
            case 5:
                data[:8] = struct.pack("<Q", chance.choice([0, 1, 2, header, 1 << 63, len(data)]))
            case 6:
                _edit_a_number(data, chance)
        if len(data) < 9:
            break
    return bytes(data)


def _edit_a_number(data: bytearray, chance: random.Random) -> None:
    """Change one number of the header and keep the rest of the file consistent."""
    size = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + size])
        entry = header[chance.choice(sorted(header))]
        numbers = entry[chance.choice(["shape", "data_offsets"])]
        numbers[chance.randrange(len(numbers))] += chance.choice([-1, 1, 2**31, -(2**63), 8])
    except (ValueError, KeyError, TypeError, IndexError):
        return
    text = json.dumps(header).encode()
    data[: 8 + size] = struct.pack("<Q", len(text)) + text


def verdict(folder: Path) -> str:
    """What became of `delta.safetensors` in a folder: refused, or read to the end."""
    try:
        delta = Delta(folder)
        delta.check(PARAMETERS)
        for name, parameter in PARAMETERS.items():
            if parameter.elements:
                values = delta.span(name, 0, parameter.elements)
                total = kernel.WeightedSum([values], [1.0])
                total.into(torch.empty(parameter.elements))
                total.squares()
    except (CrossFLError, ValueError) as error:
        return f"refused: {type(error).__name__}"
    with safe_open(folder / "delta.safetensors", framework="pt") as library:
        for name in library.keys():  # noqa: SIM118 (not a mapping)
            theirs = library.get_tensor(name)
            ours = delta.tensors[name]
            assert ours.dtype == theirs.dtype
            assert ours.shape == theirs.shape
            assert ours.reshape(-1).view(torch.uint8).equal(theirs.reshape(-1).view(torch.uint8))
    return "read"


def fuzz(seconds: float, seed: int, tries: float = math.inf) -> Counter[str]:
    """Verdicts on damaged files, for so long and so many. Any other exception goes through."""
    chance, good, verdicts = random.Random(seed), seeds(), Counter[str]()
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "delta.safetensors")
        while time.monotonic() < end and verdicts.total() < tries:
            path.write_bytes(damaged(chance.choice(good), chance))
            verdicts[verdict(Path(scratch))] += 1
    return verdicts


VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 10**30, 10**400, 1e308, -0.0, float("nan"), float("inf"),
    "", "x", "\ud800", "a\0b", "..", "/etc/passwd", "complete", "partial", "absent", "x" * 10_000,
    [], {}, ["bytes", "sha256"], {"bytes": 1, "sha256": "x"}, {"loss": 10**400},
)  # fmt: skip


KEYS = ("", "kind", "format", "files", "metrics", "loss", "\ud800", "\x1b[2J", "x" * 300)


def _places(record: Any, *above: str) -> Iterator[tuple[str, ...]]:
    for key, value in record.items() if isinstance(record, dict) else ():
        yield (*above, key)
        yield from _places(value, *above, key)


def damage_record(record: dict[str, Any], chance: random.Random) -> None:
    """Remove, add or replace one or two values, at any depth."""
    for _ in range(chance.randint(1, 2)):
        if not (places := list(_places(record))):
            return
        *above, last = chance.choice(places)
        inner: Any = record
        for key in above:
            inner = inner[key]
        match chance.randrange(6):
            case 0:
                del inner[last]
            case 1:
                word = chance.choice([v for v in VALUES if isinstance(v, str)])
                inner[word] = copy.deepcopy(chance.choice(VALUES))
            case _:
                inner[last] = copy.deepcopy(chance.choice(VALUES))


def random_value(chance: random.Random, depth: int = 3) -> Any:
    """A JSON value, of no use to anybody."""
    if depth and chance.random() < 0.4:
        inner = [random_value(chance, depth - 1) for _ in range(chance.randrange(4))]
        return inner if chance.random() < 0.5 else {chance.choice(KEYS): v for v in inner}
    return copy.deepcopy(chance.choice(VALUES))


def hostile_documents(good: dict[str, Any], seed: int, tries: int) -> Iterator[bytes | Any]:
    """Documents like a good one, and unlike any: values to be sealed, and bytes as they are."""
    chance = random.Random(seed)
    for _ in range(tries):
        record = copy.deepcopy(good)
        damage_record(record, chance)
        kind = chance.random()
        if kind < 0.7:
            yield record
        elif kind < 0.85:
            content = bytearray(json.dumps(record).encode())
            for _ in range(chance.randint(1, 4)):
                at = chance.randrange(len(content))
                content[at : at + chance.randrange(9)] = chance.choice(WORDS)
            yield bytes(content)
        elif kind < 0.95:
            yield json.dumps(random_value(chance)).encode()
        else:
            yield chance.randbytes(chance.randrange(200))


def fuzz_manifests(
    seconds: float, seed: int, tries: float = math.inf, reported: int = 25
) -> Counter[str]:
    """Verdicts on updates whose manifests are damaged. Any exception goes through.

    Args:
        seconds: how long.
        seed: of the damage.
        tries: how many.
        reported: one in so many federations is reported on.
    """
    chance, verdicts = random.Random(seed), Counter[str]()
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as scratch:
        model = {name: torch.ones(shape) for name, shape in SHAPES.items()}
        federation = Federation(Path(scratch), model, quorum=2)
        good = [federation.update(f"good{i}", federation.deltas(i)) for i in range(2)]
        alone = snapshot(federation.run(good, "alone") / "global_model")
        evil = federation.update("evil", federation.deltas(2))
        sealed = json.loads((evil / MANIFEST).read_text())
        while time.monotonic() < end and verdicts.total() < tries:
            record = copy.deepcopy(sealed)
            damage_record(record, chance)
            write_document(evil, record)
            out = federation.run([evil, *good])
            counted = [e.status for e in facilities(out).values() if e.share > 0]
            if len(counted) == len(good):
                assert snapshot(out / "global_model") == alone
            verdicts["averaged" if len(counted) > len(good) else "refused"] += 1
            if verdicts.total() % reported == 0:
                report(out / "state", [], out)
                Page((out / "report.html").read_text("utf-8"))
            shutil.rmtree(out)
    return verdicts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tries", type=float, default=math.inf, help="at most so many")
    parser.add_argument("--manifests", action="store_true", help="manifests instead of deltas")
    given = parser.parse_args()
    run = fuzz_manifests if given.manifests else fuzz
    for outcome, count in run(given.seconds, given.seed, given.tries).most_common():
        print(f"{count:>10}  {outcome}")
