"""The scripts of turns, in a real shell: what a job takes, and what is collected of it."""

import shlex
import subprocess
from pathlib import Path, PurePosixPath
from uuid import uuid4

import pytest
from streamflow.core.deployment import ExecutionLocation

from crossfl.engine.connectors.turn_scripts import (
    COLLECT,
    FORGET,
    LOOK,
    PUBLISH,
    Request,
    published,
)
from crossfl.engine.recovery.closing import Turn


class Site:
    """The work folder of a site, with the scripts that a connector runs there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.place = root / "turns" / "f-leonardo"

    def request(self, round_: int, command: str = "echo {round} > made") -> Request:
        workdir, inputs = self.root / str(uuid4()), self.root / str(uuid4())
        workdir.mkdir(parents=True)
        inputs.mkdir()
        return Request(
            turn=Turn(federation="f", facility="leonardo", round=round_, closes="first"),
            job_name=f"/train/0.{round_}",
            location=ExecutionLocation(name="login", deployment="leonardo"),
            script=f"cd '{workdir}' && : '{inputs}/model' && {command.format(round=round_)}",
            workdir=PurePosixPath(workdir),
        )

    def run(self, script: str, request: Request, **values: str | int) -> tuple[str, int]:
        done = subprocess.run(
            ["/bin/sh", "-c", request.fill(script, **values)], capture_output=True, text=True
        )
        assert done.stderr == ""
        return done.stdout.strip(), done.returncode

    def look(self, request: Request) -> str:
        return self.run(LOOK, request, round=request.turn.round)[0]

    def publish(self, request: Request) -> None:
        values = published(request)
        assert self.run(PUBLISH, request, **values) == ("", 0)

    def job(self, request: Request) -> int:
        return subprocess.run(["/bin/sh", self.place / "job"]).returncode

    def collect(self, request: Request) -> str:
        workdir = shlex.quote(str(request.workdir))
        answer, status = self.run(COLLECT, request, workdir=workdir, round=request.turn.round)
        assert status == 0
        return answer.partition("=")[2].partition("-")[0].lstrip("0")


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "work folder")


def test_a_job_takes_the_newest_turn(site: Site) -> None:
    first, second = site.request(1), site.request(2)
    for request in (first, second):
        assert site.look(request) == ""
        site.publish(request)
    assert site.job(second) == 0
    assert site.look(second) == "ended"
    assert site.collect(second) == "2"
    assert (Path(second.workdir) / "made").read_text() == "2\n"


def test_a_turn_that_is_replaced_is_removed_with_what_was_sent_for_it(site: Site) -> None:
    first, second = site.request(1), site.request(2)
    site.publish(first)
    site.publish(second)
    assert [Path(folder).exists() for folder in first.folders] == [False, False]
    assert [Path(folder).exists() for folder in second.folders] == [True, True]
    assert len(list(site.place.glob("0*"))) == 1


def test_a_later_turn_collects_what_an_earlier_one_asked_for(site: Site) -> None:
    first, second, third = site.request(1), site.request(2), site.request(3)
    site.publish(first)
    assert site.job(first) == 0
    assert site.look(second) == "ended", "nothing is sent to it"
    assert site.collect(second) == "1"
    assert (Path(second.workdir) / "made").read_text() == "1\n"
    assert site.look(third) == ""
    assert not Path(first.workdir).exists()
    assert not Path(second.workdir).exists(), "the round that collected it is over"


def test_a_job_that_runs_keeps_its_turn(site: Site) -> None:
    first = site.request(1)
    site.publish(first)
    assert site.job(first) == 0
    taken = (site.place / "taken").readlink()
    (site.place / taken / "status").unlink()  # as if it ran
    second = site.request(2)
    assert site.look(second) == "runs"
    site.publish(second)  # it started between the look and this
    assert all(Path(folder).exists() for folder in first.folders)
    assert site.collect(second) == "", "it has not ended"


def test_a_run_that_was_killed_collects_again(site: Site) -> None:
    first, again = site.request(1), site.request(1)
    site.publish(first)
    site.job(first)
    assert site.collect(first) == "1"
    assert site.look(again) == "ended"
    assert site.collect(again) == "1"
    assert (Path(again.workdir) / "made").read_text() == "1\n"


def test_a_collection_that_was_cut_off_is_done_again(site: Site) -> None:
    first, second = site.request(1), site.request(2)
    site.publish(first)
    site.job(first)
    turn = site.place / (site.place / "taken").readlink()
    # It noted where the outputs go, and was ended before it moved them, or after.
    (turn / "made").write_text(f"{second.workdir}\n{first.workdir}\n")
    Path(second.workdir).rmdir()
    assert site.collect(second) == "1"
    assert site.collect(second) == "1"
    assert (Path(second.workdir) / "made").read_text() == "1\n"
    third = site.request(2)
    assert site.collect(third) == "1"
    assert (Path(third.workdir) / "made").read_text() == "1\n"


def test_a_turn_that_is_published_twice_stays(site: Site) -> None:
    first = site.request(1)
    values = published(first)
    for _ in range(2):  # the connection was lost in the midst of the first
        assert site.run(PUBLISH, first, **values) == ("", 0)
    assert site.job(first) == 0
    assert site.run(PUBLISH, first, **values) == ("", 0), "the job started meanwhile"
    assert site.collect(first) == "1"


def test_a_turn_that_failed_is_published_anew(site: Site) -> None:
    first, again = site.request(1, "exit 3"), site.request(1)
    site.publish(first)
    assert site.job(first) == 3
    assert site.collect(first) == "1"
    assert site.look(again) == ""
    site.publish(again)
    assert site.job(again) == 0
    assert site.collect(again) == "1"


def test_a_job_that_is_requeued_does_its_turn_again(site: Site) -> None:
    first = site.request(1, "echo once more >> made")
    site.publish(first)
    assert site.job(first) == site.job(first) == 0
    assert (Path(first.workdir) / "made").read_text() == "once more\n" * 2


def test_a_job_without_a_turn_fails(site: Site) -> None:
    first = site.request(1)
    site.publish(first)
    (site.place / "next").unlink()
    assert site.job(first) == 82


def test_at_the_end_nothing_is_left(site: Site) -> None:
    first, second = site.request(1), site.request(2)
    site.publish(first)
    site.job(first)
    site.publish(second)
    assert site.run(FORGET, second) == ("", 0)
    assert [path.name for path in site.root.iterdir()] == ["turns"]
    assert list((site.root / "turns").iterdir()) == []
    assert site.run(FORGET, second) == ("", 0), "there may be none"
