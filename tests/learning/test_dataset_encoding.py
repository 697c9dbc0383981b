"""From samples to tokens: nothing of a text is lost; a sample that fails is left out for good."""

import copy
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from crossfl.errors import CrossFLError
from crossfl.facility.place import Disclosure
from crossfl.facility.time_budget import StopSignal
from crossfl.learning import datasets
from crossfl.learning.batching import batch_of, pack
from crossfl.learning.datasets import (
    IGNORED,
    Chat,
    Encoded,
    EncodedSamples,
    Image,
    Placed,
    Sample,
    Text,
)
from crossfl.learning.disclosure import whole_blocks
from crossfl.learning.evaluation import Validation
from crossfl.learning.training import Trainer
from crossfl.protocol import variables
from crossfl.protocol.manifest import UpdateManifest
from crossfl.protocol.records import Aggregation, Facility, Task, Training
from crossfl.server import state as server_state
from crossfl.simulation.simulate import rounds
from crossfl.steps.evaluate import evaluate
from crossfl.steps.initialise import initialise
from crossfl.steps.train import train
from crossfl.storage.job import Job
from tests.support.datasets import TURNS, UNMARKED, bytes_tokenizer, words_tokenizer, write_rows
from tests.support.paths import CWL, ROUND
from tests.support.processes import Run, flags

BYTES = ByT5Tokenizer()
WORDS = [f"w{i}" for i in range(30)]
CHAT = Chat((("user", "a?"), ("assistant", "bc"), ("user", "d?"), ("assistant", "e")))
CANARY = "Rossi-1961"


def read(rows: Sequence[Sample], path: Path) -> datasets.Samples:
    """The samples as they are read from a folder of theirs."""
    write_rows(path / "train.jsonl", map(datasets.row, rows))
    write_rows(path / "valid.jsonl", map(datasets.row, rows))
    return datasets.read(path, "train")


def pieces(samples: EncodedSamples) -> list[Encoded]:
    """All of them, of text."""
    every = (samples[i] for i in range(len(samples)))
    return [sample for sample in every if isinstance(sample, Encoded)]


# Long texts


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6), length=st.integers(2, 12))
def test_every_token_of_a_text_but_the_first_is_predicted_once(
    sizes: list[int], length: int
) -> None:
    texts = [f"{i}" + "x" * size for i, size in enumerate(sizes)]
    samples = datasets.Samples()
    for i, text in enumerate(texts):
        samples.add(Placed(Path("d.txt"), i + 1, Text(None, text)))
    encoded = EncodedSamples(samples, BYTES, length)
    parts = pieces(encoded)
    assert all(len(part.ids) <= length for part in parts)
    assert encoded.cut == 0
    batch = batch_of(pack(parts, length), torch.device("cpu"))
    assert batch.tokens == sum(len(text) for text in texts)  # with the end, without the first
    whole, parts_left = [], iter(parts)
    for text in texts:
        ids = next(parts_left).ids
        while len(ids) < len(text) + 1:
            following = next(parts_left).ids
            assert following[0] == ids[-1]
            ids = ids + following[1:]
        whole.append(ids)
    assert whole == [datasets.encode(s, BYTES, 99).ids for s in samples]  # type: ignore[union-attr]


def test_what_has_a_prompt_is_cut_and_that_is_told(tmp_path: Path) -> None:
    rows: list[Sample] = [Text("ab", "x" * 9), Text("ab", "x"), Text(None, "y" * 30)]
    encoded = EncodedSamples(read(rows, tmp_path), BYTES, 8)
    assert pieces(encoded)[:2] == [datasets.encode(row, BYTES, 8) for row in rows[:2]]
    assert (encoded.cut, encoded.bad) == (1, [])
    (notice,) = encoded.notices
    assert notice.startswith("samples longer than training.sequence_length (8)")
    assert notice.endswith("cut off: 1")


def test_a_pass_over_long_texts_reads_all_of_them(task: Task, tmp_path: Path) -> None:
    """50 texts of 100 bytes and 50 questions too long, at a length of 48."""
    rows: list[Sample] = [Text(None, f"{i:02}" + "x" * 98) for i in range(50)]
    rows += [Text("p" * 40, "c" * 40) for _ in range(50)]
    read(rows, tmp_path / "leonardo" / "long")
    os.environ[variables.DATA] = str(tmp_path)
    whole = task.replace(dataset="long", local_steps=50, schedule_steps=50)
    training = Training(batch_size=4, sequence_length=48, threads=1)
    update = train(ROUND / "global_model", whole, training, tmp_path / "out")
    assert update is not None and update.metrics.training is not None
    # 3 pieces each of 50 texts, and 50 questions: one pass is 200 samples.
    assert (update.samples, update.tokens) == (200, 50 * 100 + 50 * (48 - 40))
    assert (update.metrics.training.cut_samples, update.metrics.training.bad_samples) == (50, 0)


# Samples that cannot be encoded


def model_of_words(folder: Path) -> tuple[Path, str]:
    """A first model whose tokenizer has no token for other words, and the model's digest."""
    words_tokenizer(WORDS).save_pretrained(folder / "tokenizer")
    initialise(None, CWL / "config.json", str(folder / "tokenizer"), 0, 2, Aggregation(), folder)
    return folder / "global_model", server_state.load(folder / "state").model


BAD = ['{"text": "w1 Rossi-1961 w2"}', '{"text": "so happy \\ud83d"}', "{"]


@pytest.fixture
def spoilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two datasets of one facility: `clean`, and `spoilt`, which has three bad rows besides."""
    generator = np.random.default_rng(0)
    rows = [json.dumps({"text": " ".join(generator.choice(WORDS, 6))}) for _ in range(40)]
    for name, bad in (("clean", []), ("spoilt", BAD)):
        folder = tmp_path / "data" / "leonardo" / name
        folder.mkdir(parents=True)
        mixed = rows[:10] + bad[:2] + rows[10:25] + bad[2:] + rows[25:]
        (folder / "train.jsonl").write_text("\n".join(mixed))
        (folder / "valid.jsonl").write_text("\n".join(rows[:20] + bad[:2] + rows[20:]))
    monkeypatch.setenv(variables.DATA, str(tmp_path / "data"))
    return tmp_path


def test_a_facility_trains_as_if_its_bad_samples_were_not_there(spoilt: Path) -> None:
    """In every round, to the bit; and each says how many they are."""
    words_tokenizer(WORDS).save_pretrained(spoilt / "tokenizer")
    outcomes = {}
    for name in ("clean", "spoilt"):
        job = Job(
            facilities=(Facility(name="leonardo", dataset=name),),
            rounds=3,
            local_steps=5,  # 20 samples a round: the data is passed over more than once
            config=CWL / "config.json",
            tokenizer=str(spoilt / "tokenizer"),
            training=Training(batch_size=4, sequence_length=16, threads=1),
        )
        (spoilt / name).mkdir()
        *_, (state, folder) = rounds(job, spoilt / name)
        entries = [e.facilities["leonardo"] for e in server_state.history(folder / "state")]
        outcomes[name] = (state.model, [(e.status, e.samples, e.steps) for e in entries])
        counts = [e.metrics.training.bad_samples for e in entries if e.metrics.training]
        assert counts == [0 if name == "clean" else len(BAD)] * 3
    assert outcomes["clean"] == outcomes["spoilt"]
    assert outcomes["clean"][1] == [("complete", 20, 5)] * 3


class Interrupted:
    """Progress that interrupts the training after three steps."""

    def __call__(self, _: str, *, step: int = 0, **__: object) -> None:
        if step == 3:
            raise KeyboardInterrupt


def test_a_resumed_round_draws_the_same_samples(
    spoilt: Path, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variables.STATE, str(spoilt / "kept"))
    model, base = model_of_words(spoilt)
    training = Training(batch_size=4, sequence_length=16, threads=1, checkpoint_steps=2)
    asked = task.replace(dataset="spoilt", local_steps=6, schedule_steps=6, base=base)
    whole = train(model, asked, training, spoilt / "whole")
    trainer = Trainer(model, spoilt / "data" / "leonardo" / "spoilt", asked, training)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(Interrupted(), StopSignal())  # type: ignore[arg-type]
    assert list((spoilt / "kept").glob("leonardo/savepoint-*/1/2"))
    resumed = train(model, asked, training, spoilt / "resumed")
    assert whole is not None and resumed is not None
    assert resumed.digest == whole.digest


@pytest.mark.slow
def test_ranks_leave_out_the_same_samples(spoilt: Path, task: Task, run: Run) -> None:
    model, base = model_of_words(spoilt)
    training = Training(batch_size=4, sequence_length=16, threads=1)
    asked = task.replace(dataset="spoilt", local_steps=6, schedule_steps=6, base=base)
    alone = train(model, asked, training, spoilt / "alone")
    torchrun = f"{Path(sys.executable).with_name('torchrun')} --nproc-per-node=2"
    (spoilt / "two").mkdir()
    result = run(
        sys.executable, "-m", "crossfl", "train", "--global-model", model, "--outdir",
        spoilt / "two", *flags(asked, training), cwd=spoilt, CROSSFL_FACILITY="leonardo",
        CROSSFL_DATA=str(spoilt / "data" / "leonardo"), CROSSFL_LAUNCHER=torchrun,
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert CANARY not in result.stdout + result.stderr
    document = json.loads((spoilt / "two" / "update" / "manifest.json").read_bytes())
    assert alone is not None and alone.metrics.training is not None
    training_there = document["metrics"]["training"]
    assert (document["samples"], document["tokens"]) == (alone.samples, alone.tokens)
    assert training_there["ranks"] == 2
    assert training_there["bad_samples"] == alone.metrics.training.bad_samples == 3
    assert training_there["last_loss"] == pytest.approx(alone.metrics.training.last_loss, rel=1e-3)


def test_nothing_of_a_bad_sample_leaves(
    spoilt: Path, task: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    model, base = model_of_words(spoilt)
    asked = task.replace(dataset="spoilt", base=base)
    training = Training(batch_size=4, sequence_length=16, threads=1)
    train(model, asked, training, spoilt / "out")
    evaluation = evaluate(model, asked, training, [], spoilt / "out")
    printed = capsys.readouterr().err
    assert "rows of the dataset that are left out: 3; the first: " in printed
    assert "train.jsonl:11: the model's tokenizer cannot read a sample (Exception)" in printed
    assert evaluation.metrics is not None and evaluation.metrics.samples == 40
    for path in (spoilt / "out").rglob("*"):
        assert path.is_dir() or CANARY.encode() not in path.read_bytes()
    assert CANARY not in printed


def test_a_dataset_of_which_most_cannot_be_encoded_is_refused(tmp_path: Path) -> None:
    rows: list[Sample] = [Text(None, word) for word in (CANARY, CANARY, CANARY, "w1", "w1")]
    with pytest.raises(CrossFLError, match=r"3 of 5 samples cannot .*train.jsonl:1: the model's"):
        EncodedSamples(read(rows, tmp_path), words_tokenizer(WORDS), 8)


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 600])
def test_one_failure_in_many_is_the_only_one(size: int) -> None:
    rows: list[Sample] = [Text("w1", "w2 w3") for _ in range(size)]
    rows[size // 2] = Text(None, CANARY)
    results = list(datasets.encoded(rows, words_tokenizer(WORDS)))
    assert [isinstance(r, CrossFLError) for r in results] == [i == size // 2 for i in range(size)]


def test_a_panic_of_a_library_in_rust_is_a_failure_and_an_interrupt_is_not() -> None:
    class PanicException(BaseException):
        """As pyo3 raises it: no `Exception`."""

    for error, expected in ((PanicException, CrossFLError), (KeyboardInterrupt, KeyboardInterrupt)):

        def tokenizer(texts: object, error: type[BaseException] = error, **_: object) -> None:
            raise error(CANARY)

        tokenizer.bos_token_id = tokenizer.eos_token_id = None  # type: ignore[attr-defined]
        with pytest.raises(expected):
            datasets.encode(Text(None, "a"), tokenizer, 9)  # type: ignore[arg-type]


def test_images_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    pixels = np.ones((1, 4, 4), np.float32)
    rows: list[Sample] = [Image(pixels, i % 2) for i in range(20)]
    rows += [Image(pixels, 10**30), Image(pixels, 2), Image(np.ones((1, 5, 5), np.float32), 0)]
    rows.append(Text(None, "a"))
    encoded = EncodedSamples(read(rows, tmp_path), None, 8, classes=2)
    assert len(encoded) == 20
    assert [reason.split(":")[1] for reason in encoded.bad] == ["21", "22", "24", "23"]
    with pytest.raises(CrossFLError, match="it is an image, and the model takes text"):
        EncodedSamples(read(rows, tmp_path), BYTES, 8)


# The floors hold


def test_a_sample_is_not_told_by_leaving_it_out() -> None:
    """The server chooses the tokenizer, and so which samples cannot be encoded."""
    samples = [Text(None, " ".join(WORDS[i % 20 : i % 20 + 9])) for i in range(50)]
    samples[20] = Text(None, "w29 " + samples[20].text)
    samples[33] = Text(None, "w28 " + samples[33].text)
    floors, training = Disclosure(16, 1), Training(sequence_length=64, threads=1)
    counts = {}
    for name, words in {"all": WORDS, "no w29": WORDS[:29], "neither": WORDS[:28]}.items():
        validation = Validation(samples, words_tokenizer(words), training, floors)
        counts[name] = len(validation.usable)
        assert validation.withheld is None
    assert counts == {"all": 50, "no w29": 34, "neither": 16}


@settings(deadline=None)
@given(
    bad=st.tuples(*[st.sets(st.integers(0, 60), max_size=3)] * 2),
    size=st.integers(1, 60),
    floor=st.integers(1, 20),
)
def test_two_choices_differ_by_no_sample_or_by_many(
    bad: tuple[set[int], set[int]], size: int, floor: int
) -> None:
    group = list(range(size))
    one, other = (set(whole_blocks(group, floor, lambda i, b=b: i not in b)) for b in bad)  # type: ignore[misc]
    assert not one & bad[0]
    assert len(one ^ other) == 0 or len(one ^ other) >= min(floor, size)
    assert not bad[0] & set(group) or len(one) < size


# Chats


def test_a_chat_is_laid_out_by_the_template_and_the_loss_is_on_the_assistant() -> None:
    tokenizer = bytes_tokenizer(TURNS)
    (encoded,) = datasets.encoded([CHAT], tokenizer)
    assert isinstance(encoded, Encoded)
    text = "<user>a?|<assistant>bc|<user>d?|<assistant>e|"
    assert tokenizer.decode(encoded.ids) == text
    learnt = [i for i in encoded.labels if i != IGNORED]
    assert tokenizer.decode(learnt) == "bc|e|"
    assert all(label in (IGNORED, i) for i, label in zip(*encoded, strict=True))


@pytest.mark.parametrize("tokenizer", [bytes_tokenizer(UNMARKED), BYTES], ids=type)
def test_where_turns_are_not_marked_all_is_learnt_and_that_is_told(
    tokenizer: ByT5Tokenizer, tmp_path: Path
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = tokenizer.chat_template or TURNS
    encoded = EncodedSamples(read([CHAT] * 2, tmp_path), tokenizer, 20)
    assert pieces(encoded)[0].ids == pieces(encoded)[0].labels
    assert encoded.cut == 2
    assert any("loss of a chat is over all its turns" in notice for notice in encoded.notices)


def test_a_tokenizer_without_a_template_is_told_once(tmp_path: Path) -> None:
    with pytest.raises(CrossFLError, match="tokenizer has no chat template: give the first model"):
        EncodedSamples(read([CHAT] * 3, tmp_path), BYTES, 20)


def test_chats_that_a_template_refuses_are_counted(tmp_path: Path) -> None:
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('no ' + messages[0].content) }}"
    tokenizer = bytes_tokenizer(f"{strict}{{% endif %}}{TURNS}")
    rows: list[Sample] = [CHAT, CHAT, Chat((("system", CANARY),)), Chat((("user", "a"),))]
    encoded = EncodedSamples(read(rows, tmp_path), tokenizer, 99)
    assert len(encoded) == 2
    assert [reason.removeprefix(f"{tmp_path}/train.jsonl") for reason in encoded.bad] == [
        ":3: the tokenizer's chat template cannot lay out a sample (TemplateError)",
        ":4: it has no turn of the assistant",
    ]


def test_a_federation_learns_from_chats_and_instructions(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data" / "leonardo" / "mixed"
    turns = [{"role": role, "content": content} for role, content in CHAT.turns]
    rows = [{"messages": turns}, {"instruction": "a", "input": "b", "output": "c"}] * 20
    write_rows(folder / "train.jsonl", rows)
    monkeypatch.setenv(variables.DATA, str(tmp_path / "data"))
    bytes_tokenizer(TURNS).save_pretrained(tmp_path / "tokenizer")
    tokenizer, config = str(tmp_path / "tokenizer"), tmp_path / "config.json"
    longer = {**json.loads((CWL / "config.json").read_text()), "max_position_embeddings": 512}
    config.write_text(json.dumps(longer))
    initialise(None, config, tokenizer, 0, 2, Aggregation(), tmp_path)
    base = server_state.load(tmp_path / "state").model
    asked = task.replace(dataset="mixed", base=base)
    training = Training(batch_size=8, sequence_length=512, threads=1)
    update: UpdateManifest | None = train(tmp_path / "global_model", asked, training, tmp_path)
    assert update is not None and update.metrics.validation is not None
    assert (update.status, update.metrics.validation.samples) == ("complete", 4)
    assert update.metrics.training is not None and update.metrics.training.bad_samples == 0
