"""Jobs that a real Slurm ends: told in time, they deliver what they have done."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from crossfl.protocol.records import Facility, Training
from crossfl.server import state
from crossfl.server.planning.fixed import plan
from tests.support.paths import DATA, ROUND
from tests.support.testbed import Site, bind, job_of, place_data


@pytest.mark.parametrize("how", ["walltime", "signal", "cancel"])
def test_a_job_delivers_before_it_ends(alpha: Site, python: Path, tmp_path: Path, how: str) -> None:
    """The job script is the one that `crossfl bind` makes, with a command in place of the engine's.

    At the walltime it stops by the clock; told a minute before, or cancelled, by the signal. A
    cancelled step hears of it twice: from Slurm, and from the launcher, which passes it on.
    """
    data = place_data(alpha, DATA / "leonardo" / "words")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / alpha.name).symlink_to(data)
    job = job_of([alpha])
    bind([alpha], python, tmp_path / "data", job)
    (script,) = tmp_path.rglob(f"{alpha.name}*.sh")
    home = Path(alpha.facts["home"]) / f"walltime-{how}"
    subprocess.run(["rm", "-rf", home], check=True)
    (home / "out").mkdir(parents=True)
    subprocess.run(["cp", "-r", ROUND / "global_model", home], check=True)
    here = Facility(name=alpha.name, dataset="words")
    before = state.load(ROUND / "state")
    (task,) = plan(before, [here], 10**6, Training(), "train").tasks
    options: dict[str, Any] = {**task.asdict(), "batch_size": 4, "sequence_length": 48}
    options |= {"reserve_seconds": 60 if how == "walltime" else 0, "threads": 1}
    words = [w for k, v in options.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    command = (
        f"crossfl train --global-model {home}/global_model {' '.join(words)} --outdir {home}/out"
    )
    text = script.read_text().replace("{{streamflow_command}}", command)
    text = text.replace("00:05:00", "00:03:00").replace("USR1@120", "USR1@60")
    if how != "signal":
        text = text.replace("#SBATCH --signal", "# ")
    (home / "job.sh").write_text(text)
    subprocess.run(["chown", "-R", alpha.facts["username"], home], check=True)
    number = alpha.shell(f"cd {home} && sbatch --parsable job.sh").strip()
    if how == "cancel":
        time.sleep(45)
        alpha.cancel(number)
    alpha.wait_for_jobs(0, 260)
    log = "\n".join(p.read_text() for p in home.glob("slurm-*.out"))
    path = home / "out" / "update" / "manifest.json"
    assert path.exists(), log
    said = json.loads(path.read_text())
    assert said["status"] == "partial", log
    assert said["samples"] == 4 * said["steps"] > 0
    why = {"walltime": ["the job ends in"], "signal": ["SIGUSR1 was"]}
    assert any(w in said["reason"] for w in why.get(how, ["SIGTERM was", "SIGUSR1 was"]))
