"""The engine's data manager, with one fault mended: a failed copy blocked what waited for it.

It is also the first of our objects that a run makes, whatever its StreamFlow file says, and is
given that file before anything is deployed. So it is here that the jobs are checked.
"""

from pathlib import Path
from typing import Any

from streamflow.core.context import StreamFlowContext
from streamflow.core.data import DataType
from streamflow.data.manager import DefaultDataManager

from crossfl.engine.jobs import job_of
from crossfl.engine.shutdown import is_run


class DataManager(DefaultDataManager):
    """The engine's, in which a copy that failed is not waited for ever after.

    Raises:
        CrossFLError: the job of a federation is not as it should be.
    """

    def __init__(self, context: StreamFlowContext) -> None:
        super().__init__(context)
        if is_run():
            for workflow in context.config["workflows"].values():
                job_of(workflow, context.config, Path(context.config["path"]))

    async def transfer_data(self, *args: Any, **kwargs: Any) -> None:
        try:
            await super().transfer_data(*args, **kwargs)
        except BaseException:
            path = kwargs["dst_path"]
            for location in kwargs["dst_locations"]:
                for copy in self.path_mapper.get(path, None, location.deployment, location.name):
                    if copy.path == path:
                        copy.data_type = DataType.INVALID
                        copy.available.set()
            raise
