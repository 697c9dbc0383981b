"""Small federations on disk, made without a model library."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from crossfl.protocol.layout import STATE
from crossfl.protocol.records import Aggregation
from crossfl.protocol.state import ServerState
from crossfl.server.rounds import aggregate
from crossfl.storage import delta, encodings, manifest
from crossfl.storage.checkpoint import Tensors, slots
from crossfl.storage.model_settings import ADAPTER_CONFIG, LORA
from crossfl.storage.weight_files import ADAPTER, SINGLE

Values = dict[str, Tensor]
STARTED = 1_700_000_000.0


class Federation:
    """A global model and a server state in a folder, and updates for its first round.

    `shards` are the files of the model; `rules` are fields of the aggregation record. With
    `adapted`, the model is an adapter.
    """

    def __init__(
        self,
        folder: Path,
        shards: list[Values] | Values,
        adapted: bool = False,
        **rules: Any,
    ) -> None:
        self.folder = folder
        self.model, self.state = folder / "model", folder / "state"
        self.aggregation = Aggregation(**rules)
        self.shards = [shards] if isinstance(shards, dict) else shards
        self._single = ADAPTER if adapted else SINGLE
        self.model.mkdir(parents=True)
        self.state.mkdir()
        (self.model / "config.json").write_text("{}")
        if adapted:
            settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4}
            (self.model / ADAPTER_CONFIG).write_text(json.dumps(settings))
            (self.model / LORA).write_text("{}")
        for number, shard in enumerate(self.shards, 1):
            save_file(shard, self.model / self._name(number), metadata={"format": "pt"})
        if len(self.shards) > 1:
            index = {n: self._name(i) for i, s in enumerate(self.shards, 1) for n in s}
            text = json.dumps({"weight_map": index})
            (self.model / "model.safetensors.index.json").write_text(text)
        digest = manifest.write(self.model, "model", {"round": 0})["digest"]
        sums = start(Tensors.of_model(self.model), self.aggregation, self.state)
        self.server = ServerState(
            rounds=9, seed=0, aggregation=self.aggregation, started=STARTED, model=digest
        )
        self.server.save(self.state, sums)

    def _name(self, number: int) -> str:
        if len(self.shards) == 1:
            return self._single
        return f"model-{number:05}-of-{len(self.shards):05}.safetensors"

    def floats(self) -> list[Values]:
        """The floating-point tensors of each file of the model."""
        return [{n: t for n, t in s.items() if t.is_floating_point()} for s in self.shards]

    def deltas(self, seed: int, scale: float = 1.0) -> Values:
        """A random delta."""
        generator = torch.Generator().manual_seed(seed)
        names = [(n, t.shape) for shard in self.floats() for n, t in shard.items()]
        return {n: torch.randn(s, generator=generator) * scale for n, s in names}

    def update(
        self,
        facility: str,
        values: Values | None = None,
        coding: str = "fp32",
        name: str = "",
        **fields: Any,
    ) -> Path:
        """Write an update; `fields` go into its manifest."""
        path = self.folder / "updates" / (name or facility)
        path.mkdir(parents=True)
        if values is not None:
            for number, shard in enumerate(self.floats(), 1):
                file = path / delta.file_name(self._name(number))
                delta.write(file, {n: values[n] for n in shard}, encodings.of(coding, 0.05))
        self.seal(path, facility, **fields)
        return path

    def seal(self, path: Path, facility: str, **fields: Any) -> None:
        """Write the manifest of an update over the files that are there."""
        said = {
            "facility": facility,
            "round": self.server.round + 1,
            "base": self.server.model,
            "status": "complete",
            "reason": None,
            "tokens": 100,
            "samples": 10,
            "steps": 5,
            "bytes": 1,
            "seconds": {"train": 1.0},
            "metrics": {"validation": {"loss": 2.0}},
        }
        (path / manifest.FILE).unlink(missing_ok=True)
        manifest.write(path, "update", {**said, **fields})

    def run(self, updates: list[Path], out: str = "out", **how: Any) -> Path:
        """Aggregate; the folder with the next model and state."""
        aggregate(self.model, self.state, updates, self.folder / out, **how)
        return self.folder / out


def master(out: Path) -> Mapping[str, Tensor]:
    """The fp32 master weights of a next state."""
    return slots(out / STATE)["master"]


def entry(out: Path) -> dict[str, Any]:
    """The last line of the history."""
    return ServerState.load(out / STATE).history[-1]


def weights(out: Path) -> Mapping[str, Tensor]:
    """The weights of a next model."""
    return Tensors.of_model(out / MODEL)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, for comparing byte by byte."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
