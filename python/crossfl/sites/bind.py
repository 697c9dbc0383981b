"""Compose facilities into a StreamFlow file: their deployments, their job scripts, the bindings."""

import argparse
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from crossfl.errors import CrossFLError
from crossfl.sites.environment import MARK
from crossfl.sites.settings import places_of
from crossfl.sites.streamflow_file import compose
from crossfl.storage.files import write_files

SHARE = Path(__file__).parents[1] / "share"
"""Where the environments and workflows lie: in a checkout, links to those of the repository."""


def ours(path: Path) -> bool:
    """Whether an earlier binding made this file."""
    return path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace")


def shared(name: str) -> Path:
    """A folder that comes with the package, as seen from the current one."""
    return Path(os.path.relpath((SHARE / name).resolve()))


def stale(out: Path, files: Mapping[Path, bytes]) -> Iterator[Path]:
    """Job scripts of an earlier binding that this one has no use for."""
    for path in sorted(out.with_suffix(".d").glob("*.sh")):
        if path not in files and ours(path):
            yield path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `crossfl bind`."""
    parser.add_argument(
        "--facility",
        action="append",
        metavar="NAME[=ENVIRONMENT]",
        help="facility, of the environment of its name or of another; "
        "default: those of the job, else those of --from",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FACILITY.SETTING=VALUE",
        help="a setting; those of the aggregation machine are vm.SETTING",
    )
    parser.add_argument(
        "--from",
        dest="settings",
        type=Path,
        metavar="FILE",
        help="settings by facility, for example environments/eurohpc.yml; --set goes before it",
    )
    parser.add_argument("--job", type=Path, help="job file, the inputs of the workflow")
    parser.add_argument(
        "--workflow", type=Path, help="CWL workflow; default: workflows/federated.cwl"
    )
    parser.add_argument(
        "--environments",
        type=Path,
        help="folder of environments; default: those that come with crossfl",
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("streamflow.yml"), help="StreamFlow file to write"
    )
    parser.add_argument(
        "--force", action="store_true", help="overwrite files that crossfl bind has not made"
    )


def main(args: argparse.Namespace) -> None:
    """Write the StreamFlow file and the job scripts, and say what comes next.

    Raises:
        CrossFLError: a flag, a setting or a file is not as it should be, or a file is in the way.
    """
    out = args.outdir / args.output
    if not out.parent.is_dir() or out.is_dir():
        raise CrossFLError(f"{out} cannot be a file: make {out.parent}, or choose another --output")
    places, vm = places_of(args.facility or [], args.set, args.settings, args.job)
    workflow = args.workflow or shared("workflows") / "federated.cwl"
    environments = args.environments or shared("environments")
    files = compose(places, vm, environments, workflow, args.job, out)
    if not args.force and (foreign := [path for path in files if path.exists() and not ours(path)]):
        raise CrossFLError(
            f"{foreign[0]} exists and was not made by 'crossfl bind': choose another --output, "
            "or overwrite it with --force"
        )
    try:
        for folder in {path.parent for path in files}:
            folder.mkdir(exist_ok=True)
        write_files(files)
        for path in stale(out, files):
            path.unlink()
    except OSError as error:
        raise CrossFLError(f"{out} cannot be written: {error}") from None
    print(f"wrote {', '.join(str(path) for path in files)}")
    first = [] if args.job else ["bind again with --job"]
    print(f"next: {', then '.join([*first, f'crossfl check {out}', f'streamflow run {out}'])}")
