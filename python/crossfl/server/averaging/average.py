"""The numbers of a round: updates, master weights and slots in; next model and next state out.

Everything is walked in pieces: the deltas are decoded, measured and combined, the server optimizer
is applied and the result written, a span at a time; what is read and written is hashed behind that.
Inputs are memory maps, so what is held is a few spans of output. What is not summed as it lies in
its file is worked through cell by cell (`encodings.CELL`), so that it, too, does not grow with the
number of updates.
"""

import contextlib
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from crossfl.errors import CrossFLError
from crossfl.protocol.layout import MASTER, MEAN
from crossfl.protocol.manifest import StateManifest
from crossfl.protocol.state import ServerState
from crossfl.server import admission, aggregation_rules, bounds, optimizers
from crossfl.server.admission import Update, UpdatesRefused
from crossfl.server.aggregation_rules import UpdateStatistics
from crossfl.server.averaging.kernel import WeightedSum
from crossfl.server.averaging.walk import (
    PIECE,
    SPAN,
    Buffers,
    Checksums,
    Piece,
    pieces,
    walk,
    workers,
)
from crossfl.storage import checkpoint, manifest
from crossfl.storage.checkpoint import Tensors
from crossfl.storage.encodings import CELL
from crossfl.storage.files import link
from crossfl.storage.tensorfile import TensorFile, Writer, metadata_of

MODEL = "model"
NARROW = CELL // 8
"""Elements of each update that are multiplied at a time: their fp64 copies stay in the cache."""


@dataclass
class PieceResult:
    """What became of a piece."""

    squares: list[list[float]] = field(default_factory=list)
    """For each cell, the sum of squares of each update; NaN where it could not be decoded."""
    products: list[Tensor] = field(default_factory=list)
    """For each cell, inner products of the updates, fp64 [facilities, facilities]."""
    finite: bool = True
    """Whether the next model and state are, here."""

    def measure(self, squares: list[list[float]], broken: Sequence[int] = ()) -> None:
        """Note the sums of squares of the next cells, and which updates could not be decoded."""
        for cell in squares:
            for number in broken:
                cell[number] = math.nan
            self.squares.append(cell)


class Averaging:
    """The average of one round: first `weigh`, then `write`.

    Both raise `UpdatesRefused` where the numbers of an update are not those of its manifest, not
    finite, or too large.

    Args:
        folder: server state of the round (directory).
        weights: the global model of the round.
        updates: the updates, sorted by facility.
        state: what the server remembers; its aggregation record says how to average.
        threads: threads to use, by default one for each core.
        piece: elements walked at a time, a multiple of `CELL`.
    """

    def __init__(
        self,
        folder: Path,
        weights: Tensors,
        updates: Sequence[Update],
        state: ServerState,
        threads: int | None = None,
        piece: int = PIECE,
    ) -> None:
        if piece % CELL:
            raise ValueError(f"a piece of {piece} elements is not a multiple of {CELL}")
        self.updates = list(updates)
        self.coefficients: list[float] = []
        self._buffer_coefficients: list[float] = []
        self.norms: dict[str, float] = {}
        self._folder, self._weights, self._state = folder, weights, state
        self._threads, self._piece, self._buffers = threads, piece, Buffers()
        self._writers: dict[TensorFile, dict[str, Writer]] = {}
        self._products = torch.zeros(2 * (len(self.updates),), dtype=torch.float64)
        self._sums: dict[Path, str] = {}
        self._slots = checkpoint.slots(folder)
        shapes = {name: entry.shape for name, entry in weights.floats().items()}
        for slot in (MASTER, *self._slots):
            family = self._slots.get(slot)
            if family is None or {n: e.shape for n, e in family.floats().items()} != shapes:
                raise CrossFLError(f"{folder}: the tensors of {slot} are not those of the model")
        self._optimizer = optimizers.of(state.aggregation)
        self._rule = aggregation_rules.of(state.aggregation)

    @property
    def _num_byzantine(self) -> int:
        return self._state.aggregation.num_byzantine

    @property
    def least(self) -> int:
        """Fewest updates that the aggregation rule can work on."""
        return self._rule.least(self._num_byzantine)

    def weigh(self, shares: list[float]) -> None:
        """Set the coefficients; where they need inner products, all updates are read for them."""
        if self._rule.pairwise:
            with self._walking(self._survey, self._delivered()) as walked:
                for _ in walked:
                    pass
        steps = [update.normalising_steps for update in self.updates]
        statistics = UpdateStatistics(shares, steps, self._num_byzantine, self._products)
        self.coefficients = self._rule.coefficients(statistics)
        # Statistics of the data do not grow with the steps, so they are not divided by them.
        alike = replace(statistics, steps=[1.0] * len(steps))
        self._buffer_coefficients = self._rule.coefficients(alike)

    def write(self, model: Path, state: Path) -> dict[str, str]:
        """Write the tensor files of the next model and state; the sha256 of each, by its name.

        Raises:
            UpdatesRefused: an update is not what its manifest says; nothing written may be used.
            CrossFLError: the state's own files are damaged, or the next model or state is not
                finite.
        """
        files = self._remembered()
        if not self._rule.pairwise:
            files |= self._delivered()
        twins: dict[str, str] = {}
        with contextlib.ExitStack() as stack:
            closing: dict[TensorFile, contextlib.ExitStack] = {}

            def begin(file: TensorFile) -> None:
                closing[file] = stack.enter_context(contextlib.ExitStack())
                self._writers[file] = self._writers_of(file, model, state)
                for writer in self._writers[file].values():
                    closing[file].enter_context(writer)
                    self._checksums.add(writer.path, writer.size)

            with self._walking(self._step, files, begin) as walked:
                for file, group in itertools.groupby(walked, key=lambda piece: piece.file):
                    for piece in group:
                        for writer in self._targets(piece).values():
                            end = writer.offset(piece.name, piece.start + piece.count)
                            self._checksums.reach(writer.path, end)
                    closing[file].close()
                    for writer in self._writers.pop(file).values():
                        self._checksums.reach(writer.path, writer.size)
                    if _is_master(file):
                        twin = f"{MASTER}.{file.path.name}"
                        link(model / file.path.name, state / twin)
                        twins[twin] = file.path.name
        sums = {path.name: found for path, found in self._sums.items() if path not in files}
        return sums | {twin: sums[name] for twin, name in twins.items()}

    @contextlib.contextmanager
    def _walking(
        self,
        work: Callable[[Piece], PieceResult],
        files: Mapping[Path, memoryview],
        begin: Callable[[TensorFile], None] = lambda file: None,
    ) -> Iterator[Iterator[Piece]]:
        """Walk all pieces; at the end, what was seen of updates and files must be in order.

        `begin` is called with each file of the model, before work on its first piece is.
        """
        squares = [0.0] * len(self.updates)
        infinite: list[str] = []

        def measured(walked: Iterator[tuple[Piece, PieceResult]]) -> Iterator[Piece]:
            for piece, outcome in walked:
                for cell in outcome.squares:
                    squares[:] = map(operator.add, squares, cell)
                for products in outcome.products:
                    self._products += products
                if not outcome.finite:
                    infinite.append(piece.name)
                yield piece

        with workers(self._threads) as pool:
            self._checksums = Checksums(pool, files)
            yield measured(walk(pool, self._checksums.along(self._pieces()), work, begin))
            self._sums = self._checksums.results()
        by_facility = dict(zip((u.facility for u in self.updates), squares, strict=True))
        reasons = admission.check_sums(self.updates, self._sums)
        sound = {name: total for name, total in by_facility.items() if name not in reasons}
        reasons |= bounds.check_norms(sound, self.updates, self._state)
        if reasons:
            raise UpdatesRefused(reasons)
        inventory = manifest.read(self._folder, StateManifest).files
        for path in self._remembered().keys() & self._sums.keys():
            if self._sums[path] != inventory[path.name].sha256:
                raise CrossFLError(f"{path} does not match its sha256: restore the server state")
        if infinite:
            raise CrossFLError(
                f"the next {infinite[0]!r} would not be finite: lower server_learning_rate, or "
                "max_norm. The global model stays as it was"
            )
        self.norms = {facility: math.sqrt(total) for facility, total in by_facility.items()}

    def _survey(self, piece: Piece) -> PieceResult:
        """Inner products of the updates."""
        outcome = PieceResult()
        if not piece.file.entries[piece.name].dtype.is_floating_point:
            return outcome
        for start, count in piece.spans(CELL):
            deltas, broken = self._deltas(piece.name, start, count)
            products = torch.zeros_like(self._products)
            for first in range(0, count, NARROW):
                rows = torch.stack([d[first : first + NARROW].double() for d in deltas])
                products += rows @ rows.T
            outcome.products.append(products)
            outcome.measure([products.diagonal().tolist()], broken)
        return outcome

    def _step(self, piece: Piece) -> PieceResult:
        """The next model and what the server remembers with it."""
        name, targets, outcome = piece.name, self._targets(piece), PieceResult()
        dtype = piece.file.entries[name].dtype
        if not dtype.is_floating_point:
            targets[MODEL].put(name, piece.start, piece.file.span(name, piece.start, piece.count))
            return outcome
        whole = self._whole_sum(piece)
        dtypes = [dtype if slot == MODEL else torch.float32 for slot in targets]
        with self._buffers.lent([torch.float32, *dtypes]) as (combined, *results):
            for start, count in piece.spans(SPAN):
                if whole:
                    whole.into(combined[:count], start - piece.start)
                for cell, length in Piece(piece.file, name, start, count).spans(CELL):
                    part = slice(cell - start, cell - start + length)
                    delta = combined[part]
                    if not whole:
                        delta = self._combined(name, cell, length, delta, outcome)
                    next_ = self._applied(name, cell, delta)
                    for slot, result in zip(targets, results, strict=True):
                        result[part].copy_(next_[slot])
                for writer, result in zip(targets.values(), results, strict=True):
                    outcome.finite &= _is_finite(result[:count])
                    writer.put(name, start, result[:count])
        if whole:
            outcome.measure(whole.squares())
        return outcome

    def _applied(self, name: str, start: int, delta: Tensor) -> dict[str, Tensor]:
        """The server optimizer's step for a cell, by slot: all it needs is in the nearest cache.

        A buffer is not optimized: it moves by the delta. It is remembered in the precision in which
        it travels, since the next deltas are differences to what travelled.
        """
        old = {s: family.span(name, start, len(delta)) for s, family in self._slots.items()}
        if name in self._weights.buffers:
            dtype = self._weights.file_of[name].entries[name].dtype
            moved = (old.pop(MASTER) + delta).to(dtype).float()
            kept = {slot: moved if slot == MEAN else values for slot, values in old.items()}
            return {MODEL: moved, MASTER: moved, **kept}
        master, slots = self._optimizer.apply(old.pop(MASTER), delta, old, self._state.aggregation)
        return {MODEL: master, MASTER: master, **slots}

    def _whole_sum(self, piece: Piece) -> WeightedSum | None:
        """The combined delta of a piece, if it is the sum of numbers as they lie in their files."""
        updates, name = self.updates, piece.name
        if name in self._weights.frozen:
            return None
        if self._rule.coordinatewise or not all(u.delta.viewed(name) for u in updates):
            return None
        deltas = [update.delta.span(name, piece.start, piece.count) for update in updates]
        return WeightedSum(deltas, self._coefficients_of(name))

    def _coefficients_of(self, name: str) -> list[float]:
        return self._buffer_coefficients if name in self._weights.buffers else self.coefficients

    def _combined(
        self, name: str, start: int, count: int, out: Tensor, outcome: PieceResult
    ) -> Tensor:
        """The combined delta of a cell, fp32 [count], in `out` or not; the updates are measured."""
        deltas, broken = self._deltas(name, start, count)
        total = WeightedSum(deltas, self._coefficients_of(name))
        total.into(out)
        outcome.measure(total.squares(), broken)
        if coordinatewise := self._rule.coordinatewise:
            return coordinatewise([d.float() for d in deltas], self._num_byzantine)
        return out

    def _deltas(self, name: str, start: int, count: int) -> tuple[list[Tensor], list[int]]:
        """A cell of each update, and which of them could not be decoded; those are zeros.

        So is what is frozen.
        """
        if name in self._weights.frozen:
            return [torch.zeros(count) for _ in self.updates], []
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
        """The files of all updates."""
        return {f.path: f.content for u in self.updates for f in u.delta.tensors.files}

    def _families(self, file: TensorFile) -> list[str]:
        """The families of the state that are written for a file of the model."""
        return [slot for slot in self._slots if slot != MASTER or not _is_master(file)]

    def _remembered(self) -> dict[Path, memoryview]:
        """The tensor files of the server state."""
        return {f.path: f.content for family in self._slots.values() for f in family.files}

    def _targets(self, piece: Piece) -> dict[str, Writer]:
        """What the results of a piece are put into, by slot."""
        writers = self._writers[piece.file]
        floating = piece.file.entries[piece.name].dtype.is_floating_point
        return writers if floating else {MODEL: writers[MODEL]}

    def _writers_of(self, file: TensorFile, model: Path, state: Path) -> dict[str, Writer]:
        """Writers for a file of the model and for those of the state that go with it, by slot."""
        layout = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
        floats = {n: (torch.float32, s) for n, (d, s) in layout.items() if d.is_floating_point}
        metadata = metadata_of(file.buffers, file.frozen)
        writers = {MODEL: Writer(model / file.path.name, layout, metadata, reserve=True)}
        for slot in self._families(file):
            writers[slot] = Writer(state / f"{slot}.{file.path.name}", floats, reserve=True)
        return writers


def _is_finite(values: Tensor) -> bool:
    """Whether all numbers are finite: then mostly their sum is, which is found much faster."""
    wide = values if values.dtype in (torch.float32, torch.bfloat16) else values.float()
    return bool(wide.sum().isfinite()) or bool(wide.isfinite().all())


def _is_master(file: TensorFile) -> bool:
    """Whether a file of the model has the same bytes as its master weights: all of it is fp32."""
    return all(entry.dtype == torch.float32 for entry in file.entries.values())
