"""The documentation as a site: `make docs`. The pages read the same on a forge."""

import re
from pathlib import Path

from crossfl import __version__

project = "CrossFL"
author = "The CrossFL authors"
version = release = __version__
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["site"]
html_theme = "furo"
html_title = f"CrossFL {__version__}"
html_show_copyright = False
myst_heading_anchors = 3
suppress_warnings = ["misc.highlighting_failure", "toc.no_title", "toc.multiple_toc_parents"]
pygments_style = "friendly"

DOCS = Path(__file__).parent
LINK = re.compile(r"\[((?:[^][]|\[[^]]*\])*)\]\(([^)\s]+)\)")


def leave_out_the_repository(app: object, name: str, source: list[str]) -> None:
    """Turn links to files of the repository that are no pages into their words."""
    page = DOCS / f"{name}.md"

    def words(match: "re.Match[str]") -> str:
        target = match[2].split("#")[0]
        if not target or "://" in target or target.startswith("mailto:"):
            return match[0]
        path = (page.parent / target).resolve()
        is_page = path.is_relative_to(DOCS) and path.suffix == ".md"
        return match[0] if is_page else match[1]

    source[0] = LINK.sub(words, source[0])


def setup(app: object) -> None:
    """Called by Sphinx."""
    app.connect("source-read", leave_out_the_repository)  # type: ignore[attr-defined]
