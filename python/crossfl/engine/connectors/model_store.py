"""The models of a site: each is sent once, when a job is about to need it, to all sites at once.

The engine brings its inputs to one job after another, and brings them anew for every round and
attempt. Here its copy of a model only takes note. The model is sent by the job itself, and so by
the jobs of all facilities at the same time. It lies at the site under its digest:

    <work folder>/models/<digest>/

and the input folder of a job gets hard links to its files. A model that is there is not sent again.
"""

from __future__ import annotations

import asyncio
import shlex
from abc import ABC
from collections.abc import Collection, Iterable, MutableSequence
from pathlib import Path, PurePosixPath
from typing import Any

from streamflow.core.deployment import Connector, ExecutionLocation
from streamflow.core.exception import WorkflowExecutionException
from streamflow.core.utils import random_name

from crossfl.engine.connectors.deferred import DeferredFolders, within
from crossfl.errors import CrossFLError
from crossfl.protocol.layout import MANIFEST
from crossfl.protocol.manifest import ModelManifest
from crossfl.storage import manifest

COPY_SECONDS = 3600
"""A model that takes longer to place at a site, where it may have to be copied, is not placed."""
MODELS_KEPT = 2
"""Models that stay at a site for a later attempt; a job that waits has links of its own."""

# A model that stands at the site is marked as the newest; the rest is removed but for a few.
LINK = """\
cd {store} 2>/dev/null && [ -d {digest} ] || exit 3
touch {digest}
mkdir -p {parent} && rm -rf {target} && {{ cp -al {digest} {target} 2>/dev/null || \
{{ rm -rf {target}; cp -a {digest} {target}; }}; }} || exit 4
ls -1td -- [0-9a-f]* | tail -n +{first} | while read -r old; do rm -rf -- "$old"; done
"""


class ModelStore(DeferredFolders, ABC):
    """A queue manager that sends models when its jobs need them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._models: dict[str, str] = {}
        """Where each model lies here, by the path at the site where a job looks for it."""
        self._unsent: set[str] = set()
        """The paths to which nothing was brought yet."""
        self._sending = asyncio.Lock()

    async def copy_local_to_remote(
        self,
        src: str,
        dst: str,
        locations: MutableSequence[ExecutionLocation],
        read_only: bool = False,
    ) -> None:
        if read_only and _is_model(Path(src)):
            self._promise(src, dst)
        else:
            await super().copy_local_to_remote(src, dst, locations, read_only)

    async def copy_remote_to_remote(
        self,
        src: str,
        dst: str,
        locations: MutableSequence[ExecutionLocation],
        source_location: ExecutionLocation,
        source_connector: Connector | None = None,
        read_only: bool = False,
    ) -> None:
        if read_only and source_location in locations and (model := self._models.get(src)):
            self._promise(model, dst)  # another attempt, or a job of the same model
        else:
            await super().copy_remote_to_remote(
                src, dst, locations, source_location, source_connector, read_only
            )

    def _promise(self, src: str, dst: str) -> None:
        self._models[dst] = src
        self._unsent.add(dst)

    async def begin(
        self,
        location: ExecutionLocation,
        job_name: str,
        root: PurePosixPath,
        folders: Collection[str] | None = None,
    ) -> None:
        """Bring the models, too, that jobs were promised to the paths where they look for them."""
        await super().begin(location, job_name, root, folders)
        async with self._sending:
            for dst in within(sorted(self._unsent), folders):
                await self._send(Path(self._models[dst]), dst, root / "models", location)
                self._unsent.discard(dst)

    def forget(self, folders: Iterable[str]) -> None:
        folders = list(folders)
        super().forget(folders)
        self._unsent.difference_update(within(self._unsent, folders))

    async def _send(
        self, src: Path, dst: str, store: PurePosixPath, location: ExecutionLocation
    ) -> None:
        # That of the manifest, which has those of all other files.
        digest = manifest.sha256(src / MANIFEST)
        link = LINK.format(
            store=shlex.quote(str(store)),
            digest=digest,
            parent=shlex.quote(str(PurePosixPath(dst).parent)),
            target=shlex.quote(dst),
            first=MODELS_KEPT + 1,
        )
        if await self._status_of(link, location) == 0:
            return
        arrival = store / f".{random_name()}"
        try:
            await super().copy_local_to_remote(str(src), str(arrival), [location])
            rename = f"rm -rf {digest} && mv -T {arrival.name} {digest}"
            await self._status_of(f"cd {shlex.quote(str(store))} && {rename}", location)
        except BaseException:
            await asyncio.shield(self._status_of(f"rm -rf {shlex.quote(str(arrival))}", location))
            raise
        if (status := await self._status_of(link, location)) != 0:
            raise WorkflowExecutionException(
                f"Deployment {self.deployment_name}: a model was sent and cannot be placed in "
                f"{dst} (status {status}): look at the space and the rights of {store}"
            )

    async def _status_of(self, script: str, location: ExecutionLocation) -> int:
        """Run a script on the login node; its exit status."""
        _, status = await self._ask(location, "sh", "-c", script, seconds=COPY_SECONDS)
        return status


def _is_model(path: Path) -> bool:
    """Whether a path is a folder of a global model."""
    try:
        manifest.read(path, ModelManifest)
    except (CrossFLError, OSError):
        return False
    return True
