"""The server state: all that the federation remembers from one round to the next.

This is its JSON half; the tensors beside it are read and written by `crossfl.storage.checkpoint`.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from crossfl.protocol.records import Aggregation, Retention
from crossfl.storage import manifest

STATE = "state.json"
HISTORY = "history.jsonl"
UPDATES = "updates"
MASTER = "master"
"""The family of files with the fp32 master weights: `master.model.safetensors`, …"""


@dataclass(kw_only=True)
class ServerState:
    """What `plan` reads and `aggregate` renews; its tensors lie beside it in the same directory.

    On disk: `state.json`, `history.jsonl` (one line a round), `master.*.safetensors` (fp32, in
    files named like the model's), one such family for each slot of the strategy, `manifest.json`.
    """

    rounds: int
    """Rounds to run."""
    seed: int
    aggregation: Aggregation
    started: float
    """When the federation was initialised, in seconds since 1970."""
    model: str
    """Digest of the current global model."""
    round: int = 0
    """Rounds finished."""
    run: str = ""
    """Name of the run in the journal; empty without one."""
    retention: Retention = field(default_factory=Retention)
    held: list[str] = field(default_factory=list)
    """Facilities whose updates of the round to come are here already, in `updates/<facility>`."""
    waits: int = 0
    """Times that the round to come was below its quorum, and is asked for again."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry for each finished round."""

    def late(self) -> bool:
        """Whether no round may begin any more."""
        limit = self.aggregation.budget_seconds
        return limit is not None and time.time() - self.started >= limit

    def more(self) -> bool:
        """Whether another round is to follow: rounds left, target loss not met, time left."""
        met = False
        if (target := self.aggregation.target_loss) is not None and self.history:
            loss = self.history[-1]["loss"]
            met = loss is not None and loss <= target
        return self.round < self.rounds and not met and not self.late()

    def held_updates(self, directory: Path) -> list[Path]:
        """The updates that the state in a directory holds."""
        return [directory / UPDATES / facility for facility in self.held]

    @classmethod
    def load(cls, directory: Path) -> "ServerState":
        """Read the state of a directory after checking what is read against its manifest.

        Raises:
            CrossFLError: the directory is not a complete, unchanged server state.
        """
        manifest.verify(directory, "state", only=(STATE, HISTORY))
        values = json.loads((directory / STATE).read_text())
        values["aggregation"] = Aggregation.parse(values["aggregation"])
        values["retention"] = Retention.parse(values.get("retention", {}))
        lines = (directory / HISTORY).read_text().splitlines()
        return cls(**values, history=[json.loads(line) for line in lines])

    def save(self, directory: Path, known: Mapping[str, str] = MappingProxyType({})) -> None:
        """Write `state.json`, `history.jsonl` and the manifest beside the tensors already there.

        `known` has the sha256 of the tensor files by name, computed while they were written.
        """
        values = {k: v for k, v in vars(self).items() if k != "history"}
        values["aggregation"] = self.aggregation.asdict()
        values["retention"] = self.retention.asdict()
        (directory / STATE).write_text(json.dumps(values, indent=1) + "\n")
        (directory / HISTORY).write_text("".join(json.dumps(h) + "\n" for h in self.history))
        manifest.write(directory, "state", {"round": self.round}, known)

    def updates(self, facility: str) -> list[dict[str, Any]]:
        """The history of one facility: its entry in each finished round it was asked for."""
        return [h["facilities"][facility] for h in self.history if facility in h["facilities"]]

    def counted(self, facility: str) -> dict[int, dict[str, Any]]:
        """Of these the ones that were averaged, by round."""
        entries = {h["round"]: h["facilities"].get(facility) for h in self.history}
        return {n: e for n, e in entries.items() if e and e["status"] in ("complete", "partial")}
