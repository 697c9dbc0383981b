"""The package is whole: what it imports is declared, what it reads is in the wheel."""

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.paths import CWL, DATA, ROOT, ROUND
from tests.support.processes import Run

PACKAGE = ROOT / "python" / "crossfl"
OPTIONAL = {"pynvml"}
"""Used where a machine has it, and nowhere asked for."""
PARTS = ("pyproject.toml", "README.md", "LICENSE", "python", "workflows", "steps", "environments")
"""What a wheel is made from."""
NOT_UTF8 = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, ast.parse(path.read_bytes())


def imported(tree: ast.Module) -> Iterator[str]:
    """The top-level packages that a module imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> set[str]:
    """The packages that the project asks for, with all its extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return {normal(re.split(r"[^\w.-]", word, maxsplit=1)[0]) for x in lists for word in x}


def test_what_is_imported_is_declared() -> None:
    distributions = importlib.metadata.packages_distributions()
    for path, tree in trees():
        for name in {*imported(tree)} - sys.stdlib_module_names - {"crossfl"} - OPTIONAL:
            owners = {normal(owner) for owner in distributions[name]}
            assert owners & declared(), f"{path} imports {name}, and pyproject.toml lacks it"


def test_text_has_an_encoding() -> None:
    """Ruff finds only calls on what it knows to be a path."""
    for path, tree in trees():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            function = node.func
            name = function.attr if isinstance(function, ast.Attribute) else ""
            words = {keyword.arg for keyword in node.keywords}
            place = f"{path}:{node.lineno}"
            if (name == "read_text" and not node.args) or (
                name == "write_text" and len(node.args) < 2
            ):
                assert "encoding" in words, place
            if name in ("run", "Popen", "check_output"):
                assert not {"text", "universal_newlines"} & words, place


def test_every_pin_but_that_of_torch_has_hashes() -> None:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    pin = r"^([\w.-]+)==\S+ \\\n(?:    --hash=sha256:[0-9a-f]{64}.*\n)+"
    pins = re.findall(pin, lock, re.M)
    assert len(pins) == len(re.findall("==", lock)) > 100
    names = {normal(name) for name in pins}
    torch = (ROOT / "torch.lock").read_text(encoding="utf-8")
    assert re.fullmatch(r"(#.*\n)*torch==[\d.]+\n", torch)
    assert declared() - names == {"torch"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of an environment with a wheel of this package, and no repository near it."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            left_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(source, folder / "source" / name, symlinks=True, ignore=left_out)
        else:
            shutil.copy(source, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source"]
    subprocess.run([*pip, *build], check=True, timeout=300)
    shutil.rmtree(folder / "source")
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    install = ["--python", python, "install", "--no-deps", wheel]
    subprocess.run([*pip, *install], check=True, timeout=300)
    # What it depends on is here already.
    (packages,) = folder.glob("venv/lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "others.pth").write_text("\n".join(others))
    return python.parent


@pytest.mark.slow
def test_a_wheel_is_whole(installed: Path, run: Run, tmp_path: Path) -> None:
    """It binds, checks and reports, in a locale that is not UTF-8."""
    job = yaml.safe_load((CWL / "federation.yml").read_text(encoding="utf-8"))
    job["config"]["path"] = str(CWL / "config.json")
    job["prompts"] = ["città 3="]
    (tmp_path / "job.yml").write_text(yaml.safe_dump(job, allow_unicode=True), encoding="utf-8")

    def crossfl(*words: str) -> str:
        done = run(installed / "crossfl", *words, cwd=tmp_path, **NOT_UTF8)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    module = "import crossfl; print(crossfl.__file__)"
    assert run(installed / "python", "-c", module, cwd=tmp_path).stdout.startswith(
        str(installed.parent)
    )
    (tmp_path / "data").symlink_to(DATA)
    settings = [f"leonardo.folder={DATA / 'leonardo'}", "karolina.host=127.0.0.1"]
    given = {"user": "me", "account": "a", "partition": "p", "workdir": "/w", "venv": "/v"}
    settings += [f"karolina.{name}={value}" for name, value in (given | {"data": "/d"}).items()]
    crossfl(
        "bind", "--job", "job.yml", "-o", "federation.yml", "--facility", "leonardo=local",
        "--facility", "karolina", *[w for value in settings for w in ("--set", value)],
    )  # fmt: skip
    document = yaml.safe_load((tmp_path / "federation.yml").read_text(encoding="utf-8"))
    workflow = tmp_path / document["workflows"]["federation"]["config"]["file"]
    assert workflow.resolve().is_relative_to(installed.parent.resolve())
    checked = json.loads(crossfl("check", "federation.yml", "--offline", "--format", "json"))
    assert checked["passed"] and len(checked["results"]) >= 5
    validated = run(installed / "python", "-m", "cwltool", "--validate", workflow, cwd=tmp_path)
    assert validated.returncode == 0, validated.stderr
    crossfl("report", "--state", str(ROUND / "state"))
    assert "</html>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    packages = [str(path) for path in installed.parent.glob("lib/*/site-packages")]
    (ours,) = importlib.metadata.distributions(name="crossfl", path=packages)
    groups = {point.group for point in ours.entry_points}
    assert groups == {"console_scripts", "unito.streamflow.plugin"}
