"""A federation in virtual time: it decides what the workflow decides, and waits for nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from crossfl import cli
from crossfl.errors import CrossFLError
from crossfl.protocol.records import Aggregation, Facility, Task
from crossfl.server.planning.fixed import plan
from crossfl.server.quorum import BelowQuorumError
from crossfl.server.rounds import aggregate
from crossfl.simulation.virtual import sites
from crossfl.simulation.virtual.federation import Federation
from crossfl.simulation.virtual.sites import Backfill, Bursty, Lognormal, Site
from crossfl.storage.job import Job
from tests.support import federation as files
from tests.support.federation import STARTED, master
from tests.support.paths import CWL

NAMES = "abcd"
SHORT, LONG = Lognormal(median=120.0), Lognormal(median=8000.0, sigma=0.3)


def _job(rounds: int = 4, names: str = NAMES, attempts: int = 2, **rules: Any) -> Job:
    return Job(
        facilities=tuple(Facility(name=n, dataset="words", attempts=attempts) for n in names),
        rounds=rounds,
        local_steps=25,
        aggregation=Aggregation(**{"weighting": "equal", "grace_seconds": 0.0} | rules),
    )


def _sites(names: str = NAMES, **others: Any) -> dict[str, Site]:
    """One of them, b, has a long queue."""
    return {
        name: Site(**{"seconds_per_step": 24.0, "queue": LONG if name == "b" else SHORT} | others)
        for name in names
    }


def _played(job: Job, at: dict[str, Site], seed: int = 0, learner: Any = None) -> Federation:
    federation = Federation(job, at, seed, learner)
    assert federation.run(1e9)
    return federation


def test_a_round_of_all_waits_for_the_longest_queue() -> None:
    played = _played(_job(), _sites())
    assert [len(facilities) for facilities in played.schedule] == [4] * 4
    assert all(f.status == "complete" for turn in played.schedule for f in turn.values())
    assert played.clock.now > sum(played.accounts["b"].waits)
    assert {account.merged for account in played.accounts.values()} == {4}


@pytest.mark.parametrize("closes", ["first", "running", 1800])
def test_nobody_waits_for_a_queue_where_rounds_close_early(closes: Any) -> None:
    waiting = _played(_job(20), _sites())
    early = _played(_job(20, closes=closes), _sites())
    assert early.state.finished == 20
    assert early.clock.now < 0.5 * waiting.clock.now
    assert early.accounts["b"].merged >= 1  # and it is heard, once it comes
    late = [turn["b"].status for turn in early.schedule]
    assert late.count("late") > len(late) / 2


def test_a_job_takes_the_newest_task_when_it_starts() -> None:
    played = _played(_job(20, closes="first"), _sites())
    behind = [turn["b"].staleness for turn in played.schedule if turn["b"].status == "complete"]
    waits = played.accounts["b"].waits
    merges_in_its_queue = len(played.schedule) * waits[0] / played.clock.now
    assert max(behind) < merges_in_its_queue / 2
    queued = [t["b"].seconds.queue for t in played.schedule if t["b"].status == "complete"]
    assert queued == pytest.approx(waits[: len(queued)])


def test_who_comes_seldom_counts_more_each_time() -> None:
    played = _played(_job(40, closes="first"), _sites())
    weight = {name: account.weight for name, account in played.accounts.items()}
    merged = {name: account.merged for name, account in played.accounts.items()}
    assert merged["b"] < merged["a"] / 4
    assert weight["b"] / merged["b"] > 2 * weight["a"] / merged["a"]


def test_the_same_seed_is_the_same_federation() -> None:
    job, rough = _job(5, closes="first"), _sites(failures=0.2, preemptions=0.1)
    one, same, other = (_played(job, rough, seed) for seed in (1, 1, 2))
    assert (one.schedule, one.clock.now) == (same.schedule, same.clock.now)
    assert one.accounts == same.accounts
    assert one.clock.now != other.clock.now


def test_what_fails_is_tried_again_and_costs_nodes() -> None:
    smooth = _played(_job(20, "acd", quorum=1), _sites("acd"))
    rough = _played(_job(20, "acd", quorum=1), _sites("acd", failures=0.3))
    statuses = [f.status for turn in rough.schedule for f in turn.values()]
    assert 0 < statuses.count("absent") < 15  # both attempts of a job: 9 %
    assert sum(a.thrown_away for a in rough.accounts.values()) > 0
    assert sum(a.thrown_away for a in smooth.accounts.values()) == 0
    cut = _played(_job(20, "acd", attempts=1), _sites("acd", preemptions=0.3))
    assert all(f.status == "complete" for turn in cut.schedule for f in turn.values())
    assert cut.clock.now > smooth.clock.now


def test_a_quorum_that_cannot_be_met_stops() -> None:
    with pytest.raises(BelowQuorumError, match="its job failed 2 times"):
        Federation(_job(), _sites(failures=1.0), 0).run(1e9)


def test_a_budget_ends_it() -> None:
    played = _played(_job(1000, closes="first", budget_seconds=50_000.0), _sites())
    assert 50_000 <= played.clock.now < 60_000
    assert not Federation(_job(1000), _sites(), 0).run(1e5)


def test_steps_by_speed_are_those_of_the_planner() -> None:
    mixed = _sites()
    mixed["d"] = mixed["d"].replace(seconds_per_step=96.0)
    played = _played(_job(6, closes="first", planner="equal_time"), mixed)
    last = {name: [t[name].steps for t in played.schedule if t[name].steps][-1] for name in "acd"}
    assert last["a"] == last["c"] == pytest.approx(25, abs=4)
    assert last["d"] == pytest.approx(6, abs=1)


class _Known:
    """Deltas that depend on facility, task and model, so that a wrong one is seen."""

    def first(self) -> Tensor:
        return torch.zeros(6)

    def delta(self, task: Task, model: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(task.seed)
        return torch.randn(6, generator=generator) * 0.1 - 0.05 * model


@pytest.mark.parametrize("optimizer", ["fedavg", "diloco"])
@pytest.mark.parametrize("closes", ["first", 500])
def test_the_models_are_those_of_the_workflow(tmp_path: Path, closes: Any, optimizer: str) -> None:
    """The same schedule through `aggregate`, with updates on disk, gives the same weights."""
    rules = {"closes": closes, "server_optimizer": optimizer, "server_momentum": 0.5}
    job, shorter = _job(5, **rules), _sites()
    shorter["b"] = shorter["b"].replace(queue=Lognormal(median=2500.0, sigma=0.3))
    played = _played(job, shorter, learner=_Known())
    assert any(entry.staleness for turn in played.schedule for entry in turn.values())

    on_disk = files.Federation(tmp_path, {"w": torch.zeros(6)}, **job.aggregation.asdict())
    tasks: dict[tuple[str, int], tuple[Task, Tensor]] = {}
    for number, turn in enumerate(played.schedule, 1):
        model = master(on_disk.model.parent)["w"] if number > 1 else torch.zeros(6)
        planned = plan(on_disk.server, job.facilities, job.local_steps, job.training, "train")
        updates = []
        for task in planned.tasks:
            tasks[task.facility, number] = (task, model.clone())
            entry = turn[task.facility]
            name = f"{number}-{task.facility}"
            if entry.status == "late":
                stated = {"status": "late", "reason": "queue"}
                updates.append(on_disk.update(task.facility, None, name=name, **stated))
                continue
            old, base = tasks[task.facility, number - entry.staleness]
            amount = old.local_steps * job.training.batch_size
            fields: dict[str, Any] = {"steps": old.local_steps, "samples": amount}
            fields |= {"tokens": amount, "round": old.round, "base": old.base}
            values = {"w": _Known().delta(old, base)}
            updates.append(on_disk.update(task.facility, values, name=name, **fields))
        out = tmp_path / "out" / str(number)
        aggregate(
            on_disk.model, on_disk.state, updates, out, STARTED, allowances=planned.allowances
        )
        on_disk.go_on(out)
    assert {n: f.share for n, f in files.facilities(out).items()} == {
        n: f.share for n, f in played.schedule[-1].items()
    }
    assert torch.equal(master(out)["w"], played.model)


SITES = """\
sites:
  leonardo: {seconds_per_step: 24, queue: {kind: backfill, load: 0.8}, nodes: 8}
  karolina: {seconds_per_step: 30, queue: {kind: lognormal, median: 300, sigma: 1}}
"""


def test_a_forecast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sites.yml").write_text(SITES)
    words = ["simulate", str(CWL / "federation.yml"), "--sites", str(tmp_path / "sites.yml")]
    words += ["--draws", "4", "--outdir", str(tmp_path / "out")]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "ends after, hours" in printed
    assert "of 4 draws" in printed
    assert (tmp_path / "out" / "forecast.json").is_file()
    assert cli.main(words) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        (None, [], "cannot be read as a sites file"),
        ("sites: {}\n", [], "sites: expected"),
        (SITES.replace("karolina", "vega"), [], "does not describe karolina"),
        (SITES.replace("lognormal", "infinite"), [], "sites[...].queue"),
        (SITES.replace("300", "-3"), [], "queue.median"),
        (SITES.replace("kind: backfill", "kind: backfill, machine: 4"), [], "8 nodes never starts"),
        (SITES.replace("load: 0.8", "trace: no.swf"), [], "no.swf cannot be read"),
        (SITES, ["--draws", "0"], "draws is 0"),
        (SITES, ["--data", "data"], "give --data to train, or --sites"),
        (SITES, ["--replay", "history.jsonl"], "--replay trains"),
    ],
)
def test_a_sites_file_that_is_of_no_use(
    tmp_path: Path,
    text: str | None,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if text is not None:
        (tmp_path / "sites.yml").write_text(text)
    verb = ["simulate", str(CWL / "federation.yml"), "--sites", str(tmp_path / "sites.yml")]
    assert cli.main([*verb, "--outdir", str(tmp_path / "out"), *words]) == cli.BAD_INPUT
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_recorded_waits_are_those_of_the_history(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").write_bytes(b"")
    site = "{seconds_per_step: 2, queue: {kind: recorded, history: history.jsonl}}"
    (tmp_path / "sites.yml").write_text(f"sites: {{a: {site}}}\n")
    with pytest.raises(CrossFLError, match=r"history\.jsonl has no job of a"):
        Federation(_job(1, "a"), sites.load(tmp_path / "sites.yml"), 0)


def test_a_machine_and_spells_can_be_queued_in() -> None:
    for queue in (Backfill(load=0.7), Bursty()):
        played = _played(_job(2, closes="first"), _sites(queue=queue, nodes=4))
        assert played.state.finished == 2
