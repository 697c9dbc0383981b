"""The server state on disk: `state.json`, the history, and tensors beside them.

    state.json                   rounds, seed, aggregation record, ledger: `ServerState`
    history/000001.jsonl …       the finished rounds, one a line, `SEGMENT` of them in a file
    master.*.safetensors         fp32 master weights, in files named like the model's
    mean.*.safetensors           fp32 served mean of the models, where rounds close early
    <slot>.*.safetensors         one such family for each slot of the server optimizer
    updates/<facility>/          updates of a round that waits for its quorum
    signers                      who may sign, where the aggregation record asks for signatures

A state is renewed in each round. Full segments of the history get a second name there, so that what
a round costs does not grow with the rounds before it.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from crossfl.errors import CrossFLError
from crossfl.protocol import decoding
from crossfl.protocol.history import RoundEntry, decode_line, encode_line
from crossfl.protocol.layout import HELD_UPDATES, HISTORY, SERVER_STATE, SIGNERS
from crossfl.protocol.manifest import FileEntry, StateManifest
from crossfl.protocol.records import Aggregation
from crossfl.protocol.state import ServerState, decode
from crossfl.storage import manifest
from crossfl.storage.files import concatenate, link, write_bytes

SEGMENT = 32
"""Rounds in a file of the history."""


def load(directory: Path) -> ServerState:
    """Read the state of a directory after checking it against the manifest.

    Raises:
        CrossFLError: the directory is not a complete, unchanged server state.
    """
    manifest.verify(directory, StateManifest, only={SERVER_STATE, SIGNERS})
    path = directory / SERVER_STATE
    return decode(path.read_bytes(), str(path))


def save(
    state: ServerState,
    directory: Path,
    sha256_of: Mapping[str, str] = MappingProxyType({}),
    *,
    before: Path | None = None,
    entry: RoundEntry | None = None,
) -> None:
    """Write state, history and manifest beside the tensors already there.

    Args:
        state: the state.
        directory: where to write; its tensors are there.
        sha256_of: digests that are known, by file.
        before: the state (directory) that this one follows, whose history it takes over.
        entry: the round that was finished in between.
    """
    known = dict(sha256_of)
    if before is not None:
        known |= _continue(before, directory, entry)
    (directory / SERVER_STATE).write_bytes(decoding.encode(state))
    manifest.write(directory, StateManifest(round=state.round), known)


def history(directory: Path) -> Iterator[RoundEntry]:
    """The finished rounds, in order.

    Raises:
        CrossFLError: a file of the history is damaged.
    """
    for path in _segments(directory, manifest.read(directory, StateManifest)):
        with path.open("rb") as lines:
            for line in lines:
                yield decode_line(line, str(path))


def write_history(directory: Path, target: Path) -> None:
    """Write the whole history into one file, one round a line.

    Raises:
        CrossFLError: a file of the history is damaged.
    """
    concatenate(_segments(directory, manifest.read(directory, StateManifest)), target)


def held_updates(state: ServerState, directory: Path) -> list[Path]:
    """The updates of the round to come that the state in a directory holds."""
    return [directory / HELD_UPDATES / facility for facility in state.held]


def signers(state: ServerState, directory: Path) -> Path | None:
    """The file that says who may sign; None where no signature is asked for."""
    return None if state.aggregation.signers is None else directory / SIGNERS


def without_path(aggregation: Aggregation) -> Aggregation:
    """The aggregation record as the state keeps it: with the signers in a file of its own."""
    return aggregation.replace(signers=SIGNERS) if aggregation.signers else aggregation


def write_signers(aggregation: Aggregation, directory: Path) -> None:
    """Keep the file of signers that the aggregation record names, if it names one.

    Raises:
        CrossFLError: it cannot be read, or lists nobody.
    """
    if aggregation.signers is not None:
        write_bytes(directory / SIGNERS, read_signers(Path(aggregation.signers)))


def read_signers(source: Path) -> bytes:
    """A file of signers.

    Raises:
        CrossFLError: it cannot be read, or lists nobody.
    """
    try:
        content = source.read_bytes()
    except OSError as error:
        raise CrossFLError(
            f"aggregation.signers is {source}, which cannot be read: {error.strerror}"
        ) from None
    if not any(line.strip() and not line.startswith(b"#") for line in content.splitlines()):
        raise CrossFLError(f"aggregation.signers is {source}, which lists nobody who may sign")
    return content


def _segments(directory: Path, described: StateManifest) -> Sequence[Path]:
    """The files of the history, each checked."""
    names = _history_names(described)
    for name in names:
        _check_segment(directory / name, described.files[name])
    return [directory / name for name in names]


def _history_names(described: StateManifest) -> list[str]:
    """The files of the history that a manifest lists, in the order of their rounds."""
    return sorted(name for name in described.files if name.startswith(f"{HISTORY}/"))


def _check_segment(path: Path, entry: FileEntry) -> None:
    if manifest.sha256(path) != entry.sha256:
        raise CrossFLError(f"{path} does not match its sha256: restore the state")


def _continue(before: Path, directory: Path, entry: RoundEntry | None) -> dict[str, str]:
    """Take over the history, and add a round to it; the digests of the files that are unchanged."""
    described = manifest.read(before, StateManifest)
    names = _history_names(described)
    if SIGNERS in described.files:
        names.append(SIGNERS)
    unchanged = {}
    open_segment = None if entry is None else _segment(entry.round)
    for name in names:
        (directory / name).parent.mkdir(exist_ok=True)
        if name != open_segment:
            link(before / name, directory / name)
            unchanged[name] = described.files[name].sha256
    if entry is not None and open_segment is not None:
        lines = b""
        if open_segment in described.files:
            _check_segment(before / open_segment, described.files[open_segment])
            lines = (before / open_segment).read_bytes()
        (directory / open_segment).parent.mkdir(exist_ok=True)
        (directory / open_segment).write_bytes(lines + encode_line(entry))
    return unchanged


def _segment(round_: int) -> str:
    """The file of the history that has a round, named after the first one in it."""
    return f"{HISTORY}/{(round_ - 1) // SEGMENT * SEGMENT + 1:06}.jsonl"
