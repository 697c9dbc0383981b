"""Settings: what is the user's to say of a facility, and the only forms that it may have.

A value of such a form means nothing to a shell, to a scheduler or to a template.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import yaml

from crossfl.engine.placement import VM
from crossfl.errors import CrossFLError
from crossfl.storage.job import Job

SAFE = r"[A-Za-z0-9][A-Za-z0-9._+-]*"
WORD = re.compile(SAFE)
HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]*(:[0-9]{1,5})?")
COUNT = re.compile(r"[1-9][0-9]{0,4}")
FLOOR = re.compile(r"[1-9][0-9]{0,8}")
TIME = re.compile(r"[0-9]{1,3}:[0-5][0-9]:[0-5][0-9]")
ABSOLUTE = re.compile(r"(/[A-Za-z0-9._+@-]+)+")
LOCAL = re.compile(rf"(~/|/|(\.\./)+)?\.?{SAFE}(/\.?{SAFE})*")
JUMP = re.compile(rf"({SAFE}@)?{HOST.pattern}")
PROXY = re.compile(rf"https?://{HOST.pattern}")
OPTION = r"[a-z][a-z_-]*=[A-Za-z0-9][A-Za-z0-9._+:,/@-]*"
OPTIONS = re.compile(rf"{OPTION}( {OPTION})*")
WORDS = re.compile(rf"{SAFE}(/{SAFE})*( {SAFE}(/{SAFE})*)*")


class Setting(NamedTuple):
    """What a setting means, and the only form it may have."""

    means: str
    form: re.Pattern[str] = WORD


SETTINGS = {
    "account": Setting("project that the jobs are charged to"),
    "chunk": Setting(
        "PBS resources of one node, like ncpus=64:ngpus=4",
        re.compile(rf"[a-z_]+={SAFE}(:[a-z_]+={SAFE})*"),
    ),
    "container": Setting("Apptainer image with crossfl at the facility, absolute", ABSOLUTE),
    "cpus": Setting("CPU cores of each rank", COUNT),
    "data": Setting("folder of the datasets at the facility, absolute", ABSOLUTE),
    "directives": Setting(
        "what else each job asks for, `sbatch` options or PBS resources, like reservation=maker",
        OPTIONS,
    ),
    "feature": Setting("Slurm feature of the nodes, like hbm80g"),
    "filesystems": Setting(
        "file systems that the jobs use, like home:eagle", re.compile(r"[a-z_]+(:[a-z_]+)*")
    ),
    "folder": Setting("folder of the datasets, relative to the StreamFlow file", LOCAL),
    "gpus": Setting("GPUs of each node", COUNT),
    "host": Setting("login node, host or host:port", HOST),
    "jump": Setting("host to log in through, as user@host:port, as ssh's ProxyJump", JUMP),
    "key": Setting("private ssh key on this machine, relative to the StreamFlow file", LOCAL),
    "known_hosts": Setting("file with the host keys to trust, on this machine", LOCAL),
    "logs": Setting(
        "`yes` lets `crossfl logs` fetch what a job printed there; left out, it does not",
        re.compile("yes"),
    ),
    "min_samples": Setting("validation samples below which no metric leaves the facility", FLOOR),
    "min_tokens": Setting("predicted tokens below which no metric leaves the facility", FLOOR),
    "models": Setting("folder of base models at the facility, absolute, for LoRA", ABSOLUTE),
    "modules": Setting("environment modules to load, separated by blanks", WORDS),
    "nodes": Setting("nodes of each job", COUNT),
    "partition": Setting("Slurm partition"),
    "prompts": Setting(
        "`yes` lets the model complete the job's prompts there; left out, it does not",
        re.compile("yes"),
    ),
    "proxy": Setting("web proxy of the compute nodes, like http://proxy.example.org:3128", PROXY),
    "qos": Setting("Slurm quality of service"),
    "queue": Setting("PBS queue"),
    "ranks": Setting("ranks on each node, as a rule one for each GPU", COUNT),
    "staging": Setting(
        "folder of a compute node for copies of model and data, absolute, or a variable with it",
        re.compile(rf"[A-Z][A-Z0-9_]*|{ABSOLUTE.pattern}"),
    ),
    "state": Setting("folder for what is kept between rounds there, absolute", ABSOLUTE),
    "threads": Setting("threads of each rank, where that is fewer than its cores", COUNT),
    "time": Setting("wall-clock limit of each job, HH:MM:SS", TIME),
    "user": Setting("login name there"),
    "venv": Setting("virtual environment with crossfl at the facility, absolute", ABSOLUTE),
    "workdir": Setting("scratch folder there for jobs and caches, absolute", ABSOLUTE),
}


@dataclass(kw_only=True)
class Place:
    """A facility, or the aggregation VM, as the user declares it."""

    name: str
    environment: str
    settings: dict[str, str] = field(default_factory=dict)


def read_settings(path: Path) -> dict[str, dict[str, str]]:
    """Read a settings file: a mapping of facilities to their settings, every value as written.

    Raises:
        CrossFLError: it cannot be read, or it has another form.
    """
    try:
        # Not even numbers are converted: 01:00:00 is a time, and no sum of seconds.
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CrossFLError(f"{path} cannot be read as a settings file: {error}") from None
    if not isinstance(document, dict) or not all(isinstance(v, dict) for v in document.values()):
        raise CrossFLError(f"{path}: expected, for each facility, a mapping of its settings")
    for name, settings in document.items():
        if odd := [key for key, value in settings.items() if not isinstance(value, str)]:
            raise CrossFLError(
                f"{path}: {name}.{odd[0]} has to be one value, not a list or a mapping"
            )
    return document


def places_of(
    facilities: Sequence[str], changes: Sequence[str], settings: Path | None, job: Path | None
) -> tuple[list[Place], Place]:
    """The facilities and the aggregation VM that a user asks for.

    Args:
        facilities: words `NAME` or `NAME=ENVIRONMENT`; none means those of the job, else those of
            the settings file.
        changes: words `FACILITY.SETTING=VALUE`, which go before the settings file.
        settings: settings file.
        job: job file.

    Raises:
        CrossFLError: a file cannot be read, or a setting belongs to none of the facilities.
    """
    declared = read_settings(settings) if settings else {}
    environments = {name: values.pop("environment", name) for name, values in declared.items()}
    if facilities:
        pairs = [word.partition("=") for word in facilities]
        environments |= {name: environment for name, _, environment in pairs if environment}
        names = [name for name, _, _ in pairs]
    elif job:
        names = [facility.name for facility in Job.load(job).facilities]
    else:
        names = [name for name in declared if name != VM]
    environments.setdefault(VM, "local")
    places = {
        name: Place(
            name=name,
            environment=environments.get(name, name),
            settings=dict(declared.get(name, {})),
        )
        for name in [*names, VM]
    }
    for word in changes:
        target, equals, value = word.partition("=")
        name, _, setting = target.rpartition(".")
        if not equals or name not in places:
            raise CrossFLError(
                f"--set {word!r}: expected FACILITY.SETTING=VALUE, "
                f"the facility one of {', '.join(places)}"
            )
        if setting == "environment":
            places[name].environment = value
        else:
            places[name].settings[setting] = value
    return [places[name] for name in names], places[VM]
