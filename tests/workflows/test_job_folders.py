"""What a run leaves on this machine is for its own user alone, whatever the umask it began with.

What it leaves at a site is looked at in `tests/schedulers/test_job_folders.py`.
"""

from pathlib import Path

import pytest

from crossfl.engine.private import heeding_umask
from tests.support.engine import Engine
from tests.support.processes import Run


@pytest.mark.parametrize("kind", ["crossfl.local", "local"])
def test_folders_and_files_on_this_machine(run: Run, tmp_path: Path, kind: str) -> None:
    words, workdir, outdir = (tmp_path / name for name in ("words", "work", "out"))
    words.write_text("words\n")
    words.chmod(0o666)
    path = Engine(tmp_path).write(
        "private.cwl",
        {"words": {"class": "File", "path": str(words)}},
        {"this-machine": {"type": kind, "workdir": str(workdir), "config": {}}},
        {"deployment": "this-machine"},
    )
    command = ("streamflow", "run", "--outdir", outdir, path)
    result = run("sh", "-c", 'umask 000; exec "$@"', "sh", *command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert int((outdir / "box" / "umask").read_text(), 8) == 0o077
    made = [workdir, *workdir.rglob("*"), *outdir.rglob("*")]
    assert {"box", "copy", "written"} <= {path.name for path in made}
    open_to_others = [
        f"{path} {path.stat().st_mode:o}"
        for path in made
        if not path.is_symlink() and path.stat().st_mode & 0o077
    ]
    assert not open_to_others


@pytest.mark.parametrize(
    ("command", "without"),
    [
        ("mkdir -m 777 -p /work/a", "mkdir -p /work/a"),
        ("tar xpf - -C /work/a", "tar xpf - --no-same-permissions -C /work/a"),
        ("tar chf - -C /work a", "tar chf - -C /work a"),
        ("mkdir -p /work/a", "mkdir -p /work/a"),
    ],
)
def test_what_goes_past_the_umask(command: str, without: str) -> None:
    assert heeding_umask(command.split()) == without.split()
