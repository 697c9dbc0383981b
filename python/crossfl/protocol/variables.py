"""Every environment variable that the package reads or sets. The scheduler's are not ours."""

from typing import NamedTuple

FACILITY = "CROSSFL_FACILITY"
DATA = "CROSSFL_DATA"
MODELS = "CROSSFL_MODELS"
STATE = "CROSSFL_STATE"
SAMPLES_GIB = "CROSSFL_SAMPLES_GIB"
STAGING = "CROSSFL_STAGING"
LAUNCHER = "CROSSFL_LAUNCHER"
SIGNING_KEY = "CROSSFL_SIGNING_KEY"
PROMPTS = "CROSSFL_PROMPTS"
LOGS = "CROSSFL_LOGS"
MIN_VALIDATION_SAMPLES = "CROSSFL_MIN_VALIDATION_SAMPLES"
MIN_VALIDATION_TOKENS = "CROSSFL_MIN_VALIDATION_TOKENS"
LAUNCHED = "CROSSFL_LAUNCHED"
ABSENT = "CROSSFL_ABSENT"
LATE = "CROSSFL_LATE"
JOURNAL = "CROSSFL_JOURNAL"
PROGRESS = "CROSSFL_PROGRESS"
JOB_PROGRESS = "CROSSFL_JOB_PROGRESS"
ENGINE = "CROSSFL_ENGINE"
DEPLOYMENT = "CROSSFL_DEPLOYMENT"
FORKSERVER = "CROSSFL_FORKSERVER"

DEFAULT_MIN_VALIDATION_SAMPLES = 16
DEFAULT_MIN_VALIDATION_TOKENS = 256
DEFAULT_SAMPLES_GIB = 200


class Variable(NamedTuple):
    """One environment variable."""

    name: str
    doc: str
    setter: str
    """Who sets it."""


_JOB, _PLUGIN = "the facility's job script", "the StreamFlow plugin"

VARIABLES = (
    Variable(
        FACILITY,
        "Name of the facility that a step runs at; `*` lets one machine play several.",
        f"{_JOB}; `crossfl.local`",
    ),
    Variable(
        DATA,
        "Folder of the facility's datasets; with `*`, of one such folder for each facility.",
        f"{_JOB}; `crossfl.local`",
    ),
    Variable(MODELS, "Folder of the base models of adapters.", f"{_JOB}; `crossfl.local`"),
    Variable(STATE, "Folder for what a facility keeps between rounds; nothing in it leaves.", _JOB),
    Variable(
        SAMPLES_GIB,
        f"GiB of tokenized data that are kept under `{STATE}`; beyond, the oldest goes. "
        f"Default {DEFAULT_SAMPLES_GIB}.",
        _JOB,
    ),
    Variable(
        STAGING, "Folder on storage of the node to which model and data are copied first.", _JOB
    ),
    Variable(
        LAUNCHER,
        "Command that starts all ranks of what stands behind it, such as `srun`; unset, one rank.",
        _JOB,
    ),
    Variable(SIGNING_KEY, "OpenSSH key with which updates and evaluations are signed.", _JOB),
    Variable(
        PROMPTS,
        "`1` lets the model complete the job's prompts here; unset, it does not.",
        f"{_JOB}; `crossfl.local`",
    ),
    Variable(
        LOGS,
        "`1` in the job script lets `crossfl logs` fetch what a job printed; unset, it does not.",
        _JOB,
    ),
    Variable(
        MIN_VALIDATION_SAMPLES,
        "Validation samples below which no metric leaves the facility. "
        f"Default {DEFAULT_MIN_VALIDATION_SAMPLES}.",
        f"{_JOB}; `crossfl.local`",
    ),
    Variable(
        MIN_VALIDATION_TOKENS,
        "Predicted tokens below which no metric leaves the facility. "
        f"Default {DEFAULT_MIN_VALIDATION_TOKENS}.",
        f"{_JOB}; `crossfl.local`",
    ),
    Variable(
        LAUNCHED, "Marks a rank that the launcher started.", "`crossfl train`, `crossfl evaluate`"
    ),
    Variable(ABSENT, "Why a facility counts as absent in place of running the step.", _PLUGIN),
    Variable(LATE, "How far a job is that goes on while its round closes without it.", _PLUGIN),
    Variable(JOURNAL, "Folder of the journal; unset, there is none.", _PLUGIN),
    Variable(PROGRESS, "File to which steps append their events; unset, standard error.", _PLUGIN),
    Variable(
        JOB_PROGRESS,
        "File of a batch job to which its step appends its events as well; the plugin reads its "
        "end.",
        _PLUGIN,
    ),
    Variable(ENGINE, "Process of the engine; a step on the same machine ends with it.", _PLUGIN),
    Variable(DEPLOYMENT, "Name of the local deployment that a command runs in.", _PLUGIN),
    Variable(
        FORKSERVER,
        "Private folder with the socket of the process that starts steps warm; set by hand, even "
        "to nothing, each step starts by itself.",
        _PLUGIN,
    ),
)
"""All of them: those of a facility first."""
