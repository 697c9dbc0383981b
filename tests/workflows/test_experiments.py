"""The experiments: their files fit together, here and on real sites; their data are as they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from crossfl import cli
from crossfl.learning import datasets
from crossfl.learning.datasets import Image
from crossfl.protocol.records import Lora
from crossfl.steps.initialise import initialise
from crossfl.storage.checkpoint import Tensors
from crossfl.storage.job import Job
from tests.support.paths import ROOT

FOLDER = ROOT / "workflows" / "experiments"
NAMES = ("bilingual", "chemistry", "vision")
"""Those that real sites have a job for."""
SITES = {
    "bilingual": ["--from", ROOT / "environments" / "eurohpc.yml"],
    "chemistry": ["--from", ROOT / "environments" / "doe.yml"],
    "vision": ["--facility", "leonardo", "--facility", "cloud=vm", "--set", "cloud.host=a.example"],
}
"""What `docs/experiments.md` gives `crossfl bind`, besides what is the user's own."""
OWN = {
    "user": "me",
    "account": "abc",
    "workdir": "/scratch/me",
    "data": "/work/data",
    "venv": "/work/venv",
}


def script(path: str, *words: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, FOLDER / path, *words]
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", [*NAMES, "smollm"])
def test_small_version_fits_together(name: str) -> None:
    job = Job.load(FOLDER / name / "job.yml")
    deployed = yaml.safe_load((FOLDER / name / "streamflow.yml").read_text())["deployments"]
    assert set(deployed) == {"vm", *(f.name for f in job.facilities)}
    for facility in job.facilities:
        config = deployed[facility.name]["config"]
        assert config["facility"] == facility.name
        where = Path(os.path.normpath(FOLDER / name / config["data"]))  # links are not followed
        assert where == ROOT / "data" / "experiments" / name / facility.name
    assert (
        job.model == ROOT / "data" / "models" / "smollm2-135m" if name == "smollm" else job.config
    )
    assert job.config is None or job.config.is_file()


@pytest.mark.parametrize("name", NAMES)
def test_real_sites_are_bound(name: str, tmp_path: Path) -> None:
    job = Job.load(FOLDER / name / "sites.yml")
    words = [*SITES[name], "--job", FOLDER / name / "sites.yml", "-o", tmp_path / "federation.yml"]
    for facility in job.facilities:
        for setting, value in OWN.items():
            if not (facility.name == "cloud" and setting == "account"):
                words += ["--set", f"{facility.name}.{setting}={value}"]
    if name == "chemistry":
        words += ["--set", "aurora.filesystems=flare", "--set", "polaris.filesystems=eagle"]
    assert cli.main(["bind", *map(str, words)]) == 0
    bound = yaml.safe_load((tmp_path / "federation.yml").read_text())
    assert {f.name for f in job.facilities} <= set(bound["deployments"])


def test_the_configurations_are_of_the_models_they_name() -> None:
    from transformers import AutoConfig

    from crossfl.learning.models.loading import kind_of

    # VGG16's convolutions have 14,714,688 parameters with three channels, and 1,152 fewer with one.
    norms, classifier = 2 * 4224, 2 * (512 * 512 + 512) + 512 * 10 + 10
    expected = {
        "llama-2-7b.json": 6_738_415_616,
        "vision/vgg16.json": 14_714_688 - 1152 + norms + classifier,
    }
    for name, count in expected.items():
        config = AutoConfig.for_model(**json.loads((FOLDER / name).read_text()))
        with torch.device("meta"):
            model = kind_of(config).from_config(config)
        assert sum(p.numel() for p in model.parameters()) == count


def test_digits_are_split_by_class(tmp_path: Path) -> None:
    assert script("vision/generate.py", tmp_path).returncode == 0
    total = 0
    for facility, classes in (("marconi100", range(5)), ("cloud", range(5, 10))):
        for split in ("train", "valid"):
            images = datasets.read(tmp_path / facility, split)
            assert {i.label for i in images if isinstance(i, Image)} == set(classes)
            assert all(i.pixels.shape == (1, 8, 8) for i in images if isinstance(i, Image))
            assert all(i.pixels.max() <= 1 for i in images if isinstance(i, Image))
            total += len(images)
    assert total == 1797


def test_images_are_converted(tmp_path: Path) -> None:
    import io

    import pyarrow as pa
    from PIL import Image as Picture
    from pyarrow import parquet

    rows = []
    for label, colour in enumerate(((0, 0, 0), (255, 255, 255), (51, 51, 51))):
        stream = io.BytesIO()
        Picture.new("RGB", (28, 20), colour).save(stream, "PNG")
        rows.append({"image": {"bytes": stream.getvalue(), "path": None}, "label": label})
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    file = tmp_path / "a.parquet"
    words = (tmp_path / "out", "--train", file, file, "--valid", file, "--size", "16")
    result = script("vision/convert.py", *words)
    assert result.stdout == "train  6 images\nvalid  3 images\n", result.stderr
    images = [i for i in datasets.read(tmp_path / "out", "valid") if isinstance(i, Image)]
    assert [i.label for i in images] == [0, 1, 2]
    assert [i.pixels.shape for i in images] == [(1, 16, 16)] * 3
    assert [float(i.pixels.mean()) for i in images] == pytest.approx([0, 1, 0.2])


ROWS = [
    {"task": "name_conversion-i2s", "input": "a", "output": "b", "raw_input": "x"},
    {"task": "property_prediction-hiv", "input": "c", "output": "d"},
    {"task": "retrosynthesis", "input": "e", "output": "f"},
    {"task": "molecule_captioning", "input": "g{", "output": "h"},
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_smolinstruct_is_split_by_group_of_tasks(kind: str, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    file = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        file.write_text("\n".join(map(json.dumps, ROWS)))
    else:
        parquet.write_table(pa.Table.from_pylist(ROWS), file)
    out = tmp_path / "out"
    result = script("chemistry/convert.py", out, "--train", file, file, "--valid", file)
    assert "aurora  train  2 samples" in result.stdout, result.stderr
    found = {f.name: datasets.read(f / "smolinstruct", "valid") for f in out.iterdir()}
    assert found == {
        "perlmutter": [datasets.Text("[INST] a [/INST]", "b", "name_conversion-i2s")],
        "polaris": [datasets.Text("[INST] c [/INST]", "d", "property_prediction-hiv")],
        "aurora": [datasets.Text("[INST] e [/INST]", "f", "retrosynthesis")],
        "frontier": [datasets.Text("[INST] g{ [/INST]", "h", "molecule_captioning")],
    }


def test_what_is_not_smolinstruct_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"task": "poetry"}\n')
    file = tmp_path / "rows.jsonl"
    result = script("chemistry/convert.py", tmp_path / "out", "--train", file, "--valid", file)
    assert result.returncode != 0
    assert f"{file}, row 2: no row of SMolInstruct" in result.stderr


def test_smollm_is_unpacked_and_takes_an_adapter(tmp_path: Path) -> None:
    """The real model: converted once, beside a tokenizer that survives being saved."""
    made = ROOT / "data" / "models" / "smollm2-135m"
    if not made.is_dir():
        pytest.skip("data/models/smollm2-135m is not there: make experiment-data NAME=smollm")
    job = Job.load(FOLDER / "smollm" / "job.yml")
    assert job.lora
    initialise(made, None, None, 0, 1, job.aggregation, tmp_path, job.lora)
    adapter = Tensors.of_model(tmp_path / "global_model")
    assert sum(entry.elements for entry in adapter.floats().values()) == 460_800
    assert Lora.parse(json.loads((tmp_path / "global_model" / "lora.json").read_text())).base_digest


def test_an_unknown_experiment_is_named() -> None:
    command = [FOLDER / "prepare.sh", "poetry", "nowhere", sys.executable]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "no experiment poetry: bilingual, chemistry, smollm, vision" in result.stderr
