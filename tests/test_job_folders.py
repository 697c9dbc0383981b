"""What a run leaves in its work folder is for its own user alone, whatever the umask it began with.

That of a site is looked at in `tests/schedulers/test_job_folders.py`.
"""

import json
from pathlib import Path

import pytest
from conftest import Run

from crossfl.engine.private import heeding_umask

STEP = """\
cwlVersion: v1.2
class: CommandLineTool
requirements:
  InitialWorkDirRequirement:
    listing:
      - {entryname: copy, entry: $(inputs.given), writable: true}
      - {entryname: words, entry: "made by the engine"}
baseCommand: [sh, -c, "mkdir box && echo made > box/file && umask"]
inputs: {given: File}
stdout: umask.txt
outputs:
  box: {type: Directory, outputBinding: {glob: box}}
  umask: {type: stdout}
"""


@pytest.mark.parametrize("kind", ["crossfl.local", "local"])
def test_folders_and_files_on_this_machine(run: Run, tmp_path: Path, kind: str) -> None:
    (tmp_path / "step.cwl").write_text(STEP)
    (tmp_path / "given").write_text("given")
    (tmp_path / "given").chmod(0o666)
    (tmp_path / "job.json").write_text(json.dumps({"given": {"class": "File", "path": "given"}}))
    (tmp_path / "streamflow.yml").write_text(
        json.dumps(
            {
                "version": "v1.0",
                "workflows": {
                    "test": {
                        "type": "cwl",
                        "config": {"file": "step.cwl", "settings": "job.json"},
                        "bindings": [{"step": "/", "target": {"deployment": "here"}}],
                    }
                },
                "deployments": {
                    "here": {"type": kind, "workdir": str(tmp_path / "work"), "config": {}}
                },
                "database": {"type": "default", "config": {"connection": ":memory:"}},
            }
        )
    )
    command = 'umask 000; exec "$@"'
    words = ("streamflow", "run", "--outdir", "out", "streamflow.yml")
    result = run("sh", "-c", command, "sh", *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert int((tmp_path / "out" / "umask.txt").read_text(), 8) == 0o077
    made = [tmp_path / "work", *(tmp_path / "work").rglob("*"), *(tmp_path / "out").rglob("*")]
    names = {path.name for path in made}
    assert {"box", "file", "copy", "words", "umask.txt"} <= names
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
