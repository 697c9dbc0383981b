"""`crossfl check`: what is wrong is named with its remedy, offline and on this machine.

Against real sshd and Slurm it is tried in `tests/schedulers`.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from crossfl import cli
from crossfl.sites.check.probe import MARK, PACKAGES, launch
from crossfl.sites.check.table import LONGEST
from crossfl.storage.weight_files import weights_digest
from tests.support.paths import CWL, ROOT, ROUND

Document = dict[str, Any]
Change = Callable[[Document], object]
Check = Callable[..., tuple[int, str]]


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Check the federation of the tests after a change; the exit status, and what is printed."""

    def command(change: Change, *words: str, script: str | None = None) -> tuple[int, str]:
        document = yaml.safe_load((CWL / "streamflow.yml").read_text())
        config = document["workflows"]["federation"]["config"]
        config["file"] = str(ROOT / "workflows" / "federated.cwl")
        config["settings"] = str(CWL / "federation.yml")
        for name in ("leonardo", "karolina"):
            document["deployments"][name]["config"]["data"] = str(CWL / "data" / name)
        change(document)
        path = tmp_path / "streamflow.yml"
        path.write_text(yaml.safe_dump(document))
        if script is not None:
            (tmp_path / "site.sh").write_text(script)
        status = cli.main(["check", str(path), *words])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return command


def rows(output: str) -> dict[tuple[str, str], dict[str, str]]:
    return {(row["facility"], row["check"]): row for row in json.loads(output)["results"]}


def nothing(document: Document) -> None:
    pass


def behind_ssh(document: Document, **config: Any) -> None:
    """Put karolina behind a login node, with a job script."""
    document["deployments"]["karolina"] = {
        "type": "crossfl.ssh",
        "workdir": "/scratch",
        "config": {"nodes": ["127.0.0.1:1"], "checkHostKey": False, "username": "me"} | config,
    }


def with_script(document: Document) -> None:
    behind_ssh(document, services={"train": "site.sh"})
    for binding in document["workflows"]["federation"]["bindings"]:
        for target in binding["target"] if isinstance(binding["target"], list) else []:
            if target["deployment"] == "karolina":
                target["service"] = "train"


@pytest.mark.parametrize("words", [("--offline",), ()])
def test_all_is_well(words: tuple[str, ...], check: Check) -> None:
    status, output = check(nothing, "--format", "json", "--room", "0.001", *words)
    assert status == 0, output
    assert json.loads(output)["passed"]
    results = rows(output)
    assert {row["status"] for row in results.values()} == {"pass"}
    assert ("leonardo", "dataset words") in results
    assert (("karolina", "environment") in results) == (not words)


def test_the_table(check: Check) -> None:
    status, output = check(nothing, "--facility", "karolina", "--offline")
    assert status == 0
    assert "how to fix" in output and "karolina" in output and "leonardo" not in output
    assert "5 pass" in output


def bindings(document: Document) -> list[Document]:
    entries: list[Document] = document["workflows"]["federation"]["bindings"]
    return entries


BAD_INPUT: dict[str, tuple[Change, tuple[str, ...], str]] = {
    "type": (lambda d: d["deployments"]["vm"].update(type="nowhere"), (), "the engine refuses"),
    "version": (lambda d: d.pop("version"), (), "the engine refuses the file"),
    "field": (
        lambda d: d["deployments"]["vm"]["config"].update(colour="red"),
        (),
        "the engine refuses the file",
    ),
    "step": (
        lambda d: bindings(d)[1].update(step="/federate/tarin"),
        (),
        "a binding matches no step: '/federate/tarin'",
    ),
    "deployment": (
        lambda d: d["deployments"].pop("karolina"),
        (),
        "a binding names a deployment that does not exist: 'karolina'",
    ),
    "facility": (
        lambda d: [b.update(target={"deployment": "leonardo"}) for b in bindings(d)[1:]],
        (),
        "facilities without a deployment in",
    ),
    "workflow": (
        lambda d: d["workflows"]["federation"]["config"].update(file="nothing.cwl"),
        (),
        "cannot be read as a CWL workflow",
    ),
    "job": (
        lambda d: d["workflows"]["federation"]["config"].update(settings="nothing.yml"),
        (),
        "cannot be read as a job file",
    ),
    "script": (with_script, (), "the job script of karolina does not exist"),
    "name": (nothing, ("--facility", "lumi"), "has no facility 'lumi'"),
    "wait": (nothing, ("--wait", "0"), "--wait takes at least 1 second"),
    "submit": (nothing, ("--submit", "--offline"), "leave out --offline"),
}


@pytest.mark.parametrize("what", BAD_INPUT)
def test_bad_input(what: str, check: Check) -> None:
    change, words, message = BAD_INPUT[what]
    status, output = check(change, *words)
    assert status == cli.BAD_INPUT
    assert output.startswith("crossfl check: ")
    assert message in output


def test_files_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, message in (
        (None, "cannot be read as a StreamFlow file"),
        ("- a\n", "is not a StreamFlow file: it holds no fields"),
        ("a: [", "cannot be read as a StreamFlow file"),
        ((ROOT / "environments" / "doe.yml").read_text(), "crossfl bind --from"),
    ):
        path = tmp_path / "file.yml"
        path.unlink(missing_ok=True)
        if text:
            path.write_text(text)
        assert cli.main(["check", str(path)]) == cli.BAD_INPUT
        assert message in capsys.readouterr().err


def test_a_file_without_a_job_is_only_a_warning(check: Check) -> None:
    status, output = check(
        lambda d: d["workflows"]["federation"]["config"].pop("settings"),
        "--offline",
        "--format=json",
    )
    assert status == 0
    assert rows(output)["streamflow.yml", "job file"]["status"] == "warn"


SCRIPTS = {
    "settings": ("#SBATCH --account=<account>\n{{streamflow_command}}\n", "not filled in: account"),
    "job script": ("if true\n{{streamflow_command}}\n", "bash -n: "),
    "shellcheck": ("cd /scratch\n{{streamflow_command}}\n", "shellcheck: "),
}


@pytest.mark.parametrize("what", SCRIPTS)
def test_job_scripts(what: str, check: Check) -> None:
    text, message = SCRIPTS[what]
    status, output = check(with_script, "--offline", "--format", "json", script=text)
    row = rows(output)["karolina", what]
    if row["status"] == "skip":
        pytest.skip(row["result"])
    assert status == 1
    assert row["status"] == "fail" and row["result"].startswith(message) and row["fix"]


def test_a_job_script_without_an_interpreter(check: Check) -> None:
    script = "{{streamflow_command}}\n"
    for first, found in (("", True), ("#!/bin/bash -l\n", False)):
        _, output = check(with_script, "--offline", "--format", "json", script=first + script)
        assert (("karolina", "interpreter") in rows(output)) == found


def test_a_job_script_without_the_command(check: Check) -> None:
    status, output = check(with_script, "--offline", "--format", "json", script="true\n")
    assert status == 1
    assert "has no {{streamflow_command}}" in rows(output)["karolina", "job script"]["result"]


def test_a_binding_without_the_service(check: Check) -> None:
    status, output = check(behind_ssh, "--offline", "--format", "json")
    assert status == 0
    row = rows(output)["karolina", "job script"]
    assert row["status"] == "warn" and "names no service" in row["result"]


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A folder with a key, one with a passphrase, and what is none."""
    for name, phrase in (("good", ""), ("locked", "secret")):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", phrase, "-f", str(tmp_path / name)]
        subprocess.run(command, check=True)
    (tmp_path / "phrase").write_text("secret\n")
    (tmp_path / "wrong").write_text("public\n")
    return tmp_path


GOOD_FILES: list[Document] = [
    {"sshKey": "good"},
    {"sshKey": "locked", "sshKeyPassphraseFile": "phrase", "knownHosts": "wrong"},
]
BAD_FILES: list[tuple[Document, str]] = [
    ({"sshKey": "nothing"}, "sshKey {}/nothing cannot be read: No such file"),
    ({"sshKey": "wrong"}, "sshKey {}/wrong is no private key"),
    ({"sshKey": "good.pub"}, "sshKey {}/good.pub is no private key"),
    ({"sshKey": "locked"}, "sshKey {}/locked is no private key that can be opened: Passphrase"),
    (
        {"sshKey": "locked", "sshKeyPassphraseFile": "wrong"},
        "sshKey {}/locked is no private key that can be opened: ",
    ),
    ({"sshKey": "good", "knownHosts": "nothing"}, "knownHosts {}/nothing cannot be read"),
    ({"passwordFile": "nothing"}, "passwordFile {}/nothing cannot be read"),
    (
        {"nodes": [{"hostname": "127.0.0.1:1", "sshKey": "nothing"}]},
        "sshKey {}/nothing cannot be read",
    ),
    ({"tunnel": {"hostname": "a", "sshKey": "nothing"}}, "sshKey {}/nothing cannot be read"),
]


def test_files_of_a_connection(check: Check, keys: Path) -> None:
    for config in GOOD_FILES:
        status, output = check(lambda d, c=config: behind_ssh(d, **c), "--offline", "--format=json")
        assert status == 0, output
    for config, message in BAD_FILES:
        status, output = check(lambda d, c=config: behind_ssh(d, **c), "--offline", "--format=json")
        assert status == 1, config
        row = rows(output)["karolina", "settings"]
        assert row["result"].startswith(message.format(keys)), row
        assert row["fix"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("rounds: 2", "rounds: -3", "rounds is -3: it must be from 1"),
        ("path: config.json", "path: nothing.json", "nothing.json, which cannot be read"),
        ("batch_size", "batch_siz", "training: no field 'batch_siz'"),
    ],
)
def test_the_job_is_looked_at_offline(
    check: Check, tmp_path: Path, old: str, new: str, message: str
) -> None:
    text = (CWL / "federation.yml").read_text()
    assert old in text
    (tmp_path / "job.yml").write_text(text.replace(old, new, 1))
    (tmp_path / "config.json").write_text((CWL / "config.json").read_text())
    status, output = check(
        lambda d: d["workflows"]["federation"]["config"].update(settings="job.yml"), "--offline"
    )
    assert status == cli.BAD_INPUT
    assert output.startswith(f"crossfl check: {tmp_path / 'job.yml'}: ") and message in output


def test_data_on_this_machine_is_looked_at_offline(check: Check) -> None:
    status, output = check(FAULTS["dataset words"][0], "--offline", "--format=json")
    assert status == 1
    assert "/tmp/words is not there" in rows(output)["karolina", "dataset words"]["result"]


@pytest.mark.parametrize(("name", "key"), [("vm", "journal"), ("karolina", "state")])
def test_folders_that_cannot_be_made(check: Check, tmp_path: Path, name: str, key: str) -> None:
    def change(document: Document) -> None:
        document["deployments"][name]["config"][key] = "job.yml/folder"

    assert check(change, "--offline")[0] == 0
    (tmp_path / "job.yml").touch()
    status, output = check(change, "--offline", "--format=json")
    assert status == 1
    row = rows(output)[name, "settings"]
    assert row["result"].startswith(f"{key} {tmp_path}/job.yml/folder cannot be a folder")
    assert row["fix"] == f"correct its `{key}`"


def test_every_job_script_has_to_be_there(check: Check) -> None:
    """That of a service which no binding uses, too: the engine reads them all."""

    def another(document: Document) -> None:
        with_script(document)
        services = document["deployments"]["karolina"]["config"]["services"]
        services["other"] = "nothing.sh"

    status, output = check(another, "--offline", script="{{streamflow_command}}\n")
    assert status == cli.BAD_INPUT
    assert "the job script of karolina does not exist" in output


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder of base models, with one."""
    shutil.copytree(ROUND / "global_model", tmp_path / "models" / "tiny")
    return tmp_path / "models"


def training_adapters(base: Path, **lora: Any) -> Change:
    """A job that trains adapters, and the folder of base models of both facilities."""
    job = yaml.safe_load((CWL / "federation.yml").read_text())
    job["lora"] = {"base_model": "tiny"} | lora
    job["config"]["path"] = str(CWL / "config.json")
    (base.parent / "job.yml").write_text(yaml.safe_dump(job))

    def change(document: Document) -> None:
        document["workflows"]["federation"]["config"]["settings"] = "job.yml"
        for name in ("leonardo", "karolina"):
            document["deployments"][name]["config"]["models"] = "models"

    return change


def test_the_base_of_adapters(check: Check, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = weights_digest(base / "tiny")
    change = training_adapters(base, base_digest=right)
    status, output = check(change, "--offline", "--format=json")
    assert status == 0, output
    assert rows(output)["leonardo", "base model tiny"]["status"] == "pass"

    def unset(document: Document) -> None:
        change(document)
        for name in ("leonardo", "karolina"):
            del document["deployments"][name]["config"]["models"]

    assert check(unset, "--offline")[0] == 1
    monkeypatch.setenv("CROSSFL_MODELS", str(base))
    assert check(unset, "--offline")[0] == 0
    for lora, message in (
        ({"base_model": "other", "base_digest": right}, "models/other has neither"),
        ({"base_digest": "0" * 64}, f"has the digest {right}, and the job's base 000"),
    ):
        status, output = check(training_adapters(base, **lora), "--offline", "--format=json")
        assert status == 1
        failed = [row for row in rows(output).values() if row["status"] == "fail"]
        (row,) = [row for row in failed if row["facility"] == "karolina"]
        assert message in row["result"]
        assert row["fix"].startswith("crossfl bind --set karolina.models=")


FAULTS: dict[str, tuple[Change, tuple[str, ...], str, str]] = {
    "dataset words": (
        lambda d: d["deployments"]["karolina"]["config"].update(data="/tmp"),
        (),
        "/tmp/words is not there",
        "crossfl bind --set karolina.folder=",
    ),
    "facility": (
        lambda d: d["deployments"]["karolina"]["config"].update(facility="leonardo"),
        (),
        "CROSSFL_FACILITY is leonardo",
        "bind again",
    ),
    "work folder": (
        lambda d: d["deployments"]["karolina"].update(workdir="/etc/passwd/work"),
        (),
        "/etc/passwd/work: ",
        "crossfl bind --set karolina.workdir=",
    ),
    "login": (behind_ssh, (), "connection refused", "Nothing listens on port 1 there"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_faults(what: str, check: Check) -> None:
    change, words, message, fix = FAULTS[what]
    status, output = check(change, "--format", "json", *words)
    assert status == 1
    results = rows(output)
    row = results["karolina", what]
    assert row["status"] == "fail"
    assert message in row["result"] and row["fix"].startswith(fix)
    failed = {key for key, row in results.items() if row["status"] == "fail"}
    assert failed == {("karolina", what)}, "the others are not touched by it"
    assert (("karolina", "remaining checks") in results) == (what == "login")


HOSTILE = "\x1b[2J\x1b]0;owned\x07 \u202etxt.exe\u2066"


def fake_python(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Have this machine answer the probe with a script's output, at a facility `engines_own`."""
    path = folder / "bin" / "python"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CROSSFL_FACILITY", "karolina")
    monkeypatch.setenv("CROSSFL_DATA", str(CWL / "data" / "karolina"))


def engines_own(document: Document) -> None:
    """Reach karolina with the engine's own connector, which leaves PATH as it is."""
    document["deployments"]["karolina"] = {"type": "local", "config": {}}


def answer(**changes: Any) -> str:
    """The script of a facility that answers the probe as it likes."""
    packages = {name: metadata.version(name) for name in PACKAGES}
    observation = {"host": "node", "python": "3.11.7", "packages": packages, "absent": []}
    return f"echo {shlex.quote(f'{MARK} {json.dumps(observation | changes)}')}"


@pytest.mark.parametrize("where", ["version", "package", "output"])
def test_a_facility_cannot_command_the_terminal(
    where: str, check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = {
        "version": answer(python=f"3.11{HOSTILE}"),
        "package": answer(packages={"crossfl": f"1.0{HOSTILE}", "torch": None}),
        "output": f"printf %s {shlex.quote(HOSTILE)} >&2; exit 1",
    }[where]
    fake_python(tmp_path, monkeypatch, script)
    words = ("--facility=karolina", "--room=0.001")
    status, output = check(engines_own, "--format=json", *words)
    row = rows(output)["karolina", "environment"]
    assert status == (0 if where == "version" else 1)
    assert row["status"] == ("pass" if where == "version" else "fail")
    assert r"\x1b[2J\x1b]0;owned\x07 \u202etxt.exe\u2066" in row["result"]
    assert all(line.isprintable() for value in row.values() for line in value.split("\n"))
    _, output = check(engines_own, *words)
    assert "owned" in output
    assert all(line.isprintable() for line in output.split("\n"))


@pytest.mark.parametrize(
    "script",
    [f"echo '{MARK} {{\"host\": 1}}'", f"echo '{MARK} {{broken}}'", answer(absent="words")],
)
def test_a_malformed_answer(
    script: str, check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_python(tmp_path, monkeypatch, script)
    status, output = check(engines_own, "--format=json", "--facility=karolina", "--room=0.001")
    row = rows(output)["karolina", "environment"]
    assert status == 1
    assert row["status"] == "fail"
    assert row["result"].startswith("the answer of the probe is malformed: ")


def test_a_long_answer_is_cut(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_python(tmp_path, monkeypatch, "head -c 100000 /dev/zero | tr '\\0' x; exit 1")
    _, output = check(engines_own, "--format=json", "--facility=karolina", "--room=0.001")
    assert rows(output)["karolina", "environment"]["result"] == "x" * (LONGEST - 1) + "…"


START = 'for i in 0 1; do PMI_RANK={rank} PMI_SIZE={size} MPI_LOCALRANKID=$i "$@" || exit 1; done'
LAUNCHERS = {
    "two ranks": (START.format(rank="$i", size=2), 2, None),
    "two jobs of one": (START.format(rank=0, size=1), 2, "2 processes that are not one group"),
    "one for two": (START.format(rank="$i", size=4), 2, "2 processes that are not one group"),
    "unheard of": ('"$@" && "$@"', 0, "no variable of a launcher says which rank it is"),
    "PBS's wrapper": (
        "echo 'mpiexec:  unexpected error - no non-PBS mpiexec in PBS_O_PATH' >&2; exit 1",
        0,
        "no non-PBS mpiexec in PBS_O_PATH",
    ),
    "nothing": ("exit 0", 0, "it started nothing"),
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_launcher_is_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That it is there says little: it has to start ranks that know their number."""
    for variable in ("SLURM_PROCID", "RANK", "PMI_RANK"):
        monkeypatch.delenv(variable, raising=False)
    script, ranks, problem = LAUNCHERS[name]
    path = tmp_path / "mpiexec"
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)
    answer = launch([str(path)])
    assert answer["ranks"] == ranks
    assert (problem or "") in answer.get("launch_failure", "")
    assert ("launch_failure" in answer) == (problem is not None)


def test_no_engine_is_imported_to_read_flags() -> None:
    code = (
        "import sys; from crossfl.sites import bind; from crossfl.sites.check import command; "
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = {name.partition(".")[0] for name in done.stdout.split()}
    assert not {"streamflow", "asyncssh", "rich", "torch"} & modules


def test_too_little_room(check: Check, tmp_path: Path) -> None:
    status, output = check(
        lambda d: d["deployments"]["vm"].update(workdir=str(tmp_path / "not" / "yet")),
        "--format=json",
        "--room=1e9",
    )
    assert status == 1
    row = rows(output)["vm", "work folder"]
    assert row["status"] == "fail" and "GiB free" in row["result"] and "--room" in row["fix"]
    assert not (tmp_path / "not").exists(), "it leaves nothing behind"
