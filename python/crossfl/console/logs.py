"""Print what a job of a facility printed, where the facility allows it.

A log can quote the data that a job failed on. So it stays at the facility, unless the facility's
job script says `CROSSFL_LOGS=1` (the setting `logs: yes`). What comes is cut and printable.
"""

import argparse
import asyncio
import re
import shlex
from pathlib import Path

from crossfl.console.run import Found, find
from crossfl.errors import CrossFLError
from crossfl.observe.live import fold, read
from crossfl.protocol.text import printable
from crossfl.protocol.variables import LOGS
from crossfl.sites.check.findings import Federation, Site

MOST_BYTES = 1 << 20
"""Of the end of a log."""
KEPT = "\n\t"
ALLOWED = re.compile(rf"^export {LOGS}=1\b", re.MULTILINE)


def path_of(found: Found, facility: str, round_: int | None) -> str:
    """The file at a facility with what a job of it printed: the last one, or that of a round.

    Raises:
        CrossFLError: no such job has ended.
    """
    live = fold(read(found.events))
    if (state := live.facilities.get(facility)) is None:
        known = ", ".join(sorted(live.facilities)) or "none"
        raise CrossFLError(f"{found.path.name} has no facility {facility!r}; it has {known}")
    path = state.log if round_ is None else state.logs.get(round_)
    if not path:
        rounds = ", ".join(map(str, sorted(state.logs))) or "none"
        raise CrossFLError(
            f"no log of a job of {facility} is known"
            + (f" for round {round_}; rounds with one: {rounds}" if round_ is not None else "")
            + ". A facility without a scheduler has none, and a job that goes on has none yet"
        )
    return path


def allowed(file: Path, facility: str) -> Site:
    """The site of a facility that lets its logs be fetched.

    Raises:
        CrossFLError: it does not, or the StreamFlow file does not name it.
    """
    sites = {site.name: site for site in Federation.load(file).sites}
    if (site := sites.get(facility)) is None:
        raise CrossFLError(
            f"{file} has no facility {facility!r}; it has {', '.join(sorted(sites))}"
        )
    script = site.script.read_text("utf-8", "replace") if site.script else ""
    if not ALLOWED.search(script):
        raise CrossFLError(
            f"{facility} does not let its logs be fetched: a log may quote the data. Read it "
            f"at the site; or, if the facility agrees, {site.setting('logs')} with `yes`"
        )
    return site


async def fetch(site: Site, folder: Path, path: str, lines: int) -> str:
    """The end of a file at a site.

    Raises:
        CrossFLError: the site cannot be reached, or the file cannot be read there.
    """
    from crossfl.engine.interruption import INTERRUPTION
    from crossfl.sites.check.online import connect
    from crossfl.sites.check.visit import CONNECT, LIMIT
    from crossfl.sites.streamflow_file import engine_validator

    engine_validator()
    INTERRUPTION.heed(is_run=False)
    connector = connect(site, folder.resolve())
    try:
        async with asyncio.timeout(LIMIT + CONNECT):
            places = await connector.get_available_locations(site.service)
            location = next(iter(places.values())).location
            script = f"tail -c {MOST_BYTES} -- {shlex.quote(path)} | tail -n {lines}"
            answer = await connector.run(
                location=location,
                command=[
                    "sh",
                    "-c",
                    shlex.quote(f"[ -r {shlex.quote(path)} ] || exit 3; {script}"),
                ],
                capture_output=True,
            )
    except TimeoutError:
        raise CrossFLError(f"{site.name} gave no answer: try again") from None
    except Exception as error:
        raise CrossFLError(f"{site.name} cannot be asked: {error}") from None
    finally:
        await connector.undeploy(False)
    text, status = answer or ("", 1)
    if status != 0:
        raise CrossFLError(f"{path} is not there any more at {site.name}, or not readable")
    return str(text)[:MOST_BYTES]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `crossfl logs`."""
    parser.add_argument("facility", help="whose job")
    parser.add_argument("--round", type=int, help="of which round; default: the last that ended")
    parser.add_argument("--journal", type=Path, help="journal, or folder of a run")
    parser.add_argument("--run", help="name of the run; default: the newest")
    parser.add_argument("--lines", type=_lines, default=200, help="lines of its end; default 200")
    parser.add_argument(
        "--file",
        type=Path,
        default=Path("streamflow.yml"),
        help="StreamFlow file of the federation; default: streamflow.yml",
    )


def _lines(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text) <= 100_000:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number from 1 to 100,000")
    return int(text)


def main(args: argparse.Namespace) -> None:
    """Print the end of the log."""
    site = allowed(args.file, args.facility)
    path = path_of(find(args.journal, args.run), args.facility, args.round)
    text = asyncio.run(fetch(site, args.file.parent, path, args.lines))
    print(printable(text, keep=KEPT))
