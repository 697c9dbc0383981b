"""What trackers get is what the history says."""

import csv
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from crossfl import cli
from crossfl.protocol.history import FacilityEntry, RoundEntry, encode_line
from crossfl.protocol.measurements import PhaseSeconds


@pytest.fixture
def history(tmp_path: Path) -> Path:
    entries = [
        RoundEntry(
            round=number,
            finished="2026-01-01T00:00:00+00:00",
            seconds=10.0 * number,
            loss=4.0 / number,
            model="0" * 64,
            facilities={
                "leonardo": FacilityEntry(
                    status="complete", share=0.5, steps=7, seconds=PhaseSeconds(train=1.5)
                ),
                "karolina": FacilityEntry(status="absent", reason="it is 5 o'clock"),
            },
        )
        for number in (1, 2)
    ]
    (tmp_path / "history.jsonl").write_bytes(b"".join(map(encode_line, entries)))
    return tmp_path


def test_csv(history: Path) -> None:
    assert cli.main(["track", str(history), "--csv", str(history / "numbers.csv")]) == 0
    with (history / "numbers.csv").open() as stream:
        rows = {(row["round"], row["name"]): float(row["value"]) for row in csv.DictReader(stream)}
    assert rows["1", "loss"] == 4.0 and rows["2", "loss"] == 2.0
    assert rows["2", "seconds"] == 20.0
    assert rows["1", "leonardo/steps"] == 7 and rows["1", "leonardo/seconds/train"] == 1.5
    assert rows["1", "karolina/share"] == 0.0
    assert not [name for _, name in rows if "reason" in name or "status" in name]


def test_tensorboard(history: Path) -> None:
    event = pytest.importorskip("tensorboardX.proto.event_pb2")
    record_writer = pytest.importorskip("tensorboardX.record_writer")
    assert cli.main(["track", str(history), "--tensorboard", str(history / "events")]) == 0
    (file,) = (history / "events").iterdir()
    content, found = file.read_bytes(), {}
    while content:  # length, its checksum, the record, its checksum
        size = int.from_bytes(content[:8], "little")
        checksum = int.from_bytes(content[8:12], "little")
        assert record_writer.masked_crc32c(content[:8]) == checksum
        told = event.Event.FromString(content[12 : 12 + size])
        found |= {(told.step, v.tag): v.simple_value for v in told.summary.value}
        content = content[16 + size :]
    assert found[2, "loss"] == 2.0 and found[1, "leonardo/seconds/train"] == 1.5
    assert file.stat().st_size < 20_000


def test_mlflow_and_wandb_get_each_round(history: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own interfaces, written down: neither is installed for the tests."""
    logged: list[tuple[str, float, int]] = []

    class Run:
        def __enter__(self) -> "Run":
            return self

        def __exit__(self, *_: object) -> None: ...

        def log(self, numbers: dict[str, float], step: int) -> None:
            logged.extend((name, value, step) for name, value in numbers.items())

        def finish(self) -> None:
            logged.append(("finished", 0.0, 0))

    mlflow: Any = types.ModuleType("mlflow")
    mlflow.start_run = lambda run_name: Run()
    mlflow.log_metric = lambda name, value, step: logged.append((name, value, step))
    wandb: Any = types.ModuleType("wandb")
    wandb.init = lambda project, name: Run()
    for module in (mlflow, wandb):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert cli.main(["track", str(history / "history.jsonl"), "--mlflow"]) == 0
    assert ("loss", 2.0, 2) in logged and ("leonardo/steps", 7.0, 1) in logged
    first = list(logged)
    logged.clear()
    assert cli.main(["track", str(history), "--wandb"]) == 0
    assert logged == [*first, ("finished", 0.0, 0)]


BAD = {
    "no tracker": ([], "name a tracker"),
    "not installed": (["--mlflow"], "mlflow is not installed: pip install mlflow"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(
    case: str, history: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    more, message = BAD[case]
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert cli.main(["track", str(history), *more]) == cli.BAD_INPUT
    assert message in capsys.readouterr().err
