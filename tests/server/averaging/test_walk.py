"""How many pieces of a model are worked on at once, and how many files are open meanwhile."""

import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import torch

from crossfl.server.averaging.walk import Piece, walk, workers
from crossfl.storage.tensorfile import TensorFile
from tests.support.federation import Federation, snapshot

SHARDS = 80


@pytest.mark.parametrize("threads", [1, 2, 16])
def test_as_many_pieces_at_a_time_as_threads(threads: int) -> None:
    """Every thread meets all others in its first piece, which only so many can."""
    together = threading.Barrier(threads, timeout=30)
    most, now, lock = 0, 0, threading.Lock()

    def work(piece: Piece) -> int:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        if piece.start < threads:
            together.wait()
        with lock:
            now -= 1
        return piece.start

    file = cast(TensorFile, object())
    walked = [Piece(file, "w", number, 1) for number in range(5 * threads)]
    with workers(threads) as pool:
        results = [result for _, result in walk(pool, walked, work)]
    assert most == threads
    assert results == list(range(5 * threads))


@pytest.fixture
def few_files() -> Iterator[None]:
    """A process that may open half as many files more as the model has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = len(list(Path("/proc/self/fd").iterdir())) + SHARDS // 2
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    "rules", [{}, {"aggregation_rule": "median"}, {"server_optimizer": "fedadam"}]
)
def test_a_model_of_many_files_needs_few_of_them_open(
    tmp_path: Path, few_files: None, rules: dict[str, str]
) -> None:
    shards = [{f"w{i:03}": torch.full((3,), float(i))} for i in range(SHARDS)]
    federation = Federation(tmp_path / "f", shards, **rules)
    updates = [federation.update(name, federation.deltas(n)) for n, name in enumerate("abcd")]
    out = federation.run(updates, threads=4)
    assert len(list((out / "global_model").glob("*.safetensors"))) == SHARDS
    assert snapshot(federation.run(updates, "alone", threads=1)) == snapshot(out)
