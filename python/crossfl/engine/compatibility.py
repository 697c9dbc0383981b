"""Checks that the installed engine is the one that the plugin was written for.

The plugin repeats steps, overrides methods and reads log records that StreamFlow does not offer to
plugins. Another version would fail in the middle of a run, where a facility has just failed.
"""

import importlib.metadata
import importlib.util
import locale
from collections.abc import Iterable
from pathlib import Path

from streamflow.log_handler import logger

from crossfl.errors import CrossFLError

VERSION = "0.2.0rc3"


def check_version() -> None:
    """Check that the engine has the one version whose private names are known.

    Raises:
        CrossFLError: it has another.
    """
    installed = importlib.metadata.version("streamflow")
    if installed != VERSION:
        raise CrossFLError(
            f"StreamFlow {installed} is installed, and this crossfl works with {VERSION} only: "
            f"pip install 'streamflow=={VERSION}'"
        )


def check_names(missing: Iterable[str]) -> None:
    """Check that no name which the plugin uses is missing from the engine.

    Raises:
        CrossFLError: some are.
    """
    if names := list(missing):
        raise CrossFLError(
            f"the installed StreamFlow {VERSION} was changed: it lacks {', '.join(names)}, without "
            f"which a failed facility could not be recovered nor a failed run ended. Restore it: "
            f"pip install --force-reinstall --no-deps 'streamflow=={VERSION}'"
        )


def warn_of_encoding() -> None:
    """Say where words of a job may fail: the engine reads files and starts steps in the locale."""
    if locale.getpreferredencoding(False).lower().replace("-", "") != "utf8":
        logger.warning(
            f"The locale is {locale.getpreferredencoding(False)}, and not UTF-8: the engine fails "
            f"at words that it lacks. Set LC_ALL=C.UTF-8, or PYTHONUTF8=1"
        )


def source_of(module: str) -> str:
    """The source text of a module, which is not imported; empty where there is none."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # its package is missing
        return ""
    if spec is None or spec.origin is None:
        return ""
    return Path(spec.origin).read_text(encoding="utf-8")
