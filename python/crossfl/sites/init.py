"""Write a federation to begin with: job, model, example data, settings of its sites, a README."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from crossfl.errors import CrossFLError
from crossfl.protocol.text import quoted
from crossfl.sites import examples
from crossfl.sites.bind import shared
from crossfl.storage.files import publish
from crossfl.storage.job import Job

TEMPLATES = {
    "text": "plain text, a small language model with random weights",
    "instructions": "instructions and answers, a small language model with random weights",
    "lora": "an adapter on a base model that every facility holds",
    "vision": "images of different classes, a small image classifier",
}
"""Each template, in words; its files are in `workflows/templates`."""
SITES = ("local", "slurm", "pbs")
REMOTE = {
    "user": "me",
    "account": "project",
    "workdir": "/scratch/me/crossfl",
    "data": "/work/project/data",
    "venv": "/work/project/venv",
}
"""What every site with a scheduler is asked for, with values to be replaced."""
SCHEDULERS = {
    "slurm": {"partition": "gpu", "gpus": "1", "cpus": "8"},
    "pbs": {"queue": "gpu", "chunk": "ncpus=8:ngpus=1", "cpus": "8"},
}
MODELS, BASE = "models", "base"
"""Where the base model of the adapters lies, in the new folder."""
SEED = 0
"""Of the random weights of that model."""


def write(folder: Path, template: str, sites: str) -> None:
    """Write a federation into a new folder, whole or not at all.

    Args:
        folder: it must not exist.
        template: one of `TEMPLATES`.
        sites: one of `SITES`.

    Raises:
        CrossFLError: the folder exists.
    """
    with publish(folder) as partial:
        shutil.copytree(shared("workflows") / "templates" / template, partial, dirs_exist_ok=True)
        if template == "lora":
            _write_base(partial)
        job = Job.load(partial / "job.yml")
        for facility in job.facilities:
            dataset = partial / "data" / facility.name / facility.dataset
            dataset.mkdir(parents=True)
            made = examples.rows(facility.dataset, facility.name)
            _write_rows(dataset / "valid.jsonl", made[: examples.HELD_OUT])
            _write_rows(dataset / "train.jsonl", made[examples.HELD_OUT :])
        settings = {f.name: _settings(f.name, template, sites, folder) for f in job.facilities}
        heading = "# Settings of the facilities, for crossfl bind.\n"
        if sites != "local":
            heading += "# Replace the values by yours.\n"
        listing = yaml.safe_dump(settings, sort_keys=False)
        (partial / "sites.yml").write_text(heading + listing, encoding="utf-8")
        (partial / "README.md").write_text(_readme(folder, template, sites), encoding="utf-8")


def _write_rows(path: Path, made: list[examples.Row]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in made)
    path.write_text(text, encoding="utf-8")


def _write_base(folder: Path) -> None:
    """Make a base model with random weights, which shows the way and knows nothing."""
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed
    from transformers.utils import logging

    logging.disable_progress_bar()
    set_seed(SEED)
    config = AutoConfig.from_pretrained(folder / "config.json")
    model: Any = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder / MODELS / BASE)
    (folder / "config.json").unlink()


def _settings(name: str, template: str, sites: str, folder: Path) -> dict[str, str]:
    adapted = template == "lora"
    if sites == "local":
        models = {"models": str((folder / MODELS).resolve())} if adapted else {}
        return {"environment": "local", "folder": f"data/{name}"} | models
    models = {"models": "/work/project/models"} if adapted else {}
    host = f"login.{name}.example.org"
    return {"environment": sites, "host": host, **REMOTE, **SCHEDULERS[sites], **models}


def _readme(folder: Path, template: str, sites: str) -> str:
    bind = "crossfl bind --from sites.yml --job job.yml -o federation.yml"
    if sites == "local":
        models = f" --models {MODELS}" if template == "lora" else ""
        commands = [
            f"crossfl run job.yml --data data{models} --outdir results",
            bind,
            "crossfl check federation.yml --offline",
        ]
        told = (
            "The first command trains, and leaves model, history and report in `results/`. The "
            "other two make a StreamFlow file from `sites.yml`, and check it. To move a facility "
            "to a cluster, change its record in `sites.yml`, bind and check again, and start the "
            "federation with `streamflow run federation.yml`."
        )
    else:
        commands = [bind, "crossfl check federation.yml --submit", "streamflow run federation.yml"]
        told = (
            "Before them, replace the values in `sites.yml` by yours, and bring each folder in "
            "`data/` to the `data` folder of its facility. `crossfl check federation.yml "
            "--offline` makes no connection."
        )
        if template == "lora":
            told += f" The base model in `{MODELS}/` belongs into the `models` folder of each."
    listing = "\n".join(commands)
    return (
        f"# {folder.name}\n\nA federation of two facilities, *north* and *south*: "
        f"{TEMPLATES[template]}.\n\n## The next three commands\n\n```\n{listing}\n```\n\n{told}\n\n"
        "## Make it yours\n\n"
        "* The data in `data/` are examples, made by rule. Put yours in their place.\n"
        "* `job.yml` names model, facilities, rounds and training.\n"
        "* `sites.yml` says where each facility is, and how to log in.\n"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `crossfl init`."""
    parser.add_argument("folder", type=Path, help="folder to make")
    listing = "; ".join(f"{name}: {what}" for name, what in TEMPLATES.items())
    parser.add_argument(
        "--template", choices=TEMPLATES, default="text", help=f"default: text. {listing}"
    )
    parser.add_argument(
        "--sites", choices=SITES, default="local", help="where the facilities are; default: local"
    )


def main(args: argparse.Namespace) -> None:
    """Write the federation, and say what comes next.

    Raises:
        CrossFLError: the folder exists, or has no name.
    """
    folder = args.outdir / args.folder
    if not folder.name:
        raise CrossFLError(f"folder is {quoted(str(args.folder))}: name a new folder")
    write(folder, args.template, args.sites)
    print(f"wrote {folder}; next: cd {folder}, and read README.md")
