"""Hostile and broken updates: each refused with its reason, the others averaged as without it."""

import json
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from crossfl.errors import CrossFLError
from crossfl.protocol.manifest import ModelManifest
from crossfl.storage import manifest
from crossfl.storage.checkpoint import slots
from tests.support.federation import (
    Federation,
    Values,
    entry,
    facilities,
    snapshot,
    weights,
    write_document,
)

MODEL: Values = {"a": torch.zeros(4, 3), "b": torch.zeros(5)}
GOOD: Values = {"a": torch.ones(4, 3), "b": torch.ones(5)}

Hostile = Callable[[Federation, Path], None]
CORPUS: dict[str, tuple[Hostile, str]] = {}


def hostile(reason: str) -> Callable[[Hostile], Hostile]:
    """Add an update to the corpus under its function's name, with a part of the reason."""

    def add(make: Hostile) -> Hostile:
        CORPUS[make.__name__.strip("_")] = (make, reason)
        return make

    return add


def _says(reason: str, name: str, /, **fields: Any) -> None:
    def make(federation: Federation, path: Path) -> None:
        save_file(GOOD, path / "delta.safetensors")
        federation.seal(path, fields.pop("facility", "evil"), **fields)

    CORPUS[name] = (make, reason)


def _sends(reason: str, name: str, values: Values) -> None:
    def make(federation: Federation, path: Path) -> None:
        save_file(values, path / "delta.safetensors")
        federation.seal(path, "evil")

    CORPUS[name] = (make, reason)


def _file(
    reason: str, name: str, header: Any, data: bytes = b"", length: int | None = None
) -> None:
    def make(federation: Federation, path: Path) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        size = len(text) if length is None else length
        (path / "delta.safetensors").write_bytes(struct.pack("<Q", size) + text + data)
        federation.seal(path, "evil")

    CORPUS[name] = (make, reason)


def _edited(reason: str, name: str, edit: Callable[[dict[str, Any]], Any]) -> None:
    def make(federation: Federation, path: Path) -> None:
        save_file(GOOD, path / "delta.safetensors")
        federation.seal(path, "evil")
        document = json.loads((path / "manifest.json").read_text())
        document = edit(document) or document
        text = document if isinstance(document, str) else json.dumps(document)
        (path / "manifest.json").write_text(text)

    CORPUS[name] = (make, reason)


def _amend(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change what a manifest says, so that it still agrees with itself."""
    document = json.loads((path / "manifest.json").read_text())
    edit(document)
    write_document(path, document)


def _described(dtype: str, shape: list[Any], *offsets: Any, **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets), **more}


A, B = _described("F32", [4, 3], 0, 48), _described("F32", [5], 48, 68)
DATA = bytes(68)

# What the manifest says of the update.
_says("it is for round 2", "round_ahead", round=2)
_says("round: expected int >= 1", "round_behind", round=0)
_says("round: expected int, got str", "round_a_word", round="1")
_says("round: expected int, got bool", "round_a_boolean", round=True)
_says("another model", "base_of_another_model", base="0" * 64)
_says("base: expected str, got null", "base_missing", base=None)
_says("status: invalid enum value 'finished'", "status_unknown", status="finished")
_says("is absent and gives no reason", "absent_without_reason", status="absent")
_says("reason: expected str | null, got int", "reason_a_number", reason=7)
_says("reports 0 tokens; with weighting: tokens", "weight_zero", tokens=0)
_says("tokens: expected int >= 0", "weight_negative", tokens=-5)
_says("is not valid JSON", "weight_nan", tokens=float("nan"))
_says("is not valid JSON", "weight_infinite", tokens=float("inf"))
_says("tokens: expected int, got float", "weight_a_fraction", tokens=1.5)
_says("tokens: expected int, got bool", "weight_a_boolean", tokens=True)
_says("tokens: expected int, got str", "weight_a_word", tokens="100")
_says("tokens: expected int <=", "weight_astronomic", tokens=10**400)
_says("largest weight allowed is 1000", "weight_over_the_cap", tokens=1001)
_says("steps: expected int >= 0", "steps_negative", steps=-1)
_says("is not valid JSON", "loss_nan", metrics={"validation": {"loss": float("nan")}})
_says("loss: expected float, got str", "loss_a_word", metrics={"validation": {"loss": "low"}})
_says("number out of range", "loss_beyond_floats", metrics={"validation": {"loss": 10**400}})
_says(
    "validation.loss: expected float >= 0", "loss_negative", metrics={"validation": {"loss": -1.0}}
)
_says(
    "validation: object missing required field loss",
    "loss_missing",
    metrics={"validation": {"tokens": 1}},
)
_says(
    "local: object missing required field loss",
    "local_loss_missing",
    metrics={"local": {"tokens": 1}},
)
_says("local: expected object | null, got float", "local_a_number", metrics={"local": 1.0})
_says(
    "validation: expected object | null, got array",
    "validation_a_list",
    metrics={"validation": [1]},
)
_says(
    "metrics: object contains unknown field a",
    "metrics_deep",
    metrics={"a": {"b": {"c": {"d": {"e": 1}}}}},
)
_says(
    "first_loss: expected float | null, got str",
    "metrics_a_word",
    metrics={"training": {"first_loss": "x"}},
)
_says(
    "metrics: object contains unknown field 0",
    "metrics_huge",
    metrics={str(i): 1 for i in range(10_000)},
)
_says("seconds.train: expected float >= 0", "seconds_negative", seconds={"train": -1.0})
_says("seconds.train: expected float <=", "seconds_endless", seconds={"train": 1e300})
_says(
    "training.ranks: expected int <=",
    "metrics_beyond_floats",
    metrics={"training": {"ranks": 10**400}},
)
_says("seconds.train: expected float, got null", "seconds_missing", seconds={"train": None})
_says("metrics: expected object, got array", "metrics_a_list", metrics=[])
_says("is not valid JSON", "seconds_infinite", seconds={"train": float("inf")})
_says("facility: use letters, digits", "facility_a_path", facility="../evil")
_says("100 characters at most", "facility_of_a_long_name", facility="e" * 101)
_says("facility: expected str, got int", "facility_a_number", facility=7)
_says("delivered 2 updates", "facility_of_another", facility="good1")

# The manifest itself.
_edited("is not valid JSON", "manifest_not_json", lambda d: "{")
_edited("expected object, got array", "manifest_a_list", lambda d: "[]")
_edited("expected object, got array", "manifest_deep", lambda d: "[" * 100_000)
_edited("is not a manifest", "manifest_huge", lambda d: " " * (1 << 25))
_edited("a model, where", "manifest_of_a_model", lambda d: d.update(kind="model"))
_edited("reads format 2", "manifest_of_another_format", lambda d: d.update(format=3))
_edited("files: expected object, got array", "manifest_files_a_list", lambda d: d.update(files=[]))
_edited(
    "expected object, got array",
    "manifest_entry_a_list",
    lambda d: d["files"].update(more=["bytes", "sha256"]),
)
_edited("is corrupt", "manifest_digest_wrong", lambda d: d.update(digest="0" * 64))
_edited("is corrupt", "manifest_without_files", lambda d: d.pop("files") and None)

# The numbers.
_sends("not finite", "values_nan", {**GOOD, "b": torch.tensor([1, 2, float("nan"), 4, 5])})
_sends("not finite", "values_infinite", {**GOOD, "b": torch.full((5,), float("inf"))})
_sends("not finite", "values_bf16_nan", {n: (t * torch.nan).bfloat16() for n, t in GOOD.items()})
_sends("its norm is 3.6", "norm_over_the_limit", {n: t * 8.75e5 for n, t in GOOD.items()})
_sends("the round's median", "norm_against_the_cohort", {n: t * 500 for n, t in GOOD.items()})
_sends("shape [3, 4]", "shape_transposed", {**GOOD, "a": torch.ones(3, 4)})
_sends("shape [12]", "shape_flat", {**GOOD, "a": torch.ones(12)})
_sends("dtype torch.float64", "dtype_double", {n: t.double() for n, t in GOOD.items()})
_sends("dtype torch.int8", "dtype_codes_without_encoding", {n: t.char() for n, t in GOOD.items()})
_sends("'b' is missing", "tensor_missing", {"a": GOOD["a"]})
_sends("'c' is not in", "tensor_unknown", {**GOOD, "c": torch.ones(1)})

# The safetensors file.
_file("header of", "header_longer_than_the_file", b"{}", length=1 << 20)
_file("header of", "header_of_2_to_63_bytes", b"{}", length=1 << 63)
_file("header of", "header_empty", b"", DATA, 0)
_file("not a valid", "header_not_json", b"{x}", DATA)
_file("not a valid", "header_not_utf8", b'{"\xff":1}', DATA)
_file("not a JSON object", "header_a_list", [1], DATA)
_file("not a valid", "header_deep", b"[" * 50_000 + b"]" * 50_000)
_file("not described", "entry_a_number", {"a": 1, "b": B}, DATA)
_file("not described", "entry_with_more", {"a": {**A, "x": 1}, "b": B}, DATA)
_file("there twice", "key_twice", b'{"a":' + json.dumps(A).encode() + b',"a":1}', DATA)
_file("unknown", "dtype_unknown", {"a": {**A, "dtype": "F31"}, "b": B}, DATA)
_file("unknown", "dtype_a_list", {"a": {**A, "dtype": []}, "b": B}, DATA)
_file("not counts", "shape_negative", {"a": _described("F32", [-4, -3], 0, 48), "b": B}, DATA)
_file("not counts", "shape_a_fraction", {"a": _described("F32", [4.0, 3], 0, 48), "b": B}, DATA)
_file("not fill", "shape_overflow", {"a": _described("F32", [2**62, 4], 0, 0), "b": B}, DATA)
_file("dimensions", "shape_endless", {"a": _described("F32", [2] * 9999, 0, 48), "b": B}, DATA)
_file("not counts", "offsets_negative", {"a": _described("F32", [4, 3], -48, 0), "b": B}, DATA)
_file("offsets", "offsets_three", {"a": _described("F32", [4, 3], 0, 48, 49), "b": B}, DATA)
_file("not fill", "offsets_backwards", {"a": _described("F32", [4, 3], 48, 0), "b": B}, DATA)
_file("starts at byte", "offsets_overlap", {"a": A, "b": _described("F32", [5], 28, 48)}, DATA)
_file("starts at byte", "offsets_with_a_hole", {"a": A, "b": _described("F32", [5], 52, 72)}, DATA)
_file("the file at", "data_missing", {"a": A, "b": B}, DATA[:-1])
_file("the file at", "data_trailing", {"a": A, "b": B}, DATA + b"x")
_file("metadata", "metadata_not_strings", {"__metadata__": {"a": 1}, "a": A, "b": B}, DATA)
_file("no encoding", "encoding_unknown", {"__metadata__": {"encoding": "x"}, "a": A, "b": B}, DATA)
_file(
    "encoding",
    "topk_of_all",
    {"__metadata__": {"encoding": "topk", "topk_fraction": "7"}, "a": A},
    DATA[:48],
)
CODES = {"a": _described("I8", [12], 0, 12), "b": _described("I8", [5], 12, 17)}
_file("scale", "int8_without_scales", {"__metadata__": {"encoding": "int8"}, **CODES}, DATA[:17])


@hostile("is not valid JSON")
def _file_name_of_half_a_character(federation: Federation, path: Path) -> None:
    save_file(GOOD, path / "delta.safetensors")
    federation.seal(path, "evil")
    _amend(path, lambda said: said["files"].update({"\ud800": {"bytes": 1, "sha256": "0" * 64}}))


@hostile("is not valid JSON")
def _file_name_of_no_characters(federation: Federation, path: Path) -> None:
    save_file(GOOD, path / "delta.safetensors")
    (path / "delta.safetensors").rename(os.fsdecode(os.fsencode(path) + b"/delta\xff.safetensors"))
    federation.seal(path, "evil")


@hostile("no delta of a file of the model")
def _files_without_number(federation: Federation, path: Path) -> None:
    save_file(GOOD, path / "delta.safetensors")
    for number in range(2000):
        (path / f"{number}").touch()
    federation.seal(path, "evil")


@hostile("is a link or a device")
def _file_of_the_kernel(federation: Federation, path: Path) -> None:
    save_file(GOOD, path / "delta.safetensors")
    (path / "more").symlink_to("/proc/version")
    federation.seal(path, "evil")


@hostile("is a link or a device")
def _delta_of_the_kernel(federation: Federation, path: Path) -> None:
    (path / "delta.safetensors").symlink_to("/proc/version")
    federation.seal(path, "evil")


@hostile("")  # by the system, or, where it can map as much, by the shape
def _delta_of_a_million_megabytes(federation: Federation, path: Path) -> None:
    size = 1 << 40
    header = json.dumps({"a": _described("F32", [size // 4], 0, size)}).encode()
    (path / "delta.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    federation.seal(path, "evil")
    os.truncate(path / "delta.safetensors", 8 + len(header) + size)
    _amend(
        path, lambda said: said["files"]["delta.safetensors"].update(bytes=8 + len(header) + size)
    )


@hostile("does not match its sha256")
def _a_bit_flipped(federation: Federation, path: Path) -> None:
    save_file(GOOD, path / "delta.safetensors")
    federation.seal(path, "evil")
    data = bytearray((path / "delta.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "delta.safetensors").write_bytes(data)


@hostile("bytes instead of")
def _cut_short(federation: Federation, path: Path) -> None:
    save_file(GOOD, path / "delta.safetensors")
    federation.seal(path, "evil")
    os.truncate(path / "delta.safetensors", 100)


@hostile("is missing")
def _file_missing(federation: Federation, path: Path) -> None:
    save_file(GOOD, path / "delta.safetensors")
    federation.seal(path, "evil")
    (path / "delta.safetensors").unlink()


@hostile("is not in the manifest")
def _file_unlisted(federation: Federation, path: Path) -> None:
    save_file(GOOD, path / "delta.safetensors")
    federation.seal(path, "evil")
    (path / "more.pickle").write_bytes(b"x")


@hostile("is a link or a device")
def _a_pipe_for_a_file(federation: Federation, path: Path) -> None:
    save_file(GOOD, path / "delta.safetensors")
    federation.seal(path, "evil")
    (path / "delta.safetensors").unlink()
    os.mkfifo(path / "delta.safetensors")


@hostile("has no manifest.json")
def _no_manifest(federation: Federation, path: Path) -> None:
    save_file(GOOD, path / "delta.safetensors")


@hostile("could not be decoded")
def _topk_positions_beyond_the_cell(federation: Federation, path: Path) -> None:
    tensors = {
        "a//position": torch.tensor([60000], dtype=torch.uint16),
        "a//value": torch.ones(1).bfloat16(),
        "b//position": torch.tensor([0], dtype=torch.uint16),
        "b//value": torch.ones(1).bfloat16(),
    }
    metadata = {"encoding": "topk", "topk_fraction": "0.05"}
    save_file(tensors, path / "delta.safetensors", metadata=metadata)
    federation.seal(path, "evil")


@hostile("not finite")
def _int8_scale_nan(federation: Federation, path: Path) -> None:
    tensors = {"a": torch.ones(12).char(), "b": torch.ones(5).char()}
    tensors |= {f"{n}//scale": torch.full((1,), torch.nan).bfloat16() for n in ("a", "b")}
    save_file(tensors, path / "delta.safetensors", metadata={"encoding": "int8"})
    federation.seal(path, "evil")


def _federation(folder: Path, **rules: Any) -> Federation:
    limits = {"max_weight": 1000, "max_norm": 1e6, "max_norm_ratio": 20.0}
    return Federation(folder, MODEL, **{**limits, **rules})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the good updates alone become."""
    federation = _federation(tmp_path_factory.mktemp("good"), quorum=3)
    good = [federation.update(f"good{i}", GOOD) for i in range(4)]
    return snapshot(federation.run(good) / "global_model")


@pytest.mark.parametrize("name", CORPUS)
def test_refused_and_the_others_unaffected(
    tmp_path: Path, name: str, undisturbed: dict[str, bytes]
) -> None:
    make, reason = CORPUS[name]
    federation = _federation(tmp_path, quorum=3)
    good = [federation.update(f"good{i}", GOOD) for i in range(4)]
    path = tmp_path / "updates" / "evil"
    path.mkdir()
    make(federation, path)
    out = federation.run([path, *good])
    assert snapshot(out / "global_model") == undisturbed
    (refused,) = [e for e in facilities(out).values() if e.status == "refused"]
    assert reason in str(refused.reason)
    assert refused.share == 0
    assert str(tmp_path) not in str(refused.reason)
    json.dumps(entry(out).asdict(), allow_nan=False)


@pytest.mark.parametrize("name", ["values_nan", "a_bit_flipped", "tensor_missing", "no_manifest"])
def test_without_a_quorum_nothing_is_written(tmp_path: Path, name: str) -> None:
    make, reason = CORPUS[name]
    federation = _federation(tmp_path)
    good = [federation.update(f"good{i}", GOOD) for i in range(2)]
    path = tmp_path / "updates" / "evil"
    path.mkdir()
    make(federation, path)
    before = snapshot(tmp_path)
    with pytest.raises(CrossFLError, match="2 of 3 updates can be averaged") as error:
        federation.run([*good, path])
    assert reason in str(error.value)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam", "diloco"])
def test_finite_values_do_not_make_the_state_infinite(tmp_path: Path, strategy: str) -> None:
    federation = Federation(tmp_path, MODEL, server_optimizer=strategy, quorum=1)
    good = federation.update("good", GOOD)
    largest = {name: torch.full_like(values, 3e38) for name, values in GOOD.items()}
    out = federation.run([federation.update("evil", largest), good])
    assert "above 1e+06" in facilities(out)["evil"].reason
    kept = slots(out / "state").values()
    assert all(values.isfinite().all() for slot in kept for values in slot.values())


def test_a_refused_update_has_no_say_in_others(tmp_path: Path) -> None:
    """Neither by the name that it claims nor by its norm."""
    federation = Federation(tmp_path, MODEL, quorum=4, max_norm_ratio=10.0)
    good = [
        federation.update(f"good{i}", {name: scale * values for name, values in GOOD.items()})
        for i, scale in enumerate((1.0, 1.0, 12.0, 12.0))
    ]
    claims = federation.update("good0", GOOD, name="claims", round=7)
    tiny = federation.update("tiny", {name: values / 1000 for name, values in GOOD.items()})
    damaged = bytearray((tiny / "delta.safetensors").read_bytes())
    damaged[-1] ^= 1
    (tiny / "delta.safetensors").write_bytes(damaged)
    out = federation.run([claims, tiny, *good])
    statuses = {name: e.status for name, e in facilities(out).items()}
    assert statuses == {f"good{i}": "complete" for i in range(4)} | {
        "tiny": "refused",
        "unknown-1": "refused",
    }


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    federation = Federation(tmp_path, [{"a": MODEL["a"]}, {"b": MODEL["b"]}], quorum=2)
    good = [federation.update(f"good{i}", GOOD) for i in range(2)]
    evil = federation.update("evil", GOOD)
    save_file(GOOD, evil / "delta-00002-of-00002.safetensors")
    federation.seal(evil, "evil")
    out = federation.run([evil, *good])
    assert "also in another file" in facilities(out)["evil"].reason


def test_nobody_speaks_who_was_not_asked(tmp_path: Path) -> None:
    """An update is of the facility that was asked at its place, or of nobody."""
    federation = Federation(tmp_path, MODEL, quorum=1, aggregation_rule="fednova")
    good = federation.update("good", GOOD, steps=5)
    stranger = federation.update("stranger", GOOD, steps=5)
    boasting = federation.update("boasting", GOOD, steps=9007199254740992)
    claims = federation.update("good", name="claims", status="absent", reason="gone")
    ill = federation.update("ill", status="absent", reason="\x1b[2Jgone")
    asked = {"good": 5, "boasting": 7, "ill": 5, "late": 5, "lost": 5}
    allowances = federation.allowances(asked)
    out = federation.run([good, boasting, ill, stranger, claims], allowances=allowances)
    assert {name: (e.share, e.reason) for name, e in facilities(out).items()} == {
        "good": (1.0, None),
        "boasting": (0.0, "it is complete and claims 9007199254740992 steps, and was asked for 7"),
        "ill": (0.0, "\\x1b[2Jgone"),
        "late": (0.0, "it is made in the name of stranger, and late was asked for it"),
        "lost": (0.0, "it is made in the name of good, and lost was asked for it"),
    }


def test_a_facility_may_have_the_name_of_one_that_has_none(tmp_path: Path) -> None:
    federation = Federation(tmp_path, MODEL, quorum=1)
    nameless = federation.update("", GOOD, name="nameless")
    out = federation.run([nameless, federation.update("unknown-1", GOOD)])
    statuses = {name: e.status for name, e in facilities(out).items()}
    assert statuses == {"unknown-1": "complete", "unknown-2": "refused"}


def test_an_infinite_master_weight_is_a_damaged_one(tmp_path: Path) -> None:
    federation = Federation(tmp_path, MODEL)
    update = federation.update("good", GOOD)
    master = federation.state / "master.model.safetensors"
    data = bytearray(master.read_bytes())
    data[-4:] = struct.pack("<f", float("inf"))
    master.write_bytes(data)
    with pytest.raises(CrossFLError, match="does not match its sha256: restore the server state"):
        federation.run([update])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_an_infinite_model_is_never_written(tmp_path: Path, dtype: torch.dtype) -> None:
    model = {name: values.to(dtype) for name, values in MODEL.items()}
    federation = Federation(tmp_path, model, quorum=1, server_learning_rate=1e38)
    update = federation.update("good", {name: 5 * values for name, values in GOOD.items()})
    before = snapshot(tmp_path)
    with pytest.raises(CrossFLError, match="would not be finite: lower server_learning_rate"):
        federation.run([update])
    assert snapshot(tmp_path) == before
    # What is finite, and adds up to more than numbers can say, is written.
    largest = torch.finfo(dtype).max
    federation = Federation(tmp_path / "near", model, quorum=1, server_learning_rate=largest)
    out = federation.run([federation.update("good", GOOD)])
    assert all(values.eq(largest).all() for values in weights(out).values())


def test_a_directory_too_deep_to_list_is_refused(tmp_path: Path) -> None:
    federation = Federation(tmp_path, MODEL, quorum=2)
    good = [federation.update(f"good{i}", GOOD) for i in range(2)]
    evil = federation.update("evil", GOOD)
    here = os.open(evil, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=here)
        here, above = os.open("d", os.O_RDONLY, dir_fd=here), here
        os.close(above)
    os.close(here)
    try:
        out = federation.run([evil, *good])
    finally:
        subprocess.run(["rm", "-rf", evil], check=True)
    assert facilities(out)["evil"].status == "refused"


def test_the_corpus_is_large() -> None:
    assert len(CORPUS) >= 40


def test_partial_and_absent_updates_are_inputs_like_any_other(tmp_path: Path) -> None:
    federation = _federation(tmp_path, quorum=2)
    updates = [
        federation.update("complete", GOOD, tokens=300),
        federation.update("partial", GOOD, tokens=100, status="partial", reason="wall time"),
        federation.update("away", None, status="absent", reason="queue", tokens=0),
    ]
    entries = facilities(federation.run(updates))
    assert {name: each.share for name, each in entries.items()} == {
        "away": 0.0,
        "complete": 0.75,
        "partial": 0.25,
    }
    assert entries["away"].reason == "queue"
    assert entries["partial"].status == "partial"


@pytest.mark.parametrize("file", ["state/master.model.safetensors", "state/state.json"])
def test_a_damaged_state_is_an_error(tmp_path: Path, file: str) -> None:
    federation = _federation(tmp_path)
    update = federation.update("a", GOOD)
    data = bytearray((tmp_path / file).read_bytes())
    data[-2] ^= 1
    (tmp_path / file).write_bytes(data)
    with pytest.raises(CrossFLError, match="does not match its sha256"):
        federation.run([update])
    assert list((tmp_path / "out").glob("*")) == []


def test_a_model_of_another_round_is_an_error(tmp_path: Path) -> None:
    federation = _federation(tmp_path)
    update = federation.update("a", GOOD)
    (federation.model / "config.json").write_text('{"x": 1}')
    manifest.write(federation.model, ModelManifest(round=0))
    with pytest.raises(CrossFLError, match="is not the model that"):
        federation.run([update])
