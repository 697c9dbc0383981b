"""What a facility measures: durations, losses, scores and the cost of training."""

from typing import Annotated

import msgspec
from msgspec import Meta

from crossfl.protocol.fields import (
    Amount,
    Count,
    Label,
    Loss,
    Name,
    Positive,
    Record,
    Seconds,
    Share,
    doc,
)

Correlation = Annotated[float, Meta(ge=-1, le=1)]
"""A number from -1 to 1."""


class PhaseSeconds(Record, frozen=True, kw_only=True):
    """Seconds that a facility spent in each phase of a round."""

    queue: Annotated[Seconds, doc("Waiting in the scheduler's queue.")] = 0.0
    load: Annotated[Seconds, doc("Staging and loading model and data.")] = 0.0
    evaluate: Annotated[Seconds, doc("Measuring on the validation data.")] = 0.0
    train: Annotated[Seconds, doc("Training.")] = 0.0
    save: Annotated[Seconds, doc("Writing the delta.")] = 0.0

    @property
    def total(self) -> float:
        """All phases together."""
        return self.queue + self.working

    @property
    def working(self) -> float:
        """All phases but the queue."""
        return self.load + self.evaluate + self.train + self.save


class TaskMetrics(Record, frozen=True, kw_only=True):
    """Metrics of one task of a dataset; those that its kind of answer does not have are None."""

    loss: Annotated[Loss | None, doc("Mean loss in nats per token.")] = None
    tokens: Annotated[Count | None, doc("Tokens that were predicted.")] = None
    samples: Annotated[Count | None, doc("Samples that were measured.")] = None
    perplexity: Annotated[Amount | None, doc("Exponential of the loss.")] = None
    bits_per_byte: Annotated[Amount | None, doc("Loss in bits per byte of text.")] = None
    accuracy: Annotated[Share | None, doc("Share of right answers.")] = None
    exact_match: Annotated[
        Share | None, doc("Share of answers that are the expected ones, character by character.")
    ] = None
    coverage: Annotated[Share | None, doc("Share of answers of the kind that was asked for.")] = (
        None
    )
    rmse: Annotated[Amount | None, doc("Root mean square error of numbers.")] = None
    mcc: Annotated[Correlation | None, doc("Matthews correlation of yes and no.")] = None
    validity: Annotated[Share | None, doc("Share of answers that are molecules.")] = None
    tanimoto: Annotated[Share | None, doc("Mean Tanimoto similarity of molecules.")] = None
    bleu2: Annotated[Share | None, doc("BLEU of up to 2 words.")] = None
    bleu4: Annotated[Share | None, doc("BLEU of up to 4 words.")] = None
    rouge1: Annotated[Share | None, doc("ROUGE-1, F-measure.")] = None
    rouge2: Annotated[Share | None, doc("ROUGE-2, F-measure.")] = None
    rougeL: Annotated[Share | None, doc("ROUGE-L, F-measure.")] = None  # noqa: N815 (its name)


class Metrics(Record, frozen=True, kw_only=True):
    """Metrics of a model on a facility's validation data."""

    loss: Annotated[Loss, doc("Mean loss in nats per token.")]
    tokens: Annotated[Count, doc("Tokens that were predicted.")]
    samples: Annotated[Count | None, doc("Samples that were measured.")] = None
    perplexity: Annotated[Amount | None, doc("Exponential of the loss; of text.")] = None
    bits_per_byte: Annotated[Amount | None, doc("Loss in bits per byte of text.")] = None
    accuracy: Annotated[Share | None, doc("Share of images in the right class.")] = None
    exact_match: Annotated[
        Share | None, doc("Share of completions that are those of the data.")
    ] = None
    tasks: Annotated[
        dict[Name, TaskMetrics], Meta(max_length=64), doc("Metrics of each task of the dataset.")
    ] = msgspec.field(default_factory=dict)


class TrainingMetrics(Record, frozen=True, kw_only=True):
    """What training did and cost; counts and rates are of all ranks."""

    first_loss: Annotated[Loss | None, doc("Mean loss of the first step.")] = None
    last_loss: Annotated[Loss | None, doc("Mean loss of the last step.")] = None
    tokens_per_second: Annotated[Amount, doc("Tokens that counted in the loss, per second.")] = 0.0
    tokens_read: Annotated[
        Count, doc("Tokens that went through the model, with those of prompts.")
    ] = 0
    bad_samples: Annotated[Count, doc("Rows of the dataset that could not be used.")] = 0
    cut_samples: Annotated[
        Count, doc("Samples with a prompt that are longer than the sequence length, and were cut.")
    ] = 0
    gradient_noise_scale: Annotated[
        Amount | None, doc("Gradient noise scale in tokens; None where the steps do not tell it.")
    ] = None
    ranks: Annotated[Positive, doc("Processes that trained.")] = 1
    peak_memory: Annotated[Count, doc("Most bytes that a rank held.")] = 0
    flops_utilisation: Annotated[
        Amount | None, doc("Operations the model needs over what the devices could have done.")
    ] = None
    joules: Annotated[
        dict[Name, Amount], Meta(max_length=16), doc("Energy, of `gpu` and `cpu` where known.")
    ] = msgspec.field(default_factory=dict)
    device: Annotated[Label | None, doc("What the first rank computed on.")] = None
    software: Annotated[Label | None, doc("Versions of crossfl and torch there.")] = None


class UpdateMetrics(Record, frozen=True, kw_only=True):
    """What was measured while an update was made."""

    validation: Annotated[Metrics | None, doc("The received model.")] = None
    local: Annotated[Metrics | None, doc("The local model after training.")] = None
    training: Annotated[TrainingMetrics | None, doc("The training itself.")] = None
