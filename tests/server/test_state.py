"""The server state on disk: what a round costs does not grow with the rounds before it."""

from pathlib import Path

import pytest
import torch

from crossfl.errors import CrossFLError
from crossfl.protocol.history import RoundEntry
from crossfl.protocol.layout import GLOBAL_MODEL, STATE
from crossfl.protocol.records import Aggregation
from crossfl.server import state as server_state
from crossfl.server.rounds import Averaged, aggregate
from crossfl.server.state import SEGMENT
from tests.support.federation import STARTED, Federation

ROUNDS = 2 * SEGMENT + 3


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each of some rounds, with the model and the state after it."""
    folder = tmp_path_factory.mktemp("federation")
    first = Federation(folder / "0", {"w": torch.zeros(3)})
    server = first.server.replace(rounds=ROUNDS)
    (first.state / "manifest.json").unlink()
    server_state.save(server, first.state)
    first.server, before = server, (first.model, first.state)
    for number in range(1, ROUNDS + 1):
        first.folder = folder / f"updates-{number}"
        update = first.update("site", {"w": torch.ones(3)}, metrics=_loss(number))
        out = folder / str(number)
        outcome = aggregate(*before, [update], out, STARTED + number)
        assert isinstance(outcome, Averaged)
        first.server, before = outcome.state, (out / GLOBAL_MODEL, out / STATE)
    return folder


def _loss(number: int) -> dict[str, dict[str, float]]:
    return {"validation": {"loss": 2.0 + (number - 7) ** 2, "tokens": 50}}


def test_the_history_has_every_round_in_order(federation: Path) -> None:
    entries = list(server_state.history(federation / str(ROUNDS) / STATE))
    assert [entry.round for entry in entries] == list(range(1, ROUNDS + 1))
    assert all(isinstance(entry, RoundEntry) for entry in entries)
    server_state.write_history(federation / str(ROUNDS) / STATE, federation / "whole.jsonl")
    assert len((federation / "whole.jsonl").read_text().splitlines()) == ROUNDS


def test_full_segments_are_taken_over_and_never_written_again(federation: Path) -> None:
    last, before = (federation / str(n) / STATE / "history" for n in (ROUNDS, ROUNDS - 1))
    names = sorted(path.name for path in last.iterdir())
    assert names == [f"{1 + i * SEGMENT:06}.jsonl" for i in range(3)]
    for name in names[:-1]:
        assert (last / name).samefile(before / name)
        assert len((last / name).read_text().splitlines()) == SEGMENT
    assert not (last / names[-1]).samefile(before / names[-1])


def test_a_round_adds_its_line_to_what_the_state_says_and_no_more(federation: Path) -> None:
    sizes = [(federation / str(n) / STATE / "state.json").stat().st_size for n in (10, ROUNDS)]
    best = 60 * ROUNDS  # a round and its loss for each, up to a hundred
    assert sizes[1] < sizes[0] + best


def test_the_best_rounds_are_remembered(federation: Path) -> None:
    """The loss in a round is that of the model before it: of round 6, it was the lowest."""
    state = server_state.load(federation / str(ROUNDS) / STATE)
    assert [number for number, _ in state.best[:3]] == [6, 5, 7]
    ledger = state.ledger_of("site")
    assert (ledger.samples, ledger.counted, ledger.last_steps) == (10 * ROUNDS, ROUNDS, 5)
    assert len(ledger.recent) == 5


@pytest.mark.parametrize("name", ["000001.jsonl", f"{1 + 2 * SEGMENT:06}.jsonl"])
def test_a_damaged_segment_is_named(federation: Path, tmp_path: Path, name: str) -> None:
    import shutil

    state = tmp_path / "state"
    shutil.copytree(federation / str(ROUNDS) / STATE, state)
    path = state / "history" / name
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)
    with pytest.raises(CrossFLError, match=f"{name} does not match its sha256"):
        list(server_state.history(state))


def test_signers_are_kept_in_the_state(tmp_path: Path) -> None:
    signers = tmp_path / "allowed"
    signers.write_text("leonardo ssh-ed25519 AAAA\n")
    federation = Federation(tmp_path / "f", {"w": torch.zeros(3)}, signers=str(signers))
    signers.unlink()
    state = server_state.load(federation.state)
    assert state.aggregation.signers == "signers"
    kept = server_state.signers(state, federation.state)
    assert kept is not None and kept.read_text() == "leonardo ssh-ed25519 AAAA\n"
    for content in ("", "# nobody\n"):
        signers.write_text(content)
        with pytest.raises(CrossFLError, match="lists nobody who may sign"):
            server_state.write_signers(Aggregation(signers=str(signers)), tmp_path)
    with pytest.raises(CrossFLError, match="cannot be read: No such file"):
        server_state.write_signers(Aggregation(signers=str(tmp_path / "absent")), tmp_path)
