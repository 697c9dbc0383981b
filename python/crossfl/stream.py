"""Walking tensors too large for memory: in pieces, on several threads, in order."""

import contextlib
import hashlib
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from crossfl.encoding import CELL
from crossfl.tensorfile import TensorFile

R = TypeVar("R")

PIECE = 8 * CELL
"""Elements of a piece, unless the caller says otherwise; a multiple of `CELL`."""
SEGMENT = 1 << 22
"""Bytes of a file that one thread hashes before it turns to something else."""


@dataclass(frozen=True)
class Piece:
    """Consecutive cells of one tensor of a file."""

    file: TensorFile
    name: str
    start: int
    count: int

    def cells(self) -> Iterator[tuple[int, int]]:
        """Start in the tensor, and number of elements, of each cell."""
        end = self.start + self.count
        for start in range(self.start, end, CELL):
            yield start, min(CELL, end - start)


def pieces(file: TensorFile, size: int = PIECE) -> Iterator[Piece]:
    """The tensors of a file, in its order, cut into pieces of at most `size` elements."""
    for name, entry in file.entries.items():
        for start in range(0, entry.elements, size):
            yield Piece(file, name, start, min(size, entry.elements - start))


@contextlib.contextmanager
def workers(threads: int | None) -> Iterator[ThreadPoolExecutor]:
    """Threads for `walk`, by default one for each core; torch's own are switched off meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    count = threads or len(os.sched_getaffinity(0))
    # The setting is each thread's own, and products of several threads are not reproducible.
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def walk(
    pool: ThreadPoolExecutor,
    walked: Iterable[Piece],
    work: Callable[[Piece], R],
    begin: Callable[[TensorFile], None] = lambda file: None,
    ahead: int = 4,
) -> Iterator[tuple[Piece, R]]:
    """Each piece with its result, in order; at most `ahead` results are waiting at a time.

    `begin` is called with each file, before work on its first piece is.
    """
    pending: deque[tuple[Piece, Future[R]]] = deque()
    file: TensorFile | None = None
    for item in walked:
        if item.file is not file:
            file = item.file
            begin(file)
        pending.append((item, pool.submit(work, item)))
        if len(pending) >= ahead:
            first, future = pending.popleft()
            yield first, future.result()
    for first, future in pending:
        yield first, future.result()


class Buffers:
    """Memory that pieces leave to those after them: what the kernel gives anew, it clears first.

    Args:
        size: elements of each tensor.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._free: dict[torch.dtype, list[Tensor]] = {}

    def take(self, dtype: torch.dtype) -> Tensor:
        """A flat tensor of `size` elements, with whatever is in it."""
        free = self._free.setdefault(dtype, [])
        try:
            return free.pop()
        except IndexError:
            return torch.empty(self._size, dtype=dtype)

    def give(self, tensors: Iterable[Tensor]) -> None:
        """Take back what was handed out, to be handed out again."""
        for tensor in tensors:
            self._free[tensor.dtype].append(tensor)


class Checksums:
    """sha256 of files, computed in step with a walk over them, so that disks are read once.

    Args:
        contents: the bytes of each file, mapped.
    """

    def __init__(self, pool: ThreadPoolExecutor, contents: Mapping[Path, memoryview]) -> None:
        self._pool, self._contents = pool, contents
        self._hashes = {path: hashlib.sha256() for path in contents}
        self._reached = dict.fromkeys(contents, 0)
        self._last: dict[Path, Future[None]] = {}

    def along(self, walked: Sequence[Piece]) -> Iterator[Piece]:
        """The same pieces; as each is taken, the files are hashed as far as the walk has come."""
        total, done = sum(piece.count for piece in walked), 0
        for piece in walked:
            done += piece.count
            self.advance(done / total)
            yield piece

    def advance(self, fraction: float) -> None:
        """Have every file hashed up to this fraction of it, in the background."""
        for path, content in self._contents.items():
            size = len(content)
            target, reached = int(size * fraction), self._reached[path]
            if target > reached and (target - reached >= SEGMENT or target == size):
                before = self._last.get(path)
                self._last[path] = self._pool.submit(self._hash, path, reached, target, before)
                self._reached[path] = target

    def results(self) -> dict[Path, str]:
        """Hexadecimal sha256 of each file."""
        self.advance(1.0)
        for future in self._last.values():
            future.result()
        return {path: found.hexdigest() for path, found in self._hashes.items()}

    def _hash(self, path: Path, begin: int, end: int, before: Future[None] | None) -> None:
        if before is not None:
            before.result()  # the pool starts what it is given in order, so this one is running
        self._hashes[path].update(self._contents[path][begin:end])


def mapped(path: Path) -> memoryview:
    """The bytes of a file, not read before they are looked at."""
    if not path.stat().st_size:
        return memoryview(b"")  # which cannot be mapped
    with path.open("rb") as stream:
        return memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
