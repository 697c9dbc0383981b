"""Whether a site answers, asked through whatever the engine has wrapped around its connector."""

from contextvars import ContextVar
from typing import Any

from streamflow.deployment.future import FutureConnector
from streamflow.deployment.wrapper import ConnectorWrapper

WITHOUT_HARDWARE: ContextVar[bool] = ContextVar("WITHOUT_HARDWARE", default=False)
"""Whether who asks a login node for its locations has no use for its hardware."""


def innermost(connector: Any) -> Any:
    """The connector of the host itself; None where the engine has not deployed it yet."""
    while isinstance(connector, ConnectorWrapper | FutureConnector):
        connector = deployed(connector)
        if isinstance(connector, ConnectorWrapper):
            connector = connector.connector
    return connector


def deployed(connector: Any) -> Any:
    """A connector without the engine's wrapper for one that nothing has used yet."""
    return connector._connector if isinstance(connector, FutureConnector) else connector


async def probe(connector: Any) -> None:
    """Ask a connector, or the one inside it, whether its host answers; raises where it does not.

    A deployment that nothing has used yet holds nothing, and cannot be asked.
    """
    if ask := getattr(innermost(connector), "probe", None):
        await ask()
