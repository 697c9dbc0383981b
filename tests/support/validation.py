"""Metrics of every sample there is."""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedTokenizerBase

from crossfl.facility.place import Disclosure
from crossfl.learning.datasets import Sample
from crossfl.learning.evaluation import Validation
from crossfl.protocol.measurements import Metrics
from crossfl.protocol.records import Training

EVERYTHING = Disclosure(min_samples=1, min_tokens=1, prompts=True)


def measured(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    samples: Sequence[Sample],
    training: Training,
) -> Metrics:
    metrics = Validation(samples, tokenizer, training, EVERYTHING).measure(model)
    assert metrics is not None
    return metrics
