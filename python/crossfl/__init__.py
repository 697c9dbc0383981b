"""Cross-facility federated learning of foundation models, as CWL steps.

The Python interface is in `crossfl.api`; its names are attributes of this package.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crossfl.api import (
        CrossFLError,
        Job,
        Results,
        history_frame,
        load_job,
        load_model,
        read_history,
        simulate,
    )

__version__ = "0.1.0"
__all__ = [
    "CrossFLError",
    "Job",
    "Results",
    "history_frame",
    "load_job",
    "load_model",
    "read_history",
    "simulate",
]


def __getattr__(name: str) -> Any:
    """Import the interface when a name of it is first used; a step imports none of it."""
    if name not in __all__:
        raise AttributeError(f"module 'crossfl' has no attribute {name!r}")
    import importlib  # by name: the package itself is below everything in it

    return getattr(importlib.import_module("crossfl.api"), name)
