"""The gate: what an update must be before a byte of it counts, and the reason where it is not."""

import itertools
import json
import math
import statistics
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossfl.errors import CrossFLError
from crossfl.protocol.records import Aggregation, check_name
from crossfl.server.state import ServerState
from crossfl.storage import delta, manifest, signature
from crossfl.storage.checkpoint import Tensors
from crossfl.storage.delta import Delta

COUNTS = ("tokens", "samples", "steps")
LARGEST_COUNT = 2**53
"""Counts beyond which fp64 shares would not be exact."""
LARGEST_MEASUREMENTS = 1 << 16
"""Characters of what an update says of its training and the history takes over."""
LONGEST_REASON = 500
"""Characters of a reason that the history keeps."""
LARGEST_NORM = 1e18
"""Norms whose squares, summed over rounds, fp32 would not hold, and so neither the server state."""


class Refused(Exception):  # noqa: N818 (it is no error of ours)
    """Updates that turned out, while they were read, not to be what they should be.

    `reasons` has the reason for each facility.
    """

    def __init__(self, reasons: Mapping[str, str]) -> None:
        super().__init__(", ".join(reasons))
        self.reasons = dict(reasons)


@dataclass(frozen=True)
class Update:
    """An update that has passed all checks but those for which its numbers must be read."""

    facility: str
    path: Path
    manifest: dict[str, Any]
    delta: Delta

    def weight(self, aggregation: Aggregation) -> int:
        """What the facility's share is proportional to."""
        return 1 if aggregation.weighting == "equal" else int(self.manifest[aggregation.weighting])

    def loss(self) -> float | None:
        """Validation loss of the round's base at the facility, in nats per token, if it said."""
        validation = self.manifest["metrics"].get("validation", {})
        loss: float | None = validation.get("loss")
        return loss


@dataclass(frozen=True)
class Excluded:
    """An update that does not count: who, whether absent or refused, and why."""

    facility: str
    status: str
    reason: str
    manifest: Mapping[str, Any]
    """What it said of itself, where that could be read."""


def admit(
    paths: Sequence[Path],
    server: ServerState,
    weights: Tensors,
    asked: Mapping[str, int] | None = None,
    held: Sequence[Path] = (),
) -> tuple[list[Update], list[Excluded]]:
    """Sort the updates of a round into those to average and those that do not count, by name.

    Only manifests and headers are read here: sha256, finiteness and norms follow while the
    numbers are walked (`Refused`). A facility that delivered twice is refused whole.

    Args:
        paths: what was delivered (directories).
        server: server state of the round.
        weights: the global model of the round.
        asked: facilities that were asked for an update, and for how many steps; unset, anyone.
        held: updates of the round that came here before, and were admitted.
    """
    admitted: list[Update] = []
    excluded: list[Excluded] = []
    parameters = weights.floats()
    files = {delta.file_name(file.path.name) for file in weights.files}
    for path in (*paths, *held):
        found: dict[str, Any] = {}
        try:
            found = manifest.read(path, "update")
            _check_fields(found)
            _check_measurements(found)
            _check_files(found, files)
            if asked is not None and path not in held:
                _check_asked(found, asked)
            manifest.verify(path, "update", only=())
            if found["reason"] is not None:
                found["reason"] = _printable(found["reason"])
            if found["status"] == "absent":
                excluded.append(Excluded(found["facility"], "absent", found["reason"], found))
                continue
            signature.check(path, found["facility"])
            _check_round(found, server)
            _check_weight(found, server.aggregation)
            delivered = Delta(path)
            delivered.check(parameters)
            admitted.append(Update(found["facility"], path, found, delivered))
        except (CrossFLError, OSError, RuntimeError, ValueError) as error:
            # Also what a directory of odd names, depths or sizes makes of reading it.
            reason = str(error).replace(f"{path}/", "").replace(str(path), "the update")
            reason = _printable(reason)
            name = found.get("facility")
            known = isinstance(name, str) and _is_name(name)
            excluded.append(Excluded(str(name) if known else "", "refused", reason, {}))
    expected = set() if asked is None else {*asked, *(path.name for path in held)}
    return _once_each(admitted, excluded, expected)


def is_whole(update: Update) -> bool:
    """Whether every file of an update is, byte for byte, the one of its manifest."""
    try:
        manifest.verify(update.path, "update")
    except CrossFLError:
        return False
    return True


def check_numbers(squares: Mapping[str, float], aggregation: Aggregation) -> dict[str, str]:
    """Reasons to refuse updates, given the sum of squares of each, which is NaN if undecodable."""
    reasons = {}
    norms = {f: math.sqrt(s) for f, s in squares.items() if math.isfinite(s)}
    largest, ratio = aggregation.largest_norm, aggregation.largest_norm_ratio
    largest = LARGEST_NORM if largest is None else min(largest, LARGEST_NORM)
    cohort = [norm for norm in norms.values() if norm <= largest]
    middle = statistics.median(cohort) if len(cohort) >= 3 else 0.0
    for facility in squares:
        norm = norms.get(facility)
        if norm is None:
            reasons[facility] = "it has values that are not finite or could not be decoded"
        elif norm > largest:
            reasons[facility] = f"its norm is {norm:.6g}, above {largest}"
        elif ratio is not None and middle > 0 and norm > ratio * middle:
            reasons[facility] = f"its norm is {norm:.6g}, the median {middle:.6g}"
    return reasons


def check_sums(updates: Sequence[Update], sums: Mapping[Path, str]) -> dict[str, str]:
    """Reasons to refuse updates of whose files the sums found are not those of the manifest."""
    reasons = {}
    for update in updates:
        for name, entry in update.manifest["files"].items():
            if sums.get(update.path / name, entry["sha256"]) != entry["sha256"]:
                reasons[update.facility] = f"{name} does not match its sha256"
    return reasons


class BelowQuorumError(CrossFLError):
    """Too few updates are left; what then is for the aggregation record to say."""


def check_quorum(
    updates: Sequence[Update],
    excluded: Sequence[Excluded],
    server: ServerState,
    least: int,
    asked: Collection[str] | None = None,
) -> None:
    """Check that enough updates are left, for the quorum and for the combination.

    Args:
        updates: those that are left.
        excluded: those that are not.
        server: server state of the round.
        least: fewest updates that the combination can work on.
        asked: facilities that were asked for an update; unset, all that are named.

    Raises:
        BelowQuorumError: they are not; the message names each facility that is missing, and why.
    """
    rules = server.aggregation
    others = [e for e in excluded if asked is None or e.facility in {*asked, *server.held}]
    everyone = len(updates) + len(others)
    needed = rules.quorum or (everyone if rules.quorum_share is None else 1)
    share = share_present(updates, others, server)
    if len(updates) < needed:
        why = f"the quorum is {needed}"
    elif len(updates) < max(least, 1):
        why = f"{rules.combination} with dishonest={rules.dishonest} needs {least}"
    elif rules.quorum_share is not None and share < rules.quorum_share:
        why = f"they have {share:.3g} of the weight, where the quorum is {rules.quorum_share:.3g}"
    else:
        return
    missing = "; ".join(f"{e.facility} is {e.status}: {e.reason}" for e in excluded)
    raise BelowQuorumError(
        f"{len(updates)} of {everyone} updates can be averaged, and {why}"
        + (f": {missing}" if missing else "")
        + ". The global model stays as it was"
    )


def share_present(
    updates: Sequence[Update], excluded: Sequence[Excluded], server: ServerState
) -> float:
    """The share of the round's weight that its good updates have.

    What is missing is taken to weigh what its facility weighed last; one that never delivered, as
    much as the mean of the others.
    """
    rules = server.aggregation
    present = [update.weight(rules) for update in updates]
    missing = [_last_weight(server, each.facility) for each in excluded]
    known = present + [weight for weight in missing if weight is not None]
    mean = sum(known) / len(known) if known else 1.0
    total = sum(present) + sum(mean if weight is None else weight for weight in missing)
    return sum(present) / total if total else 0.0


def _last_weight(server: ServerState, facility: str) -> int | None:
    rules = server.aggregation
    for entry in reversed(server.counted(facility).values()):
        return 1 if rules.weighting == "equal" else int(entry[rules.weighting])
    return None


def _check_fields(found: dict[str, Any]) -> None:
    """Types and ranges of what a manifest says: nothing behind the gate meets a surprise."""
    if not isinstance(found.get("facility"), str):
        raise CrossFLError("its manifest names no facility")
    check_name("facility", found["facility"])
    if found.get("status") not in ("complete", "partial", "absent"):
        raise CrossFLError(f"its status is {found.get('status')!r}")
    found["reason"] = reason = found.get("reason")
    if reason is None and found["status"] == "absent":
        raise CrossFLError("it is absent without a reason")
    if not isinstance(reason, str | None):
        raise CrossFLError(f"its reason is {reason!r}")
    for key in (*COUNTS, "bytes"):
        count = found.get(key)
        if type(count) is not int or not 0 <= count <= LARGEST_COUNT:
            raise CrossFLError(f"its {key} are {count!r}, which is not a count")
    try:
        json.dumps(found, allow_nan=False)
    except ValueError:
        raise CrossFLError("its manifest has numbers that are not finite") from None


def _check_measurements(found: Mapping[str, Any]) -> None:
    """What an update says of its training, for people to read: numbers by name."""
    for key in ("seconds", "metrics"):
        if not isinstance(found.get(key), dict):
            raise CrossFLError(f"its {key} are not a record")
        if (size := len(json.dumps(found[key]))) > LARGEST_MEASUREMENTS:
            raise CrossFLError(f"its {key} have {size} characters: they are no measurements")
        for name, value in _leaves(found[key]):
            if not _is_number(value) and not (value is None and key == "metrics"):
                raise CrossFLError(f"its {key} have {value!r} for {name}")
    for name, value in _leaves(found["seconds"]):
        if not 0 <= value <= LARGEST_COUNT:
            raise CrossFLError(f"its seconds have {value!r} for {name}")
    for name in ("validation", "local"):
        measured = found["metrics"].get(name, {})
        said = isinstance(measured, dict) and (not measured or "loss" in measured)
        loss: Any = measured.get("loss", 0.0) if said else None
        if not _is_number(loss) or not 0 <= loss <= LARGEST_COUNT:
            raise CrossFLError(f"its {name} loss is {loss!r}")


def _check_files(found: Mapping[str, Any], names: Collection[str]) -> None:
    """Which files an update may have: none but the deltas of the files of the model."""
    for name, entry in found["files"].items():
        if name not in names:
            raise CrossFLError(f"it lists {name!r}, which is no delta of a file of the model")
        if type(entry["bytes"]) is not int or not isinstance(entry["sha256"], str):
            raise CrossFLError(f"its manifest does not give bytes and sha256 of {name}")


def _check_asked(found: Mapping[str, Any], asked: Mapping[str, int]) -> None:
    facility, steps = found["facility"], found["steps"]
    if facility not in asked:
        raise CrossFLError(f"{facility} was not asked for an update in this round")
    if steps > asked[facility]:
        raise CrossFLError(f"it claims {steps} steps, it was asked for {asked[facility]}")


def _check_round(found: Mapping[str, Any], server: ServerState) -> None:
    if type(found.get("round")) is not int or found["round"] != server.round + 1:
        raise CrossFLError(f"it is for round {found.get('round')!r}, this is {server.round + 1}")
    if found.get("base") != server.model:
        raise CrossFLError("it starts from another model than this round's")


def _check_weight(found: Mapping[str, Any], aggregation: Aggregation) -> None:
    counted = {"steps"} if aggregation.combination == "fednova" else set()
    if aggregation.weighting != "equal":
        counted.add(aggregation.weighting)
        largest = aggregation.largest_weight
        if largest is not None and found[aggregation.weighting] > largest:
            raise CrossFLError(
                f"it claims {found[aggregation.weighting]} {aggregation.weighting}, "
                f"the largest weight allowed is {largest}"
            )
    for key in sorted(counted):
        if found[key] <= 0:
            raise CrossFLError(f"it counts no {key}, so it has no weight")


def _once_each(
    admitted: list[Update], excluded: list[Excluded], expected: Collection[str]
) -> tuple[list[Update], list[Excluded]]:
    """By name, with a name for those that gave none, and without facilities that came twice.

    Those that were expected and are not among them are absent.
    What brings nothing to average has no claim to the name of an update that was admitted.
    """
    taken = {update.facility for update in admitted}
    named = [e for e in excluded if e.facility and e.facility not in taken]
    unnamed = sorted((e for e in excluded if e not in named), key=lambda e: e.reason)
    taken |= {e.facility for e in named}
    absent = sorted(set(expected) - taken)
    named += [Excluded(name, "absent", "no update came in its name", {}) for name in absent]
    free = (n for i in itertools.count(1) if (n := f"unknown-{i}") not in {*taken, *absent})
    named += [Excluded(next(free), e.status, e.reason, e.manifest) for e in unnamed]
    times = Counter([u.facility for u in admitted] + [e.facility for e in named])
    once = [u for u in admitted if times[u.facility] == 1]
    others = [e for e in named if times[e.facility] == 1]
    others += [
        Excluded(facility, "refused", f"it delivered {n} updates for one round", {})
        for facility, n in times.items()
        if n > 1
    ]
    return sorted(once, key=lambda u: u.facility), sorted(others, key=lambda e: e.facility)


def _leaves(record: Mapping[str, Any], depth: int = 4) -> Iterator[tuple[str, Any]]:
    """The values of a record and of records in it, each with its name."""
    for name, value in record.items():
        if isinstance(value, dict) and depth > 1:
            yield from _leaves(value, depth - 1)
        else:
            yield name, value


def _is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that fp64 holds."""
    return type(value) is float or (type(value) is int and abs(value) <= LARGEST_COUNT)


def _printable(reason: str) -> str:
    """A reason as the history has it, which may be read on a terminal."""
    return "".join(c if c.isprintable() else " " for c in reason[:LONGEST_REASON])


def _is_name(name: str) -> bool:
    try:
        check_name("facility", name)
    except CrossFLError:
        return False
    return True
