"""The engine's data manager, with one fault mended: a failed copy blocked what waited for it."""

from typing import Any

from streamflow.core.data import DataType
from streamflow.data.manager import DefaultDataManager


class DataManager(DefaultDataManager):
    """The engine's, in which a copy that failed is not waited for ever after."""

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
