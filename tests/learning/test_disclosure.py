"""What metrics, completions and messages tell of a facility's data to who asks cleverly."""

import functools
import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, ByT5Tokenizer, LlamaConfig, set_seed

from crossfl.errors import CrossFLError
from crossfl.facility import place
from crossfl.facility.place import Disclosure
from crossfl.learning import datasets, scoring
from crossfl.learning.datasets import Text
from crossfl.learning.disclosure import (
    Span,
    edge_losses,
    groups_of,
    measured_length,
    rounded,
    usable,
)
from crossfl.learning.evaluation import Validation, complete_prompts, validation_samples
from crossfl.learning.ranks import Parallel
from crossfl.protocol import variables
from crossfl.protocol.measurements import Metrics
from crossfl.protocol.records import Task, Training
from crossfl.steps.evaluate import evaluate
from crossfl.steps.train import train
from tests.support.paths import DATA, ROUND
from tests.support.validation import EVERYTHING

SAMPLE = "Paziente Rossi Maria 1961 HIV+"
FLOORS = Disclosure()
STEP = 0.05
"""Nats between the logits of two tokens: enough to tell them apart at four decimals."""
SPANS = st.lists(
    st.builds(
        lambda a, b, gaps: Span(a, a + b, tuple(sorted(a + g for g in gaps if 0 < g < b - 1))),
        st.integers(0, 12),
        st.integers(1, 12),
        st.sets(st.integers(0, 12), max_size=6),
    )
)
"""With gaps, as between the turns of a chat; the first and the last position are predicted."""


class Oracle(torch.nn.Module):
    """A model that ignores what it reads and gives each token odds of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.arange(384) * STEP)

    def forward(self, input_ids: torch.Tensor, **_: object) -> object:
        class Output:
            logits = self.logits.expand(*input_ids.shape, -1)

        return Output


@pytest.fixture
def clinic(tmp_path: Path) -> Path:
    """50 validation samples: a secret, and 49 that are shorter."""
    rows = [{"text": t} for t in [SAMPLE] + [f"sample {i}" for i in range(49)]]
    (tmp_path / "clinic").mkdir()
    for split in ("train", "valid"):
        path = tmp_path / "clinic" / f"{split}.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path / "clinic"


PARALLEL = functools.cache(lambda: Parallel(Training(threads=1)))


def ask(dataset: Path, samples: int | None, length: int, disclosure: Disclosure) -> Metrics | None:
    """What the facility answers to one choice of settings."""
    training = Training(sequence_length=length, validation_samples=samples, threads=1)
    chosen = validation_samples(dataset, training, disclosure)
    return Validation(chosen, ByT5Tokenizer(), training, disclosure).measure(Oracle(), PARALLEL())


def read_off(dataset: Path, samples: int | None, disclosure: Disclosure) -> str:
    """The secret, from the differences of losses at growing sequence lengths."""
    odds = torch.arange(384, dtype=torch.float64) * STEP
    before, text = 0.0, ""
    for length in range(2, len(SAMPLE) + 1):
        answer = ask(dataset, samples, length, disclosure)
        total = answer.loss * answer.tokens if answer else 0.0
        token = round((float(odds.logsumexp(0)) - (total - before)) / STEP)
        text += chr(token - 3) if 3 <= token < 259 else "?"
        before = total
    return text


def matches(text: str) -> int:
    return sum(a == b for a, b in zip(text, SAMPLE[1:], strict=True))


def test_without_floors_losses_spell_a_sample(clinic: Path) -> None:
    assert read_off(clinic, 1, EVERYTHING) == SAMPLE[1:]


@pytest.mark.parametrize(("samples", "tokens"), [(1, 256), (1, 1), (17, 1), (None, 1), (None, 256)])
def test_losses_do_not_spell_a_sample(clinic: Path, samples: int | None, tokens: int) -> None:
    """Also where the secret is the only sample that reaches a length, and tokens have no floor."""
    text = read_off(clinic, samples, Disclosure(min_samples=16, min_tokens=tokens))
    assert matches(text) <= 2, text


def test_no_two_settings_differ_by_few_samples(clinic: Path) -> None:
    """All pairs of settings: the totals of their tokens are equal, or many samples apart."""
    floors = Disclosure(min_samples=16, min_tokens=1)
    answers = {
        (samples, length): ask(clinic, samples, length, floors)
        for samples in (1, 16, 17, 32, 49, None)
        for length in (2, 8, 9, 10, 11, 20, 31)
    }
    totals = {a.tokens for a in answers.values() if a}
    assert len(totals) > 3, "the settings have to matter at all"
    assert all(abs(a - b) >= 16 for a, b in itertools.combinations(totals, 2))
    assert {a.samples for a in answers.values() if a} == {16, 32, 48}


@given(
    spans=SPANS, floor=st.integers(1, 5), lengths=st.tuples(st.integers(1, 26), st.integers(1, 26))
)
def test_lengths_differ_by_no_sample_or_by_many(
    spans: list[Span], floor: int, lengths: tuple[int, int]
) -> None:
    one, other = (measured_length(spans, length, floor) for length in lengths)
    differing = sum(span.until(one) != span.until(other) for span in spans)
    assert one <= lengths[0]
    assert differing == 0 or differing >= min(floor, len(spans))


@given(spans=SPANS, length=st.integers(1, 26))
def test_without_a_floor_nothing_is_left_out(spans: list[Span], length: int) -> None:
    shorter = measured_length(spans, length, 1)
    assert [s.until(shorter) for s in spans] == [s.until(length) for s in spans]


@given(size=st.integers(0, 100), wanted=st.integers(1, 120), floor=st.integers(1, 20))
def test_the_number_of_samples_is_a_multiple_of_the_floor(
    size: int, wanted: int, floor: int
) -> None:
    count = usable(size, wanted, floor)
    assert count <= size
    assert count == size if size < floor else (count >= floor and count % floor == 0)
    assert usable(size, wanted, 1) == min(size, wanted)


@given(names=st.lists(st.sampled_from(["a", "b", "c", "d", None])), floor=st.integers(1, 6))
def test_neither_tasks_nor_the_rest_are_few(names: list[str | None], floor: int) -> None:
    items = [(name, i) for i, name in enumerate(names)]
    groups = groups_of(items, lambda group: len(group) >= floor)
    assert sorted(i for group in groups.values() for i in group) == list(range(len(names)))
    if len(groups) > 1:
        assert min(map(len, groups.values())) >= floor
    assert all(len(group) >= floor for name, group in groups.items() if name)


def test_a_small_task_is_not_what_the_others_leave_of_the_whole() -> None:
    """One sample of task b beside 40 of a: neither b is told, nor what is not a."""
    samples = [Text(None, f"sample {i:02}", "a") for i in range(40)] + [Text(None, SAMPLE, "b")]
    training = Training(sequence_length=64, threads=1)
    metrics = Validation(samples, ByT5Tokenizer(), training, FLOORS).measure(Oracle())
    assert metrics is not None
    assert metrics.samples == 41
    assert metrics.tasks == {}


@pytest.mark.parametrize(
    ("samples", "tokens"), [(15, 256), (16, 257)], ids=["few samples", "few tokens"]
)
def test_below_a_floor_no_metric_leaves(samples: int, tokens: int) -> None:
    rows = [Text(None, "x" * 16) for _ in range(samples)]  # 16 predicted tokens each, with the end
    training = Training(sequence_length=64, threads=1)
    small = Validation(rows, ByT5Tokenizer(), training, Disclosure(16, tokens))
    assert small.measure(Oracle()) is None
    assert "fewer than 16 samples" in (small.withheld or "")
    enough = Validation([*rows, rows[0]], ByT5Tokenizer(), training, Disclosure(16, tokens))
    assert (enough.measure(Oracle()) is None) == (samples == 15 and tokens > 256)
    assert enough.withheld is None


def test_a_short_prompt_is_not_measured_alone() -> None:
    """Of 20 samples all but one have a prompt as long as the sequence."""
    samples = [Text("p" * 50, f"{i}") for i in range(19)] + [Text("p", SAMPLE)]
    floors = Disclosure(16, 1)
    for length in range(2, 51):
        training = Training(sequence_length=length, threads=1)
        assert Validation(samples, ByT5Tokenizer(), training, floors).measure(Oracle()) is None


def test_scores_are_of_many_answers() -> None:
    """A model that answers one question with a number would tell how far off it is."""
    pairs = [("none", str(i)) for i in range(19)] + [("3", "1961.5")]
    assert scoring.score("number", pairs, 16) == {"coverage": 1 / 20}
    assert "rmse" in scoring.score("number", pairs, 1)
    few = [("1", "word")] * 19 + [("3", "1961.5")]
    assert scoring.score("number", few, 16) == {}
    assert scoring.score("exact", pairs[:15], 16) == {}

    metrics = Metrics.parse({"loss": 1.0, "tokens": 400, "samples": 20})
    samples = [Text("q", str(i)) for i in range(20)]
    scored = scoring.score_completions(metrics, ["1"] * 20, samples, {}, 16)
    assert scored.exact_match == 0.05
    assert scoring.score_completions(metrics, ["1"], samples[:1], {}, 16) == metrics


def test_losses_of_training_are_of_many_samples() -> None:
    losses = [float(i) for i in range(1, 9)]
    assert edge_losses(losses, 4, 16) == (2.5, 6.5)
    assert edge_losses(losses[:3], 4, 16) == (None, None)
    assert edge_losses([1.23456], 32, 16) == (1.2346, 1.2346)


def test_digits() -> None:
    metrics = {
        "loss": 1.234567,
        "tokens": 3,
        "perplexity": 123456.7,
        "tasks": {"a": {"f": 0.12345}},
    }
    assert rounded(metrics) == {
        "loss": 1.2346,
        "tokens": 3,
        "perplexity": 123500.0,
        "tasks": {"a": {"f": 0.1235}},
    }


def test_training_goes_on_where_no_metric_leaves(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And it goes on as ever: the delta is that of a facility that tells its metrics."""
    training = Training(batch_size=4, sequence_length=48, threads=1)
    told = train(ROUND / "global_model", task, training, tmp_path / "told")
    monkeypatch.delenv(variables.MIN_VALIDATION_SAMPLES)
    capsys.readouterr()
    kept = train(ROUND / "global_model", task, training, tmp_path / "kept")
    shown = capsys.readouterr().err
    assert told is not None and kept is not None
    assert told.metrics.validation is not None
    assert (kept.metrics.validation, kept.metrics.local) == (None, None)
    assert kept.metrics.training is not None and kept.metrics.training.last_loss is None
    assert kept.digest == told.digest
    assert "metrics stay here" in shown
    assert " loss " not in shown
    found = evaluate(ROUND / "global_model", task, training, ["it 3="], tmp_path / "evaluated")
    assert found.metrics is None
    assert "fewer than 16 samples" in (found.reason or "")


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5", "²"])
def test_a_floor_is_a_whole_number(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variables.MIN_VALIDATION_SAMPLES, value)
    with pytest.raises(CrossFLError, match=r"CROSSFL_MIN_VALIDATION_SAMPLES is .* from 1 on"):
        place.disclosure()


def test_prompts_are_completed_where_the_facility_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, allowed in (("1", True), ("", False), ("yes", False)):
        monkeypatch.setenv(variables.PROMPTS, value)
        assert place.disclosure().prompts is allowed


def test_a_text_learnt_by_heart_leaves_only_where_prompts_are_allowed() -> None:
    set_seed(0)
    tokenizer = ByT5Tokenizer()
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, eos_token_id=1, pad_token_id=0,
        )
    )  # fmt: skip
    ids = tokenizer(f"name: {SAMPLE}", return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(150):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    training = Training(max_new_tokens=40, threads=1)
    (completion,), notice = complete_prompts(
        model, tokenizer, ["name: P"], training, Disclosure(prompts=True)
    )
    assert completion.completion == SAMPLE[1:]
    assert notice is None
    completions, notice = complete_prompts(model, tokenizer, ["name: P"], training, Disclosure())
    assert completions == []
    assert "CROSSFL_PROMPTS is not 1" in (notice or "")


CANARY = "CANARY-7f3a"


def _bad_files(folder: Path) -> None:
    """Datasets that libraries complain about in words that quote them."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = {
        "latin.txt": f"uno\n{CANARY} \xe8\n".encode("latin-1"),
        "latin.jsonl": json.dumps({"text": f"{CANARY} è"}, ensure_ascii=False).encode("latin-1"),
        "cut.jsonl": f'{{"text": "{CANARY}'.encode(),
        "deep.jsonl": b"[" * 100_000,
        "surrogate.jsonl": f'{{"text": "{CANARY} \\ud83d"}}'.encode(),
        "digits.jsonl": b'{"pixels": [[[1' + b"0" * 400 + b']]], "label": 0}',
        "task.jsonl": json.dumps({"text": "a", "task": f"{CANARY} !"}).encode(),
        "label.jsonl": json.dumps({"pixels": [[[0.0]]], "label": CANARY}).encode(),
        "words.jsonl": json.dumps({CANARY: CANARY}).encode(),
        "text.parquet": CANARY.encode(),
    }
    for name, content in rows.items():
        (folder / name).write_bytes(content)
    ends = pa.py_buffer(b"\0\0\0\0\x0c\0\0\0")
    bad = pa.Array.from_buffers(pa.string(), 1, [None, ends, pa.py_buffer(b"CANARY-7f3a\xe8")])
    parquet.write_table(pa.table({"text": bad}), folder / "bytes.parquet")
    (folder / "saved").mkdir()
    (folder / "saved" / "dataset_info.json").write_text(f'{{"{CANARY}')
    (folder / "saved" / "state.json").write_text(f'{{"{CANARY}')


def test_no_message_quotes_the_data(tmp_path: Path) -> None:
    _bad_files(tmp_path)
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(CrossFLError) as raised:
            datasets.read(path, "train")
        message = str(raised.value)
        assert str(path) in message
        for part in (CANARY, "\xe8", "xe8", "d83d"):
            assert part not in message.removeprefix(str(path)), message
        if path.suffix in (".jsonl", ".txt"):
            number = 2 if path.suffix == ".txt" else 1
            assert f"{path}:{number}" in message


def test_a_tokenizer_that_fails_quotes_nothing() -> None:
    def tokenizer(text: str, **_: object) -> None:
        raise TypeError(f"cannot read {text}")

    tokenizer.bos_token_id = tokenizer.eos_token_id = None  # type: ignore[attr-defined]
    with pytest.raises(CrossFLError, match=r"cannot read a sample \(TypeError\)") as raised:
        datasets.encode(Text(None, CANARY), tokenizer, 9)  # type: ignore[arg-type]
    assert CANARY not in str(raised.value)


def test_the_tests_data_are_below_the_floors() -> None:
    """Else what the fixtures allow would not be needed."""
    assert len(datasets.read(DATA / "leonardo" / "words", "valid")) < FLOORS.min_samples
