"""Measure the training loop against the Hugging Face `Trainer` and a loop with xFFL's settings.

    python benchmarks/training.py --work /tmp/benchmark
    python benchmarks/training.py --work /tmp/benchmark --device cuda --case 1b --precision bf16
    python benchmarks/training.py --work /tmp/benchmark --device cuda --case 7b-lora --arms ours

One model with random weights, one batch after the other of the same samples for all, every arm in a
process of its own. They take turns, a step each, so that what else goes on meets them all alike
(with several `--ranks`, under torchrun, they run one after the other). Medians over the repeats, of
the steps that follow the first ones. Nothing is measured before losses agree. xFFL's settings are
those of `examples/llm/client/src/training.py` at 009f184 (https://github.com/alpha-unito/xffl):
weights in the precision of the arithmetic, activations computed again, AdamW as it comes, no
clipping; FSDP where there are several ranks.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from crossfl.facility.time_budget import StopSignal
from crossfl.learning import datasets, lora
from crossfl.learning.batching import batch_of
from crossfl.learning.evaluation import summed_loss
from crossfl.learning.models.loading import load, load_weights
from crossfl.learning.telemetry import accounting
from crossfl.protocol.manifest import ModelManifest
from crossfl.protocol.records import Aggregation, Lora, Task, Training
from crossfl.protocol.variables import MODELS
from crossfl.steps.initialise import initialise
from crossfl.storage import manifest
from crossfl.storage.model_folder import ModelFolder

CASES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "heads": 4},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "heads": 16},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "heads": 32},
}
VOCABULARY = {"small": 384, "1b": 32000, "7b": 32000}
SAMPLES = 512
TURNS = "BENCHMARK_TURNS"
"""Two pipes: from the one an arm takes its turn, to the other it gives it."""


def prepare(args: argparse.Namespace) -> tuple[Path, Path]:
    """Model and data of a case, made once under the work folder."""
    size, _, lora = args.case.partition("-")
    model, rows = args.work / args.case / "global_model", args.work / f"rows-{args.length}.jsonl"
    args.work.mkdir(parents=True, exist_ok=True)
    if not rows.exists():
        letters = "".join(chr(97 + i * i % 26) for i in range(args.length))
        lines = (json.dumps({"text": f"{i:06d}{letters}"}) for i in range(SAMPLES))
        rows.write_text("\n".join(lines) + "\n")
    if model.exists():
        return model, rows
    shape = dict(CASES[size])
    heads = shape.pop("heads")
    config = args.work / f"{size}.json"
    config.write_text(
        json.dumps(
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **shape}
            | {"num_attention_heads": heads, "num_key_value_heads": heads, "pad_token_id": 0}
            | {"eos_token_id": 1, "bos_token_id": None, "vocab_size": VOCABULARY[size]}
            | {"max_position_embeddings": max(2048, args.length), "dtype": "float32"}
        )
    )
    base = args.work / size
    if not (base / "global_model").exists():
        initialise(None, config, "bytes", 0, 1, Aggregation(), base)
    if lora:
        record = Lora(base_model=f"{size}/global_model", rank=16)
        base = base / "global_model"
        initialise(base, None, None, 0, 1, Aggregation(), args.work / args.case, record)
    return model, rows


def records(args: argparse.Namespace, model: Path) -> tuple[Task, Training]:
    """The task and the settings that all arms share."""
    steps = args.steps
    base = manifest.read(model, ModelManifest).digest
    task = Task(
        facility="here", dataset="rows", round=1, local_steps=steps, seed=1, schedule_step=0,
        schedule_steps=steps, samples_seen=0, data_seed=1, base=base, federation="benchmark",
    )  # fmt: skip
    training = Training(
        batch_size=args.batch * args.ranks, sequence_length=args.length, learning_rate=1e-4,
        precision=args.precision, threads=args.threads, validation_samples=1,
        activation_checkpointing=args.recompute,
        compile=args.compile,
        sharding="fsdp" if args.ranks > 1 else "none",
    )  # fmt: skip
    return task, training


def ours(args: argparse.Namespace, model: Path, rows: Path) -> dict[str, Any]:
    """`crossfl.learning.training.Trainer`, as a job calls it."""
    from crossfl.learning.training import Trainer

    task, training = records(args, model)
    trainer, clock = Trainer(model, rows, task, training), Clock(args)
    trained = trainer.train(clock.tick, StopSignal())  # type: ignore[arg-type]
    said = result(args, trained.losses, clock)
    # Its own seconds are also those of the first steps, and those in which it waits for its turn.
    timed = dataclasses.replace(trained, seconds=trained.read / said["tokens_per_second"])
    return said | {"utilisation": trainer.account(timed).flops_utilisation}


def hugging_face(args: argparse.Namespace, model: Path, rows: Path) -> dict[str, Any]:
    """The `Trainer`, as it comes, on the same samples in the same order."""
    import transformers

    task, training = records(args, model)
    network, tokenizer = load(model, training)
    samples = encoded(rows, task, training, tokenizer)

    class Sequential(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(samples)

    class Ticks(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    def collate(batch: list[datasets.Encoded]) -> dict[str, torch.Tensor]:
        found = batch_of([[sample] for sample in batch], torch.device("cpu"))
        return {"input_ids": found.inputs, "labels": found.labels}

    settings = transformers.TrainingArguments(
        output_dir=str(args.work / "trainer"), per_device_train_batch_size=args.batch,
        max_steps=args.steps, learning_rate=1e-4, lr_scheduler_type="constant", logging_steps=1,
        save_strategy="no", report_to="none", remove_unused_columns=False, disable_tqdm=True,
        bf16=args.precision == "bf16", use_cpu=args.device == "cpu", weight_decay=0.0,
        gradient_checkpointing=args.recompute, torch_compile=args.compile, seed=1,
    )  # fmt: skip
    trainer = Sequential(
        model=network, args=settings, train_dataset=samples, data_collator=collate,
        callbacks=[Ticks()],
    )  # fmt: skip
    clock = Clock(args)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return result(args, losses, clock)


def xffl(args: argparse.Namespace, model: Path, rows: Path) -> dict[str, Any]:
    """A plain loop with the settings of xFFL's example."""
    from crossfl.learning.ranks import Parallel

    task, training = records(args, model)
    _, tokenizer = load(model, training)
    half = torch.bfloat16 if args.precision == "bf16" else torch.float32
    network: Any = load_weights(ModelFolder.received(model, only=()), half)
    network.gradient_checkpointing_enable({"use_reentrant": False})
    parallel = Parallel(training)
    wrapped = parallel.wrap(network)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-4, weight_decay=0.0)
    samples = encoded(rows, task, training, tokenizer)
    losses, clock, size = [], Clock(args), training.batch_size
    wrapped.train()
    for step in range(args.steps):
        mine = samples[step * size : (step + 1) * size][parallel.rank :: parallel.number]
        batch = batch_of([[sample] for sample in mine], parallel.device)
        loss = summed_loss(wrapped, batch) / batch.tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        clock.tick()
    return result(args, losses, clock)


ARMS: dict[str, Callable[[argparse.Namespace, Path, Path], dict[str, Any]]] = {
    "ours": ours,
    "trainer": hugging_face,
    "xffl": xffl,
}


def encoded(rows: Path, task: Task, training: Training, tokenizer: Any) -> list[datasets.Encoded]:
    """The samples of all steps, in the order in which `crossfl train` draws them."""
    samples, count = datasets.read(rows, "train"), task.local_steps * training.batch_size
    drawn = datasets.order(len(samples), task.data_seed, 0, count)
    found = [datasets.encode(samples[i], tokenizer, training.sequence_length) for i in drawn]
    return [sample for sample in found if isinstance(sample, datasets.Encoded)]


class Clock:
    """Seconds of each step of an arm, which waits for its turn between them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self.seconds: list[float] = []
        turns = os.environ.get(TURNS, "").split(os.pathsep)
        self._mine, self._next = (
            [os.open(pipe, os.O_RDWR) for pipe in turns] if len(turns) == 2 else (None, None)
        )
        self._begin()

    def _begin(self) -> None:
        if self._mine is not None:
            os.read(self._mine, 1)
        self._begun = time.monotonic()

    def tick(self, *_: Any, **__: Any) -> None:
        """A step is over: let the next arm do one, and wait."""
        if self._args.device == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.monotonic() - self._begun)
        if self._next is not None:
            os.write(self._next, b".")
        if len(self.seconds) < self._args.steps:
            self._begin()


def result(args: argparse.Namespace, losses: list[float], clock: Clock) -> dict[str, Any]:
    """Losses, and tokens per second of the steps after those that warm up."""
    seconds = sum(clock.seconds[args.warmup :])
    tokens = (args.steps - args.warmup) * args.batch * args.ranks * args.length
    device = torch.device(args.device)
    return {
        "losses": losses,
        "tokens_per_second": tokens / seconds,
        "peak_memory": accounting.peak_memory(device),
    }


def run(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Every arm, in a process of its own; the last line of its output is its result."""
    ranks = [str(Path(sys.executable).with_name("torchrun")), f"--nproc-per-node={args.ranks}"]
    words = [*(ranks if args.ranks > 1 else [sys.executable]), __file__, *sys.argv[1:]]
    here = {MODELS: str(args.work), "CROSSFL_FACILITY": "here"}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        pipes = [str(Path(folder, arm)) for arm in args.arms]
        for pipe in pipes:
            os.mkfifo(pipe)
        first = os.open(pipes[0], os.O_RDWR)
        stack.callback(os.close, first)
        os.write(first, b".")
        logs = {
            (a, kind): Path(folder, f"{a}.{kind}") for a in args.arms for kind in ("out", "err")
        }
        processes = {}
        for number, arm in enumerate(args.arms):
            ring = os.pathsep.join((pipes[number], pipes[(number + 1) % len(pipes)]))
            turns = {TURNS: ring} if args.ranks == 1 else {}
            with logs[arm, "out"].open("wb") as out, logs[arm, "err"].open("wb") as errors:
                processes[arm] = subprocess.Popen(
                    [*words, "--arm", arm],
                    stdout=out,
                    stderr=errors,
                    env={**os.environ, **here, **hidden, **turns},
                )
            stack.callback(processes[arm].kill)
            if args.ranks > 1:
                processes[arm].wait()
        # One that fails gives its turn to nobody: the others would wait for ever.
        while None in (ends := [process.poll() for process in processes.values()]):
            if any(ends):
                break
            time.sleep(0.1)
        for arm, process in processes.items():
            if process.poll():
                raise SystemExit(f"{arm} failed:\n{logs[arm, 'err'].read_text()}")
        for arm in args.arms:
            found[arm] = json.loads(logs[arm, "out"].read_text().strip().splitlines()[-1])
    return found


def main() -> None:
    """Print the machine, every repeat, and the table of medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and data")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--case", choices=("small", "1b", "7b", "7b-lora"), default="small")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch", type=int, default=8, help="samples per rank and step")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--warmup", type=int, default=4, help="steps that are not counted")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of each rank")
    parser.add_argument("--recompute", action="store_true", help="activations, in all arms")
    parser.add_argument("--compile", action="store_true", help="the model, in all arms")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work = args.work.resolve()
    os.environ.setdefault(MODELS, str(args.work))
    model, rows = prepare(args)
    if args.arm:
        found = ARMS[args.arm](args, model, rows)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found))
        return
    if lora.is_adapter(model) and args.arms != ["ours"]:
        parser.error("the other arms train whole models: --arms ours")

    import accelerate
    import transformers

    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor()
    print(f"{device or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, ", end="")
    print(f"transformers {transformers.__version__}, accelerate {accelerate.__version__}")
    print({k: str(v) for k, v in vars(args).items() if k not in ("arm", "work")})
    compared = run(args)  # also reads the files once
    first = compared[args.arms[0]]["losses"]
    tolerance = 2e-3 if args.precision == "fp32" else 3e-2
    for arm in args.arms:
        losses = compared[arm]["losses"]
        # xFFL does not clip the gradient: the first step of AdamW, which has no scale, is the same.
        same = slice(2 if arm == "xffl" else None)
        worst = max(abs(a - b) / b for a, b in zip(losses[same], first[same], strict=True))
        print(f"{arm}: losses {losses[0]:.4f} … {losses[-1]:.4f}, off by {worst:.1e} at most")
        if worst > tolerance:
            raise SystemExit(f"the losses of {arm} are not those of {args.arms[0]}")
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in args.arms}
    for repeat in range(args.repeats):
        for arm, outcome in run(args).items():
            found[arm].append(outcome)
            rate = outcome["tokens_per_second"]
            print(f"repeat {repeat + 1}  {arm:<8}{rate:10.0f} tokens/s", flush=True)
    print("\n| Loop | tokens/s, median | least | most | ours / it, median ", end="")
    print("| peak memory, MiB | utilisation |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    reference = [r["tokens_per_second"] for r in found[args.arms[0]]]
    for arm, each in found.items():
        rates = [r["tokens_per_second"] for r in each]
        memory = statistics.median(r["peak_memory"] for r in each) / 2**20
        used = [r["utilisation"] for r in each if r.get("utilisation") is not None]
        share = f"{statistics.median(used):.1%}" if used else ""
        print(
            f"| {arm} | {statistics.median(rates):.0f} | {min(rates):.0f} | {max(rates):.0f} ",
            end="",
        )
        ratio = statistics.median(a / b for a, b in zip(reference, rates, strict=True))
        print(f"| {ratio:.3f} | {memory:.0f} | {share} |")


if __name__ == "__main__":
    main()
