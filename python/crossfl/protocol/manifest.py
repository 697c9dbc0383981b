"""The manifests of the directories that travel, and the evaluation, which is a manifest alone.

A manifest lists every file with size and sha256. Its `digest` covers the files, its `seal` all
else that it states. Reading and writing the files is for `crossfl.storage`.
"""

import hashlib
from collections.abc import Mapping
from typing import Annotated, Final, Literal, Self, TypeVar

import msgspec
from msgspec import Meta

from crossfl.errors import CrossFLError
from crossfl.protocol import decoding
from crossfl.protocol.fields import (
    SEALED,
    Count,
    Digest,
    Label,
    Name,
    Natural,
    Positive,
    Reason,
    Record,
    Seconds,
    doc,
)
from crossfl.protocol.measurements import Metrics, PhaseSeconds, UpdateMetrics
from crossfl.protocol.text import quoted

FORMAT: Final = 2
"""Of manifests and server states."""
UNSEALED = ""
"""Digest and seal of a manifest that has none yet."""
LARGEST_REPORT = 1 << 20
"""Bytes of the manifest of an update or evaluation; more is refused unread."""
LARGEST_INVENTORY = 16 << 20
"""Bytes of the manifest of a model or state; more is refused unread."""

FilePath = Annotated[str, Meta(min_length=1, max_length=255)]
"""Path of a file in its directory, with `/` between its parts."""


class FileEntry(Record, frozen=True, kw_only=True):
    """A file as it has to arrive."""

    bytes: Annotated[Count, doc("Size of the file.")]
    sha256: Annotated[Digest, doc("Digest of its content.")]


ManyFiles = Annotated[dict[FilePath, FileEntry], Meta(max_length=100_000)]
Files = Annotated[dict[FilePath, FileEntry], Meta(max_length=10_000)]
NoFiles = Annotated[dict[FilePath, FileEntry], Meta(max_length=0)]


Seal = Annotated[str, Meta(pattern=SEALED)]
"""A sha256; empty in a manifest that is not sealed yet."""


class Manifest(Record, frozen=True, kw_only=True):
    """What all manifests state: kind, format and files, and two digests over them."""

    format: Annotated[Literal[2], doc("Format of the document.")] = FORMAT
    digest: Annotated[Seal, doc("One sha256 over those of all files and their names.")] = UNSEALED
    files: Annotated[ManyFiles, doc("Each file of the directory, by its path.")] = msgspec.field(
        default_factory=dict
    )
    seal: Annotated[Seal, doc("One sha256 over everything else that the manifest states.")] = (
        UNSEALED
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for path in self.files:
            if {"", ".", ".."} & set(path.split("/")) or not path.isprintable():
                raise CrossFLError(f"files: {quoted(path)} is no path of a file in the directory")

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(entry.bytes for entry in self.files.values())

    def sealed(self) -> Self:
        """The manifest with the digest of its files and the seal of what it states."""
        complete = self.replace(digest=digest(self.files))
        return complete.replace(seal=seal(complete))

    def is_intact(self) -> bool:
        """Whether digest and seal are those of what the manifest states."""
        return self.digest == digest(self.files) and self.seal == seal(self)


class ModelManifest(Manifest, frozen=True, kw_only=True, tag="model", tag_field="kind"):
    """The manifest of a global model."""

    round: Annotated[Natural, doc("Rounds that the model has behind it.")]


class StateManifest(Manifest, frozen=True, kw_only=True, tag="state", tag_field="kind"):
    """The manifest of a server state."""

    round: Annotated[Natural, doc("Rounds that are finished.")]


class UpdateManifest(Manifest, frozen=True, kw_only=True, tag="update", tag_field="kind"):
    """The manifest of what a facility delivers for one round: a delta, or why there is none."""

    files: Annotated[Files, doc("Each file of the delta, by its path.")] = msgspec.field(
        default_factory=dict
    )
    facility: Annotated[Name, doc("Facility that trained.")]
    federation: Annotated[Name, doc("Mark of the federation, as the task gave it.")]
    round: Annotated[Positive, doc("Round that the update is for.")]
    base: Annotated[Digest, doc("Digest of the global model that training started from.")]
    status: Annotated[
        Literal["complete", "partial", "absent", "late"],
        doc(
            "Whether all steps were taken, some of them, or none; late where the job goes on and a "
            "later round takes its update."
        ),
    ]
    reason: Annotated[Reason | None, doc("Why the update is not complete.")] = None
    tokens: Annotated[Count, doc("Tokens that counted in the loss.")] = 0
    samples: Annotated[Count, doc("Samples trained on.")] = 0
    steps: Annotated[Count, doc("Optimizer steps taken.")] = 0
    seconds: Annotated[PhaseSeconds, doc("Duration of each phase.")] = PhaseSeconds()
    metrics: Annotated[UpdateMetrics, doc("What was measured on the way.")] = UpdateMetrics()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.status != "complete" and not self.reason:
            raise CrossFLError(f"the update is {self.status} and gives no reason")


class Completion(Record, frozen=True, kw_only=True):
    """What the model wrote behind a prompt of the job file."""

    prompt: Annotated[str, Meta(max_length=100_000), doc("Prompt, from the job file.")]
    completion: Annotated[str, Meta(max_length=100_000), doc("What the model wrote.")]


class EvaluationManifest(Manifest, frozen=True, kw_only=True, tag="evaluation", tag_field="kind"):
    """How the global model does on a facility's validation data, or why that is not known."""

    files: Annotated[NoFiles, doc("None: an evaluation has no files.")] = msgspec.field(
        default_factory=dict
    )
    facility: Annotated[Name, doc("Facility that evaluated.")]
    federation: Annotated[Name, doc("Mark of the federation, as the task gave it.")]
    dataset: Annotated[Label, doc("Name of the facility's dataset.")]
    round: Annotated[Natural, doc("Rounds that the model has behind it.")]
    model: Annotated[Digest, doc("Digest of the model that was evaluated.")]
    status: Annotated[Literal["complete", "absent"], doc("Whether there is an evaluation.")]
    reason: Annotated[Reason | None, doc("Why there are no metrics, or not all of them.")] = None
    metrics: Annotated[
        Metrics | None, doc("Metrics on the validation data; none with a reason.")
    ] = None
    completions: Annotated[
        tuple[Completion, ...], Meta(max_length=256), doc("Completions of the job's prompts.")
    ] = ()
    seconds: Annotated[Seconds, doc("Duration of the evaluation.")] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metrics is None and not self.reason:
            raise CrossFLError("the evaluation has neither metrics nor a reason")
        if self.status == "absent" and (self.metrics is not None or self.completions):
            raise CrossFLError("the evaluation is absent and has metrics or completions")


M = TypeVar("M", bound=Manifest)
LIMITS: Mapping[type[Manifest], int] = {
    ModelManifest: LARGEST_INVENTORY,
    StateManifest: LARGEST_INVENTORY,
    UpdateManifest: LARGEST_REPORT,
    EvaluationManifest: LARGEST_REPORT,
}


def kind_of(manifest: type[Manifest]) -> str:
    """What a manifest describes: `model`, `state`, `update` or `evaluation`."""
    return str(manifest.__struct_config__.tag)


def decode(content: bytes, kind: type[M], what: str) -> M:
    """Read a manifest of a kind.

    Args:
        content: the document.
        kind: the manifest that it must be.
        what: name of the document, for the message.

    Raises:
        CrossFLError: it is of another kind or format, damaged, or out of its limits.
    """
    head = decoding.read_head(content, what, LIMITS[kind])
    if not head.kind:
        raise CrossFLError(f"{what} is not a manifest made by crossfl: it names no kind")
    if head.kind != (wanted := kind_of(kind)):
        raise CrossFLError(
            f"{what} describes {an(quoted(head.kind)[1:-1])}, where {an(wanted)} was expected"
        )
    decoding.check_format(head, FORMAT, what)
    return decoding.decode(content, kind, what, LIMITS[kind])


def digest(files: Mapping[str, FileEntry]) -> str:
    """One sha256 over those of several files and their names."""
    lines = "".join(f"{files[name].sha256}  {name}\n" for name in sorted(files))
    return hashlib.sha256(lines.encode(errors="surrogatepass")).hexdigest()


def seal(manifest: Manifest) -> str:
    """One sha256 over everything that a manifest states except its seal."""
    return hashlib.sha256(
        decoding.encode_compact(manifest.replace(seal=UNSEALED).asdict())
    ).hexdigest()


def an(noun: str) -> str:
    """A noun with its article."""
    return f"{'an' if noun[:1] in 'aeiou' else 'a'} {noun}"
