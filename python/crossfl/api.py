"""The Python interface: load a job, simulate it, read what happened, load the model.

`import crossfl` gives these names, and imports what they need when they are used.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from crossfl.errors import CrossFLError
from crossfl.protocol.history import RoundEntry
from crossfl.protocol.layout import EVALUATIONS, GLOBAL_MODEL, REPORT
from crossfl.storage import history
from crossfl.storage.job import Job

if TYPE_CHECKING:
    import pandas
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "CrossFLError",
    "Job",
    "Results",
    "history_frame",
    "load_job",
    "load_model",
    "read_history",
    "simulate",
]


@dataclass(frozen=True)
class Results:
    """What a federation left in a folder, whichever way it was run."""

    folder: Path

    @property
    def model(self) -> Path:
        """Folder of the global model."""
        return self.folder / GLOBAL_MODEL

    @property
    def report(self) -> Path:
        """The report, one HTML page."""
        return self.folder / REPORT

    @property
    def evaluation(self) -> dict[str, Any]:
        """The final model measured at every facility, as in `evaluation.json`."""
        values: dict[str, Any] = msgspec.json.decode((self.folder / EVALUATIONS).read_bytes())
        return values

    @property
    def history(self) -> list[RoundEntry]:
        """The finished rounds, in order."""
        return read_history(self.folder)


def load_job(path: str | Path) -> Job:
    """Read a job file, and check that a federation can come of it.

    Example:
        >>> crossfl.load_job("workflows/numbers/job.yml").rounds  # doctest: +SKIP
        12

    Raises:
        CrossFLError: it cannot be read, or no federation can come of it.
    """
    job = Job.load(Path(path))
    job.check(Path(path))
    return job


def simulate(job: Job | str | Path, data: str | Path, out: str | Path) -> Results:
    """Run a federation in this process; the same bits as the workflow on a CPU.

    While it goes on, this process plays every facility: environment variables of CrossFL are set,
    and restored at the end.

    Args:
        job: a job, or the path of a job file.
        data: folder with one folder for each facility, which holds its datasets.
        out: folder to write into; it holds no model yet.

    Raises:
        CrossFLError: the job is not as it should be, or a round is below its quorum.
    """
    from crossfl.simulation.simulate import simulate as run

    run(job if isinstance(job, Job) else load_job(job), Path(data), Path(out))
    return Results(Path(out))


def read_history(path: str | Path) -> list[RoundEntry]:
    """Read a history: a `history.jsonl`, or the folder of results that holds one.

    Raises:
        CrossFLError: it cannot be read, or a line is not that of a round.
    """
    return history.read_history(Path(path))


def history_rows(entries: list[RoundEntry]) -> Iterator[dict[str, Any]]:
    """One row for each facility and round, nested fields joined by dots."""
    for entry in entries:
        common = {"round": entry.round, "finished": entry.finished, "loss": entry.loss}
        for name, facility in sorted(entry.facilities.items()):
            values = msgspec.to_builtins(facility)
            yield {**common, "facility": name, **dict(history.flat(values, "."))}


def history_frame(entries: str | Path | list[RoundEntry]) -> "pandas.DataFrame":
    """The history as a data frame: one row for each facility and round.

    Columns are `round`, `finished`, `loss` (mean validation loss of the model that the round
    started from, nats per token), `facility`, and the fields of a facility's entry, nested ones
    joined by dots: `share`, `norm`, `status`, `steps`, `seconds.train`, `metrics.validation.loss` …

    Raises:
        CrossFLError: pandas is not installed, or the history cannot be read.
    """
    try:
        import pandas
    except ImportError:
        raise CrossFLError("pandas is not installed: pip install pandas") from None
    given = read_history(entries) if isinstance(entries, str | Path) else entries
    return pandas.DataFrame(list(history_rows(given)))


def load_model(path: str | Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase | None]":
    """Load a global model in fp32, and its tokenizer; of an image classifier, None.

    An adapter comes on its base, which is looked for under `CROSSFL_MODELS`.

    Args:
        path: folder of a global model, or of the results that hold one.

    Raises:
        CrossFLError: it cannot be loaded.
    """
    from typing import cast

    from crossfl.learning.models.loading import load
    from crossfl.protocol.records import Training

    folder = Path(path)
    if (folder / GLOBAL_MODEL).is_dir():
        folder /= GLOBAL_MODEL
    network, tokenizer = load(folder, Training(sequence_length=2))
    return cast("PreTrainedModel", network), tokenizer
