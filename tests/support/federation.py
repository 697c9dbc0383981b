"""Small federations on disk, made without a model library."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from crossfl.errors import CrossFLError
from crossfl.protocol import manifest as documents
from crossfl.protocol.history import FacilityEntry, RoundEntry
from crossfl.protocol.layout import GLOBAL_MODEL, MANIFEST, STATE
from crossfl.protocol.manifest import Manifest, ModelManifest, UpdateManifest
from crossfl.protocol.records import Aggregation, Allowance
from crossfl.protocol.state import ServerState
from crossfl.server import first_state
from crossfl.server import state as server_state
from crossfl.server.rounds import aggregate
from crossfl.storage import delta, encodings, manifest
from crossfl.storage.checkpoint import Tensors, slots
from crossfl.storage.model_settings import ADAPTER_CONFIG, LORA
from crossfl.storage.tensorfile import metadata_of
from crossfl.storage.weight_files import ADAPTER, SINGLE

Values = dict[str, Tensor]
STARTED = 1_700_000_000.0


class Federation:
    """A global model and a server state in a folder, and updates for its first round.

    `shards` are the files of the model, `buffers` those of their tensors that are no parameters;
    `rules` are fields of the aggregation record. With `adapted`, the model is an adapter.
    """

    def __init__(
        self,
        folder: Path,
        shards: list[Values] | Values,
        adapted: bool = False,
        buffers: Collection[str] = (),
        rounds: int = 9,
        **rules: Any,
    ) -> None:
        self.folder = folder
        self.model, self.state = folder / "model", folder / "state"
        self.aggregation = Aggregation(**rules)
        self.shards = [shards] if isinstance(shards, dict) else shards
        self.buffers = buffers
        self._single = ADAPTER if adapted else SINGLE
        self.model.mkdir(parents=True)
        self.state.mkdir()
        (self.model / "config.json").write_text("{}")
        if adapted:
            settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4}
            (self.model / ADAPTER_CONFIG).write_text(json.dumps(settings))
            (self.model / LORA).write_text("{}")
        for number, shard in enumerate(self.shards, 1):
            metadata = metadata_of(shard.keys() & set(buffers))
            save_file(shard, self.model / self._name(number), metadata=metadata)
        if len(self.shards) > 1:
            index = {n: self._name(i) for i, s in enumerate(self.shards, 1) for n in s}
            text = json.dumps({"weight_map": index})
            (self.model / "model.safetensors.index.json").write_text(text)
        digest = manifest.write(self.model, ModelManifest(round=0)).digest
        sums = first_state.write_tensors(Tensors.of_model(self.model), self.aggregation, self.state)
        server_state.write_signers(self.aggregation, self.state)
        self.server = ServerState(
            rounds=rounds,
            seed=0,
            aggregation=server_state.without_path(self.aggregation),
            started=STARTED,
            model=digest,
        )
        server_state.save(self.server, self.state, sums)

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
                mine = {n: values[n] for n in shard}
                delta.write(file, mine, encodings.of(coding, 0.05), buffers=self.buffers)
        self.seal(path, facility, **fields)
        return path

    def seal(self, path: Path, facility: str, **fields: Any) -> None:
        """Write the manifest of an update over the files that are there."""
        document = {
            "facility": facility,
            "federation": self.server.federation,
            "round": self.server.round + 1,
            "base": self.server.model,
            "status": "complete",
            "tokens": 100,
            "samples": 10,
            "steps": 5,
            "seconds": {"train": 1.0},
            "metrics": {"validation": {"loss": 2.0, "tokens": 50}},
        }
        (path / MANIFEST).unlink(missing_ok=True)
        files = {
            file.relative_to(path).as_posix(): {
                "bytes": file.stat().st_size,
                "sha256": manifest.sha256(file),
            }
            for file in sorted(path.rglob("*"))
            if file.is_file()
        }
        write_document(path, {"kind": "update", "format": 2, **document, "files": files, **fields})

    def allowances(self, steps: Mapping[str, int]) -> list[Allowance]:
        """What facilities may claim, given the steps they were asked for."""
        return [
            Allowance(facility=name, steps=count, samples=2 * count, tokens=1000 * count)
            for name, count in steps.items()
        ]

    def run(
        self, updates: Sequence[Path], out: str = "out", now: float = STARTED + 60, **how: Any
    ) -> Path:
        """Aggregate; the folder with the next model and state."""
        aggregate(self.model, self.state, updates, self.folder / out, now, **how)
        return self.folder / out

    def go_on(self, out: Path) -> None:
        """Begin the round after the one whose outcome lies in a folder."""
        self.model, self.state = out / GLOBAL_MODEL, out / STATE
        self.server = server_state.load(self.state)


def write_document(
    path: Path, document: dict[str, Any], kind: type[Manifest] = UpdateManifest
) -> None:
    """Write a manifest, whatever it states, with digest and seal if they exist."""
    document = {**document, "digest": "0" * 64, "seal": "0" * 64}
    try:
        content = json.dumps(document).encode()
        stated = documents.decode(content, kind, "manifest").sealed()
        document |= {"digest": stated.digest, "seal": stated.seal}
    except CrossFLError:
        pass  # it is refused before its seal is looked at
    (path / MANIFEST).write_text(json.dumps(document))


def master(out: Path) -> Mapping[str, Tensor]:
    """The fp32 master weights of a next state."""
    return slots(out / STATE)["master"]


def entry(out: Path) -> RoundEntry:
    """The last round of the history."""
    return list(server_state.history(out / STATE))[-1]


def facilities(out: Path) -> Mapping[str, FacilityEntry]:
    """What became of each facility's update in the last round."""
    return entry(out).facilities


def weights(out: Path) -> Mapping[str, Tensor]:
    """The weights of a next model."""
    return Tensors.of_model(out / GLOBAL_MODEL)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, for comparing byte by byte."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
