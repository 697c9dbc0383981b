"""What a site sends is written where it was asked for, or not at all."""

from __future__ import annotations

import io
import os
import stat
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crossfl.engine import archive
from crossfl.engine.archive import END, Limits, RefusedError, copy, extract
from tests.schedulers import hostile
from tests.support.engine import Engine, Outcome
from tests.support.testbed import Site

LIMITS = Limits(members=1000, bytes=2**21)
Shim = Callable[[Site, str, str], None]


def packed(folder: Path) -> io.BytesIO:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as stream:
        stream.add(folder, folder.name)
    return io.BytesIO(buffer.getvalue() + END)


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def make_box(place: Path) -> Path:
    box = place / "box"
    (box / "deep" / "er").mkdir(parents=True)
    (box / "a").write_bytes(os.urandom(100_000))
    (box / "deep" / "er" / "b").write_bytes(b"b")
    (box / "deep" / "script").write_text("#!/bin/sh\n")
    (box / "deep" / "script").chmod(0o4755)
    os.link(box / "a", box / "twin")
    return box


def test_a_folder(tmp_path: Path) -> None:
    box = make_box(tmp_path)
    extract(packed(box), "box", tmp_path / "inbox", LIMITS)
    assert tree(tmp_path / "inbox") == tree(box)
    assert (tmp_path / "inbox" / "deep" / "script").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "inbox" / "twin").stat().st_nlink == 1


def test_a_folder_into_one_that_is_there(tmp_path: Path) -> None:
    box = make_box(tmp_path)
    (inbox := tmp_path / "inbox").mkdir()
    (inbox / "a").write_text("older")
    (inbox / "kept").write_text("kept")
    extract(packed(box), "box", inbox, LIMITS)
    assert tree(inbox) == tree(box) | {"kept": b"kept"}


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "inbox").mkdir()
    extract(packed(tmp_path / "file"), "file", tmp_path / "renamed", LIMITS)
    extract(packed(tmp_path / "file"), "file", tmp_path / "inbox", LIMITS)
    assert (tmp_path / "renamed").read_text() == "text"
    assert (tmp_path / "inbox" / "file").read_text() == "text"


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    """Whether or not the site claims that the stream is whole."""
    (box := tmp_path / "box").mkdir()
    (box / "a").write_bytes(b"a" * 700)
    whole = packed(box).getvalue()
    ends = whole.index(b"a" * 700) + 1024  # of the last member, with its padding
    for length in (*range(0, ends + 512, 100), ends):
        for tail in (b"", END):
            with pytest.raises(RefusedError):
                extract(io.BytesIO(whole[:length] + tail), "box", tmp_path / "inbox", LIMITS)
            assert not (tmp_path / "inbox").exists()


def test_what_goes_through_a_link_that_was_there(tmp_path: Path) -> None:
    box = make_box(tmp_path)
    (outside := tmp_path / "outside").mkdir()
    (inbox := tmp_path / "inbox").mkdir()
    (inbox / "deep").symlink_to(outside)
    (outside / "target").write_text("mine")
    (inbox / "a").symlink_to(outside / "target")
    with pytest.raises(RefusedError, match="in the way"):
        extract(packed(box), "box", inbox, LIMITS)
    assert tree(outside) == {"target": b"mine"}


def snapshot(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize("claims_whole", [False, True])
def test_hostile_archives(tmp_path: Path, claims_whole: bool) -> None:
    (place := tmp_path / "vm").mkdir()
    target = tmp_path / "target"
    before = snapshot(tmp_path)
    seen = []
    for name, contents in hostile.archives(str(target)):
        stream = io.BytesIO(contents + (END if claims_whole else b""))
        with pytest.raises(RefusedError):
            extract(stream, "box", place / "inbox", LIMITS)
        assert snapshot(tmp_path) == before, name
        seen.append(name)
    assert tuple(seen) == hostile.NAMES


def test_a_million_members(tmp_path: Path) -> None:
    """Refused at the first one too many: it takes no longer, and leaves nothing."""

    class Million:
        """A tar stream that is made as it is read."""

        def __init__(self) -> None:
            self.number = 0
            self.rest = bytes(hostile.member("box", tarfile.DIRTYPE).tobuf())

        def read(self, size: int) -> bytes:
            while len(self.rest) < size and self.number < 1_000_000:
                self.rest += hostile.member(f"box/{self.number}").tobuf()
                self.number += 1
            taken, self.rest = self.rest[:size], self.rest[size:]
            return taken

    stream = Million()
    with pytest.raises(RefusedError, match="more than 1000 members"):
        extract(stream, "box", tmp_path / "inbox", LIMITS)
    assert stream.number < 10_000
    assert not (tmp_path / "inbox").exists()


# --- on this machine ---


def test_local_copy(tmp_path: Path) -> None:
    box = make_box(tmp_path)
    (box / "inner").symlink_to("deep/er/b")
    (box / "inner_folder").symlink_to("deep")
    copy(box, tmp_path / "inbox", LIMITS)
    copied = tree(tmp_path / "inbox")
    assert copied["inner"] == b"b" and copied["inner_folder/er/b"] == b"b"
    assert not any(path.is_symlink() for path in (tmp_path / "inbox").rglob("*"))


def spoil(box: Path, how: str) -> None:
    match how:
        case "file" | "folder" | "climb" | "dangling" | "loop":
            targets = {"file": "/etc/passwd", "folder": "/etc", "climb": "../outside", "loop": "."}
            (box / "link").symlink_to(targets.get(how, "nowhere"))
        case "fifo":
            os.mkfifo(box / "fifo")
        case "device":
            os.mknod(box / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
        case "many":
            for number in range(LIMITS.members + 1):
                (box / str(number)).touch()
        case "huge":
            (box / "huge").touch()
            os.truncate(box / "huge", 2**40)


SPOILED = ("file", "folder", "climb", "dangling", "loop", "fifo", "device", "many", "huge")


@pytest.mark.parametrize("how", SPOILED)
def test_hostile_local_folders(tmp_path: Path, how: str) -> None:
    (box := tmp_path / "box").mkdir()
    (tmp_path / "outside").write_text("mine")
    (box / "a").write_text("a")
    spoil(box, how)
    with pytest.raises(RefusedError):
        copy(box, tmp_path / "inbox", LIMITS)
    assert not (tmp_path / "inbox").exists()


# --- through the connectors, with the real engine ---

LIMITED: dict[str, Any] = {"maxArchiveMembers": LIMITS.members, "maxArchiveBytes": LIMITS.bytes}
VIA = ("ssh", "slurm", "pbs")
CHOSEN = ["climbing", "absolute", "symlink", "hardlink", "device", "fifo", "many", "huge", "cut"]
CREATES = 'case "$1" in c*)'  # a shim for `tar` leaves the unpacking of inputs to the real one


def fetch(engine: Engine, sites: dict[str, Site], via: str, script: str) -> Outcome:
    """Run a script somewhere, and bring the folder `box` that it leaves."""
    if via == "local":
        return engine.run(
            "one.cwl",
            {"script": script},
            {"here": {"type": "crossfl.local", "workdir": str(engine.folder), "config": LIMITED}},
            {"deployment": "here"},
            seconds=40,
        )
    site = sites["gamma" if via == "pbs" else "alpha"]
    if via == "ssh":
        return engine.run(
            "one.cwl",
            {"script": script},
            {"site": site.login(**LIMITED)},
            {"deployment": "site"},
            seconds=40,
        )
    return engine.run_at(site, script, seconds=40, **LIMITED)


@pytest.mark.parametrize("via", (*VIA, "local"))
def test_an_honest_folder_through(via: str, engine: Engine, sites: dict[str, Site]) -> None:
    script = "mkdir -p 'box/in ner'; cd box; echo hello > 'in ner/file'; cp -l 'in ner/file' twin"
    done = fetch(engine, sites, via, script)
    assert done.code == 0, done.log
    box = Path(done.outputs["box"]["path"])
    assert tree(box) == {"in ner/file": b"hello\n", "twin": b"hello\n"}


@pytest.mark.parametrize("via", VIA)
def test_hostile_archives_through(
    via: str, engine: Engine, sites: dict[str, Site], shim: Shim, tmp_path: Path
) -> None:
    """A `tar` of the site's own sends what it likes; one run of the engine each.

    The shortest list that takes every way out of the corpus; all of it is tried without an engine.
    """
    site = sites["gamma" if via == "pbs" else "alpha"]
    if "home" not in site.facts:
        pytest.skip("faults are injected only in the testbed")
    target = Path("/tmp") / f"crossfl-hostile-{os.getpid()}"
    corpus = dict(hostile.archives(str(target)))
    evil = Path(site.facts["home"]) / "evil.tar"
    shim(site, "tar", f'{CREATES} exec cat {evil};; *) exec /bin/tar "$@";; esac')
    for name in CHOSEN:
        evil.write_bytes(corpus[name])
        evil.chmod(0o644)
        (folder := tmp_path / name).mkdir()
        began = time.monotonic()
        done = fetch(Engine(folder), sites, via, "mkdir box; echo hello > box/file")
        assert done.code != 0, name
        assert time.monotonic() - began < 40
        assert "is refused, and nothing of it was kept" in done.log, name
        assert not target.exists(), name
        assert not [path for path in folder.rglob("*") if "pwned" in path.name or path.is_fifo()]
    evil.unlink()


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_hostile_folder_through_local(
    kind: str, engine: Engine, sites: dict[str, Site], tmp_path: Path
) -> None:
    (outside := tmp_path / "outside").mkdir()
    (outside / "secret").write_text("mine")
    link = outside if kind == "folder" else outside / "secret"
    done = fetch(engine, sites, "local", f"mkdir box; ln -s {link} box/link")
    assert done.code != 0
    assert "is refused, and nothing of it was kept" in done.log
    assert "mine" not in "".join(p.read_text() for p in engine.outdir.rglob("*") if p.is_file())


def test_a_tar_that_fails_is_a_cut_stream(
    engine: Engine, sites: dict[str, Site], shim: Shim
) -> None:
    """GNU tar ends its archive properly even where it could not read a file."""
    shim(sites["alpha"], "tar", f'{CREATES} /bin/tar "$@"; exit 2;; *) exec /bin/tar "$@";; esac')
    done = fetch(engine, sites, "ssh", "mkdir box; echo hello > box/file")
    assert done.code != 0
    assert "the stream was cut short" in done.log


def test_limits_are_those_of_the_documentation() -> None:
    assert (archive.MAX_MEMBERS, archive.MAX_BYTES) == (100_000, 2**40)
