"""The pages for people: what they name is there, and what they say to type is understood."""

import argparse
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from crossfl.cli import VERBS
from crossfl.errors import Code
from crossfl.protocol.fields import fields_of
from crossfl.protocol.records import Aggregation, Facility, Lora, Retention, Task, Training
from crossfl.protocol.variables import VARIABLES
from crossfl.simulation.virtual import sites
from crossfl.sites.settings import places_of
from crossfl.sites.streamflow_file import deploy
from crossfl.storage.job import Job
from tests.support.paths import ROOT

PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(p for top in ("docs", "environments", "workflows") for p in (ROOT / top).rglob("*.md")),
    ]
)
GUIDES = [
    page
    for page in PAGES
    if page.parent == ROOT or (ROOT / "docs" in page.parents and page.parent.name != "reference")
]
"""Those that say what to type."""
PROGRAMS = (
    *("apptainer", "cd", "crossfl", "cwltool", "docker", "export", "git", "make", "pip", "python"),
    *("scp", "ssh", "streamflow", ".venv/bin/pre-commit", ".venv/bin/streamflow"),
)
"""What the first word of a block is, if the block is commands."""
RUN_WHOLE = {
    "docs/tutorial/laptop.md": "tests/workflows/test_pages.py",
    "docs/python.md": "tests/workflows/test_pages.py",
}
"""Pages whose every block, but a comparison, is run in order, and by which test."""
ELSEWHERE = {
    r"make [a-z-]+( |$)": "a target of the Makefile: .ci/run calls them, or test_make_targets",
    r".*…": "what is particular to a person or a site is left out",
    r"cd \w+$": "only changes the folder",
    r"export PATH=": "only sets the path",
    r"export CROSSFL_SIGNING_KEY=": "tests/workflows/test_signers.py sets it",
    r"CROSSFL_FORKSERVER= streamflow run": "tests/workflows/test_warm.py runs without the server",
    r"crossfl init ": "tests/sites/test_init.py",
    r"crossfl run ": "tests/workflows/test_run.py",
    r"crossfl compare ": "tests/simulation/test_compare.py",
    r"crossfl bind --from sites.yml --job job.yml": "tests/sites/test_init.py",
    r"crossfl bind --from mine.yml": "tests/sites/test_environments.py binds every environment",
    r"crossfl check federation.yml --offline": "tests/sites/test_init.py",
    r"crossfl check federation.yml": "makes connections: tests/schedulers/test_check.py",
    r"(\.venv/bin/)?streamflow run ": "tests/workflows/test_engines.py and tests/schedulers",
    r"cwltool ": "tests/workflows/test_engines.py",
    r"crossfl runs": "tests/server/test_runs.py",
    r"crossfl aggregate ": "tests/steps/test_aggregate.py",
    r"crossfl status": "tests/console/test_status.py",
    r"crossfl logs": "tests/console",
    r"crossfl export": "tests/console",
    r"crossfl simulate job.yml --sites": "tests/simulation/virtual",
    r"crossfl simulate job.yml --data .* --replay": "tests/simulation/test_replay.py",
    r"crossfl provenance ": "tests/observe/test_provenance.py",
    r"crossfl track ": "tests/observe/test_trackers.py",
    r"streamflow (list|report|prov) ": "tests/workflows/test_run.py lists",
    r"python workflows/experiments/": "tests/workflows/test_experiments.py converts made tables",
    r"python benchmarks/": "a benchmark: minutes to hours",
    r"python -m crossfl.protocol.generate": "make lint",
    r"pip (install|wheel)": "tests/test_package.py builds and installs a wheel",
    r"(scp|ssh) ": "needs a site of one's own",
    r"(docker|apptainer) ": "no container engine runs where the tests do",
    r"git |\.venv/bin/pre-commit ": "changes the clone of whoever runs it",
}
"""Commands of other pages, and where they are run, or why nowhere."""
PACKAGE = ROOT / "python" / "crossfl"
PLACES = {path.name for folder in (ROOT, PACKAGE) for path in folder.iterdir() if path.is_dir()} - {
    "data",  # made by commands that the pages describe
    "results",
}
"""First parts of paths that are in the repository, or in the package."""

FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^ {4}.*\n)+", re.MULTILINE)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"(?<!!)\[[^]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
PATH = re.compile(r"(?<![\w./<{$~-])([\w-]+(?:/[\w.*-]+)+/?)")
MODULE = re.compile(r"crossfl(?:\.\w+){2,}")
FIELD = re.compile(
    r"(?<![\w.])(aggregation|facility|lora|retention|task|training)\.([a-z]\w+)\b(?!\.\w)"
)
RECORDS = {
    "aggregation": Aggregation,
    "facility": Facility,
    "lora": Lora,
    "retention": Retention,
    "task": Task,
    "training": Training,
}
SUFFIXES = {"cwl", "json", "md", "py", "sh", "yml"}
"""A name that ends so is a file, and no field of a record."""
FOREIGN = {"--debug", "--preserve-environment", "--signal", "--version"}
"""Flags of streamflow, cwltool, sbatch and schedulers that the pages name alone."""
FOREIGN_VARIABLES = re.compile(r"CROSSFL_(TEST\w*|STEP)")
"""What the testbed, the tests and a job script have besides."""


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return INDENTED.sub("", FENCED.sub("", page.read_text("utf-8")))


def code(page: Path) -> Iterator[str]:
    """The code of a page: lines of its blocks, continued lines as one, and what is in backticks."""
    text = page.read_text("utf-8")
    blocks = [block for _, block in FENCED.findall(text)]
    blocks += INDENTED.findall(FENCED.sub("", text))
    for block in blocks:
        yield from block.replace("\\\n", " ").splitlines()
    yield from (" ".join(span.split()) for span in SPAN.findall(prose(page)))


def commands(page: Path) -> Iterator[str]:
    """The commands in the blocks of a page, without comments; continued lines as one."""
    text = page.read_text("utf-8")
    blocks = [block for language, block in FENCED.findall(text) if language in ("", "sh")]
    blocks += INDENTED.findall(FENCED.sub("", text))
    for block in blocks:
        lines = block.replace("\\\n", " ").splitlines()
        lines = [" ".join(line.split("   #")[0].split()) for line in lines]
        if lines and lines[0].split()[:1] and lines[0].split()[0] in PROGRAMS:
            yield from filter(None, lines)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors of a page."""
    return frozenset(slug(heading) for heading in HEADING.findall(page.read_text("utf-8")))


@cache
def parser_of(verb: str) -> argparse.ArgumentParser:
    """The flags of a verb."""
    parser = argparse.ArgumentParser()
    importlib.import_module(f"crossfl.{VERBS[verb][0]}").add_arguments(parser)
    parser.add_argument("--outdir")
    return parser


@cache
def known_flags() -> frozenset[str]:
    """The flags of every verb and every benchmark."""
    ours = {flag for verb in VERBS for flag in parser_of(verb)._option_string_actions}
    benchmarks = "".join(p.read_text("utf-8") for p in (ROOT / "benchmarks").glob("*.py"))
    return frozenset(ours | set(re.findall(r'"(--[a-z-]+)"', benchmarks)))


def identify(page: Path) -> str:
    """The name of a page in a test's name."""
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_links(page: Path) -> None:
    for target in LINK.findall(prose(page)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{target}: there is no {path}"
        assert path.is_relative_to(ROOT), f"{target} leads out of the repository"
        if anchor:
            assert anchor in anchors(path), f"{target}: {path.name} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_paths_and_modules(page: Path) -> None:
    for text in code(page):
        for name in PATH.findall(text):
            if name.split("/")[0] not in PLACES or "…" in text:
                continue
            roots = (ROOT, PACKAGE, page.parent)
            present = any(any(root.glob(name.rstrip("/"))) for root in roots)
            assert present, f"`{text}`: there is no {name}"
        for name in MODULE.findall(text):
            path = PACKAGE.joinpath(*name.split(".")[1:])
            candidates = [path, path.parent]  # the last part may be a name in the module
            assert any(c.is_dir() or c.with_suffix(".py").is_file() for c in candidates), name


@pytest.mark.parametrize("page", GUIDES, ids=identify)
def test_verbs_and_flags(page: Path) -> None:
    for text in code(page):
        command = text.split("#")[0]
        for verb, words in re.findall(r"(?<![\w/.-])crossfl ([a-z]+)\b([^|;&]*)", command):
            assert verb in VERBS, f"`{text}`: there is no verb {verb}"
            for flag in re.findall(r"(?<!\S)--[a-z][a-z-]*", words):
                assert flag in parser_of(verb)._option_string_actions, f"`{text}`: no flag {flag}"
        if match := re.match(r"--[a-z][a-z-]*", command):
            assert match[0] in known_flags() | FOREIGN, f"`{text}`: no verb has the flag {match[0]}"


@pytest.mark.parametrize("page", PAGES, ids=identify)
def test_make_targets(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for text in code(page):
        for target in re.findall(r"^make ([a-z][a-z-]*)", text.strip()):
            assert target in targets, f"`{text}`: the Makefile has no target {target}"


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=identify)
def test_variables_and_fields(page: Path) -> None:
    text = page.read_text("utf-8")
    known = {variable.name for variable in VARIABLES}
    for name in re.findall(r"CROSSFL_[A-Z_]*[A-Z]", text):
        assert name in known or FOREIGN_VARIABLES.fullmatch(name), f"no variable {name}"
    for span in SPAN.findall(prose(page)):
        for record, field in FIELD.findall(span):
            if field not in SUFFIXES:
                names = {f.name for f in fields_of(RECORDS[record])}
                assert field in names, f"`{span}`: {record} has no field {field}"


@pytest.mark.parametrize("page", GUIDES, ids=identify)
def test_every_command_is_run_somewhere(page: Path) -> None:
    if identify(page) in RUN_WHOLE:
        assert (ROOT / RUN_WHOLE[identify(page)]).is_file()
        return
    for command in commands(page):
        known = any(re.match(pattern, command) for pattern in ELSEWHERE)
        assert known, f"`{command}` is run by no test: run it in one, or say why not in ELSEWHERE"


def test_where_commands_are_run_is_there() -> None:
    for told in ELSEWHERE.values():
        for name in re.findall(r"tests/[\w/.]+\w", told):
            assert (ROOT / name).exists(), name


def test_every_code_of_an_error_has_its_entry() -> None:
    text = (ROOT / "docs" / "errors.md").read_text("utf-8")
    assert re.findall(r"^## (CFL\d+): ", text, re.M) == list(Code)
    assert re.findall(r"^\| \[(CFL\d+)\]", text, re.M) == list(Code)


def yaml_blocks() -> list[tuple[str, str]]:
    """Every block of YAML in the guides, which is a job file or a part of one, or a sites file."""
    return [
        (identify(page), block)
        for page in GUIDES
        for language, block in FENCED.findall(page.read_text("utf-8"))
        if language == "yaml"
    ]


@pytest.mark.parametrize(("page", "block"), yaml_blocks(), ids=lambda value: value.split("\n")[0])
def test_parts_of_job_files(page: str, block: str, tmp_path: Path) -> None:
    least = {"facilities": [{"name": "leonardo", "dataset": "it"}], "rounds": 1, "local_steps": 1}
    values = yaml.safe_load(block)
    path = tmp_path / "job.yml"
    if "sites" in values:
        path.write_text(block)
        assert sites.load(path)
        return
    if all(isinstance(value, dict) and "environment" in value for value in values.values()):
        path.write_text(block)
        places, _ = places_of([], [], path, None)
        assert deploy(places, ROOT / "environments", tmp_path / "federation.yml")
        return
    path.write_text(yaml.safe_dump({**least, **values}))
    job = Job.load(path)
    assert set(values) <= set(Job.__dataclass_fields__)
    assert len(job.facilities) == len(values.get("facilities", least["facilities"]))


def test_the_job_of_the_readme_is_complete(tmp_path: Path) -> None:
    (block,) = (block for page, block in yaml_blocks() if page == "README.md")
    path = tmp_path / "job.yml"
    path.write_text(block)
    job = Job.load(path)
    assert job.model == tmp_path / "my-llama"
    assert [facility.name for facility in job.facilities] == ["leonardo", "karolina"]


def test_what_a_wrong_page_would_fail(tmp_path: Path) -> None:
    """The patterns of this module see what they are to see."""
    page = tmp_path / "page.md"
    page.write_text(
        "`server/nothing.py`, `crossfl fork`\n\n    crossfl bind --nothing\n\n[x](y.md)\n"
    )
    texts = list(code(page))
    assert {"server/nothing.py", "crossfl fork"} <= set(texts)
    assert any("crossfl bind --nothing" in text for text in texts)
    assert LINK.findall(prose(page)) == ["y.md"]
    with pytest.raises(AssertionError, match="server/nothing"):
        test_paths_and_modules(page)
    with pytest.raises(AssertionError, match=r"no verb fork|no flag --nothing"):
        test_verbs_and_flags(page)
    with pytest.raises(AssertionError, match="there is no"):
        test_links(page)
