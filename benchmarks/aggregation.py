"""Measure `crossfl aggregate` against its peers and against a plain copy of the same bytes.

    python benchmarks/aggregation.py --work /tmp/benchmark --dtype fp32 bf16

Seeded, Llama-shaped files; every method in a process of its own, the peers each in a virtual
environment made here from pinned packages; methods interleaved, medians over the repeats. Results
are compared with fp64. Prints one table in Markdown.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from methods import METHODS
from safetensors import safe_open

from crossfl.engine.archive import BUFFER
from crossfl.protocol.manifest import ModelManifest, UpdateManifest
from crossfl.protocol.records import Aggregation
from crossfl.protocol.state import ServerState
from crossfl.server import first_state
from crossfl.server import state as server_state
from crossfl.storage import manifest, tensorfile
from crossfl.storage.checkpoint import Tensors

GIBI, MEBI = 1 << 30, 1 << 20
COMMON = ["torch==2.13.0", "safetensors==0.8.0", "numpy==2.4.6"]
PEERS = {"nvflare": "nvflare==2.9.0", "appfl": "appfl==1.9.0", "flwr": "flwr==1.41.0"}
HIDDEN, INNER, VOCABULARY = 1024, 2816, 32000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def layout(size: int, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names and shapes of a Llama model of at least `size` bytes."""
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (VOCABULARY, HIDDEN),
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    layer, elements = 0, 0
    while elements * dtype.itemsize < size:
        prefix = f"model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{prefix}self_attn.{name}.weight"] = (HIDDEN, HIDDEN)
        for name in ("gate_proj", "up_proj"):
            shapes[f"{prefix}mlp.{name}.weight"] = (INNER, HIDDEN)
        shapes[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, INNER)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (HIDDEN,)
        layer, elements = layer + 1, sum(torch.Size(s).numel() for s in shapes.values())
    return {name: (dtype, shape) for name, shape in shapes.items()}


def make(folder: Path, size: int, dtype: torch.dtype, sites: int, distinct: int) -> None:
    """Write the model files of all sites, and the same files as updates of a federation from 0.

    Only the first `distinct` of them differ: the others are more names of these, without bytes of
    their own.
    """
    shapes = layout(size, dtype)
    layers = max(int(n.split(".")[2]) for n in shapes if n.startswith("model.layers.")) + 1
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
    }
    for number in range(-1, sites):
        site = folder / ("model" if number < 0 else f"site{number:02}")
        site.mkdir(parents=True)
        (site / "config.json").write_text(json.dumps(config))
        file = site / "model.safetensors"
        if number >= distinct:
            os.link(folder / f"site{number % distinct:02}" / file.name, file)
        else:
            generator = torch.Generator().manual_seed(number)
            sent = file.with_suffix(".sent")
            with tensorfile.Writer(sent, shapes) as writer:
                for _, shape in shapes.values():
                    zeros = torch.zeros(1)
                    values = torch.randn(shape, generator=generator) if number >= 0 else zeros
                    writer.write(values.expand(shape).to(dtype))
            # It is to lie in memory as the connectors lay what arrives.
            with sent.open("rb") as source, file.open("wb") as target:
                shutil.copyfileobj(source, target, BUFFER)
            sent.unlink()
        if number >= 0:
            (site / "update").mkdir()
            os.link(file, site / "update" / "delta.safetensors")
    (folder / "model" / "config.json").write_text("{}")
    digest = manifest.write(folder / "model", ModelManifest(round=0)).digest
    rules = Aggregation(weighting="equal")
    (folder / "state").mkdir()
    weights = Tensors.of_model(folder / "model")
    sums = first_state.write_tensors(weights, rules, folder / "state")
    state = ServerState(rounds=9, aggregation=rules, started=0.0, model=digest)
    server_state.save(state, folder / "state", sums)
    known: list[dict[str, str]] = []
    for number in range(sites):
        site = folder / f"site{number:02}"
        same = known[number % distinct :][:1] or [{}]
        stated = UpdateManifest(
            facility=site.name,
            federation=state.federation,
            round=1,
            base=digest,
            status="complete",
            tokens=1,
            samples=1,
            steps=1,
        )
        written = manifest.write(site / "update", stated, same[0])
        known.append({name: entry.sha256 for name, entry in written.files.items()})


def environment(environments: Path, method: str) -> Path | None:
    """The Python that runs a method; made now if it is a peer's. None where it does not install."""
    peer = method.split(",")[0]
    if peer not in PEERS:
        return Path(sys.executable)
    folder = environments / peer
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [folder / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
        for packages in (COMMON, [PEERS[peer]]):
            if subprocess.run([*pip, *packages], check=False).returncode:
                return None
        (folder / "ready").touch()
    return folder / "bin" / "python"


def rounded_right(folder: Path, sites: int, output: Path, dtype: torch.dtype) -> float | None:
    """Part of the elements that are the fp64 mean rounded to the dtype; None for a pickle."""
    names = ("model.embed_tokens.weight", "model.norm.weight")
    try:
        with safe_open(output, framework="pt") as result:
            found = {name: result.get_tensor(name) for name in names}
    except Exception:
        return None
    right = total = 0
    files = [tensorfile.TensorFile(folder / f"site{i:02}/model.safetensors") for i in range(sites)]
    for name in names:
        exact = sum(file.tensor(name).double() for file in files) / sites
        right += int((found[name].reshape(exact.shape) == exact.to(dtype)).sum())  # type: ignore
        total += found[name].numel()
    return right / total


def run(python: Path | None, folder: Path, method: str, sites: int, kind: str) -> dict[str, Any]:
    """One measurement; `error` in place of figures where the method fails."""
    if python is None:
        return {"error": "does not install"}
    script, output = Path(__file__).with_name("methods.py"), folder / "output"
    command = [python, script, method, folder, str(sites), output, kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["killed"])[-1][:60]}
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The figures in Markdown: medians of seconds, largest memory."""
    lines = [
        "| method | warm, s | cold, s | processor, s | anonymous, MiB | above imports, MiB "
        "| resident, MiB | rounded as fp64 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, row in rows.items():
        if "error" in row:
            lines.append(f"| {method} | {row['error']} | | | | | | |")
            continue
        seconds = [
            f"{statistics.median(row[k]):.2f}" if row[k] else "–"
            for k in ("warm", "cold", "processor")
        ]
        sizes = [f"{max(row[k]) / MEBI:.0f}" for k in ("anonymous", "grown", "resident")]
        right = "–" if row["right"] is None else f"{100 * row['right']:.2f} %"
        lines.append(f"| {method} | " + " | ".join([*seconds, *sizes, right]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Make the files, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for files, environments")
    parser.add_argument(
        "--environments", type=Path, help="folder for the peers' environments; default: in --work"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--gibibytes", type=float, default=1.0, help="size of a model")
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument(
        "--distinct", type=int, help="files that differ, the rest are links; default: all"
    )
    parser.add_argument("--remove", action="store_true", help="remove the files at the end")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cold", type=int, default=3, help="repeats with a cold page cache")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    environments = args.environments or args.work / "environments"
    pythons = {method: environment(environments, method) for method in args.methods}
    for name in args.dtype:
        folder = args.work / f"{name}-{args.gibibytes}-{args.sites}"
        if not folder.exists():
            size, distinct = int(args.gibibytes * GIBI), args.distinct or args.sites
            make(folder, size, DTYPES[name], args.sites, min(distinct, args.sites))
        rows: dict[str, dict[str, Any]] = {}
        for repeat in range(args.repeats + args.cold):
            kind = "warm" if repeat < args.repeats else "cold"
            for method in args.methods:
                keys = ("warm", "cold", "processor", "anonymous", "grown", "resident")
                row = rows.setdefault(method, {key: [] for key in keys} | {"right": None})
                if "error" in row:
                    continue
                found = run(pythons[method], folder, method, args.sites, kind)
                if "error" in found:
                    row["error"] = found["error"]
                    continue
                row[kind].append(found["seconds"])
                for key in keys[2:]:
                    row[key].append(found[key])
                if repeat == 0 and not method.startswith("copy"):
                    output = folder / "output"
                    row["right"] = rounded_right(folder, args.sites, output, DTYPES[name])
                print(f"{name} {kind} {repeat} {method}: {found['seconds']:.2f} s", file=sys.stderr)
        if args.remove:
            shutil.rmtree(folder)
        print(f"\n{name}, {args.sites} files of {args.gibibytes} GiB,", end=" ")
        print(f"{args.repeats} warm and {args.cold} cold repeats, {platform.machine()},", end=" ")
        print(f"{os.cpu_count()} cores, Linux {platform.release()},", end=" ")
        print(f"Python {platform.python_version()}, torch {torch.__version__}; peers:", end=" ")
        print(", ".join(PEERS.values()) + "\n")
        print(table(rows), flush=True)


if __name__ == "__main__":
    main()
