"""The training record: how a facility trains and what it sends back."""

from typing import Annotated, Literal

from msgspec import Meta

from crossfl.protocol.fields import (
    LARGEST_INT,
    Amount,
    Natural,
    Positive,
    Record,
    Seconds,
    Share,
    doc,
)

Schedule = Literal["constant", "linear", "cosine"]


class Training(Record, frozen=True, kw_only=True):
    """How a facility trains and what it sends back."""

    batch_size: Annotated[Positive, doc("Samples per optimizer step, over all ranks.")] = 8
    sequence_length: Annotated[
        int, Meta(ge=2, le=LARGEST_INT), doc("Longest sample, in tokens.")
    ] = 512
    learning_rate: Annotated[Amount, doc("Peak learning rate of AdamW.")] = 3e-4
    schedule: Annotated[
        Schedule, doc("Learning rate after the warm-up, down to 0 at the last round.")
    ] = "constant"
    warmup_steps: Annotated[Natural, doc("Steps of linear warm-up, once per federation.")] = 0
    weight_decay: Annotated[Amount, doc("Weight decay of AdamW.")] = 0.0
    max_grad_norm: Annotated[Amount, doc("Largest norm of the gradient; 0 never clips.")] = 1.0
    precision: Annotated[
        Literal["fp32", "bf16"],
        doc("Arithmetic of forward and backward pass; weights and optimizer are fp32."),
    ] = "fp32"
    micro_batch: Annotated[
        Positive | None,
        doc("Rows of one forward pass on each rank; unset, its whole share of the batch."),
    ] = None
    packing: Annotated[
        bool, doc("Put as many samples into a row as fit; they do not see each other.")
    ] = False
    attention: Annotated[
        Literal["auto", "eager", "sdpa", "flash_attention_2"],
        doc("How attention is computed; auto is the best the model has."),
    ] = "auto"
    activation_checkpointing: Annotated[
        bool, doc("Compute activations again in the backward pass instead of keeping them.")
    ] = False
    compile: Annotated[bool, doc("Run the model through torch.compile.")] = False
    sharding: Annotated[
        Literal["none", "fsdp"],
        doc("Whether each rank holds the whole model or a shard of it."),
    ] = "none"
    local_optimizer: Annotated[
        Literal["reset", "keep"],
        doc("Whether the optimizer starts anew in each round or stays, at the facility."),
    ] = "reset"
    max_seconds: Annotated[
        Seconds | None,
        doc("Longest training in a round, in seconds; what was done till then is delivered."),
    ] = None
    reserve_seconds: Annotated[
        Seconds,
        doc("Seconds before the end of its job at which training stops, to deliver."),
    ] = 120.0
    checkpoint_steps: Annotated[
        Positive | None,
        doc("Steps between checkpoints kept at the facility for a second attempt; unset, none."),
    ] = None
    proximal_mu: Annotated[
        Amount, doc("Weight of FedProx's pull towards the global model; 0 is none.")
    ] = 0.0
    encoding: Annotated[
        Literal["fp32", "bf16", "fp16", "int8", "int4", "topk"],
        doc("How the delta is written for the journey."),
    ] = "fp32"
    topk_fraction: Annotated[Share, doc("Share of its values that a topk delta keeps.")] = 0.05
    validation_samples: Annotated[
        Positive | None, doc("Validation samples to use, the first ones; unset, all.")
    ] = None
    max_new_tokens: Annotated[Positive, doc("Longest completion to generate, in tokens.")] = 64
    threads: Annotated[
        Positive | None, doc("CPU threads of each rank; unset, OMP_NUM_THREADS or every core.")
    ] = None
