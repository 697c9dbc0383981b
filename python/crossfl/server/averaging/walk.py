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
from typing import Any, TypeVar

import torch
from torch import Tensor

from crossfl.storage.encodings import CELL
from crossfl.storage.tensorfile import TensorFile

R = TypeVar("R")

PIECE = 64 * CELL
"""Elements that a thread takes at a time, unless the caller says otherwise: whole cells."""
SPAN = 8 * CELL
"""Elements that are worked out and written at a time: 2 MiB of fp32, which is still in the
processor's cache when it is written."""
AHEAD = 2
"""Pieces given out to each thread: one that it works on, and the next."""
SEGMENT = 1 << 22
"""Bytes of a file that one thread hashes before it turns to something else."""


@dataclass(frozen=True)
class Piece:
    """Consecutive cells of one tensor of a file."""

    file: TensorFile
    name: str
    start: int
    count: int

    def spans(self, size: int) -> Iterator[tuple[int, int]]:
        """Start in the tensor, and number of elements, of each part of at most `size` elements."""
        end = self.start + self.count
        for start in range(self.start, end, size):
            yield start, min(size, end - start)


def pieces(file: TensorFile, size: int = PIECE) -> Iterator[Piece]:
    """The tensors of a file, in its order, cut into pieces of at most `size` elements."""
    for name, entry in file.entries.items():
        for start in range(0, entry.elements, size):
            yield Piece(file, name, start, min(size, entry.elements - start))


class Workers(ThreadPoolExecutor):
    """Threads, each of which has none of torch's beside it."""

    def __init__(self, count: int) -> None:
        # The setting is each thread's own, and products of several threads are not reproducible.
        super().__init__(count, initializer=torch.set_num_threads, initargs=(1,))
        self.count = count


@contextlib.contextmanager
def workers(threads: int | None) -> Iterator[Workers]:
    """Threads for `walk`, by default one for each core; torch's own are switched off meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    pool = Workers(threads or len(os.sched_getaffinity(0)))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def walk(
    pool: Workers,
    walked: Iterable[Piece],
    work: Callable[[Piece], R],
    begin: Callable[[TensorFile], None] = lambda file: None,
) -> Iterator[tuple[Piece, R]]:
    """Each piece with its result, in order; every thread has one at hand and another to come.

    `begin` is called with each file, before work on its first piece is.
    """
    pending: deque[tuple[Piece, Future[R]]] = deque()
    file: TensorFile | None = None
    for item in walked:
        if item.file is not file:
            file = item.file
            begin(file)
        pending.append((item, pool.submit(work, item)))
        if len(pending) >= AHEAD * pool.count:
            first, future = pending.popleft()
            yield first, future.result()
    for first, future in pending:
        yield first, future.result()


class Buffers:
    """Memory that one piece leaves to the next, which so finds it in the processor's cache."""

    def __init__(self) -> None:
        self._free: dict[torch.dtype, list[Tensor]] = {}

    @contextlib.contextmanager
    def lent(self, dtypes: Sequence[torch.dtype]) -> Iterator[list[Tensor]]:
        """Flat tensors of `SPAN` elements, with whatever is in them, one of each dtype given."""
        taken = [self._take(dtype) for dtype in dtypes]
        yield taken
        for tensor in taken:
            self._free[tensor.dtype].append(tensor)

    def _take(self, dtype: torch.dtype) -> Tensor:
        free = self._free.setdefault(dtype, [])
        try:
            return free.pop()
        except IndexError:
            return torch.empty(SPAN, dtype=dtype)


class Checksums:
    """sha256 of files, computed in step with a walk over them, so that disks are read once.

    Args:
        pool: threads to hash on.
        contents: the bytes of each file that is read, mapped.
    """

    def __init__(self, pool: ThreadPoolExecutor, contents: Mapping[Path, memoryview]) -> None:
        self._pool, self._contents = pool, contents
        self._sizes: dict[Path, int] = {}
        self._hashes: dict[Path, Any] = {}
        self._reached: dict[Path, int] = {}
        self._last: dict[Path, Future[None]] = {}
        for path, content in contents.items():
            self.add(path, len(content))

    def add(self, path: Path, size: int) -> None:
        """One more file, which is being written: it is hashed as far as `reach` says."""
        self._sizes[path], self._hashes[path] = size, hashlib.sha256()
        self._reached[path] = 0

    def along(self, walked: Sequence[Piece]) -> Iterator[Piece]:
        """The same pieces; as each is taken, what is read is hashed as far as the walk has come."""
        total, done = sum(piece.count for piece in walked), 0
        for piece in walked:
            done += piece.count
            for path in self._contents:
                self.reach(path, self._sizes[path] * done // total)
            yield piece

    def reach(self, path: Path, end: int) -> None:
        """Have a file hashed up to byte `end`, in the background, a segment or more at a time."""
        begin = self._reached[path]
        if end - begin >= SEGMENT or begin < end == self._sizes[path]:
            before = self._last.get(path)
            self._last[path] = self._pool.submit(self._hash, path, begin, end, before)
            self._reached[path] = end

    def results(self) -> dict[Path, str]:
        """Hexadecimal sha256 of each file, all of which must have been reached."""
        for path in self._contents:
            self.reach(path, self._sizes[path])
        for future in self._last.values():
            future.result()
        if left := [path for path, size in self._sizes.items() if self._reached[path] < size]:
            raise ValueError(f"{left[0]} was not hashed to its end")
        return {path: found.hexdigest() for path, found in self._hashes.items()}

    def _hash(self, path: Path, begin: int, end: int, before: Future[None] | None) -> None:
        if before is not None:
            before.result()  # the pool starts what it is given in order, so this one is running
        if (content := self._contents.get(path)) is not None:
            self._hashes[path].update(content[begin:end])
        else:
            with _mapped(path, begin, end) as written:
                self._hashes[path].update(written)


@contextlib.contextmanager
def _mapped(path: Path, begin: int, end: int) -> Iterator[memoryview]:
    """Bytes of a file, which is open meanwhile only: a model may have more files than may be."""
    start = begin - begin % mmap.ALLOCATIONGRANULARITY
    with (
        path.open("rb") as stream,
        mmap.mmap(stream.fileno(), end - start, offset=start, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as content,
        content[begin - start :] as part,
    ):
        yield part
