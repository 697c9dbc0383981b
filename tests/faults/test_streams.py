"""Streams cut and garbled at random points, on real connections: refused by name, or harmless."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from streamflow.core.deployment import ExecutionLocation
from streamflow.core.exception import WorkflowExecutionException

from crossfl.engine.connectors.ssh import SSHConnector
from crossfl.errors import CrossFLError
from crossfl.protocol.manifest import ModelManifest
from crossfl.server.rounds import aggregate
from crossfl.storage import manifest
from tests.support.faults import FULL
from tests.support.paths import ROUND
from tests.support.testbed import ssh

POINTS = 100 if FULL else 10
"""At which each stream is cut, and at which it is garbled."""
FAULT = """\
case " $* " in *" {mode} "*) ;; *) exec /usr/bin/tar "$@";; esac
fault() {{ python3 -c '
import sys
how, where = sys.argv[1:]
stream = bytearray(sys.stdin.buffer.read())
at = int(float(where) * len(stream))
if how == "cut":
    del stream[at:]
else:
    stream[at] ^= 1 << at % 8
sys.stdout.buffer.write(stream)' $(cat ~/fault); }}
{pipe}
"""


@pytest.fixture
async def wire(alpha: Any) -> AsyncIterator[SSHConnector]:
    """A connection to alpha's login node."""
    connector = ssh(alpha)
    yield connector
    await connector.undeploy(external=False)


async def location(wire: SSHConnector) -> ExecutionLocation:
    (found,) = (await wire.get_available_locations()).values()
    return found.location


def tree(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("how", ["cut", "flip"])
async def test_the_model_on_its_way_to_a_facility(
    wire: SSHConnector, alpha: Any, shim: Callable[[Any, str, str], None], how: str
) -> None:
    """The host says that not all of it came, or the facility's manifest does."""
    sent = tree(ROUND / "global_model")
    shim(alpha, "tar", FAULT.format(mode="xpf", pipe='fault | /usr/bin/tar "$@"'))
    chance, place, refused = random.Random(4), await location(wire), 0
    for number in range(POINTS):
        (Path(alpha.facts["home"]) / "fault").write_text(f"{how} {chance.random()}")
        arrived = Path(alpha.facts["workdir"]) / f"{how}-{number}"
        shutil.rmtree(arrived, ignore_errors=True)
        try:
            await wire.copy_local_to_remote(str(ROUND / "global_model"), str(arrived), [place])
            manifest.verify(arrived, ModelManifest)
        except WorkflowExecutionException as error:
            assert "Deployment alpha: what was sent there did not arrive whole" in str(error)
            refused += 1
        except CrossFLError as error:
            assert str(arrived) in str(error)
            refused += 1
        else:  # it hit what is no part of any file, such as a time or the padding
            assert tree(arrived) == sent
        shutil.rmtree(arrived, ignore_errors=True)
    assert refused >= POINTS / 2


FULL_DISK = """\
case " $* " in *" xpf "*) ;; *) exec /usr/bin/tar "$@";; esac
{reads}
echo 'tar: model.safetensors: Cannot write: No space left on device' >&2
exit 2
"""


@pytest.mark.parametrize("reads", ["cat > /dev/null", "true"], ids=["at the end", "at once"])
async def test_a_disk_that_is_full_at_the_facility(
    wire: SSHConnector,
    alpha: Any,
    shim: Callable[[Any, str, str], None],
    tmp_path: Path,
    reads: str,
) -> None:
    """It is known before a job waits in the queue for nothing, with the host's own word for it."""
    shim(alpha, "tar", FULL_DISK.format(reads=reads))
    model = Path(shutil.copytree(ROUND / "global_model", tmp_path / "model"))
    (model / "large").write_bytes(bytes(1 << 24))
    place = await location(wire)
    said = "did not arrive whole: .*No space left on device"
    with pytest.raises(WorkflowExecutionException, match=said):
        await wire.copy_local_to_remote(str(model), f"{alpha.facts['workdir']}/full", [place])


@pytest.mark.parametrize("how", ["cut", "flip"])
async def test_an_update_on_its_way_back(
    wire: SSHConnector,
    alpha: Any,
    shim: Callable[[Any, str, str], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    how: str,
) -> None:
    """Nothing of it is kept, the gate refuses it by name, or the mean is that of all that was sent.

    The site claims that each stream is whole.
    """
    model, state = ROUND / "global_model", ROUND / "state"
    other = ROUND / "karolina" / "update"
    aggregate(model, state, [ROUND / "leonardo" / "update", other], tmp_path / "whole", time.time())
    undisturbed = tree(tmp_path / "whole" / "global_model")
    there = Path(alpha.facts["workdir"]) / "update"
    shutil.rmtree(there, ignore_errors=True)
    shutil.copytree(ROUND / "leonardo" / "update", there)
    shim(alpha, "tar", FAULT.format(mode="chf", pipe='/usr/bin/tar "$@" | fault'))
    chance, place, refused = random.Random(5), await location(wire), 0
    for number in range(POINTS):
        (Path(alpha.facts["home"]) / "fault").write_text(f"{how} {chance.random()}")
        here, out = tmp_path / f"update-{number}", tmp_path / f"out-{number}"
        try:
            await wire.copy_remote_to_local(str(there), str(here), place)
            aggregate(model, state, [here, other], out, time.time())
        except WorkflowExecutionException as error:
            assert f"Deployment alpha: what came for {there} is refused" in str(error)
            assert not here.exists()
            refused += 1
        except CrossFLError as error:
            assert "1 of 2 updates can be averaged" in str(error)
            assert "is refused: " in str(error)
            assert not out.exists() or not any(out.iterdir())
            refused += 1
        else:
            assert tree(out / "global_model") == undisturbed
    assert refused >= POINTS / 2
    capsys.readouterr()
