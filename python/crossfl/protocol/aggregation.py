"""The aggregation record: how updates become the next global model, and when to stop."""

import sys
from typing import Annotated, Literal

from msgspec import Meta

from crossfl.protocol.fields import (
    Amount,
    Decay,
    File,
    Natural,
    Number,
    Positive,
    Record,
    Seconds,
    Share,
    doc,
)


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
        Positive | None, doc("Updates that a round needs; unset, one from every facility.")
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
        Annotated[float, Meta(ge=1, le=sys.float_info.max)] | None,
        doc(
            "Largest norm of an update per unit of training, over the median of the round's (from "
            "3 updates on) and over that of the facility's own last rounds."
        ),
    ] = 10.0
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

    def learning_rate(self, default: float) -> float:
        """The server learning rate in force, given that of the server optimizer."""
        return default if self.server_learning_rate is None else self.server_learning_rate
