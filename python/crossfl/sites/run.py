"""Run a federation on this machine through the real engine, without a StreamFlow file of one's own.

The StreamFlow file and the journal are made in the folder of the outputs. The same command goes on
after an interruption, as `streamflow run` does, and ends with its exit status.
"""

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from crossfl.engine.placement import VM
from crossfl.errors import CrossFLError
from crossfl.protocol.layout import EVALUATIONS, GLOBAL_MODEL, HISTORY_LINES, REPORT
from crossfl.sites.bind import ours, shared
from crossfl.sites.settings import Place
from crossfl.sites.streamflow_file import compose
from crossfl.storage.files import check_vacant, write_bytes
from crossfl.storage.job import Job

FILE = "federation.yml"
"""Name of the StreamFlow file that is made."""
ENGINE = "from crossfl.sites.run import run_engine; run_engine()"
"""A process of its own: the engine loads its extensions once, and `compose` has loaded them."""
OUTPUTS = {
    "model": GLOBAL_MODEL,
    "history": HISTORY_LINES,
    "scores": EVALUATIONS,
    "report": REPORT,
}
"""What a run leaves in its folder."""


def prepare(path: Path, data: Path, out: Path, models: Path | None = None) -> Path:
    """Write the StreamFlow file of a job whose facilities are all on this machine.

    Args:
        path: job file.
        data: folder with one folder for each facility, which holds its datasets.
        out: folder of the outputs, where the file is made.
        models: folder of the base models of adapters.

    Returns:
        The StreamFlow file.

    Raises:
        CrossFLError: the job or a folder is not as it should be, or a file is in the way.
    """
    job = Job.load(path)
    job.check(path)
    check_vacant(out / GLOBAL_MODEL)
    names = [facility.name for facility in job.facilities]
    if missing := [name for name in names if not (data / name).is_dir()]:
        raise CrossFLError(
            f"{data / missing[0]} is no folder: --data names a folder with a folder of datasets "
            f"for each facility, {', '.join(names)}"
        )
    if job.lora and not (models and (models / job.lora.base_model).is_dir()):
        raise CrossFLError(
            f"lora.base_model is {job.lora.base_model!r}: name the folder that holds it with "
            "--models"
        )
    file = out / FILE
    if file.exists() and not ours(file):
        raise CrossFLError(f"{file} was not made by crossfl: choose another --outdir")
    # A path of the user's may have any form, and a setting may not: the paths come last.
    places = [Place(name=n, environment="local", settings={"folder": "data"}) for n in names]
    vm = Place(name=VM, environment="local")
    workflow = shared("workflows") / "federated.cwl"
    (made,) = compose(places, vm, shared("environments"), workflow, path, file).values()
    heading, _, body = made.decode().partition("\n")
    document: dict[str, Any] = yaml.safe_load(body)
    for name in names:
        config = document["deployments"][name]["config"]
        config["data"] = str((data / name).resolve())
        if models:
            config["models"] = str(models.resolve())
    out.mkdir(parents=True, exist_ok=True)
    write_bytes(file, f"{heading}\n{yaml.safe_dump(document, sort_keys=False)}".encode())
    return file


def run_engine(words: Sequence[str] | None = None) -> NoReturn:
    """Run the engine in this process, say where the outputs are, and exit with its status.

    Args:
        words: what `streamflow run` takes, the folder of the outputs first; unset, those of the
            process.

    Raises:
        SystemExit: always.
    """
    from streamflow.main import main as streamflow

    out, *more = sys.argv[1:] if words is None else words
    with contextlib.redirect_stdout(io.StringIO()):  # the outputs, as JSON
        status = streamflow(["run", "--outdir", out, *more])
    if status == 0:
        for name, output in OUTPUTS.items():
            print(f"{name:<8} {Path(out, output)}")
    sys.exit(status)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `crossfl run`."""
    parser.add_argument("job", type=Path, help="job file, as for workflows/federated.cwl")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder with a folder of datasets per facility"
    )
    parser.add_argument("--models", type=Path, help="folder of the base models of adapters")
    parser.add_argument(
        "--debug", action="store_true", help="show the engine's own account of its work"
    )


def main(args: argparse.Namespace) -> NoReturn:
    """Prepare the run, and become the engine: signals and exit status are its own.

    Raises:
        CrossFLError: the job or a folder is not as it should be.
    """
    file = prepare(args.job, args.data, args.outdir, args.models)
    words = [str(args.outdir), "--debug" if args.debug else "--quiet", str(file)]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-P", "-c", ENGINE, *words])  # noqa: S606 (a list of words)
