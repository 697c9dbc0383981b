"""Look at facilities through the engine's own connectors: what is checked is what will run."""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamflow.core.deployment import Connector
from streamflow.deployment.connector import connector_classes
from streamflow.log_handler import logger

from crossfl.engine.connectors.queue import QueueConnector
from crossfl.engine.connectors.ssh import SSHConnector
from crossfl.engine.interruption import INTERRUPTION
from crossfl.sites.check.answers import first_line
from crossfl.sites.check.findings import Result, Site
from crossfl.sites.check.queue import QueueVisit
from crossfl.sites.check.visit import CONNECT, Visit
from crossfl.sites.streamflow_file import engine_validator


async def run(
    sites: Sequence[Site], folder: Path, *, room: float, wait: int | None
) -> list[Result]:
    """Check the sites, all at once.

    Args:
        sites: the deployments.
        folder: that of the StreamFlow file.
        room: GiB that have to be free in a work folder.
        wait: seconds that a test job may take; without it none is submitted.

    Raises:
        CrossFLError: the engine is not installed.
    """
    engine_validator()
    INTERRUPTION.heed(is_run=False)
    for noisy in (logger, logging.getLogger("asyncssh")):  # what they would say, the table says
        noisy.setLevel(logging.CRITICAL)
    wire = asyncio.Lock()
    results = await asyncio.gather(
        *(examine(site, folder.resolve(), wire, room=room, wait=wait) for site in sites)
    )
    return [result for site_results in results for result in site_results]


async def examine(
    site: Site, folder: Path, wire: asyncio.Lock, *, room: float, wait: int | None
) -> list[Result]:
    """Every check that makes sense at one site, and its connection ended."""
    try:
        connector = connect(site, folder)
    except Exception as error:
        remedy = "correct its `config`"
        return [Result(site.name, "deployment", "fail", first_line(error), remedy)]
    queued = isinstance(connector, QueueConnector)
    visit = QueueVisit(site, connector, wait) if queued else Visit(site, connector)
    try:
        await visit.examine(room, wire)
    finally:
        await visit.leave()
    return visit.results


def connect(site: Site, folder: Path) -> Connector:
    """The connector of a site, as the engine makes it, but one that gives up sooner."""
    config: dict[str, Any] = dict(site.config)
    kind = connector_classes[site.kind]
    if issubclass(kind, SSHConnector):
        config["retries"] = 1
        config["connectTimeout"] = min(CONNECT, config.get("connectTimeout", CONNECT))
    if issubclass(kind, QueueConnector):
        if site.wraps:
            config |= {"connector": connect(site.wraps, folder), "service": site.wraps.service}
        else:
            local = connector_classes["local"]("__LOCAL__", str(folder))
            config |= {"connector": local, "service": None}
    return kind(site.name, str(folder), **config)
