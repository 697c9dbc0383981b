"""The StreamFlow plugin: facilities as deployments, and jobs routed to them by name."""

import asyncio
import contextlib
import os
from importlib.resources import files

from streamflow.ext.plugin import StreamFlowPlugin

from crossfl.engine import compatibility, shutdown, terminal
from crossfl.engine.interruption import INTERRUPTION
from crossfl.engine.placement import FILTER, LOCAL
from crossfl.engine.private import UMASK


class CrossFLPlugin(StreamFlowPlugin):
    """Registers the connectors, the binding filter and the failure manager."""

    def register(self) -> None:
        """Called once by the engine, before it reads the StreamFlow file.

        Raises:
            CrossFLError: this engine is not the one that the plugin was written for.
        """
        # First, so that an error from here on is one message too, and harmless.
        shutdown.watch()
        terminal.guard()
        with contextlib.suppress(RuntimeError):  # no run: `crossfl check` reads a file
            asyncio.get_running_loop()
            INTERRUPTION.heed(is_run=True)
            os.umask(UMASK)  # before the engine makes the folder of its database
        compatibility.check_version()
        compatibility.warn_of_encoding()
        # Not at the top: in another version of the engine these imports may fail.
        from streamflow.data import data_manager_classes
        from streamflow.deployment.connector import connector_classes

        from crossfl.engine.connectors.local import FacilityLocalConnector, LocalConnector
        from crossfl.engine.connectors.pbs import PBSConnector
        from crossfl.engine.connectors.slurm import SlurmConnector
        from crossfl.engine.connectors.ssh import SSHConnector
        from crossfl.engine.data import DataManager
        from crossfl.engine.recovery import replay
        from crossfl.engine.recovery.failures import FacilityFailureManager
        from crossfl.engine.routing import FacilityFilter

        compatibility.check_names([*replay.missing_names(), *shutdown.missing_names()])
        self.register_schema(files("crossfl.engine").joinpath("schemas", "base", "archive.json"))
        self.register_binding_filter(FILTER, FacilityFilter)
        self.register_failure_manager("crossfl.facility", FacilityFailureManager)
        self.register_connector(LOCAL, FacilityLocalConnector)
        self.register_connector("crossfl.ssh", SSHConnector)
        self.register_connector("crossfl.slurm", SlurmConnector)
        self.register_connector("crossfl.pbs", PBSConnector)
        # The engine's own place for what no deployment is named for, the outputs of a run among
        # it, is of type `local`: what comes back from a site ends there.
        connector_classes["local"] = LocalConnector
        data_manager_classes["default"] = DataManager
