"""The numbers of a round: updates, master weights and slots in; next model and next state out.

Everything is walked in pieces: the deltas are decoded, measured and combined, the strategy applied,
the result written, and handed on to be hashed in order. Inputs are memory maps, so what is held is
a few pieces of output. What is not summed as it lies in its file is worked through cell by cell
(`crossfl.encoding.CELL`), so that it, too, does not grow with the number of updates.
"""

import contextlib
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from crossfl import checkpoint, combinations, gate, kernel, manifest, outputs, strategies
from crossfl.checkpoint import Tensors
from crossfl.combinations import Cohort
from crossfl.encoding import CELL
from crossfl.errors import CrossFLError
from crossfl.gate import Refused, Update
from crossfl.records import Aggregation
from crossfl.state import MASTER
from crossfl.stream import PIECE, Buffers, Checksums, Piece, mapped, pieces, walk, workers
from crossfl.tensorfile import TensorFile, Writer

MODEL = "model"


@dataclass
class Done:
    """What became of a piece."""

    squares: list[list[float]] = field(default_factory=list)
    """For each cell, the sum of squares of each update; NaN where it could not be decoded."""
    products: list[Tensor] = field(default_factory=list)
    """For each cell, inner products of the updates, fp64 [facilities, facilities]."""
    written: dict[str, Tensor] = field(default_factory=dict)
    """Elements of the next model, of its master and of each slot, at the start of a buffer."""

    def measure(self, squares: list[list[float]], broken: list[int]) -> None:
        """Note the sums of squares of the next cells, and which updates could not be decoded."""
        for cell in squares:
            for number in broken:
                cell[number] = math.nan
            self.squares.append(cell)


class Averaging:
    """The average of one round: first `weigh`, then `write`.

    Both raise `Refused` where the numbers of an update are not those of its manifest, not finite,
    or too large.

    Args:
        state: server state of the round (directory).
        weights: the global model of the round.
        updates: the updates, sorted by facility.
        aggregation: the strategy and its parameters.
        threads: threads to use, by default one for each core.
        piece: elements walked at a time, a multiple of `CELL`.
    """

    def __init__(
        self,
        state: Path,
        weights: Tensors,
        updates: Sequence[Update],
        aggregation: Aggregation,
        threads: int | None = None,
        piece: int = PIECE,
    ) -> None:
        if piece % CELL:
            raise ValueError(f"a piece of {piece} elements is not a multiple of {CELL}")
        self.updates = list(updates)
        self.coefficients: list[float] = []
        self.norms: dict[str, float] = {}
        self._state, self._weights, self._aggregation = state, weights, aggregation
        self._threads, self._piece, self._buffers = threads, piece, Buffers(piece)
        self._writers: dict[TensorFile, dict[str, Writer]] = {}
        self._slots = checkpoint.slots(state)
        shapes = {name: entry.shape for name, entry in weights.floats().items()}
        for slot in (MASTER, *self._slots):
            family = self._slots.get(slot)
            if family is None or {n: e.shape for n, e in family.floats().items()} != shapes:
                raise CrossFLError(f"{state}: the tensors of {slot} are not those of the model")
        self._strategy = strategies.of(aggregation)
        self._combination = combinations.of(aggregation)

    @property
    def least(self) -> int:
        """Fewest updates that the combination can work on."""
        return self._combination.least(self._aggregation.dishonest)

    def weigh(self, shares: list[float]) -> None:
        """Set the coefficients; where they need inner products, all updates are read for them."""
        products = torch.zeros(2 * (len(self.updates),), dtype=torch.float64)
        if self._combination.pairwise:
            with self._walking(self._survey, self._delivered()) as walked:
                for _, done in walked:
                    for cell in done.products:
                        products += cell
        steps = [update.manifest["steps"] for update in self.updates]
        cohort = Cohort(shares, steps, self._aggregation.dishonest, products)
        self.coefficients = self._combination.coefficients(cohort)

    def write(self, model: Path, state: Path) -> dict[str, str]:
        """Write the tensor files of the next model and state; the sha256 of each, by its name.

        Raises:
            Refused: an update is not what its manifest says; nothing written may be used.
            CrossFLError: the state's own files are damaged.
        """
        sums: dict[str, str] = {}
        files = self._remembered()
        if not self._combination.pairwise:
            files |= self._delivered()
        with contextlib.ExitStack() as stack:
            closing: dict[TensorFile, contextlib.ExitStack] = {}

            def begin(file: TensorFile) -> None:
                closing[file] = stack.enter_context(contextlib.ExitStack())
                writers = self._writers_of(file, model, state)
                self._writers[file] = {
                    slot: closing[file].enter_context(writer) for slot, writer in writers.items()
                }

            with self._walking(self._step, files, begin) as walked:
                for file, group in itertools.groupby(walked, key=lambda item: item[0].file):
                    for piece, done in group:
                        for slot, tensor in done.written.items():
                            self._writers[file][slot].note(tensor[: piece.count])
                        self._buffers.give(done.written.values())
                    closing[file].close()
                    for writer in self._writers.pop(file).values():
                        sums[writer.path.name] = writer.sha256
                    if _is_master(file):
                        twin = state / f"{MASTER}.{file.path.name}"
                        outputs.link(model / file.path.name, twin)
                        sums[twin.name] = sums[file.path.name]
        return sums

    @contextlib.contextmanager
    def _walking(
        self,
        work: Callable[[Piece], Done],
        files: Mapping[Path, memoryview],
        begin: Callable[[TensorFile], None] = lambda file: None,
    ) -> Iterator[Iterator[tuple[Piece, Done]]]:
        """Walk all pieces; at the end, what was seen of updates and files must be in order.

        `begin` is called with each file of the model, before work on its first piece is.
        """
        squares = [0.0] * len(self.updates)

        def measured(walked: Iterator[tuple[Piece, Done]]) -> Iterator[tuple[Piece, Done]]:
            for piece, done in walked:
                for cell in done.squares:
                    squares[:] = map(operator.add, squares, cell)
                yield piece, done

        with workers(self._threads) as pool:
            checksums = Checksums(pool, files)
            yield measured(walk(pool, checksums.along(self._pieces()), work, begin))
            sums = checksums.results()
        by_facility = dict(zip((u.facility for u in self.updates), squares, strict=True))
        reasons = gate.check_numbers(by_facility, self._aggregation)
        reasons |= gate.check_sums(self.updates, sums)
        if reasons:
            raise Refused(reasons)
        entries = manifest.read(self._state, "state")["files"]
        for path in self._remembered().keys() & sums.keys():
            if sums[path] != entries[path.name]["sha256"]:
                raise CrossFLError(f"{path} does not match its sha256: restore the server state")
        self.norms = {facility: math.sqrt(total) for facility, total in by_facility.items()}

    def _survey(self, piece: Piece) -> Done:
        """Inner products of the updates."""
        done = Done()
        if not piece.file.entries[piece.name].dtype.is_floating_point:
            return done
        for start, count in piece.cells():
            deltas, broken = self._deltas(piece.name, start, count)
            rows = torch.stack([delta.double() for delta in deltas])
            products = rows @ rows.T
            done.products.append(products)
            done.measure([products.diagonal().tolist()], broken)
        return done

    def _step(self, piece: Piece) -> Done:
        """The next model and what the server remembers with it."""
        dtype = piece.file.entries[piece.name].dtype
        done = Done(written={MODEL: self._buffers.take(dtype)})
        if not dtype.is_floating_point:
            kept = piece.file.span(piece.name, piece.start, piece.count)
            done.written[MODEL][: piece.count].copy_(kept)
            return self._put(piece, done)
        done.written |= {s: self._buffers.take(torch.float32) for s in self._families(piece.file)}
        combined = self._buffers.take(torch.float32)
        for start, count in self._spans(piece):
            delta = self._combined(piece.name, start, count, combined[:count], done)
            for begin in range(start, start + count, CELL):
                self._apply(piece, begin, delta[begin - start :][:CELL], done)
        self._buffers.give([combined])
        return self._put(piece, done)

    def _apply(self, piece: Piece, start: int, delta: Tensor, done: Done) -> None:
        """Take the server optimizer's step for a cell: what it needs stays in the nearest cache."""
        name, count = piece.name, len(delta)
        old = {s: family.span(name, start, count) for s, family in self._slots.items()}
        master, slots = self._strategy.apply(old.pop(MASTER), delta, old, self._aggregation)
        next_ = {MODEL: master, MASTER: master, **slots}
        for slot, buffer in done.written.items():
            buffer.narrow(0, start - piece.start, count).copy_(next_[slot])

    def _put(self, piece: Piece, done: Done) -> Done:
        for slot, tensor in done.written.items():
            self._writers[piece.file][slot].put(piece.name, piece.start, tensor[: piece.count])
        return done

    def _spans(self, piece: Piece) -> Iterable[tuple[int, int]]:
        """Start and number of elements of what is combined at once."""
        plain = all(update.delta.plain for update in self.updates)
        if plain and not self._combination.coordinatewise:
            return [(piece.start, piece.count)]
        return piece.cells()

    def _combined(self, name: str, start: int, count: int, out: Tensor, done: Done) -> Tensor:
        """The combined delta of a span, fp32 [count], in `out` or not; the updates are measured."""
        deltas, broken = self._deltas(name, start, count)
        done.measure(kernel.weighted_sum(deltas, self.coefficients, out), broken)
        if coordinatewise := self._combination.coordinatewise:
            return coordinatewise([d.float() for d in deltas], self._aggregation.dishonest)
        return out

    def _deltas(self, name: str, start: int, count: int) -> tuple[list[Tensor], list[int]]:
        """A span of each update, and which of them could not be decoded; those are zeros."""
        deltas, broken = [], []
        for number, update in enumerate(self.updates):
            try:
                deltas.append(update.delta.span(name, start, count))
            except ValueError:
                deltas.append(torch.zeros(count))
                broken.append(number)
        return deltas, broken

    def _pieces(self) -> list[Piece]:
        return [piece for file in self._weights.files for piece in pieces(file, self._piece)]

    def _delivered(self) -> dict[Path, memoryview]:
        """The files of all updates; those of tensors as they are mapped for the walk."""
        tensors = {f.path: f.content for u in self.updates for f in u.delta.tensors.files}
        paths = [path for update in self.updates for path in update.files()]
        return {path: tensors[path] if path in tensors else mapped(path) for path in paths}

    def _families(self, file: TensorFile) -> list[str]:
        """The families of the state that are written for a file of the model."""
        return [slot for slot in self._slots if slot != MASTER or not _is_master(file)]

    def _remembered(self) -> dict[Path, memoryview]:
        """The tensor files of the server state."""
        return {f.path: f.content for family in self._slots.values() for f in family.files}

    def _writers_of(self, file: TensorFile, model: Path, state: Path) -> dict[str, Writer]:
        """Writers for a file of the model and for those of the state that go with it, by slot."""
        layout = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
        floats = {
            name: (torch.float32, shape)
            for name, (dtype, shape) in layout.items()
            if dtype.is_floating_point
        }
        writers = {MODEL: Writer(model / file.path.name, layout)}
        for slot in self._families(file):
            writers[slot] = Writer(state / f"{slot}.{file.path.name}", floats)
        return writers


def _is_master(file: TensorFile) -> bool:
    """Whether a file of the model has the same bytes as its master weights: all of it is fp32."""
    return all(entry.dtype == torch.float32 for entry in file.entries.values())
