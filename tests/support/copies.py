"""A copy of the tests' federation that a test may change."""

import shutil
from pathlib import Path

from tests.support.paths import CWL, ROOT


def copy_federation(folder: Path) -> Path:
    """Copy `tests/cwl`, beside the workflows and steps that its files name; where the copy is."""
    for name in ("workflows", "steps"):
        (folder / name).symlink_to(ROOT / name)
    return Path(shutil.copytree(CWL, folder / "tests" / "cwl"))
