"""What a hostile VM puts into a model folder: refused by name, nothing outside opened, none run."""

import functools
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from crossfl.errors import CrossFLError
from crossfl.learning.models.loading import load, load_weights
from crossfl.protocol.layout import MANIFEST
from crossfl.protocol.manifest import ModelManifest
from crossfl.protocol.records import Aggregation, Lora, Task, Training
from crossfl.steps.initialise import initialise
from crossfl.storage import manifest
from crossfl.storage.model_folder import ModelFolder
from crossfl.storage.weight_files import ADAPTER, INDEX, SINGLE
from tests.support.paths import DATA, ROOT, ROUND

TRAINING = Training(batch_size=4, sequence_length=48, learning_rate=0.0, threads=1)
MODEL = ROUND / "global_model"
PLAIN = {"format": "pt"}
Make = Callable[[Path, Path], None]
KINDS: dict[str, tuple[Make, str]] = {}
"""What spoils a folder, given the private folder beside it, and what its refusal says."""
MEMORY = 256 << 20


def kind(message: str) -> Callable[[Make], Make]:
    def register(make: Make) -> Make:
        KINDS[make.__name__] = make, message
        return make

    return register


def edited(name: str, **changes: Any) -> Make:
    """Set keys of a JSON file of the folder; strings `PRIVATE` become the private folder's path."""

    def make(folder: Path, private: Path) -> None:
        document = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        text = json.dumps(document | changes).replace("PRIVATE", str(private))
        (folder / name).write_text(text)

    return make


def added(name: str, content: bytes = b"x") -> Make:
    return lambda folder, private: ((folder / name).write_bytes(content), None)[1]


def shard(folder: Path, count: int = 2) -> dict[str, str]:
    """Save the model anew in several files with an index; the index."""
    weights = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    index = {}
    for number in range(count):
        name = f"model-{number + 1:05}-of-{count:05}.safetensors"
        part = {n: weights[n] for n in sorted(weights)[number::count]}
        save_file(part, folder / name, PLAIN)
        index |= dict.fromkeys(part, name)
    write_index(folder, index)
    return index


def write_index(folder: Path, index: dict[str, Any]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))


def pointed(target: Callable[[Path, Path], str]) -> Make:
    """An index that has every tensor in a place outside."""

    def make(folder: Path, private: Path) -> None:
        index = shard(folder)
        for name in set(index.values()):
            (folder / name).unlink()
        write_index(folder, dict.fromkeys(index, target(folder, private)))

    return make


KINDS |= {
    "index outside by ..": (
        pointed(lambda f, p: os.path.relpath(p / SINGLE, f)),
        "no weight file",
    ),
    "index outside by absolute path": (pointed(lambda f, p: str(p / SINGLE)), "no weight file"),
    "index of nothing": (pointed(lambda f, p: ""), "no weight file"),
    "index of a pickle": (pointed(lambda f, p: "pytorch_model.bin"), "no weight file"),
    "index of a missing shard": (
        pointed(lambda f, p: "model-00009-of-00009.safetensors"),
        "not there",
    ),
    "code": (added("modeling_evil.py", b"open('ran', 'w')"), "modeling_evil.py"),
    "conftest": (added("conftest.py"), "conftest.py"),
    "shared library": (added("evil.so"), "evil.so"),
    "torch.bin": (added("pytorch_model.bin", pickle.dumps({})), "pytorch_model.bin"),
    "adapter.bin": (added("adapter_model.bin", pickle.dumps({})), "adapter_model.bin"),
    "checkpoint": (added("model.ckpt"), "model.ckpt"),
    "training arguments": (added("training_args.bin"), "training_args.bin"),
    "gguf": (added("model.gguf", b"GGUF"), "model.gguf"),
    "upper case": (added("MODEL.safetensors"), "MODEL.safetensors"),
    "config in capitals": (added("Config.json", b"{}"), "Config.json"),
    "Cyrillic letter": (added("m\u043edel.safetensors"), r"m\u043edel"),
    "fullwidth letters": (added("\uff4dodel.safetensors"), r"\uff4dodel"),
    "zero-width space": (added("config.json\u200b", b"{}"), r"\u200b"),
    "line break": (added("config.json\n", b"{}"), r"\n"),
    "bytes of no encoding": (added(os.fsdecode(b"model\xff.safetensors")), r"\udcff"),
    "processor": (added("preprocessor_config.json", b"{}"), "preprocessor_config.json"),
    "hidden file": (added(".config.json", b"{}"), ".config.json"),
    "variant": (added("model.fp16.safetensors"), "model.fp16.safetensors"),
    "versioned config": (added("config.4.0.0.json", b"{}"), "config.4.0.0.json"),
    "stray shard": (added("model-00001-of-00002.safetensors"), "not one of the model's"),
    "empty weights": (added(SINGLE, b""), "not a valid safetensors file"),
    "weights of garbage": (added(SINGLE, b"\xff" * 4096), "not a valid safetensors file"),
    "pickle as weights": (added(SINGLE, pickle.dumps([1])), "not a valid safetensors file"),
    "huge header": (
        added(SINGLE, (1 << 62).to_bytes(8, "little") + b"{}"),
        "not a valid safetensors file",
    ),
    "header of brackets": (
        added(SINGLE, (1 << 20).to_bytes(8, "little") + b"[" * (1 << 20)),
        "not a valid safetensors file",
    ),
    "empty config": (added("config.json", b""), "not a valid JSON document"),
    "config of brackets": (added("config.json", b"[" * 400_000), "not a valid JSON document"),
    "config of objects": (added("config.json", b"[" + b"{}," * 600_000 + b"0]"), "values"),
    "config too long": (added("config.json", b" " * (1 << 25)), "at most"),
    "config of a list": (added("config.json", b"[]"), "not a JSON object"),
    "key twice": (added("config.json", b'{"a": 1, "a": 2}'), "key is there twice"),
    "huge number": (added("config.json", b'{"a": ' + b"9" * 9999 + b"}"), "not a valid JSON"),
    "not UTF-8": (added("config.json", b'{"a": "\xff"}'), "not a valid JSON document"),
    "tokenizer of objects": (added("tokenizer.json", b"[" + b"{}," * 9_000_000), "values"),
    "tokens without numbers": (added("added_tokens.json", b'{"a": "b"}'), "without a number"),
    "hub code": (edited("config.json", auto_map={"AutoConfig": "evil.Evil"}), "auto_map"),
    "private code": (
        edited("config.json", auto_map={"AutoModelForCausalLM": "PRIVATE--evil.Evil"}),
        "auto_map",
    ),
    "nested code": (edited("config.json", text_config={"auto_map": {"A": "b.C"}}), "auto_map"),
    "another config": (
        edited("config.json", configuration_files=["config.1.0.0.json"]),
        "configuration_files",
    ),
    "other weights": (
        edited("config.json", transformers_weights="PRIVATE/model.safetensors"),
        "transformers_weights",
    ),
    "quantised": (
        edited("config.json", quantization_config={"quant_method": "fp8"}),
        "quantization_config",
    ),
    "hub kernel": (
        edited("config.json", attn_implementation="kernels-community/flash-attn"),
        "attn_implementation",
    ),
    "hub kernel, internal": (
        edited("config.json", _attn_implementation_internal="evil/kernel"),
        "_attn_implementation_internal",
    ),
    "hub experts": (edited("config.json", _experts_implementation="evil/k"), "_experts_impl"),
    "backbone": (edited("config.json", backbone="evil/backbone"), "backbone"),
    "timm": (edited("config.json", model_type="timm_wrapper"), "timm"),
    "timm file": (edited("config.json", pretrained_cfg={"file": "PRIVATE/x"}), "pretrained_cfg"),
    "name of a place": (edited("config.json", _name_or_path="PRIVATE"), "_name_or_path"),
    "path anywhere": (edited("config.json", whatever=[["PRIVATE/x"]]), "may be a path"),
    "file by key": (edited("config.json", spk_dict_file="x"), "spk_dict_file"),
    "dtype of another kind": (edited("config.json", dtype="compile"), "dtype"),
    "labels of lists": (edited("config.json", id2label={"0": ["/"]}), "id2label"),
    "generation code": (
        edited("generation_config.json", custom_generate="PRIVATE"),
        "custom_generate",
    ),
    "vocabulary file": (edited("tokenizer_config.json", vocab_file="PRIVATE/v"), "vocab_file"),
    "merges file": (edited("tokenizer_config.json", merges_file="PRIVATE/v"), "merges_file"),
    "tokenizer file": (
        edited("tokenizer_config.json", tokenizer_file="PRIVATE/tokenizer.json"),
        "tokenizer_file",
    ),
    "vocabulary by name": (edited("tokenizer_config.json", vocab="PRIVATE/v"), "'vocab'"),
    "gguf file": (edited("tokenizer_config.json", gguf_file="PRIVATE/v"), "gguf_file"),
    "versioned tokenizer": (
        edited("tokenizer_config.json", fast_tokenizer_files=["tokenizer.1.json"]),
        "fast_tokenizer_files",
    ),
    "positional arguments": (
        edited("tokenizer_config.json", init_inputs=["PRIVATE/v"]),
        "init_inputs",
    ),
    "sentencepiece arguments": (
        edited("tokenizer_config.json", sp_model_kwargs={"model_file": "PRIVATE/v"}),
        "sp_model_kwargs",
    ),
    "mecab arguments": (
        edited("tokenizer_config.json", mecab_kwargs={"mecab_option": "-r PRIVATE"}),
        "mecab_kwargs",
    ),
    "tokenizer code": (
        edited("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.E", None]}),
        "auto_map",
    ),
    "class that is no tokenizer": (
        edited("tokenizer_config.json", tokenizer_class="Trainer"),
        "tokenizer_class",
    ),
    "class that loops": (
        edited("tokenizer_config.json", tokenizer_class="AutoTokenizer"),
        "tokenizer_class",
    ),
    "file among special tokens": (
        edited("special_tokens_map.json", vocab_file="PRIVATE/v"),
        "special_tokens_map.json",
    ),
    "place among special tokens": (
        edited("special_tokens_map.json", name_or_path="PRIVATE"),
        "special_tokens_map.json",
    ),
}


def linked(name: str, replaces: bool = True) -> Make:
    def make(folder: Path, private: Path) -> None:
        if replaces:
            (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(private / name)

    return make


for _name in (SINGLE, "config.json", "tokenizer.json", "manifest.json", "README.md"):
    KINDS[f"link for {_name}"] = linked(_name), f"'{_name}'"


@kind("no regular file")
def link_inside(folder: Path, private: Path) -> None:
    (folder / "README.md").symlink_to("config.json")


@kind("no regular file")
def link_to_a_folder(folder: Path, private: Path) -> None:
    (folder / "vocab.json").symlink_to(private)


@kind("no regular file")
def broken_link(folder: Path, private: Path) -> None:
    (folder / "merges.txt").symlink_to("nowhere")


@kind("no regular file")
def fifo(folder: Path, private: Path) -> None:
    os.mkfifo(folder / "tokenizer.json")


@kind("no regular file")
def fifo_as_weights(folder: Path, private: Path) -> None:
    (folder / SINGLE).unlink()
    os.mkfifo(folder / SINGLE)


@kind("no regular file")
def unix_socket(folder: Path, private: Path) -> None:
    here = Path.cwd()
    os.chdir(folder)  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("vocab.txt")
    finally:
        os.chdir(here)


@kind("no regular file")
def nested_folder(folder: Path, private: Path) -> None:
    shutil.copytree(MODEL, folder / "original")


@kind("no regular file")
def nested_templates(folder: Path, private: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "x.jinja").write_text("{{ 1 }}")


@kind("no regular file")
def folder_as_weights(folder: Path, private: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).mkdir()


@kind("not a valid safetensors file")
def sparse_terabyte(folder: Path, private: Path) -> None:
    with (folder / SINGLE).open("r+b") as stream:
        stream.truncate(1 << 40)


@kind("at most")
def sparse_tokenizer(folder: Path, private: Path) -> None:
    with (folder / "tokenizer.json").open("wb") as stream:
        stream.truncate(1 << 40)


@kind("one index too many")
def index_beside_a_single_file(folder: Path, private: Path) -> None:
    write_index(folder, dict.fromkeys(load_file(folder / SINGLE), str(private / SINGLE)))


@kind("without lora.json")
def decoy_adapter(folder: Path, private: Path) -> None:
    edited("adapter_config.json", base_model_name_or_path="PRIVATE", peft_type="LORA")(
        folder, private
    )
    save_file({"x": torch.zeros(2)}, folder / ADAPTER, PLAIN)


@kind("not one of the model's")
def decoy_adapter_weights(folder: Path, private: Path) -> None:
    save_file({"x": torch.zeros(2)}, folder / ADAPTER, PLAIN)


@kind("no weight file")
def decoy_adapter_and_index(folder: Path, private: Path) -> None:
    pointed(lambda f, p: os.path.relpath(p / SINGLE, f))(folder, private)
    decoy_adapter_weights(folder, private)


@kind("not one of the model's")
def adapter_beside_a_model(folder: Path, private: Path) -> None:
    adapter(folder)
    save_file({"x": torch.zeros(2)}, folder / SINGLE, PLAIN)


@kind("is also in another file")
def tensor_in_two_files(folder: Path, private: Path) -> None:
    index = shard(folder)
    one, other = sorted(set(index.values()))
    save_file(load_file(folder / one) | load_file(folder / other), folder / other, PLAIN)


@kind("does not list the tensors")
def index_of_other_tensors(folder: Path, private: Path) -> None:
    index = shard(folder)
    write_index(folder, index | {"more": next(iter(index.values()))})


@kind("not one of the model's")
def shard_that_no_index_names(folder: Path, private: Path) -> None:
    shard(folder)
    save_file({"x": torch.zeros(2)}, folder / "model-00009-of-00009.safetensors", PLAIN)


@kind("key is there twice")
def index_with_a_key_twice(folder: Path, private: Path) -> None:
    shard(folder)
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text[:-1] + ', "weight_map": {"x": "/etc/passwd"}}')


@kind("not a safetensors index")
def index_of_numbers(folder: Path, private: Path) -> None:
    write_index(folder, dict.fromkeys(shard(folder), 1))


@kind("is missing")
def no_config(folder: Path, private: Path) -> None:
    (folder / "config.json").unlink()


@kind("has neither")
def no_weights(folder: Path, private: Path) -> None:
    (folder / SINGLE).unlink()


@kind("has no tensor")
def no_tensors(folder: Path, private: Path) -> None:
    save_file({}, folder / SINGLE, PLAIN)


def adapter(folder: Path, **changes: Any) -> None:
    """Make the folder one of an adapter."""
    out = folder.with_name("adapter")
    lora = Lora(base_model="tiny", rank=2, alpha=4, base_digest="0" * 64)
    initialise(None, MODEL / "config.json", "bytes", 0, 1, Aggregation(), out, lora)
    shutil.rmtree(folder)
    shutil.move(out / "global_model", folder)
    shutil.rmtree(out)
    edited("adapter_config.json", **changes)(folder, folder)


for _key, _value in {
    "auto_mapping": {"parent_library": "evil", "base_model_class": "Evil"},
    "init_lora_weights": "pissa",
    "megatron_core": "evil.core",
    "megatron_config": {"x": 1},
    "peft_type": "XLORA",
    "task_type": "SEQ_CLS",
    "tokenizer_name_or_path": "PRIVATE",
    "target_modules": "(a+)+$",
    "revision": "main",
    "corda_config": {"cache_file": "PRIVATE/x"},
    "eva_config": {"rho": 2.0},
}.items():
    KINDS[f"adapter with {_key}"] = (
        lambda folder, private, key=_key, value=_value: adapter(folder, **{key: value}),
        _key,
    )


def write_manifest(folder: Path) -> None:
    """A manifest over whatever is in the folder, correct but for the sha256 of what has none."""
    if (folder / MANIFEST).is_symlink():
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    known = {
        name.relative_to(folder).as_posix(): "0" * 64
        for name in folder.rglob("*")
        if name.is_symlink() or (name.is_file() and name.stat().st_size > 1 << 30)
    }
    try:
        manifest.write(folder, ModelManifest(round=0), known)
    except CrossFLError:  # names that our own manifests do not have
        files = {
            path.relative_to(folder).as_posix(): {
                "bytes": path.lstat().st_size,
                "sha256": known.get(path.relative_to(folder).as_posix()) or manifest.sha256(path),
            }
            for path in folder.rglob("*")
            if path.is_file()
        }
        seals = {"digest": "0" * 64, "seal": "0" * 64}
        document = {"kind": "model", "format": 2, "round": 0, "files": files, **seals}
        (folder / MANIFEST).write_text(json.dumps(document))


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def plant(folder: Path) -> Path:
    """A private folder beside a model's: other weights, a tokenizer, and code that would show."""
    private = folder.with_name("private")
    shutil.copytree(MODEL, private)
    generator = torch.Generator().manual_seed(5)
    weights = load_file(MODEL / SINGLE)
    save_file(
        {n: torch.randn(t.shape, generator=generator) for n, t in weights.items()},
        private / SINGLE,
        PLAIN,
    )
    (private / "tokenizer.json").write_text("{}")
    (private / "README.md").write_text("private")
    (private / "evil.py").write_text(f"open({str(private / 'ran')!r}, 'w')")
    (private / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(private / "ran")))
    return private


def spoilt(root: Path, *names: str) -> Path:
    """A good folder with a correct manifest, spoilt in the named ways one after another."""
    folder = root / "model"
    root.mkdir(parents=True, exist_ok=True)
    shutil.copytree(MODEL, folder)
    private = plant(folder)
    for name in names:
        KINDS[name][0](folder, private)
    write_manifest(folder)
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_a_hostile_folder_is_refused_by_name(name: str, tmp_path: Path) -> None:
    folder = spoilt(tmp_path, name)
    with pytest.raises(CrossFLError) as refusal:
        ModelFolder.received(folder)
    assert KINDS[name][1] in str(refusal.value)
    assert len(str(refusal.value)) < 600
    assert str(refusal.value).isprintable()
    assert not (tmp_path / "private" / "ran").exists()


@pytest.mark.slow
def test_neither_training_nor_evaluation_opens_anything_outside(task: Task, tmp_path: Path) -> None:
    """All kinds in one process, under an audit hook; the good folder shows that the hook works."""
    names = dict(enumerate(KINDS))
    folders = [spoilt(tmp_path / str(i), name) for i, name in names.items()]
    good = spoilt(tmp_path / "good")
    asked = {
        "folders": [str(good), *map(str, folders)],
        "task": task.asdict(),
        "training": TRAINING.asdict(),
    }
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.open_folder"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env=os.environ
        | {
            "CROSSFL_FACILITY": "leonardo",
            "CROSSFL_DATA": str(DATA / "leonardo"),
            "CROSSFL_PROGRESS": os.devnull,
        },
    )
    assert result.returncode == 0, result.stderr
    first, *lines = (json.loads(line) for line in result.stdout.splitlines())
    assert first["errors"] == ["", ""]
    assert first["outside"] == []
    for name, line in zip(KINDS, lines, strict=True):
        assert all(KINDS[name][1] in error for error in line["errors"]), (name, line)
        assert not any("UNEXPECTED" in error for error in line["errors"]), (name, line)
        assert line["outside"] == [], (name, line)
        assert line["rise"] < MEMORY, (name, line)
    assert not list(tmp_path.glob("*/private/ran"))


@functools.cache
def harmless() -> frozenset[str]:
    """Kinds that can follow one another: they add or edit one file of a whole folder."""
    return frozenset(
        name
        for name, (make, _) in KINDS.items()
        if getattr(make, "__qualname__", "").startswith(("edited", "added"))
    )


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=st.data())
def test_any_combination_is_refused(
    tmp_path_factory: pytest.TempPathFactory, drawn: st.DataObject
) -> None:
    names = sorted(n for n in harmless() if "object" not in n and "too long" not in n)
    chosen = drawn.draw(st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True))
    # An edit needs a file that is still JSON: those come before what replaces a file.
    chosen.sort(key=lambda name: "added" in KINDS[name][0].__qualname__)
    root = tmp_path_factory.mktemp("any")
    folder = spoilt(root, *chosen)
    with pytest.raises(CrossFLError):
        ModelFolder.received(folder)
    shutil.rmtree(root)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("config.json", {"vocab_size": 1 << 40}),
        ("config.json", {"hidden_size": 12}),
        ("config.json", {"hidden_act": "nonesuch"}),
        ("config.json", {"model_type": "nonesuch"}),
        ("config.json", {"rope_parameters": 5}),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": 5}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": 1}}),
        ("tokenizer_config.json", {"extra_special_tokens": {"a": {"b": 1}}}),
    ],
)
def test_what_a_library_cannot_load_is_refused(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = spoilt(tmp_path)
    edited(name, **changes)(folder, folder)
    if name == "tokenizer.json":
        edited("tokenizer_config.json", tokenizer_class="TokenizersBackend")(folder, folder)
    write_manifest(folder)
    with pytest.raises(CrossFLError, match=r"cannot be loaded|lacks") as refusal:
        load(folder, TRAINING)
    assert "crossfl-model-" not in str(refusal.value)


def bpe(folder: Path) -> None:
    """Give a folder a tokenizer of byte pairs."""
    unknown = {"unk_token": "<unk>"}
    tokenizer = Tokenizer(models.BPE(**unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"])
    tokenizer.train_from_iterator(["a few words of text, and a few more"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template="{{ 1 }}", **unknown, **{"eos_token": "</s>"}
    )
    for name in ("tokenizer_config.json", "added_tokens.json"):
        (folder / name).unlink()
    fast.save_pretrained(folder)


@pytest.mark.parametrize("number", [1, 3])
def test_good_models_load_as_before(number: int, tmp_path: Path) -> None:
    folder = spoilt(tmp_path)
    if number > 1:
        shard(folder, number)
    bpe(folder)
    write_manifest(folder)
    (tmp_path / "link").symlink_to(folder)  # as engines stage folders
    model, tokenizer = load(tmp_path / "link", TRAINING)
    expected = load_file(MODEL / SINGLE)
    assert all(torch.equal(t, expected[n]) for n, t in model.state_dict().items())
    plain = AutoTokenizer.from_pretrained(folder)
    assert tokenizer is not None
    assert tokenizer("a few words").input_ids == plain("a few words").input_ids


def test_hard_links_are_files(tmp_path: Path) -> None:
    folder = spoilt(tmp_path)
    os.link(folder / SINGLE, tmp_path / "journal")
    assert ModelFolder.received(folder).weights == (folder / SINGLE,)


def test_an_adapter_is_known_by_its_record(tmp_path: Path) -> None:
    folder = spoilt(tmp_path)
    adapter(folder)
    write_manifest(folder)
    found = ModelFolder.received(folder)
    assert (found.is_adapter, found.weights) == (True, (folder / ADAPTER,))
    with found.view() as view:
        assert {p.name for p in view.iterdir()} >= {ADAPTER, "adapter_config.json"}
        assert view.stat().st_mode & 0o777 == 0o700
    assert not view.exists()


def test_of_a_users_own_folder_the_safetensors_are_loaded(tmp_path: Path) -> None:
    """It is laid out as a hub's cache, with pickles, code and an adapter beside the weights."""
    folder, blobs = spoilt(tmp_path), tmp_path / "blobs"
    blobs.mkdir()
    edited("config.json", auto_map={"AutoModelForCausalLM": "evil.Evil"})(folder, folder)
    for path in list(folder.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    for name in ("pytorch_model.bin", "evil.py"):
        shutil.copy(tmp_path / "private" / name, folder)
    edited("adapter_config.json", base_model_name_or_path="PRIVATE", peft_type="LORA")(
        folder, tmp_path / "private"
    )
    (folder / "original").mkdir()
    expected = load_file(MODEL / SINGLE)
    loaded = load_weights(ModelFolder.own(folder), torch.float32).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.items())
    initialise(folder, None, None, 0, 1, Aggregation(), tmp_path / "out")
    made = ModelFolder.received(tmp_path / "out" / "global_model")
    assert "auto_map" not in json.loads((made.path / "config.json").read_text())
    assert not (tmp_path / "private" / "ran").exists()
