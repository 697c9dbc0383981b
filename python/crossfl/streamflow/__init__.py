"""The StreamFlow plugin: facilities as deployments, and jobs routed to them by name."""

from importlib.resources import files

from streamflow.data import data_manager_classes
from streamflow.deployment.connector import connector_classes
from streamflow.ext.plugin import StreamFlowPlugin

from crossfl.streamflow import ending
from crossfl.streamflow.failures import DataManager, FacilityFailureManager
from crossfl.streamflow.filter import FacilityFilter
from crossfl.streamflow.local import FacilityLocalConnector, LocalConnector
from crossfl.streamflow.pbs import PBSConnector
from crossfl.streamflow.slurm import SlurmConnector
from crossfl.streamflow.ssh import SSHConnector


class CrossFLPlugin(StreamFlowPlugin):
    """Registers the connectors, the binding filter and the failure manager."""

    def register(self) -> None:
        """Called once by the engine."""
        self.register_schema(files(__package__).joinpath("schemas", "base", "archive.json"))
        self.register_binding_filter("crossfl.facility", FacilityFilter)
        self.register_failure_manager("crossfl.facility", FacilityFailureManager)
        self.register_connector("crossfl.local", FacilityLocalConnector)
        self.register_connector("crossfl.ssh", SSHConnector)
        self.register_connector("crossfl.slurm", SlurmConnector)
        self.register_connector("crossfl.pbs", PBSConnector)
        # The engine's own place for what no deployment is named for, the outputs of a run among
        # it, is of type `local`: what comes back from a site ends there.
        connector_classes["local"] = LocalConnector
        data_manager_classes["default"] = DataManager
        ending.watch()
