"""LoRA: only adapters travel, and the one that comes out loads with peft and merges."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from crossfl.errors import CrossFLError
from crossfl.facility.time_budget import StopSignal
from crossfl.learning import datasets, lora
from crossfl.learning.models.loading import load
from crossfl.protocol import variables
from crossfl.protocol.manifest import ModelManifest
from crossfl.protocol.records import Aggregation, Lora, Task, Training
from crossfl.protocol.state import ServerState
from crossfl.server import state as server_state
from crossfl.server.planning.fixed import plan
from crossfl.simulation.simulate import playing_every_facility, rounds, simulate
from crossfl.steps.initialise import initialise
from crossfl.steps.train import train
from crossfl.storage import manifest
from crossfl.storage.checkpoint import Tensors
from crossfl.storage.delta import Delta
from crossfl.storage.job import Job
from crossfl.storage.weight_files import weights_digest
from tests.support.paths import CWL, DATA, ROOT, ROUND
from tests.support.processes import Run
from tests.support.validation import measured

BASE = ROUND / "global_model"
TRAINING = Training(batch_size=4, sequence_length=48, learning_rate=0.03, threads=1)
LORA = Lora(base_model="tiny", rank=2, alpha=4)


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The base as a facility has it."""
    folder = tmp_path / "models"
    (folder / "tiny").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / "tiny" / name).write_bytes((BASE / name).read_bytes())
    monkeypatch.setenv(variables.MODELS, str(folder))
    return folder


@pytest.fixture
def lora_job(job: Job) -> Job:
    return dataclasses.replace(
        job,
        config=CWL / "config.json",
        lora=LORA.replace(base_digest=weights_digest(BASE)),
        training=TRAINING,
        aggregation=Aggregation(server_optimizer="fedavg"),
        rounds=3,
    )


@pytest.mark.slow
def test_only_adapters_travel_and_the_result_merges(
    lora_job: Job, models: Path, tmp_path: Path
) -> None:
    before = {p: p.read_bytes() for p in models.rglob("*") if p.is_file()}
    simulate(lora_job, DATA, tmp_path / "out")
    result = tmp_path / "out" / "global_model"
    history = [json.loads(x) for x in (tmp_path / "out" / "history.jsonl").read_text().splitlines()]
    whole = (BASE / "model.safetensors").stat().st_size
    own = {
        name: t.numel() * 4 for name, t in load_file(result / "adapter_model.safetensors").items()
    }
    for entry in history:
        for said in entry["facilities"].values():
            assert sum(own.values()) <= said["bytes"] < 0.5 * whole
    assert all("lora_" in name for name in own)
    assert not list((tmp_path / "out").rglob("model.safetensors"))
    assert {p: p.read_bytes() for p in models.rglob("*") if p.is_file()} == before
    losses = [entry["loss"] for entry in history]
    assert losses[-1] < losses[0]

    base = AutoModelForCausalLM.from_pretrained(models / "tiny", dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(result))
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(models / "tiny", dtype=torch.float32)
    with torch.no_grad():
        assert (plain(input_ids=ids).logits - expected).abs().max() > 1e-3


def test_an_adapter_that_has_learnt_nothing_changes_nothing(
    lora_job: Job, models: Path, tmp_path: Path
) -> None:
    initialise(None, lora_job.config, "bytes", 0, 1, Aggregation(), tmp_path / "out", lora_job.lora)
    samples = datasets.read(DATA / "leonardo" / "words", "valid")
    found, tokenizer = load(tmp_path / "out" / "global_model", TRAINING)
    whole, _ = load(BASE, TRAINING)
    scores = [measured(model, tokenizer, samples, TRAINING) for model in (found, whole)]
    assert scores[0] == scores[1]


def test_the_model_given_is_the_base(models: Path, tmp_path: Path) -> None:
    initialise(BASE, None, None, 0, 1, Aggregation(), tmp_path / "out", LORA)
    said = json.loads((tmp_path / "out" / "global_model" / lora.FILE).read_text())
    assert said["base_digest"] == weights_digest(BASE)
    assert lora.base_of(tmp_path / "out" / "global_model") == models / "tiny"
    manifest.verify(tmp_path / "out" / "global_model", ModelManifest)


def test_b_alone_averages_exactly(lora_job: Job, models: Path, tmp_path: Path) -> None:
    """A stays as it was; the mean of the products is the product with the mean of B."""
    assert lora_job.lora is not None
    job = dataclasses.replace(lora_job, lora=lora_job.lora.replace(factors="b"))
    (tmp_path / "r").mkdir()
    walked = rounds(job, tmp_path / "r")
    _, first = next(walked)
    one = load_file(first / "global_model" / "adapter_model.safetensors")
    _, second = next(walked)
    two = load_file(second / "global_model" / "adapter_model.safetensors")
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]) == (".lora_A." in name)


def test_another_base_is_refused(lora_job: Job, models: Path, tmp_path: Path) -> None:
    initialise(None, lora_job.config, "bytes", 0, 1, Aggregation(), tmp_path / "out", lora_job.lora)
    directory = tmp_path / "out" / "global_model"
    weights = models / "tiny" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CrossFLError, match=r"has the digest .* place the same files at every"):
        load(directory, TRAINING)
    weights.unlink()
    with pytest.raises(CrossFLError, match="has neither"):
        load(directory, TRAINING)
    (models / "tiny" / "config.json").unlink()
    (models / "tiny").rmdir()
    with pytest.raises(CrossFLError, match=r"base model 'tiny' is not in .* CROSSFL_MODELS"):
        load(directory, TRAINING)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_digest": None}, r"lora.base_digest is missing: run 'crossfl digest FOLDER'"),
        ({"base_model": "../tiny"}, "without '..' and not absolute"),
        ({"target_modules": ("no_such",)}, r"lora.target_modules: Target modules"),
    ],
)
def test_bad_adapters_are_refused(
    lora_job: Job, models: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    assert lora_job.lora is not None
    record = lora_job.lora.replace(**changes)
    with pytest.raises(CrossFLError, match=message):
        initialise(None, lora_job.config, "bytes", 0, 1, Aggregation(), tmp_path / "out", record)
        load(tmp_path / "out" / "global_model", TRAINING)


def test_an_adapter_on_embeddings_learns(lora_job: Job, models: Path, tmp_path: Path) -> None:
    """Of an embedding it is B that peft draws; both zero would stay so for ever."""
    assert lora_job.lora is not None
    for factors, still in (("both", ()), ("b", (".lora_A.", "lora_embedding_B"))):
        record = lora_job.lora.replace(target_modules=("embed_tokens", "q_proj"), factors=factors)
        first = tmp_path / f"first-{factors}"
        initialise(None, lora_job.config, "bytes", 0, 1, Aggregation(), first, record)
        before = load_file(first / "global_model" / "adapter_model.safetensors")
        (tmp_path / factors).mkdir()
        job = dataclasses.replace(lora_job, lora=record, seed=0)
        _, here = next(rounds(job, tmp_path / factors))
        after = load_file(here / "global_model" / "adapter_model.safetensors")
        drawn = {name for name, tensor in before.items() if tensor.any()}
        assert {name for name in before if ".lora_A." in name or "embedding_B" in name} == drawn
        assert before["base_model.model.model.embed_tokens.lora_embedding_B"].std() > 0.5
        for name, tensor in before.items():
            assert tensor.equal(after[name]) == any(part in name for part in still), name


def test_adapters_that_get_no_gradient_are_refused(
    lora_job: Job, models: Path, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model may compute with the weights of a layer, and never call the layer."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    def bypassing(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        up = torch.nn.functional.linear(x, self.up_proj.weight)
        down: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * up)
        return down

    record = lora_job.lora
    assert record is not None
    initialise(None, lora_job.config, "bytes", 0, 1, Aggregation(), tmp_path / "out", record)
    base = server_state.load(tmp_path / "out" / "state").model
    mine = task.replace(base=base, federation="f")
    monkeypatch.setattr(LlamaMLP, "forward", bypassing)
    with pytest.raises(CrossFLError, match=r"target_modules: the adapters on 'up_proj' get no"):
        train(tmp_path / "out" / "global_model", mine, TRAINING, tmp_path / "update")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mixtral", "num_local_experts": 2}, "the experts of a 'mixtral' are not"),
        ({"model_type": "vit"}, "lora: 'vit' is an image classifier"),
        ({"model_type": "t5"}, "'t5' .it is an encoder with a decoder"),
    ],
)
def test_bases_that_take_no_such_adapter_are_refused(
    config: dict[str, object], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    record = LORA.replace(base_digest="0" * 64)
    with pytest.raises(CrossFLError, match=message):
        initialise(
            None, tmp_path / "config.json", "bytes", 0, 1, Aggregation(), tmp_path / "out", record
        )


ADAPTERS = {
    "whole layers": LORA.replace(
        target_modules=("q_proj", "v_proj"),
        rank_pattern=("q_proj=3",),
        modules_to_save=("lm_head",),
    ),
    "frozen factors": LORA.replace(factors="b"),
    "prompt": LORA.replace(virtual_tokens=4),
}


def adapted(job: Job, name: str, **training: object) -> Job:
    return dataclasses.replace(
        job,
        config=None,
        model=BASE,
        tokenizer=None,
        lora=ADAPTERS[name],
        training=job.training.replace(**training),
    )


def last_of(walked: Iterator[tuple[ServerState, Path]]) -> dict[str, torch.Tensor]:
    folder = [folder for _, folder in walked][-1]
    return load_file(folder / "global_model" / "adapter_model.safetensors")


@pytest.mark.parametrize("encoding", ["fp32", "int4", "topk"])
@pytest.mark.parametrize("name", list(ADAPTERS))
def test_adapters_of_every_kind_federate_in_every_encoding(
    name: str, encoding: str, lora_job: Job, models: Path, tmp_path: Path
) -> None:
    """Error feedback and a kept optimizer beside them; what is frozen does not travel."""
    job = adapted(lora_job, name, encoding=encoding, topk_fraction=0.5, local_optimizer="keep")
    job = dataclasses.replace(job, rounds=2)
    (tmp_path / "r").mkdir()
    first: dict[str, torch.Tensor] = {}
    for now, folder in rounds(job, tmp_path / "r"):
        state = now
        learnt = load_file(folder / "global_model" / "adapter_model.safetensors")
        (entry,) = list(server_state.history(folder / "state"))[-1:]
        assert {said.status for said in entry.facilities.values()} == {"complete"}
        if name == "prompt":
            assert all(said.bytes < 4096 for said in entry.facilities.values())
        first = first or learnt
    frozen = {n for n in first if name == "frozen factors" and ".lora_A." in n}
    assert {n for n, tensor in first.items() if tensor.equal(learnt[n])} == frozen
    assert state.round == 2

    weights = Tensors.of_model(folder / "global_model")
    assert weights.frozen == frozen
    task = plan(state, job.facilities, 1, job.training, "evaluate").tasks[0]
    task = task.replace(round=3, local_steps=1, counted=0, schedule_steps=8, federation="another")
    with playing_every_facility(DATA):
        train(folder / "global_model", task, job.training, tmp_path / "update")
    sent = Delta(tmp_path / "update" / "update")
    assert {part.partition("//")[0] for part in sent.tensors} == set(first) - frozen


def test_whole_layers_begin_as_the_base_and_load_with_peft(
    lora_job: Job, models: Path, tmp_path: Path
) -> None:
    job = adapted(lora_job, "whole layers")
    initialise(BASE, None, None, 0, 1, Aggregation(), tmp_path / "first", job.lora)
    begun = load_file(tmp_path / "first" / "global_model" / "adapter_model.safetensors")
    head = load_file(BASE / "model.safetensors")["lm_head.weight"]
    assert begun["base_model.model.lm_head.weight"].equal(head.float())
    ranks = {n.split(".")[-3]: t.shape[0] for n, t in begun.items() if ".lora_A." in n}
    assert ranks == {"q_proj": 3, "v_proj": 2}
    (tmp_path / "r").mkdir()
    learnt = last_of(rounds(job, tmp_path / "r"))
    assert not learnt["base_model.model.lm_head.weight"].equal(head.float())
    base = AutoModelForCausalLM.from_pretrained(models / "tiny", dtype=torch.float32)
    merged = PeftModel.from_pretrained(
        base, str(tmp_path / "r" / str(job.rounds) / "global_model")
    ).merge_and_unload()
    assert merged.lm_head.weight.equal(learnt["base_model.model.lm_head.weight"])


def test_a_prompt_learns_and_loads_with_peft(lora_job: Job, models: Path, tmp_path: Path) -> None:
    job = dataclasses.replace(adapted(lora_job, "prompt", learning_rate=0.3), rounds=4)
    simulate(job, DATA, tmp_path / "out")
    lines = (tmp_path / "out" / "history.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < losses[0]
    base = AutoModelForCausalLM.from_pretrained(models / "tiny", dtype=torch.float32)
    network = PeftModel.from_pretrained(base, str(tmp_path / "out" / "global_model"))
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = network(input_ids=ids).logits
    assert logits.shape[1] == 12 + 4
    found, _ = load(tmp_path / "out" / "global_model", TRAINING)
    with torch.no_grad():
        assert found(input_ids=ids).logits.allclose(logits)


@pytest.mark.parametrize("name", ["whole layers", "prompt"])
def test_a_second_attempt_goes_on_to_the_same_adapter(
    name: str, lora_job: Job, models: Path, task: Task, tmp_path: Path
) -> None:
    """Savepoints hold what learns, and nothing of the base."""
    job = adapted(lora_job, name, checkpoint_steps=1)
    initialise(BASE, None, None, 0, 1, Aggregation(), tmp_path / "out", job.lora)
    model = tmp_path / "out" / "global_model"
    base = server_state.load(tmp_path / "out" / "state").model
    mine = task.replace(base=base, federation="f", local_steps=3)
    train(model, mine, job.training, tmp_path / "whole")
    stopped = job.training.replace(max_seconds=0.0)
    with pytest.raises(CrossFLError, match="no time for a step"):
        train(model, mine.replace(federation="g"), stopped, tmp_path / "none")
    stop = StopSignal()
    calls = iter([None, None, "told to stop"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crossfl.learning.training.Budget.spent", lambda self: next(calls))
        train(model, mine.replace(federation="h"), job.training, tmp_path / "cut", stop)
    train(model, mine.replace(federation="h"), job.training, tmp_path / "again")
    one, two = (dict(Delta(tmp_path / w / "update").tensors) for w in ("whole", "again"))
    assert one.keys() == two.keys()
    assert all(one[n].equal(two[n]) for n in one)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank_pattern": ("q_proj",)}, "'q_proj' is not layer=rank"),
        ({"rank_pattern": ("q_proj=0",)}, "'q_proj=0' is not layer=rank"),
        ({"virtual_tokens": 2, "target_modules": ("q_proj",)}, "a prompt, which adapts no layer"),
    ],
)
def test_adapters_that_contradict_themselves_are_refused(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(CrossFLError, match=message):
        LORA.replace(**changes)


def test_whole_layers_need_the_base_itself(lora_job: Job, models: Path, tmp_path: Path) -> None:
    record = ADAPTERS["whole layers"].replace(base_digest=weights_digest(BASE))
    with pytest.raises(CrossFLError, match="modules_to_save needs the weights of the base"):
        initialise(None, lora_job.config, "bytes", 0, 1, Aggregation(), tmp_path / "out", record)


@pytest.mark.engine
def test_the_workflow_gives_the_same_adapter(
    lora_job: Job, models: Path, tmp_path: Path, run: Run
) -> None:
    """Through CWL, with the digest that the command prints."""
    said = run("crossfl", "digest", BASE, cwd=tmp_path)
    assert said.stdout.strip() == weights_digest(BASE)
    job = {
        "config": {"class": "File", "path": str(CWL / "config.json")},
        "tokenizer": "bytes",
        "seed": 1,
        "rounds": 1,
        "lora": {
            "base_model": "tiny",
            "base_digest": said.stdout.strip(),
            "target_modules": ["q_proj"],
        },
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    result = run(
        "cwltool", "--outdir", tmp_path / "cwl", ROOT / "steps" / "initialise.cwl",
        tmp_path / "job.json", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    record = LORA.replace(rank=8, alpha=16.0, base_digest=weights_digest(BASE))
    record = record.replace(target_modules=("q_proj",))
    initialise(None, lora_job.config, "bytes", 1, 1, Aggregation(), tmp_path / "here", record)
    names = ("adapter_model.safetensors", lora.FILE)
    for name in names:
        one, two = (tmp_path / x / "global_model" / name for x in ("cwl", "here"))
        assert one.read_bytes() == two.read_bytes()
