"""Where the tests' data lie."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
CWL = ROOT / "tests" / "cwl"
DATA = CWL / "data"
ROUND = CWL / "round"
"""A federation after initialisation: global_model, state and the updates of round 1."""
