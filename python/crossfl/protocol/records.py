"""The records that cross the workflow: declared here and, field for field, in `steps/types/`.

Each dataclass below is one CWL record and one group of command-line flags. `tests/test_records.py`
holds names, types, defaults and wording of the three together.
"""

import argparse
import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, Literal, Self, TypeVar

from crossfl.errors import CrossFLError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
BYTES = "bytes"
"""The tokenizer that is not a directory."""


def option(
    doc: str,
    default: Any = MISSING,
    least: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> Any:
    """Declare a field: its one-line description, its default, what its numbers must lie between."""
    limits = {"least": least, "most": most, "below": below}
    return dataclasses.field(default=default, metadata={"doc": doc, **limits})


@dataclass(frozen=True, kw_only=True)
class Record:
    """What all records share: checked construction, with errors that name the field."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            where = f"{type(self).__name__.lower()}.{field.name}"
            choices = choices_of(field)
            if choices and value not in choices:
                raise CrossFLError(f"{where} is {value!r}: choose one of {', '.join(choices)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise CrossFLError(f"{where} is {value}: give a finite number")
            limits = field.metadata
            numbers = value if isinstance(value, tuple) else (value,)
            for number in (n for n in numbers if isinstance(n, int | float)):
                if number < limits["least"]:
                    raise CrossFLError(f"{where} is {value}: it must be at least {limits['least']}")
                if number > limits["most"]:
                    raise CrossFLError(f"{where} is {value}: it must be at most {limits['most']}")
                if number >= limits["below"]:
                    raise CrossFLError(f"{where} is {value}: it must be below {limits['below']}")

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> Self:
        """Build the record from a mapping (a job file, a JSON document), checking every value.

        Raises:
            CrossFLError: a field is unknown, missing or of the wrong type.
        """
        label = cls.__name__.lower()
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if not isinstance(values, Mapping):
            raise CrossFLError(f"{label}: expected a record, found {values!r}")
        if unknown := sorted(set(values) - set(fields)):
            raise CrossFLError(f"{label}: no field {unknown[0]!r}; it has {', '.join(fields)}")
        given: dict[str, Any] = {}
        for name, field in fields.items():
            value = values.get(name)
            if value is not None:
                given[name] = _convert(value, field, f"{label}.{name}")
            elif field.default is MISSING:
                raise CrossFLError(f"{label}.{name} is missing")
        return cls(**given)

    def asdict(self) -> dict[str, Any]:
        """The record as JSON-ready values, unset fields left out."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


@dataclass(frozen=True, kw_only=True)
class Facility(Record):
    """A site that takes part, under the name its deployment has, with a dataset it holds."""

    name: str = option("Name of the facility, the same as its deployment.")
    dataset: str = option("Name of its dataset, resolved at the facility under CROSSFL_DATA.")
    local_steps: int | None = option(
        "Optimizer steps per round here, in place of the federation's.", None, least=1
    )
    joins: int = option("First round it takes part in. Default 1.", 1, least=1)
    leaves: int | None = option("Last round it takes part in; unset, it stays.", None, least=1)
    skips: tuple[int, ...] = option("Rounds it sits out. Default none.", (), least=1)
    attempts: int = option(
        "Times that a job of it is tried before it counts as absent. Default 2.", 2, least=1
    )
    queue_timeout: int | None = option(
        "Seconds that a job of it may wait in the queue; unset, as its deployment says.",
        None,
        least=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("facility", self.name)


@dataclass(frozen=True, kw_only=True)
class Task(Record):
    """What one facility is asked to do in one round."""

    facility: str = option("Facility that is to do it.")
    dataset: str = option("Name of the facility's dataset.")
    round: int = option("Round it belongs to, counted from 1.", least=0)
    local_steps: int = option("Optimizer steps to take; 0 asks for an evaluation.", least=0)
    seed: int = option("Seed of this facility in this round.", least=0)
    schedule_step: int = option("Steps of the learning-rate schedule that are behind.", least=0)
    schedule_steps: int = option("Steps of the schedule over the whole federation.", least=1)
    samples_seen: int = option("Samples this facility has trained on before.", least=0)
    data_seed: int = option("Seed of the order of the facility's samples.", least=0)
    base: str = option("Digest of the global model that the task starts from.")
    counted: int = option(
        "Last round in which an update of this facility counted; 0, none did. Default 0.",
        0,
        least=0,
    )
    federation: str | None = option(
        "Mark of the federation on what the facility keeps for it; unset, of any.", None
    )
    attempts: int = option(
        "Times that the job is tried before the facility counts as absent. Default 2.", 2, least=1
    )
    queue_timeout: int | None = option(
        "Seconds that the job may wait in the queue; unset, as its deployment says.",
        None,
        least=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name("task.facility", self.facility)
        if self.federation is not None:
            check_name("task.federation", self.federation)


@dataclass(frozen=True, kw_only=True)
class Training(Record):
    """How a facility trains and what it sends back."""

    batch_size: int = option("Samples per optimizer step, over all ranks. Default 8.", 8, least=1)
    sequence_length: int = option("Longest sample, in tokens. Default 512.", 512, least=2)
    learning_rate: float = option("Peak learning rate of AdamW. Default 0.0003.", 3e-4, least=0)
    schedule: Literal["constant", "linear", "cosine"] = option(
        "Learning rate after the warm-up, down to 0 at the last round. Default constant.",
        "constant",
    )
    warmup_steps: int = option(
        "Steps of linear warm-up, once per federation. Default 0.", 0, least=0
    )
    weight_decay: float = option("Weight decay of AdamW. Default 0.0.", 0.0, least=0)
    gradient_clip: float = option(
        "Largest norm of the gradient; 0 never clips. Default 1.0.", 1.0, least=0
    )
    precision: Literal["fp32", "bf16"] = option(
        "Arithmetic of forward and backward pass; weights and optimizer are fp32. Default fp32.",
        "fp32",
    )
    micro_batch: int | None = option(
        "Rows of one forward pass on each rank; unset, its whole share of the batch.",
        None,
        least=1,
    )
    batching: Literal["padded", "packed"] = option(
        "A sample in each row, or as many as fit, which do not see each other. Default padded.",
        "padded",
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = option(
        "How attention is computed; auto is the best the model has. Default auto.", "auto"
    )
    activations: Literal["keep", "recompute"] = option(
        "Whether activations are kept for the backward pass or computed again. Default keep.",
        "keep",
    )
    execution: Literal["eager", "compiled"] = option(
        "Whether the model runs as written or through torch.compile. Default eager.", "eager"
    )
    sharding: Literal["none", "fsdp"] = option(
        "Whether each rank holds the whole model or a shard of it. Default none.", "none"
    )
    local_optimizer: Literal["reset", "keep"] = option(
        "Whether the optimizer starts anew in each round or stays, at the facility. Default reset.",
        "reset",
    )
    max_seconds: float | None = option(
        "Longest training in a round, in seconds; what was done till then is delivered.",
        None,
        least=0,
    )
    reserve_seconds: float = option(
        "Seconds before the end of its job at which training stops, to deliver. Default 120.0.",
        120.0,
        least=0,
    )
    checkpoint_steps: int | None = option(
        "Steps between checkpoints kept at the facility for a job that is run again; unset, none.",
        None,
        least=1,
    )
    proximal_mu: float = option(
        "Weight of FedProx's pull towards the global model; 0 is none. Default 0.0.", 0.0, least=0
    )
    encoding: Literal["fp32", "bf16", "fp16", "int8", "int4", "topk"] = option(
        "How the delta is written for the journey. Default fp32.", "fp32"
    )
    kept: float = option(
        "Share of its values that a topk delta keeps. Default 0.05.", 0.05, least=0, most=1
    )
    validation_samples: int | None = option(
        "Validation samples to use, the first ones; unset, all.", None, least=1
    )
    completion_tokens: int = option(
        "Longest completion to generate, in tokens. Default 64.", 64, least=1
    )
    threads: int | None = option(
        "CPU threads of each rank; unset, OMP_NUM_THREADS or every core.", None, least=1
    )


@dataclass(frozen=True, kw_only=True)
class Lora(Record):
    """An adapter to train in place of the whole model, and the base that it is for."""

    base_model: str = option(
        "Name of the base model, resolved at each facility under CROSSFL_MODELS."
    )
    base_digest: str | None = option(
        "Digest of its weights, as crossfl digest prints it; unset, that of the model given.", None
    )
    rank: int = option("Rank of the adapter's matrices. Default 8.", 8, least=1)
    alpha: float = option("Scale of the adapter, over its rank. Default 16.0.", 16.0, least=0)
    dropout: float = option(
        "Share of inputs the adapter drops in training. Default 0.0.", 0.0, least=0, below=1
    )
    target_modules: tuple[str, ...] = option(
        "Names of the layers that are adapted. Default all linear ones but the last.", ()
    )
    factors: Literal["both", "b"] = option(
        "Whether A and B learn, or B alone, which averages exactly. Default both.", "both"
    )


@dataclass(frozen=True, kw_only=True)
class Aggregation(Record):
    """How updates become the next global model, and when to stop before the last round."""

    strategy: Literal["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "diloco"] = option(
        "Server optimizer, which applies the combined delta. Default fedavg.", "fedavg"
    )
    combination: Literal[
        "mean", "fednova", "median", "trimmed_mean", "krum", "multi_krum", "geometric_median"
    ] = option("How the deltas of a round become one. Default mean.", "mean")
    broadcast: Literal["own", "fp32", "bf16"] = option(
        "Number format in which the global model travels; own is that of its files. Default own.",
        "own",
    )
    weighting: Literal["tokens", "samples", "steps", "equal"] = option(
        "What a facility's weight is proportional to. Default tokens.", "tokens"
    )
    largest_share: float | None = option(
        "Largest share of one facility in the mean; the rest is spread over the others.",
        None,
        least=0,
        most=1,
    )
    server_learning_rate: float | None = option(
        "Step of the server optimizer; unset, 1.0, for diloco 0.7, for the adaptive ones 0.01.",
        None,
        least=0,
    )
    server_momentum: float = option(
        "Momentum of fedavgm, Nesterov momentum of diloco. Default 0.9.", 0.9, least=0, below=1
    )
    first_decay: float = option(
        "Decay of the mean in fedadam, fedyogi and fedadagrad. Default 0.9.", 0.9, least=0, below=1
    )
    second_decay: float = option(
        "Decay of the mean square in fedadam and fedyogi. Default 0.99.", 0.99, least=0, below=1
    )
    adaptivity: float = option(
        "What fedadam, fedyogi and fedadagrad add to the root of the mean square. Default 0.001.",
        1e-3,
        least=1e-18,
        most=1e9,
    )
    dishonest: int = option(
        "Facilities that trimmed_mean, krum and multi_krum are to withstand. Default 1.",
        1,
        least=0,
    )
    quorum: int | None = option(
        "Updates that a round needs; unset, one from every facility.", None, least=1
    )
    quorum_share: float | None = option(
        "Share of the federation's weight that a round needs; unset, the quorum alone counts.",
        None,
        least=0,
        most=1,
    )
    below_quorum: Literal["stop", "skip", "wait"] = option(
        "Below the quorum, stop, skip the round, or wait and ask again who was missing. "
        "Default stop.",
        "stop",
    )
    wait_seconds: float = option(
        "Seconds to wait below the quorum before asking again. Default 300.0.", 300.0, least=0
    )
    largest_weight: int | None = option(
        "Largest weight, in the unit of the weighting, that an update may claim.", None, least=1
    )
    largest_norm: float | None = option("Largest L2 norm that an update may have.", None, least=0)
    largest_norm_ratio: float | None = option(
        "Largest norm of an update over the median of the round's; checked from 3 updates on. "
        "Default 10.0.",
        10.0,
        least=1,
    )
    target_loss: float | None = option(
        "Stop when the mean validation loss (nats per token) is no more than this.", None
    )
    budget_seconds: float | None = option(
        "Start no round later than this many seconds after the first.", None, least=0
    )

    def learning_rate(self, default: float) -> float:
        """The server learning rate in force, given the strategy's own."""
        return default if self.server_learning_rate is None else self.server_learning_rate


@dataclass(frozen=True, kw_only=True)
class Retention(Record):
    """Which finished rounds the journal keeps."""

    keep_last: int = option("Rounds to keep, the last ones. Default 2.", 2, least=1)
    keep_every: int = option("Keep every so many rounds; 0 keeps none. Default 0.", 0, least=0)
    keep_best: int = option(
        "Rounds to keep whose models had the lowest validation loss. Default 1.", 1, least=0
    )


R = TypeVar("R", bound=Record)


def check_name(what: str, name: str) -> None:
    """Refuse a name that could be anything but a plain word in a path, a table or a shell."""
    if not NAME.fullmatch(name):
        raise CrossFLError(
            f"{what} {name[:200]!r}: use letters, digits, '.', '_' and '-', a letter or digit "
            "first, 100 characters at most"
        )


def choices_of(field: "dataclasses.Field[Any]") -> tuple[str, ...]:
    """The values of a `Literal` field; empty for any other."""
    return typing.get_args(field.type) if typing.get_origin(field.type) is Literal else ()


def scalar_of(field: "dataclasses.Field[Any]") -> type[int] | type[float] | type[str]:
    """The type of one value of the field: what is left without `None`, `Literal` or `tuple`."""
    kind: Any = field.type
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is Literal:
        return str
    if typing.get_origin(kind) is tuple:
        kind = typing.get_args(kind)[0]
    return typing.cast("type[int] | type[float] | type[str]", kind)


def flag(name: str) -> str:
    """The command-line flag of a field."""
    return "--" + name.replace("_", "-")


def add_flags(
    parser: argparse.ArgumentParser, record: type[Record], optional: bool = False
) -> None:
    """Declare one flag for each field of the record, which as a whole may be optional."""
    group = parser.add_argument_group(record.__name__.lower())
    for field in dataclasses.fields(record):
        group.add_argument(
            flag(field.name),
            dest=f"{record.__name__}.{field.name}",
            required=field.default is MISSING and not optional,
            choices=choices_of(field) or None,
            metavar=None if choices_of(field) else scalar_of(field).__name__.upper(),
            help=field.metadata["doc"],
        )


def from_flags(args: argparse.Namespace, record: type[R]) -> R:
    """Build the record from the flags that `add_flags` declared."""
    return record.parse(
        {f.name: getattr(args, f"{record.__name__}.{f.name}") for f in dataclasses.fields(record)}
    )


def from_flags_if_any(args: argparse.Namespace, record: type[R]) -> R | None:
    """Build an optional record; None where not one of its flags was given."""
    names = [f"{record.__name__}.{field.name}" for field in dataclasses.fields(record)]
    return from_flags(args, record) if any(getattr(args, n) is not None for n in names) else None


def from_words(words: Iterable[str], record: type[R]) -> R:
    """Build the record from words like `name=leonardo dataset=it`."""
    pairs = [word.split("=", 1) for word in words]
    if bad := [pair[0] for pair in pairs if len(pair) == 1]:
        raise CrossFLError(f"{record.__name__.lower()}: {bad[0]!r} is not of the form field=value")
    return record.parse(dict(pairs))


def _convert(value: Any, field: "dataclasses.Field[Any]", where: str) -> Any:
    kind = scalar_of(field)
    if "tuple" in str(field.type):
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise CrossFLError(f"{where} is {value!r}: expected a list")
        return tuple(_scalar(item, kind, where) for item in items if item != "")
    return _scalar(value, kind, where)


def _scalar(value: Any, kind: type[Any], where: str) -> Any:
    wrong = CrossFLError(f"{where} is {value!r}: expected {kind.__name__}")
    # The command line brings every number as a word; a job file must bring it as a number.
    if isinstance(value, bool) or not isinstance(value, str if kind is str else str | int | float):
        raise wrong
    try:
        converted = kind(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong from None
    if kind is int and isinstance(value, float) and value != converted:
        raise wrong
    return converted
