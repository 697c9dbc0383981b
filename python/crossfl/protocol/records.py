"""The records that cross the workflow: who takes part, what is asked of it, how, what is kept.

Each is one CWL record in `steps/types/` and one group of command-line flags; both follow from the
declarations here. The module is long because every field, limit and description stands here once.
"""

import sys
from typing import Annotated, Literal

from msgspec import Meta

from crossfl.errors import CrossFLError
from crossfl.protocol.fields import (
    LARGEST_COUNT,
    LARGEST_INT,
    Amount,
    Count,
    Decay,
    Digest,
    File,
    Label,
    Name,
    Natural,
    Number,
    Positive,
    Record,
    Seconds,
    Share,
    doc,
)

BYTES = "bytes"
"""The tokenizer that is not a directory."""
Schedule = Literal["constant", "linear", "cosine"]
Closing = Literal["all", "running", "first"] | Positive
"""When a round closes: a rule, or a number of seconds."""
GRACE_SECONDS = 60.0
"""For which a round stays open, unless something else is said."""
SERVED_MEAN = 0.2
"""Rate of the served mean in a full participation, unless something else is said."""
ANY_MODEL = "0" * 64
"""In place of a digest: of a task that does not say which model it is for. None trains on it."""
INCREMENTAL = ("fedavg", "fedavgm", "diloco")
"""Server optimizers that can step for one update as well as for those of everybody."""


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
    """What one facility is asked to do in one round; an evaluation needs facility and dataset."""

    facility: Annotated[Name, doc("Facility that is to do it.")]
    dataset: Annotated[Label, doc("Name of the facility's dataset.")]
    round: Annotated[Natural, doc("Round it belongs to, counted from 1.")] = 0
    local_steps: Annotated[Natural, doc("Optimizer steps to take; 0 asks for an evaluation.")] = 0
    seed: Annotated[Natural, doc("Seed of this facility in this round.")] = 0
    schedule_step: Annotated[Natural, doc("Steps of the learning-rate schedule already taken.")] = 0
    schedule_steps: Annotated[
        Positive, doc("Steps of the learning-rate schedule over the whole federation.")
    ] = 1
    samples_seen: Annotated[Count, doc("Samples this facility has trained on before.")] = 0
    data_seed: Annotated[Natural, doc("Seed of the order of the facility's samples.")] = 0
    base: Annotated[
        Digest,
        doc("Digest of the global model that the task starts from; unset, evaluate takes any."),
    ] = ANY_MODEL
    federation: Annotated[
        Name, doc("Mark of the federation on what the facility keeps and delivers for it.")
    ] = "none"
    counted: Annotated[
        Natural, doc("Round of the task of its last update that counted; 0, none did.")
    ] = 0
    attempts: Annotated[
        Positive, doc("Times that the job is tried before the facility counts as absent.")
    ] = 2
    queue_timeout: Annotated[
        Positive | None,
        doc("Seconds that the job may wait in the queue; unset, as its deployment says."),
    ] = None
    walltime_seconds: Annotated[
        Positive | None,
        doc(
            "Walltime to ask the scheduler for, in seconds, where the planner knows how long the "
            "job takes; unset, that of the job template."
        ),
    ] = None
    closes: Annotated[
        Closing,
        doc("When the round closes, as `aggregation.closes` says; the job may then be late."),
    ] = "all"
    grace_seconds: Annotated[
        Seconds, doc("Seconds that the round stays open once running or first would close it.")
    ] = GRACE_SECONDS
    quorum: Annotated[
        Positive, doc("Updates without which a round that need not wait for all stays open.")
    ] = 1


class Allowance(Record, frozen=True, kw_only=True):
    """What a facility may claim for one task, and the learning-rate schedule it trained on."""

    facility: Annotated[Name, doc("Facility that was asked.")]
    steps: Annotated[Natural, doc("Optimizer steps that were asked for.")]
    samples: Annotated[Count, doc("Most samples that the steps can take.")]
    tokens: Annotated[Count, doc("Most tokens that the samples can have.")]
    schedule: Annotated[Schedule, doc("Learning rate after the warm-up.")] = "constant"
    schedule_step: Annotated[
        Natural, doc("Steps of the learning-rate schedule taken before the task.")
    ] = 0
    schedule_steps: Annotated[
        Positive, doc("Steps of the learning-rate schedule over the whole federation.")
    ] = 1
    warmup_steps: Annotated[Natural, doc("Steps of linear warm-up, once per federation.")] = 0


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
    sampling: Annotated[
        Literal["samples", "groups"],
        doc("What is drawn: samples, or groups (column group) and then a sample of each."),
    ] = "samples"
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


class Lora(Record, frozen=True, kw_only=True):
    """An adapter to train in place of the whole model, and the base that it is for.

    It is one of low-rank matrices (LoRA), or a prompt of virtual tokens.
    """

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
    rank_pattern: Annotated[
        tuple[Label, ...],
        doc("Ranks of layers that have one of their own, each as layer=rank; unset, none."),
    ] = ()
    modules_to_save: Annotated[
        tuple[Label, ...],
        doc("Names of layers that learn whole, and travel with the adapter; unset, none."),
    ] = ()
    virtual_tokens: Annotated[
        Positive | None,
        doc("Tokens of a prompt that learns in place of matrices (prompt tuning); unset, none."),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.virtual_tokens is not None and (
            self.target_modules or self.rank_pattern or self.modules_to_save
        ):
            raise CrossFLError(
                "lora.virtual_tokens is of a prompt, which adapts no layer: leave target_modules, "
                "rank_pattern and modules_to_save out"
            )
        self.ranks()

    def ranks(self) -> dict[str, int]:
        """The ranks of `rank_pattern` by layer.

        Raises:
            CrossFLError: an item is not of the form.
        """
        ranks = {}
        for item in self.rank_pattern:
            layer, _, rank = item.partition("=")
            if not layer or not rank.isdecimal() or not 1 <= int(rank) <= LARGEST_INT:
                raise CrossFLError(
                    f"lora.rank_pattern: {item!r} is not layer=rank, such as q_proj=16"
                )
            ranks[layer] = int(rank)
        return ranks


class Aggregation(Record, frozen=True, kw_only=True):
    """How updates become the next global model, and when to stop before the last round."""

    server_optimizer: Annotated[
        Literal["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "diloco"],
        doc("Server optimizer, which applies the combined delta."),
    ] = "fedavg"
    aggregation_rule: Annotated[
        Literal[
            "mean", "fednova", "median", "trimmed_mean", "krum", "multi_krum", "geometric_median"
        ],
        doc("How the deltas of a round become one."),
    ] = "mean"
    model_dtype: Annotated[
        Literal["keep", "fp32", "bf16"],
        doc("Number format in which the global model travels; keep is that of its files."),
    ] = "keep"
    weighting: Annotated[
        Literal["tokens", "samples", "steps", "equal"],
        doc("What a facility's weight is proportional to."),
    ] = "tokens"
    max_share: Annotated[
        Share | None,
        doc("Largest share of one facility in the mean; the rest is spread over the others."),
    ] = None
    server_learning_rate: Annotated[
        Amount | None,
        doc(
            "Step of the server optimizer; unset, 1.0, for diloco 0.7, for the adaptive ones 0.01."
        ),
    ] = None
    server_momentum: Annotated[Decay, doc("Momentum of fedavgm, Nesterov momentum of diloco.")] = (
        0.9
    )
    beta1: Annotated[Decay, doc("Decay of the mean in fedadam, fedyogi and fedadagrad.")] = 0.9
    beta2: Annotated[Decay, doc("Decay of the mean square in fedadam and fedyogi.")] = 0.99
    tau: Annotated[
        float,
        Meta(ge=1e-18, le=1e9),
        doc("What fedadam, fedyogi and fedadagrad add to the root of the mean square."),
    ] = 1e-3
    num_byzantine: Annotated[
        Natural, doc("Facilities that trimmed_mean, krum and multi_krum are to withstand.")
    ] = 1
    quorum: Annotated[
        Positive | None,
        doc(
            "Updates that a round needs; unset, one from every facility, or one at all where "
            "rounds do not wait for everybody."
        ),
    ] = None
    quorum_share: Annotated[
        Share | None,
        doc("Share of the federation's weight that a round needs; unset, the quorum alone counts."),
    ] = None
    below_quorum: Annotated[
        Literal["stop", "skip", "wait"],
        doc("Below the quorum, stop, skip the round, or wait and ask again who was missing."),
    ] = "stop"
    wait_seconds: Annotated[
        Seconds, doc("Seconds to wait below the quorum before asking again.")
    ] = 300.0
    max_weight: Annotated[
        Positive | None,
        doc("Largest weight, in the unit of the weighting, that an update may claim."),
    ] = None
    max_norm: Annotated[Amount, doc("Largest L2 norm that an update may have.")] = 1e6
    max_norm_ratio: Annotated[
        float,
        Meta(ge=1, le=sys.float_info.max),
        doc(
            "Largest norm of an update per unit of training, over the median of the round's (from "
            "3 updates on) and over that of the facility's own last rounds."
        ),
    ] = 10.0
    closes: Annotated[
        Closing,
        doc(
            "When a round closes: all, everybody has delivered or is absent; running, all whose "
            "jobs run have; first, one has; or after so many seconds. Who is late goes on, and a "
            "later round takes the update."
        ),
    ] = "all"
    planner: Annotated[
        Literal["fixed", "equal_time", "fedqueue"],
        doc(
            "How many steps a job is asked for: fixed, those of the job file; equal_time, as many "
            "as take the same time everywhere, by the speed of the facility's last jobs; fedqueue, "
            "as many as end in time after the wait that is predicted, where rounds close after so "
            "many seconds."
        ),
    ] = "fixed"
    job_seconds: Annotated[
        Seconds | None,
        doc(
            "Seconds of training that equal_time asks for; unset, ten times what else a job does, "
            "and 600 at least."
        ),
    ] = None
    grace_seconds: Annotated[
        Seconds, doc("Seconds that a round stays open once running or first would close it.")
    ] = GRACE_SECONDS
    served_mean: Annotated[
        Share | None,
        doc(
            "Where rounds close early, the part of the way to the newest model that the mean of "
            "models goes in a full participation; the federation ends with the mean. 0 serves the "
            "newest model; unset, 0.2."
        ),
    ] = None
    target_loss: Annotated[
        Number | None,
        doc("Stop when the mean validation loss (nats per token) is no more than this."),
    ] = None
    budget_seconds: Annotated[
        Seconds | None, doc("Start no round later than this many seconds after the first.")
    ] = None
    signers: Annotated[
        File | None,
        doc(
            "OpenSSH allowed-signers file; with it, only updates and evaluations signed by their "
            "facility's key count."
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.job_seconds is not None and self.planner != "equal_time":
            raise CrossFLError(
                "aggregation.job_seconds is of planner: equal_time, and the planner is "
                f"{self.planner}"
            )
        if self.planner == "fedqueue" and not isinstance(self.closes, int):
            raise CrossFLError(
                "aggregation.planner is fedqueue, which fills rounds of a length, and closes is "
                f"{self.closes}: give closes a number of seconds"
            )
        if self.waits_for_all and self.served_mean:
            raise CrossFLError(
                "aggregation.served_mean is for rounds that close early, and closes is all: leave "
                "it out"
            )
        if self.waits_for_all:
            return
        unfit = None
        if self.aggregation_rule != "mean":
            unfit = f"{self.aggregation_rule} compares the updates of all: use mean"
        elif self.server_optimizer not in INCREMENTAL:
            unfit = (
                f"{self.server_optimizer} steps once for the updates of all: use one of "
                f"{', '.join(INCREMENTAL)}"
            )
        elif self.max_share is not None:
            unfit = "max_share is a share of the updates of all: leave it out"
        if unfit:
            raise CrossFLError(
                f"aggregation.closes is {self.closes}, and rounds close before all have delivered; "
                f"{unfit}, or closes: all"
            )

    @property
    def waits_for_all(self) -> bool:
        """Whether a round waits until everybody has delivered or is absent."""
        return self.closes == "all"

    @property
    def mean_rate(self) -> float:
        """The part of the way to the newest model that the served mean goes; 0, there is none."""
        unset = 0.0 if self.waits_for_all else SERVED_MEAN
        return unset if self.served_mean is None else self.served_mean

    def learning_rate(self, default: float) -> float:
        """The server learning rate in force, given that of the server optimizer."""
        return default if self.server_learning_rate is None else self.server_learning_rate


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
        samples=min(samples, LARGEST_COUNT),
        tokens=min(samples * training.sequence_length, LARGEST_COUNT),
        schedule=training.schedule,
        schedule_step=task.schedule_step,
        schedule_steps=task.schedule_steps,
        warmup_steps=training.warmup_steps,
    )
