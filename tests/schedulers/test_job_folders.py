"""What a run makes at a site is for the site's user alone, whatever umask a login there has."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.engine import Engine
from tests.support.testbed import Site


@pytest.fixture
def lax(site: Site) -> Iterator[Site]:
    """A site whose logins have a umask of 000."""
    if "home" not in site.facts:
        pytest.skip("logins are changed only where the home of the site's user is here")
    start = Path(site.facts["home"]) / ".bashrc"
    kept = start.read_text() if start.exists() else ""
    start.write_text(f"umask 000\n{kept}")
    yield site
    start.write_text(kept)


@pytest.mark.parametrize("way", ["queue", "login"])
def test_folders_and_files_at_a_site(lax: Site, way: str, engine: Engine, tmp_path: Path) -> None:
    assert lax.shell("umask") == "0000\n"
    workdir = Path(lax.facts["workdir"], "private")
    shutil.rmtree(workdir, ignore_errors=True)
    (tmp_path / "words").write_text("words\n")
    (tmp_path / "words").chmod(0o666)
    names = {"login": f"{lax.name}-login", "queue": lax.name}
    deployments = {names["login"]: lax.login(), names["queue"]: lax.queue()}
    for deployment in deployments.values():
        deployment["workdir"] = str(workdir)
    done = engine.run(
        "private.cwl",
        {"words": {"class": "File", "path": str(tmp_path / "words")}},
        deployments,
        {"deployment": names[way]},
    )
    assert done.code == 0, done.log
    assert int((engine.outdir / "box" / "umask").read_text(), 8) == 0o077
    assert (engine.outdir / "box" / "copy").read_text() == "words\n"
    made = [workdir, *workdir.rglob("*")]
    assert {"box", "copy", "written"} <= {path.name for path in made}
    open_to_others = [
        f"{path} {path.stat().st_mode:o}"
        for path in [*made, *engine.outdir.rglob("*")]
        if not path.is_symlink() and path.stat().st_mode & 0o077
    ]
    assert not open_to_others
