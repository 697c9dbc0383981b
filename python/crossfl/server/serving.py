"""What the federation ends with: the served mean, where there is one, in place of the newest model.

While rounds follow, facilities train from the newest model, and the mean lies beside it in the
state. At the end the mean becomes the model and the master weights, so that a run that goes on with
more rounds starts from what was delivered.
"""

from pathlib import Path

from crossfl.protocol.layout import MANIFEST, MASTER, MEAN
from crossfl.protocol.manifest import ModelManifest
from crossfl.storage import manifest
from crossfl.storage.checkpoint import REWRITTEN, Tensors
from crossfl.storage.files import link
from crossfl.storage.tensorfile import TensorFile, Writer, metadata_of


def deliver(model: Path, state: Path, sums: dict[str, str]) -> str:
    """Make the served mean of a state the model, rounded to its dtype, and the master weights.

    Nothing is written in place: files may be second names of the journal's. The manifest of the
    state is still to be written.

    Args:
        model: folder of the model, with its manifest.
        state: folder of the state.
        sums: the sha256 of the tensor files of the state, by name; renewed.

    Returns:
        The digest of the model: a new one, unless there is no mean or it was delivered before.
    """
    described = manifest.read(model, ModelManifest)
    masters = {f"{MASTER}.{name}": sums.get(f"{MEAN}.{name}") for name in described.files}
    renewed = {name: mean for name, mean in masters.items() if mean and sums[name] != mean}
    if not renewed:
        return described.digest
    known = {name: file.sha256 for name, file in described.files.items()}
    for file in Tensors.of_model(model).files:
        mean = TensorFile(state / f"{MEAN}.{file.path.name}")
        layout = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
        partial = file.path.with_suffix(".partial")
        with Writer(partial, layout, metadata_of(file.buffers)) as writer:
            for name, entry in file.entries.items():
                source = mean if name in mean.entries else file
                for start in range(0, entry.elements, REWRITTEN):
                    count = min(REWRITTEN, entry.elements - start)
                    writer.write(source.span(name, start, count).to(entry.dtype))
        partial.rename(file.path)
        known[file.path.name] = writer.sha256
        master = state / f"{MASTER}.{file.path.name}"
        master.unlink()
        link(mean.path, master)
    sums |= renewed
    (model / MANIFEST).unlink()
    return manifest.write(model, ModelManifest(round=described.round), known).digest
