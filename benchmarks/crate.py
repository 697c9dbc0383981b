"""Validate a crate of `crossfl provenance` with `roc-validator`, where that package is installed.

`python benchmarks/crate.py CRATE` needs `pip install roc-validator`, in an environment of its own:
it asks for an older `rich`, and brings 18 packages. With --offline, where w3id.org cannot be
reached, the terms of the RO-Crate context that a crate of ours uses are those declared here. The
profiles are the validator's own either way.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

CONTEXT = "https://w3id.org/ro/crate/1.1/context"
BIOSCHEMAS = "https://bioschemas.org/"
TERMS = {
    "@vocab": "http://schema.org/",
    "File": "http://schema.org/MediaObject",
    "conformsTo": "http://purl.org/dc/terms/conformsTo",
    "ComputationalWorkflow": f"{BIOSCHEMAS}ComputationalWorkflow",
    "FormalParameter": f"{BIOSCHEMAS}FormalParameter",
    "input": f"{BIOSCHEMAS}ComputationalWorkflow#input",
    "output": f"{BIOSCHEMAS}ComputationalWorkflow#output",
}


NEED_CONTEXT = ("ro-crate-1.1_3.1", "ro-crate-1.1_3.2")
"""Checks that fetch the context themselves: that it is there, and that the document is compact."""


def answer_from_here() -> None:
    """Have rdflib take the context from `TERMS`."""
    from rdflib.plugins.shared.jsonld.context import Context

    fetch = Context._fetch_context

    def local(self: Any, source: str, *rest: Any, **more: Any) -> Any:
        if source == CONTEXT:
            return {"@context": TERMS}
        return fetch(self, source, *rest, **more)

    Context._fetch_context = local


def main() -> int:
    """Print what is required and missing; 0 if nothing is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("crate", type=Path, help="folder of a crate")
    parser.add_argument("--offline", action="store_true", help="use the terms declared here")
    args = parser.parse_args()
    from rocrate_validator import models, services

    if args.offline:
        answer_from_here()
    settings = services.ValidationSettings(
        rocrate_uri=str(args.crate),
        profile_identifier="workflow-run-crate",
        requirement_severity=models.Severity.REQUIRED,
    )
    result = services.validate(settings)
    issues = list(result.get_issues())
    if args.offline:
        issues = [issue for issue in issues if issue.check.identifier not in NEED_CONTEXT]
        print(f"not checked, for want of a connection: {', '.join(NEED_CONTEXT)}")
    for issue in issues:
        print(f"{issue.severity.name} {issue.check.identifier}: {issue.message}")
    print("not valid" if issues else "valid")
    return bool(issues)


if __name__ == "__main__":
    sys.exit(main())
