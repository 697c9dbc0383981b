"""A corpus of archives that a hostile or broken site may send, instead of the folder `box`."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

Maker = Callable[[tarfile.TarFile], None]
MANY = 2000  # against a limit of 1000; the corpus itself can make a million


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    info.mode = 0o755
    return info


def add(archive: tarfile.TarFile, name: str, contents: bytes = b"pwned\n") -> None:
    info = member(name)
    info.size = len(contents)
    archive.addfile(info, io.BytesIO(contents))


def folder(archive: tarfile.TarFile) -> None:
    archive.addfile(member("box", tarfile.DIRTYPE))


def corpus(target: str) -> dict[str, Maker]:
    """Archives that try to write `target`, an absolute path outside the inbox."""

    def climbing(archive: tarfile.TarFile) -> None:
        folder(archive)
        add(archive, f"box/{'../' * 20}{target[1:]}")

    def climbing_root(archive: tarfile.TarFile) -> None:
        add(archive, f"../../../../../../../../../../{target[1:]}")

    def absolute(archive: tarfile.TarFile) -> None:
        folder(archive)
        add(archive, target)

    def unasked(archive: tarfile.TarFile) -> None:
        folder(archive)
        add(archive, "another")

    def symlink(archive: tarfile.TarFile) -> None:
        folder(archive)
        archive.addfile(member("box/link", tarfile.SYMTYPE, str(Path(target).parent)))
        add(archive, f"box/link/{Path(target).name}")

    def symlink_file(archive: tarfile.TarFile) -> None:
        folder(archive)
        archive.addfile(member("box/link", tarfile.SYMTYPE, target))
        add(archive, "box/link")

    def symlink_root(archive: tarfile.TarFile) -> None:
        archive.addfile(member("box", tarfile.SYMTYPE, str(Path(target).parent)))
        add(archive, f"box/{Path(target).name}")

    def hardlink(archive: tarfile.TarFile) -> None:
        folder(archive)
        archive.addfile(member("box/link", tarfile.LNKTYPE, "/etc/passwd"))
        add(archive, "box/link")

    def hardlink_climbing(archive: tarfile.TarFile) -> None:
        folder(archive)
        archive.addfile(member("box/link", tarfile.LNKTYPE, "box/../../../../etc/passwd"))

    def device(archive: tarfile.TarFile) -> None:
        folder(archive)
        info = member("box/device", tarfile.BLKTYPE)
        info.devmajor, info.devminor = 8, 0
        archive.addfile(info)

    def character_device(archive: tarfile.TarFile) -> None:
        folder(archive)
        archive.addfile(member("box/device", tarfile.CHRTYPE))

    def fifo(archive: tarfile.TarFile) -> None:
        folder(archive)
        archive.addfile(member("box/fifo", tarfile.FIFOTYPE))

    def many(archive: tarfile.TarFile) -> None:
        folder(archive)
        for number in range(MANY):
            add(archive, f"box/{number}", b"")

    def huge(archive: tarfile.TarFile) -> None:
        folder(archive)
        info = member("box/huge")
        info.size = 2**50
        archive.addfile(info)

    def growing(archive: tarfile.TarFile) -> None:
        folder(archive)
        for number in range(8):
            add(archive, f"box/{number}", bytes(2**19))

    def sparse(archive: tarfile.TarFile) -> None:
        folder(archive)
        info = member("box/sparse")
        info.pax_headers = {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": "box/sparse",
            "GNU.sparse.realsize": str(2**60),
        }
        archive.addfile(info)

    def header(archive: tarfile.TarFile) -> None:
        info = member("box", tarfile.GNUTYPE_LONGNAME)
        info.size = 2**33
        archive.addfile(info)

    def chained_headers(archive: tarfile.TarFile) -> None:
        for _ in range(5000):
            info = member("box", tarfile.XGLTYPE)
            info.size = 0
            archive.addfile(info)

    def unknown(archive: tarfile.TarFile) -> None:
        folder(archive)
        archive.addfile(member("box/odd", b"V"))

    def file_as_folder(archive: tarfile.TarFile) -> None:
        add(archive, "box")
        add(archive, "box/inside")

    return {name: maker for name, maker in locals().items() if callable(maker) and name != "target"}


NAMES = (*corpus("/x/y"), "cut", "cut_between", "empty", "noise", "endless")


def archives(target: str) -> Iterator[tuple[str, bytes]]:
    for name, maker in corpus(target).items():
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
            maker(archive)
        yield name, buffer.getvalue()
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        folder(archive)
        add(archive, "box/first", b"1" * 3000)
        add(archive, "box/second", b"2" * 3000)
    yield "cut", whole.getvalue()[:3000]
    yield "cut_between", whole.getvalue()[: 512 + 512 + 3072]
    yield "empty", b""
    yield "noise", bytes(range(256)) * 64
    yield "endless", whole.getvalue() + b"\0" * 2**22
