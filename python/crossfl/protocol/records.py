"""The records that cross the workflow: who takes part, what is asked of it, what is kept.

Each is one CWL record in `steps/types/` and one group of command-line flags; both follow from the
declarations here. `crossfl.protocol.training` and `crossfl.protocol.aggregation` have the others.
"""

from typing import Annotated, Literal

from crossfl.protocol.fields import (
    LARGEST_INT,
    Amount,
    Decay,
    Digest,
    Label,
    Name,
    Natural,
    Positive,
    Record,
    doc,
)
from crossfl.protocol.training import Schedule, Training

BYTES = "bytes"
"""The tokenizer that is not a directory."""


class Facility(Record, frozen=True, kw_only=True):
    """A site that takes part, under the name its deployment has, with a dataset it holds."""

    name: Annotated[Name, doc("Name of the facility, the same as its deployment.")]
    dataset: Annotated[
        Label, doc("Name of its dataset, resolved at the facility under CROSSFL_DATA.")
    ]
    local_steps: Annotated[
        Positive | None, doc("Optimizer steps per round here, in place of the federation's.")
    ] = None
    joins: Annotated[Positive, doc("First round it takes part in.")] = 1
    leaves: Annotated[Positive | None, doc("Last round it takes part in; unset, it stays.")] = None
    skips: Annotated[tuple[Positive, ...], doc("Rounds it sits out; unset, none.")] = ()
    attempts: Annotated[
        Positive, doc("Times that a job of it is tried before it counts as absent.")
    ] = 2
    queue_timeout: Annotated[
        Positive | None,
        doc("Seconds that a job of it may wait in the queue; unset, as its deployment says."),
    ] = None


class Task(Record, frozen=True, kw_only=True):
    """What one facility is asked to do in one round."""

    facility: Annotated[Name, doc("Facility that is to do it.")]
    dataset: Annotated[Label, doc("Name of the facility's dataset.")]
    round: Annotated[Natural, doc("Round it belongs to, counted from 1.")]
    local_steps: Annotated[Natural, doc("Optimizer steps to take; 0 asks for an evaluation.")]
    seed: Annotated[Natural, doc("Seed of this facility in this round.")]
    schedule_step: Annotated[Natural, doc("Steps of the learning-rate schedule already taken.")]
    schedule_steps: Annotated[
        Positive, doc("Steps of the learning-rate schedule over the whole federation.")
    ]
    samples_seen: Annotated[Natural, doc("Samples this facility has trained on before.")]
    data_seed: Annotated[Natural, doc("Seed of the order of the facility's samples.")]
    base: Annotated[Digest, doc("Digest of the global model that the task starts from.")]
    federation: Annotated[
        Name, doc("Mark of the federation on what the facility keeps and delivers for it.")
    ]
    counted: Annotated[
        Natural, doc("Last round in which an update of this facility counted; 0, none did.")
    ] = 0
    attempts: Annotated[
        Positive, doc("Times that the job is tried before the facility counts as absent.")
    ] = 2
    queue_timeout: Annotated[
        Positive | None,
        doc("Seconds that the job may wait in the queue; unset, as its deployment says."),
    ] = None


class Allowance(Record, frozen=True, kw_only=True):
    """What a facility may claim for one task, and the learning-rate schedule it trained on."""

    facility: Annotated[Name, doc("Facility that was asked.")]
    steps: Annotated[Natural, doc("Optimizer steps that were asked for.")]
    samples: Annotated[Natural, doc("Most samples that the steps can take.")]
    tokens: Annotated[Natural, doc("Most tokens that the samples can have.")]
    schedule: Annotated[Schedule, doc("Learning rate after the warm-up.")] = "constant"
    schedule_step: Annotated[
        Natural, doc("Steps of the learning-rate schedule taken before the task.")
    ] = 0
    schedule_steps: Annotated[
        Positive, doc("Steps of the learning-rate schedule over the whole federation.")
    ] = 1
    warmup_steps: Annotated[Natural, doc("Steps of linear warm-up, once per federation.")] = 0


class Lora(Record, frozen=True, kw_only=True):
    """An adapter to train in place of the whole model, and the base that it is for."""

    base_model: Annotated[
        Label, doc("Name of the base model, resolved at each facility under CROSSFL_MODELS.")
    ]
    base_digest: Annotated[
        Digest | None,
        doc("Digest of its weights, as crossfl digest prints it; unset, that of the model given."),
    ] = None
    rank: Annotated[Positive, doc("Rank of the adapter's matrices.")] = 8
    alpha: Annotated[Amount, doc("Scale of the adapter, over its rank.")] = 16.0
    dropout: Annotated[Decay, doc("Share of inputs the adapter drops in training.")] = 0.0
    target_modules: Annotated[
        tuple[Label, ...],
        doc("Names of the layers that are adapted; unset, all linear ones but the last."),
    ] = ()
    factors: Annotated[
        Literal["both", "b"], doc("Whether A and B learn, or B alone, which averages exactly.")
    ] = "both"


class Retention(Record, frozen=True, kw_only=True):
    """Which finished rounds the journal keeps."""

    keep_last: Annotated[Positive, doc("Rounds to keep, the last ones.")] = 2
    keep_every: Annotated[Natural, doc("Keep every so many rounds; 0 keeps none.")] = 0
    keep_best: Annotated[
        Natural, doc("Rounds to keep whose models had the lowest validation loss.")
    ] = 1


def allowance_of(task: Task, training: Training) -> Allowance:
    """What a facility may claim for a task: no more than its steps can have used."""
    samples = task.local_steps * training.batch_size
    return Allowance(
        facility=task.facility,
        steps=task.local_steps,
        samples=min(samples, LARGEST_INT),
        tokens=min(samples * training.sequence_length, LARGEST_INT),
        schedule=training.schedule,
        schedule_step=task.schedule_step,
        schedule_steps=task.schedule_steps,
        warmup_steps=training.warmup_steps,
    )
