"""Describe a run as a Workflow Run RO-Crate: what was run, on what, with what outcome.

Weights are named by their digests and stay where they are. Nothing that tells a host, a user, a
path or a dataset of a facility goes in: only fields that are listed here do, and none is free text
of a facility. Profile: https://w3id.org/ro/wfrun/workflow/0.5, RO-Crate 1.1.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from crossfl import __version__
from crossfl.errors import CrossFLError
from crossfl.protocol.history import RoundEntry
from crossfl.protocol.layout import EVALUATIONS, GLOBAL_MODEL, HISTORY_LINES, MANIFEST
from crossfl.protocol.manifest import ModelManifest
from crossfl.storage import manifest
from crossfl.storage.files import publish, write_json
from crossfl.storage.history import read_history
from crossfl.storage.job import Job

SHARE = Path(__file__).parents[1] / "share"
"""Where workflow and steps lie: in a checkout, links to those of the repository."""
METADATA = "ro-crate-metadata.json"
WORKFLOW = "workflows/federated.cwl"
PARTS = ("workflows/*.cwl", "steps/*.cwl", "steps/types/*.yml")
"""The workflow and all that it needs."""
SUMMARY, SETTINGS, SCORES = "history.json", "job.json", "evaluation.json"
PROFILES = (
    "https://w3id.org/ro/wfrun/process/0.5",
    "https://w3id.org/ro/wfrun/workflow/0.5",
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0",
)
CONTEXT = [
    "https://w3id.org/ro/crate/1.1/context",
    {"sha256": "https://w3id.org/ro/terms/workflow-run#sha256"},
]
CWL = "https://w3id.org/workflowhub/workflow-ro-crate#cwl"
LICENSE = "https://spdx.org/licenses/Apache-2.0"
FACILITY_FIELDS = ("share", "norm", "status", "staleness", "tokens", "samples", "steps", "bytes")
"""Of a facility's entry in the history: numbers and one word of ours."""
JOB_FIELDS = ("rounds", "local_steps", "seed", "training", "retention", "lora")
METRICS = ("loss", "perplexity", "bits_per_byte", "tokens", "samples", "exact_match", "accuracy")

Entity = dict[str, Any]


def crate(
    results: Path, job: Path, out: Path, *, name: str = "Federated training", licence: str = LICENSE
) -> None:
    """Write the crate of a finished run into a new folder, whole or not at all.

    Args:
        results: folder with the outputs of the run.
        job: job file of the run.
        out: folder to make.
        name: what the run is called.
        licence: URL of the license of the crate.

    Raises:
        CrossFLError: an output is missing or damaged, or the folder exists.
    """
    history = read_history(results / HISTORY_LINES)
    if not history:
        raise CrossFLError(f"{results} has no round: name the outputs of a run that is finished")
    model = manifest.read(results / GLOBAL_MODEL, ModelManifest)
    if history[-1].model != model.digest:
        raise CrossFLError(
            f"{results / GLOBAL_MODEL} is not the model at the end of {results / HISTORY_LINES}: "
            "name a folder with the outputs of one run"
        )
    with publish(out) as partial:
        for pattern in PARTS:
            for path in sorted(SHARE.glob(pattern)):
                copy = partial / path.relative_to(SHARE)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
        write_json(partial / SUMMARY, [_round(entry) for entry in history])
        write_json(partial / SETTINGS, _settings(Job.load(job)))
        write_json(partial / SCORES, _scores(results / EVALUATIONS))
        graph = _graph(partial, history, model.digest, name, licence)
        document = {"@context": CONTEXT, "@graph": graph}
        write_json(partial / METADATA, document)


def _round(entry: RoundEntry) -> Entity:
    return {
        "round": entry.round,
        "finished": entry.finished,
        "loss": entry.loss,
        "model": entry.model,
        "skipped": entry.skipped is not None,
        "facilities": {
            facility: {field: getattr(values, field) for field in FACILITY_FIELDS}
            for facility, values in sorted(entry.facilities.items())
        },
    }


def _settings(job: Job) -> Entity:
    """The configuration, without what names a file or a dataset."""
    records = {key: getattr(job, key) for key in JOB_FIELDS}
    kept: Entity = {k: v.asdict() if hasattr(v, "asdict") else v for k, v in records.items()}
    if job.lora:
        kept["lora"].pop("base_model")
    aggregation = job.aggregation.asdict()
    kept["aggregation"] = aggregation | {"signers": job.aggregation.signers is not None}
    kept["facilities"] = [facility.name for facility in job.facilities]
    return kept


def _scores(path: Path) -> Entity:
    """The losses by facility; no completion, no reason."""
    try:
        document = json.loads(path.read_bytes())
        return {
            name: {key: values["metrics"][key] for key in METRICS if key in values["metrics"]}
            for name, values in document["facilities"].items()
            if values.get("metrics")
        }
    except OSError as error:
        raise CrossFLError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CrossFLError(f"{path} is not what the report step writes: run it again") from None


def _graph(
    folder: Path, history: Sequence[RoundEntry], model: str, name: str, licence: str
) -> list[Entity]:
    files = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
    document = yaml.safe_load((folder / WORKFLOW).read_text(encoding="utf-8"))
    inputs, outputs = (_parameters(document[key], key) for key in ("inputs", "outputs"))
    end = history[-1].finished
    begin = datetime.fromisoformat(end) - timedelta(seconds=history[-1].seconds)
    facilities = sorted({facility for entry in history for facility in entry.facilities})
    results = {"history": SUMMARY, "evaluation": SCORES, "global_model": f"urn:sha256:{model}"}
    values = {
        **dict.fromkeys(("training", "aggregation", "facilities"), SETTINGS),
        **results,
    }
    made = [_ref(place) for place in results.values()]
    described = {
        SUMMARY: "What happened in each round",
        SETTINGS: "The configuration",
        SCORES: "The final model measured at each facility",
    }
    entities: list[Entity] = [
        {
            "@id": METADATA,
            "@type": "CreativeWork",
            "about": _ref("./"),
            "conformsTo": [
                _ref("https://w3id.org/ro/crate/1.1"),
                _ref(PROFILES[2]),
            ],
        },
        {
            "@id": "./",
            "@type": "Dataset",
            "name": name,
            "description": (
                f"A federation of {len(facilities)} facilities, {len(history)} rounds. Weights are "
                "named by digest and not included; nor are hosts, users, paths and datasets."
            ),
            "datePublished": end,
            "license": _ref(licence),
            "conformsTo": [_ref(profile) for profile in PROFILES],
            "hasPart": [_ref(file) for file in files],
            "mainEntity": _ref(WORKFLOW),
            "mentions": [_ref("#run")],
        },
        {
            "@id": WORKFLOW,
            "@type": ["File", "SoftwareSourceCode", "ComputationalWorkflow"],
            "name": document["label"],
            "description": document["doc"],
            "programmingLanguage": _ref(CWL),
            "input": [_ref(each["@id"]) for each in inputs],
            "output": [_ref(each["@id"]) for each in outputs],
            "license": _ref(LICENSE),
            "version": __version__,
            **_digest(folder / WORKFLOW),
        },
        {
            "@id": "#run",
            "@type": "CreateAction",
            "name": name,
            "instrument": _ref(WORKFLOW),
            "object": [_ref(SETTINGS)],
            "result": made,
            "startTime": begin.isoformat(),
            "endTime": end,
            "actionStatus": _ref("http://schema.org/CompletedActionStatus"),
            "agent": _ref("#crossfl"),
            "participant": [_ref(f"#facility-{facility}") for facility in facilities],
        },
        {
            "@id": results["global_model"],
            "@type": "CreativeWork",
            "name": "Global model",
            "description": f"The model after the last round, by the digest in its {MANIFEST}",
            "identifier": f"sha256:{model}",
            "exampleOfWork": _ref("#output-global_model"),
        },
        *({"@id": f"#facility-{f}", "@type": "Organization", "name": f} for f in facilities),
        {"@id": "#crossfl", "@type": "SoftwareApplication", "name": f"CrossFL {__version__}"}
        | {"version": __version__, "url": "https://pypi.org/project/crossfl"},
        {"@id": CWL, "@type": "ComputerLanguage", "name": "Common Workflow Language"}
        | {"alternateName": "CWL", "identifier": _ref("https://w3id.org/cwl/v1.2/")}
        | {"url": _ref("https://www.commonwl.org/")},
        *(
            {"@id": profile, "@type": "CreativeWork", "name": title, "version": version}
            for profile, title, version in zip(
                PROFILES,
                ("Process Run Crate", "Workflow Run Crate", "Workflow RO-Crate"),
                ("0.5", "0.5", "1.0"),
                strict=True,
            )
        ),
        *(
            {"@id": url, "@type": "CreativeWork", "name": url.rpartition("/")[2], "url": url}
            | {"description": f"The license {url}"}
            for url in dict.fromkeys((licence, LICENSE))
        ),
        *inputs,
        *outputs,
    ]
    for file in files:
        if file != WORKFLOW:
            title = described.get(file, Path(file).name)
            entity: Entity = {"@id": file, "@type": "File", "name": title}
            entity |= _digest(folder / file) | {"encodingFormat": _format(file)}
            used = [
                f"#{kind}-{parameter}"
                for kind, parameters in (("input", inputs), ("output", outputs))
                for parameter, place in values.items()
                if place == file and f"#{kind}-{parameter}" in {p["@id"] for p in parameters}
            ]
            if used:
                entity["exampleOfWork"] = [_ref(each) for each in used]
            entities.append(entity)
    return entities


def _parameters(declared: Mapping[str, Any], kind: str) -> list[Entity]:
    """The inputs or outputs of the workflow, as formal parameters."""
    made = []
    for name, values in declared.items():
        shape = values["type"]
        optional = isinstance(shape, list) and "null" in shape
        optional |= isinstance(shape, str) and shape.endswith("?")
        made.append(
            {
                "@id": f"#{kind[:-1]}-{name}",
                "@type": "FormalParameter",
                "additionalType": _additional(shape),
                "name": name,
                "description": values["doc"],
                "valueRequired": not optional,
                "conformsTo": _ref("https://bioschemas.org/profiles/FormalParameter/1.0-RELEASE"),
            }
        )
    return made


def _additional(shape: Any) -> str:
    """The type of a parameter in the words of schema.org."""
    text = str(shape)
    known = {"Directory": "Dataset", "File": "File", "int": "Integer", "string": "Text"}
    return next((word for cwl, word in known.items() if text.startswith(cwl)), "PropertyValue")


def _format(file: str) -> str:
    return "application/json" if file.endswith(".json") else "text/x-yaml"


def _digest(path: Path) -> Entity:
    content = path.read_bytes()
    return {"contentSize": str(len(content)), "sha256": hashlib.sha256(content).hexdigest()}


def _ref(target: str) -> dict[str, str]:
    return {"@id": target}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `crossfl provenance`."""
    parser.add_argument("results", type=Path, help="folder with the outputs of a finished run")
    parser.add_argument("--job", type=Path, required=True, help="job file of the run")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("crate"), help="folder to make; default: crate"
    )
    parser.add_argument("--name", default="Federated training", help="what the run is called")
    parser.add_argument("--license", default=LICENSE, help="URL of the license of the crate")


def main(args: argparse.Namespace) -> None:
    """Write the crate, and say where it is.

    Raises:
        CrossFLError: an output is missing or damaged, or the folder exists.
    """
    out = args.outdir / args.output
    crate(args.results, args.job, out, name=args.name, licence=args.license)
    print(f"wrote {out}, a Workflow Run RO-Crate; look through it before you publish it")
