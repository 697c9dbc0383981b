"""Every shipped environment composes, and no setting reaches a shell as anything but itself.

What is checked here is form. That a facility takes the jobs can only be seen there.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import pytest
import yaml

from crossfl import cli
from crossfl.errors import CrossFLError
from crossfl.sites.environment import PLACEHOLDER, Environment
from crossfl.sites.settings import SETTINGS, Place, read_settings
from crossfl.sites.streamflow_file import FACILITY_STEPS, steps_of, validate
from tests.support.paths import CWL, ROOT

ENVIRONMENTS = ROOT / "environments"
NAMES = sorted(path.parent.name for path in ENVIRONMENTS.glob("*/deployment.yml"))
SHIPPED = [Environment.load(ENVIRONMENTS, name) for name in NAMES]
SCHEDULED = [name for name in NAMES if name not in ("local", "vm")]
ROUND_CWL = ROOT / "workflows" / "round.cwl"
DUMMY = {
    "account": "abc123",
    "chunk": "ncpus=64:ngpus=4",
    "data": "/work/abc123/data",
    "folder": "data/here",
    "host": "login.example.org",
    "partition": "gpu",
    "queue": "workq",
    "user": "me",
    "venv": "/work/abc123/venv",
    "workdir": "/scratch/abc123/crossfl",
}
HOSTILE = [
    "a; id", "a;id", "$(id)", "`id`", "a\nid", "a\n", "\na", "a b", "a'b", 'a"b', "-a", "--wrap=id",
    "a|id", "a&id", "a>b", "a<b", "a\\b", "a*", "a{{b}}", "{%b%}", "a#b", "", " ", "a\0b", "ä", "~",
]  # fmt: skip
STEPS = steps_of(ROOT / "workflows" / "federated.cwl")
Bind = Callable[..., tuple[int, str]]


@pytest.fixture
def crossfl_bind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Bind:
    """Run `crossfl bind` in an empty folder; its exit status, and what it printed."""
    monkeypatch.chdir(tmp_path)

    def command(*words: str | Path) -> tuple[int, str]:
        status = cli.main(["bind", *(str(word) for word in words)])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return command


def required(name: str, facility: str, **changes: str) -> list[str]:
    """The `--set` words that an environment cannot do without, with dummy values."""
    environment = Environment.load(ENVIRONMENTS, name)
    needed = {k for k in environment.placeholders() if k in SETTINGS} - {*environment.defaults}
    needed -= {"container", *(["venv"] if "container" in changes else [])}
    values = {key: DUMMY[key] for key in sorted(needed)} | changes
    return [word for k, v in values.items() for word in ("--set", f"{facility}.{k}={v}")]


def load(path: Path = Path("streamflow.yml")) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text())
    return document


def test_the_environments_that_are_promised() -> None:
    slurm = "leonardo karolina lumi marenostrum5 meluxina vega deucalion discoverer frontier"
    assert set(NAMES) == {
        *slurm.split(), "perlmutter", "slurm", "polaris", "aurora", "improv", "pbs", "local", "vm",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_environment_composes(name: str, crossfl_bind: Bind) -> None:
    facility = f"my-{name}"
    status, output = crossfl_bind("--facility", f"{facility}={name}", *required(name, facility))
    assert status == 0, output
    document = load()
    validate(document)
    kinds = {d["type"] for d in document["deployments"].values()}
    assert kinds <= {"crossfl.local", "crossfl.ssh", "crossfl.slurm", "crossfl.pbs"}
    assert not PLACEHOLDER.search(Path("streamflow.yml").read_text())
    for binding in document["workflows"]["federation"]["bindings"]:
        assert binding["step"] == "/" or binding["step"] in STEPS


def test_bindings_match_steps(crossfl_bind: Bind) -> None:
    crossfl_bind("--facility", "local", "--set", "local.folder=data")
    config = load()["workflows"]["federation"]
    assert not Path(config["config"]["file"]).is_absolute()
    known = steps_of(Path(config["config"]["file"])) | {"/"}
    assert [b["step"] for b in config["bindings"]] == ["/", *FACILITY_STEPS]
    assert {b["step"] for b in config["bindings"]} <= known


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SCHEDULED, "vm"])
def test_job_scripts(name: str, crossfl_bind: Bind) -> None:
    status, output = crossfl_bind("--facility", f"site={name}", *required(name, "site"))
    assert status == 0, output
    path = Path("streamflow.d/site.sh")
    text = path.read_text()
    variables = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(text))  # noqa: S701
    assert variables == {"streamflow_command"}
    assert text.count("{{streamflow_command}}") == 1
    assert not PLACEHOLDER.search(text)
    lines = text.splitlines()
    assert lines[0].startswith("#!/bin/bash")
    directives = [i for i, line in enumerate(lines) if line.startswith(("#SBATCH", "#PBS"))]
    commands = [i for i, line in enumerate(lines) if line and not line.startswith("#")]
    assert not directives or max(directives) < min(commands), "a directive after a command is lost"
    assert "export CROSSFL_FACILITY=site CROSSFL_DATA=/work/abc123/data" in lines
    assert "HF_HUB_OFFLINE=1" in text
    assert re.search(r"^export OMP_NUM_THREADS=\d+$", text, re.MULTILINE)
    assert ("CROSSFL_LAUNCHER" in text) == (name in SCHEDULED)
    runnable = jinja2.Template(text).render(streamflow_command="true")
    checked = subprocess.run(["bash", "-n"], input=runnable, text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["leonardo", "lumi", "polaris", "vm"])
def test_a_container_in_place_of_a_virtual_environment(name: str, crossfl_bind: Bind) -> None:
    words = required(name, "site", container="/work/crossfl.sif")
    status, output = crossfl_bind("--facility", f"site={name}", *words)
    assert status == 0, output
    text = Path("streamflow.d/site.sh").read_text()
    assert "activate" not in text and text.count("{{streamflow_command}}") == 1
    assert text.endswith('/work/crossfl.sif bash -c "trap : TERM USR1; $step"\n')
    assert cli.main(["check", "--offline", "streamflow.yml"]) == 0
    for more, message in (
        (["--set", "site.venv=/work/venv"], "site has venv and container: give one of them"),
        (["--set", "site.nodes=2"], "jobs in a container have one node"),
    ):
        if name != "vm" or "nodes" not in message:
            status, output = crossfl_bind("--facility", f"site={name}", *words, *more)
            assert status == cli.BAD_INPUT and message in output


@pytest.mark.parametrize(("staging", "folder"), [("SCRATCH", "/node/7"), ("/local", "/local")])
def test_staging(staging: str, folder: str, crossfl_bind: Bind, tmp_path: Path) -> None:
    activate = tmp_path / "venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.touch()
    changes = {"venv": str(tmp_path / "venv"), "staging": staging}
    status, output = crossfl_bind("--facility", "site=vm", *required("vm", "site", **changes))
    assert status == 0, output
    assert cli.main(["check", "--offline", "streamflow.yml"]) == 0
    job = jinja2.Template(Path("streamflow.d/site.sh").read_text())
    script = job.render(streamflow_command='echo "$CROSSFL_STAGING"')
    environment = {"SCRATCH": "/node/7", "PATH": os.environ["PATH"]}
    done = subprocess.run(["bash"], input=script, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{folder}\n", done.stderr


def lines_of_job_script(crossfl_bind: Bind, name: str, **changes: str) -> list[str]:
    status, printed = crossfl_bind("--facility", f"site={name}", *required(name, "site", **changes))
    assert status == 0, printed
    assert cli.main(["check", "--offline", "streamflow.yml"]) == 0
    return Path("streamflow.d/site.sh").read_text().splitlines()


@pytest.mark.parametrize("name", [*SCHEDULED, "vm"])
def test_what_may_leave(name: str, crossfl_bind: Bind) -> None:
    variables = (
        "CROSSFL_PROMPTS",
        "CROSSFL_MIN_VALIDATION_SAMPLES",
        "CROSSFL_MIN_VALIDATION_TOKENS",
    )
    script = "\n".join(lines_of_job_script(crossfl_bind, name))
    assert not any(variable in script for variable in variables)
    changes = {"prompts": "yes", "min_samples": "20", "min_tokens": "300"}
    lines = lines_of_job_script(crossfl_bind, name, **changes)
    exports = "\n".join(line for line in lines if any(v in line for v in variables))
    show = exports + "".join(f'\necho "${variable}"' for variable in variables)
    done = subprocess.run(["bash", "-c", show], capture_output=True, text=True, env={})
    assert done.stdout.split() == ["1", "20", "300"], done.stderr


def test_what_a_site_may_want_besides(crossfl_bind: Bind) -> None:
    changes = {
        "directives": "reservation=maker exclude=nid001",
        "feature": "hbm80g",
        "modules": "nccl python/3.11",
        "proxy": "http://proxy.example.org:3128",
        "state": "/project/state",
        "threads": "4",
    }
    lines = lines_of_job_script(crossfl_bind, "perlmutter", **changes)
    assert "#SBATCH --reservation=maker" in lines and "#SBATCH --exclude=nid001" in lines
    constraints = [x for x in lines if x.startswith("#SBATCH --constraint=")]
    assert constraints[-1] == "#SBATCH --constraint=gpu&hbm80g", "the last one counts"
    assert "module load nccl python/3.11 || exit 1" in lines
    show = "\n".join(x for x in lines if x.startswith("export"))
    show += '\necho "$OMP_NUM_THREADS $https_proxy $CROSSFL_STATE"'
    done = subprocess.run(["bash", "-c", show], capture_output=True, text=True, env={})
    assert done.stdout == "4 http://proxy.example.org:3128 /project/state\n", done.stderr
    lines = lines_of_job_script(crossfl_bind, "perlmutter")
    assert [x for x in lines if "--constraint" in x] == ["#SBATCH --constraint=gpu"]
    assert "proxy" not in "\n".join(lines)
    lines = lines_of_job_script(crossfl_bind, "polaris", directives="place=excl ngpus=4")
    assert "#PBS -l place=excl" in lines and "#PBS -l ngpus=4" in lines


def test_a_missing_module_ends_the_job(crossfl_bind: Bind) -> None:
    lines_of_job_script(crossfl_bind, "vm", modules="bogus")
    job = jinja2.Template(Path("streamflow.d/site.sh").read_text())
    script = "module() { return 1; }\n" + job.render(streamflow_command="echo never")
    done = subprocess.run(["bash"], input=script, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")


@pytest.mark.parametrize("nodes", ["1", "2"])
@pytest.mark.parametrize("name", ["perlmutter", "polaris"])
def test_nccl_uses_the_plugin_of_the_fabric_between_nodes(
    name: str, nodes: str, crossfl_bind: Bind
) -> None:
    lines = lines_of_job_script(crossfl_bind, name, nodes=nodes)
    begin = next(i for i, line in enumerate(lines) if line.startswith("export NCCL_SOCKET"))
    end = next(i for i, line in enumerate(lines) if "CROSSFL_LAUNCHER" in line)
    show = "\n".join([*lines[begin:end], 'echo "${NCCL_NET-}"'])
    done = subprocess.run(["bash", "-uc", show], capture_output=True, text=True, env={})
    assert done.stdout == ("AWS Libfabric\n" if nodes == "2" else "\n"), done.stderr


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_aurora_leaves_the_first_core_of_each_socket_alone(nodes: str, crossfl_bind: Bind) -> None:
    lines = lines_of_job_script(crossfl_bind, "aurora", nodes=nodes)
    begin = next(i for i, line in enumerate(lines) if line.startswith("cores="))
    show = "\n".join([*lines[begin : begin + 2], 'echo "$CROSSFL_LAUNCHER"'])
    launcher = shlex.split(subprocess.check_output(["bash", "-c", show], text=True))
    assert launcher[:3] == ["mpiexec", "-n", str(12 * int(nodes))]
    ranges = [r.split("-") for r in launcher[-1].removeprefix("list:").split(":")]
    cores = [set(range(int(first), int(last) + 1)) for first, last in ranges]
    assert len(cores) == 12 and all(len(c) == 8 for c in cores)
    assert len(set().union(*cores)) == 96, "no core has two ranks"
    sockets = [{core // 52 for core in c} for c in cores]
    assert sockets == [{0}] * 6 + [{1}] * 6
    assert not {0, 52} & set().union(*cores)


def test_a_login_through_another_host(crossfl_bind: Bind) -> None:
    words = required("vm", "site", jump="me@gate.example.org:2222")
    assert crossfl_bind("--facility", "site=vm", *words)[0] == 0
    assert load()["deployments"]["site"]["config"]["proxyJump"] == "me@gate.example.org:2222"
    assert crossfl_bind("--facility", "site=vm", *required("vm", "site"))[0] == 0
    assert "proxyJump" not in load()["deployments"]["site"]["config"]


@pytest.mark.parametrize("value", ["no", "1", "true", "YES", "yes no"])
def test_prompts_are_a_plain_yes(value: str, crossfl_bind: Bind) -> None:
    words = required("vm", "site", prompts=value)
    status, printed = crossfl_bind("--facility", "site=vm", *words)
    assert status == cli.BAD_INPUT
    assert f"site.prompts is {value!r}: `yes` lets the model complete" in printed


def test_recipes_of_containers() -> None:
    """They cannot be built here; that they name what there is, and the lock's Python, is seen."""
    folder = ENVIRONMENTS / "containers"
    recipe = (folder / "Dockerfile").read_text()
    for names in re.findall(r"^COPY (.+) \S+$", recipe, re.MULTILINE):
        assert all((ROOT / name).exists() for name in names.split())
    version = re.search(r"with Python (3\.\d+)", (ROOT / "requirements.lock").read_text())
    assert version and f"ARG BASE=python:{version[1]}-" in recipe
    definition = (folder / "crossfl.def").read_text()
    page = (folder / "README.md").read_text()
    archive = re.search(r"^From: (\S+)$", definition, re.MULTILINE)
    assert archive and f"docker save -o {archive[1]} crossfl" in page


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_passes_the_check(
    name: str, crossfl_bind: Bind, capsys: pytest.CaptureFixture[str]
) -> None:
    crossfl_bind("--facility", f"site={name}", *required(name, "site"))
    status = cli.main(["check", "--offline", "--format", "json", "streamflow.yml"])
    results = json.loads(capsys.readouterr().out)["results"]
    assert status == 0, results
    checks = {row["check"] for row in results if row["facility"] == "site"}
    assert checks == {"settings"} | ({"job script", "shellcheck"} if name != "local" else set())
    if "skip" in {row["status"] for row in results}:
        pytest.skip("shellcheck is not installed: apt install shellcheck, or pip install '.[dev]'")


def test_a_facility_on_this_machine_may_hold_base_models(crossfl_bind: Bind) -> None:
    words = ("--facility", "site=local", "--set", "site.folder=d", "--set", "site.models=/models")
    assert crossfl_bind(*words)[0] == 0
    document = yaml.safe_load(Path("streamflow.yml").read_text())
    assert document["deployments"]["site"]["config"]["models"] == "/models"


@pytest.mark.parametrize("name", SCHEDULED)
def test_a_page_of_facts(name: str) -> None:
    text = (ENVIRONMENTS / name / "README.md").read_text()
    if name not in ("slurm", "pbs"):
        assert "could be tried on the machine itself" in text
        assert "https://" in text
        host = Environment.load(ENVIRONMENTS, name).defaults["host"]
        assert f"`{str(host).partition(':')[0]}`" in text


@pytest.mark.parametrize("value", HOSTILE, ids=repr)
@pytest.mark.parametrize("setting", SETTINGS)
def test_hostile_settings_are_refused(setting: str, value: str) -> None:
    if setting == "modules" and value == "a b":
        pytest.skip("two modules")
    environment = next(e for e in SHIPPED if setting in e.placeholders())
    place = Place(name="site", environment=environment.name, settings={**DUMMY, setting: value})
    with pytest.raises(CrossFLError, match=re.escape(f"site.{setting} is {value!r}")):
        environment.values(place, "site.sh")


@pytest.mark.slow
@pytest.mark.parametrize("value", HOSTILE, ids=repr)
@pytest.mark.parametrize("source", ["--set", "--from"])
def test_nothing_is_written_for_a_hostile_setting(
    value: str, source: str, crossfl_bind: Bind
) -> None:
    if source == "--set":
        words = required("leonardo", "leonardo", account=value)
    else:
        settings = {key: DUMMY[key] for key in ("data", "user", "venv", "workdir")}
        Path("mine.yml").write_text(json.dumps({"leonardo": settings | {"account": value}}))
        words = ["--from", "mine.yml"]
    status, output = crossfl_bind("--facility", "leonardo", *words)
    assert status == cli.BAD_INPUT
    assert f"leonardo.account is {value!r}" in output or "cannot be read" in output
    assert {path.name for path in Path().iterdir()} <= {"mine.yml"}


@pytest.mark.parametrize("name", ["a; id", "$(id)", "a\nb", "-a", "A", "vm", "../a", "a/b", ""])
def test_hostile_names_are_refused(name: str, crossfl_bind: Bind) -> None:
    status, output = crossfl_bind(f"--facility={name}=local", "--set", "vm.environment=local")
    assert status == cli.BAD_INPUT
    assert "facility" in output
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_is_accepted_means_nothing_to_a_shell(setting: str) -> None:
    form = SETTINGS[setting].form
    for code in range(256):
        for value in (chr(code), f"a{chr(code)}", f"1{chr(code)}a", f"/a{chr(code)}b"):
            if form.fullmatch(value) and setting != "modules" and not value.startswith("~"):
                assert shlex.quote(value) == value


def test_all_that_is_missing_is_said_at_once(crossfl_bind: Bind) -> None:
    status, output = crossfl_bind("--facility", "leonardo", "--facility", "polaris")
    assert status == cli.BAD_INPUT
    assert output.count("crossfl bind:") == 1
    for facility in ("leonardo", "polaris"):
        for setting in ("account", "data", "user", "venv", "workdir"):
            assert f"{facility}.{setting} is missing: {SETTINGS[setting].means}" in output
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--facility", "nowhere"], "no environment 'nowhere'"),
        (["--facility", "local", "--facility", "local"], "name each facility once"),
        ([], "name each facility once"),
        (["--facility", "local", "--set", "local.folder"], "expected FACILITY.SETTING=VALUE"),
        (["--facility", "local", "--set", "lumi.user=me"], "expected FACILITY.SETTING=VALUE"),
        (["--facility", "local", "--set", "local.colour=red"], "local.colour is unknown"),
        (["--facility", "local", "--set", "local.folder=d", "-o", "."], "cannot be a file"),
        (["--facility", "local=../local"], "no environment '../local'"),
        (["--facility", "local", "--from", "nothing.yml"], "cannot be read as a settings file"),
        (["--facility", "local", "--set", "local.folder=d", "-o", "no/x.yml"], "make no"),
        (
            ["--facility", "local", "--set", "local.folder=d", "--job", CWL / "federation.yml"],
            "facilities without a deployment: karolina, leonardo",
        ),
        (
            ["--facility", "local", "--set", "local.folder=d", "--workflow", ROUND_CWL],
            "has no step /federate/train",
        ),
    ],
)
def test_mistakes_are_named(words: list[str | Path], message: str, crossfl_bind: Bind) -> None:
    status, output = crossfl_bind(*words)
    assert status == cli.BAD_INPUT
    assert message in output
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("name", ["eurohpc", "doe"])
def test_ready_federations(name: str, crossfl_bind: Bind) -> None:
    path = ENVIRONMENTS / f"{name}.yml"
    facilities = read_settings(path)
    words = [word for f in facilities for word in required(f, f)]
    status, output = crossfl_bind("--from", path, *words, "-o", f"{name}.yml")
    assert status == 0, output
    assert {*facilities, "vm"} <= set(load(Path(f"{name}.yml"))["deployments"])
    assert cli.main(["check", "--offline", f"{name}.yml"]) == 0
    assert "02:00:00" in Path(f"{name}.d/{next(iter(facilities))}.sh").read_text()


def test_the_aggregation_machine_may_be_another(crossfl_bind: Bind) -> None:
    Path("mine.yml").write_text("vm: {environment: vm, host: h}\nhere: {environment: local}\n")
    dummies = {key: DUMMY[key] for key in ("user", "venv", "workdir")}
    words = [word for k, v in dummies.items() for word in ("--set", f"vm.{k}={v}")]
    status, output = crossfl_bind("--from", "mine.yml", "--set", "here.folder=data", *words)
    assert status == 0, output
    document = load()
    assert document["deployments"]["vm"]["type"] == "crossfl.ssh"
    target = document["workflows"]["federation"]["bindings"][0]["target"]
    assert target == {"deployment": "vm", "service": "train"}
    assert "CROSSFL_FACILITY" not in Path("streamflow.d/vm.sh").read_text()


@pytest.mark.parametrize("foreign", ["streamflow.yml", "streamflow.d/vega.sh"])
def test_what_others_made_stays(foreign: str, crossfl_bind: Bind) -> None:
    Path("streamflow.d").mkdir()
    Path(foreign).write_text("mine\n")
    words = ["--facility", "vega", *required("vega", "vega")]
    status, output = crossfl_bind(*words)
    assert status == cli.BAD_INPUT
    assert f"{foreign} exists and was not made by 'crossfl bind'" in output
    assert Path(foreign).read_text() == "mine\n"
    assert [p for p in Path().rglob("*") if p.is_file()] == [Path(foreign)]
    for more in (["--force"], []):  # what was made by it may be made again
        assert crossfl_bind(*words, *more)[0] == 0
    assert Path(foreign).read_text() != "mine\n"


def test_the_result_is_the_same_each_time(crossfl_bind: Bind) -> None:
    words = ["--facility", "lumi", "--facility", "aurora"]
    words += required("lumi", "lumi") + required("aurora", "aurora")
    crossfl_bind(*words)
    first = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    crossfl_bind(*words)
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == first
    assert first[Path("streamflow.yml")].startswith(b"# lumi, aurora: made by 'crossfl bind'.")
    assert not re.search(rb"[ =]/(tmp|root|home)\b", b"".join(first.values()))


def test_a_facility_joins_and_leaves_without_a_change_of_cwl(crossfl_bind: Bind) -> None:
    def snapshot() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in ROOT.glob("**/*.cwl")}

    before = snapshot()
    job: dict[str, Any] = yaml.safe_load((CWL / "federation.yml").read_text())
    words = required("leonardo", "leonardo") + required("karolina", "karolina")
    lumi = {"name": "lumi", "dataset": "words"}
    for facilities, more in (
        (job["facilities"], []),
        ([*job["facilities"], lumi], required("lumi", "lumi")),
        (job["facilities"], []),
    ):
        Path("job.yml").write_text(yaml.safe_dump({**job, "facilities": facilities}))
        status, output = crossfl_bind("--job", "job.yml", *words, *more)
        assert status == 0, output
        names = {facility["name"] for facility in facilities}
        document = load()
        assert names <= set(document["deployments"])
        assert ("lumi" in document["deployments"]) == ("lumi" in names)
        assert document["workflows"]["federation"]["config"]["settings"] == "job.yml"
        assert {path.stem for path in Path("streamflow.d").iterdir()} == names
    assert snapshot() == before


def test_it_stays_light() -> None:
    code = (
        "import sys; from crossfl.sites import bind, streamflow_file; "
        "streamflow_file.engine_validator(); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "accelerate"} & set(done.stdout.split())
