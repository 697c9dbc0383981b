"""Going on with a run after its last published round."""

from pathlib import Path

from crossfl.errors import CrossFLError
from crossfl.protocol.layout import GLOBAL_MODEL, MANIFEST, SERVER_STATE, SIGNERS, STATE
from crossfl.protocol.manifest import StateManifest
from crossfl.protocol.records import Aggregation, Retention
from crossfl.server import state as server_state
from crossfl.storage import manifest
from crossfl.storage.files import link_tree, publish


def resume(
    last: Path,
    rounds: int,
    aggregation: Aggregation,
    retention: Retention,
    out: Path,
) -> None:
    """Write `out/global_model` and `out/state` as the last published round left them.

    Args:
        last: that round in the journal.
        rounds: rounds to run; another number than before in a run that was unlocked alone.
        aggregation: the same, of the aggregation.
        retention: which rounds the journal keeps from now on.
        out: folder to write into.

    Raises:
        CrossFLError: the file of signers cannot be read.
    """
    state = server_state.load(last / STATE)
    if state.aggregation.waits_for_all != aggregation.waits_for_all:
        raise CrossFLError(
            f"a run with closes: {state.aggregation.closes} cannot go on with closes: "
            f"{aggregation.closes}, which counts rounds otherwise: begin anew, from its model"
        )
    wanted = state.replace(
        rounds=rounds, aggregation=server_state.without_path(aggregation), retention=retention
    )
    with publish(out / GLOBAL_MODEL) as directory:
        link_tree(last / GLOBAL_MODEL, directory)
    with publish(out / STATE) as memory:
        link_tree(last / STATE, memory)
        # Never written in place: these files are the journal's, too.
        for name in (SERVER_STATE, SIGNERS, MANIFEST):
            (memory / name).unlink(missing_ok=True)
        server_state.write_signers(aggregation, memory)
        files = manifest.read(last / STATE, StateManifest).files
        renewed = (SERVER_STATE, SIGNERS)
        known = {name: file.sha256 for name, file in files.items() if name not in renewed}
        server_state.save(wanted, memory, known)
