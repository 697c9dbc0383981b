"""Check every facility of a StreamFlow file before a job is spent: what fails, how to fix it."""

import argparse
import asyncio
from pathlib import Path

from crossfl.errors import CrossFLError
from crossfl.sites.check import offline, table
from crossfl.sites.check.findings import Federation

FAILED = 1
"""Exit status where something fails."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `crossfl check`."""
    parser.add_argument("file", type=Path, help="StreamFlow file, such as streamflow.yml")
    parser.add_argument(
        "--facility", action="append", metavar="NAME", help="check this one only; repeatable"
    )
    parser.add_argument("--offline", action="store_true", help="make no connection")
    parser.add_argument(
        "--submit", action="store_true", help="run a job of two minutes at most at each facility"
    )
    parser.add_argument(
        "--wait",
        type=int,
        default=900,
        metavar="SECONDS",
        help="how long such a job may take, its time in the queue included; default 900",
    )
    parser.add_argument(
        "--room",
        type=float,
        default=10.0,
        metavar="GIB",
        help="free space that a work folder needs; default 10",
    )
    parser.add_argument("--format", choices=("text", "json"), default="text", help="of the table")


def main(args: argparse.Namespace) -> int:
    """Print the table; 0 where nothing fails, else `FAILED`.

    Raises:
        CrossFLError: the flags contradict each other, or a file cannot be checked at all.
    """
    if args.wait < 1 or args.room < 0:
        raise CrossFLError("--wait takes at least 1 second, and --room at least 0 GiB")
    if args.offline and args.submit:
        raise CrossFLError("--submit needs a connection: leave out --offline")
    federation = Federation.load(args.file)
    sites = federation.sites
    if args.facility:
        names = {site.name for site in sites}
        if unknown := sorted(set(args.facility) - names):
            raise CrossFLError(
                f"{args.file} has no facility {unknown[0]!r}; it has {', '.join(sorted(names))}"
            )
        sites = tuple(site for site in sites if site.name in args.facility)
    results = [*federation.results, *(r for site in sites for r in offline.examine(site))]
    if not args.offline:
        from crossfl.engine.interruption import INTERRUPTION
        from crossfl.sites.check import online

        wait = args.wait if args.submit else None
        try:
            results += asyncio.run(online.run(sites, args.file.parent, room=args.room, wait=wait))
        except asyncio.CancelledError:
            INTERRUPTION.exit()
    order = {name: i for i, name in enumerate((args.file.name, *(site.name for site in sites)))}
    results.sort(key=lambda result: order[result.facility])
    if args.format == "json":
        table.show_json(args.file, results)
    else:
        table.show(results)
    return FAILED if table.has_failed(results) else 0
