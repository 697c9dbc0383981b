"""A short form of the fuzzer; `python -m tests.support.fuzz --seconds 600` is the long one."""

from pathlib import Path

import pytest

from tests.support import fuzz


def test_good_files_are_read(tmp_path: Path) -> None:
    for good in fuzz.seeds():
        (tmp_path / "delta.safetensors").write_bytes(good)
        assert fuzz.verdict(tmp_path) == "read"


@pytest.mark.slow
def test_no_damage_gets_through_or_crashes() -> None:
    verdicts = fuzz.fuzz(seconds=600, seed=1, tries=2000)
    assert verdicts.total() > 500
    assert verdicts["refused: CrossFLError"] > 100


@pytest.mark.slow
def test_damaged_manifests_never_crash_the_gate() -> None:
    verdicts = fuzz.fuzz_manifests(seconds=600, seed=1, tries=120)
    assert verdicts["refused"] > 50
    assert verdicts["averaged"] > 0
