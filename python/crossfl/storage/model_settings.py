"""The JSON files of a model folder: small, without surprises, and naming no other file.

`transformers` and `peft` open, import and download what some keys of these files name. A folder
that has such a key is refused: see `FOLLOWED`, `NAMING`, `TOKENIZER_TEXTS` and `ADAPTER_TEXTS`.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from crossfl.errors import CrossFLError
from crossfl.storage.json_limits import MOST_VALUES, count_values, unique

ADAPTER_CONFIG = "adapter_config.json"
LORA = "lora.json"
"""The record of an adapter; the folder that holds it holds an adapter, and no other does."""
CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"

LARGEST_JSON = 1 << 24
"""Bytes of a JSON file that is parsed; an index of a hundred thousand tensors has less."""
LARGEST_FILE = 1 << 27
"""Bytes of any file that is no weight file; the largest tokenizers have a quarter of it."""
MOST_DATA_VALUES = 8_000_000
"""Values in a JSON file that is data, as vocabularies are."""

FOLLOWED = frozenset(
    (
        "attn_implementation",
        "auto_map",
        "auto_mapping",
        "backbone",
        "compression_config",
        "configuration_files",
        "custom_generate",
        "custom_pipelines",
        "distributed_config",
        "experts_implementation",
        "extra_files",
        "fast_tokenizer_files",
        "fusion_config",
        "gguf_file",
        "init_inputs",
        "kernel_config",
        "model_args",
        "pretrained_cfg",
        "quantization_config",
        "transformers_weights",
        "use_kernels",
    )
)
"""Keys, without leading underscores, by which transformers opens files, imports or downloads."""
NAMING = re.compile(
    r"(^|_)(files?|filename|path|dir|directory|folder|repo|repo_id|url|uri|module)$"
)
"""Endings of keys that name a place."""
NAMES = ("_name_or_path", "name_or_path")
"""Where a model came from; transformers compares it with known names, and opens nothing by it."""
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?|", re.ASCII)
LABELS = ("id2label", "label2id")
DTYPES = ("float32", "float16", "bfloat16", "float64")

TOKENIZER_TEXTS = frozenset(
    (
        "added_tokens_decoder",
        "additional_special_tokens",
        "backend",
        "chat_control_tokens",
        "chat_template",
        "errors",
        "extra_special_tokens",
        "language",
        "model_input_names",
        "model_specific_special_tokens",
        "padding",
        "padding_side",
        "prepend_scheme",
        "processor_class",
        "response_schema",
        "response_template",
        "src_lang",
        "task",
        "tgt_lang",
        "tokenizer_class",
        "truncation",
        "truncation_side",
        "truncation_strategy",
    )
)
"""Keys of a tokenizer's configuration that may hold text; besides these, `<name>_token` may."""
TOKENIZER_CLASS = re.compile(
    r"(?!Auto|Rag)[A-Za-z0-9_]*(Tokenizer|TokenizerFast|TokenizersBackend|PythonBackend"
    r"|SentencePieceBackend|MistralCommonBackend)"
)
ADAPTER_TEXTS: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        "base_model_name_or_path": re.compile(r"[\w./-]*"),
        "bias": re.compile("none"),
        "megatron_core": re.compile(r"megatron\.core"),
        "modules_to_save": re.compile(r"[\w.-]+"),
        "peft_type": re.compile("LORA|PROMPT_TUNING"),
        "peft_version": re.compile(r"[\w.+@-]+"),
        "prompt_tuning_init": re.compile("RANDOM"),
        "rank_pattern": re.compile(r"[\w.-]+"),
        "target_modules": re.compile(r"[\w.-]+"),
        "task_type": re.compile("CAUSAL_LM"),
    }
)
"""What `peft` writes as text for the adapters that `crossfl.learning.lora` makes. It reads a type
and a bias by name, and never opens the base by its name, since it is given the base itself."""

ADAPTER_LISTS = ("modules_to_save", "rank_pattern", "target_modules")
"""Keys that may hold several names."""


def read_json(path: Path) -> Any:
    """A small JSON document without a key that is there twice.

    Raises:
        CrossFLError: it is missing, too large, or no such document.
    """
    if not path.is_file():
        raise CrossFLError(f"{path.parent} has no {path.name}: it is incomplete, send it again")
    check_size(path, LARGEST_JSON, MOST_VALUES)
    try:
        return json.loads(path.read_bytes().decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CrossFLError(f"{path} is not a valid JSON document: {error}") from None


def check_size(path: Path, largest: int = LARGEST_FILE, values: int = MOST_DATA_VALUES) -> None:
    """Check a file's bytes, and that a JSON file has separators for no more than so many values.

    Raises:
        CrossFLError: it has more.
    """
    if (size := path.stat().st_size) > largest:
        raise CrossFLError(f"{path} has {size} bytes: {largest} at most")
    count = 0
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            count += count_values(piece)
    if path.suffix == ".json" and count > values:
        raise CrossFLError(f"{path} has {count} values: {values} at most")


def _settings(path: Path) -> dict[str, Any]:
    document = read_json(path)
    if not isinstance(document, dict):
        raise CrossFLError(f"{path} is not a JSON object")
    return document


def _check_object(path: Path) -> None:
    _settings(path)


def _check_config(path: Path) -> None:
    """Check `config.json` or `generation_config.json`, with all that is nested in it."""
    document = _settings(path)
    for key in LABELS:
        labels = document.pop(key, None) or {}
        if not isinstance(labels, dict) or _nested(labels.values()):
            raise CrossFLError(f"{path}: {key} is no table of labels")
    for key, value in _walk(document):
        if key in NAMES:
            is_name = isinstance(value, str) and HUB_NAME.fullmatch(value)
            if not is_name or (value and Path(value).exists()):
                raise CrossFLError(f"{path}: {key} is {value!a:.80}: remove it")
        else:
            _check_reference(path, key, value)
            if isinstance(value, str) and any(mark in value for mark in ("/", "\\")):
                raise CrossFLError(
                    f"{path}: {key} is {value!a:.80}, which may be a path: remove it"
                )
        if key in ("dtype", "torch_dtype") and isinstance(value, str) and value not in DTYPES:
            raise CrossFLError(f"{path}: {key} is {value!a:.80}: use one of {', '.join(DTYPES)}")
        if key == "model_type" and isinstance(value, str) and value.startswith("timm"):
            raise CrossFLError(f"{path}: models of timm are not supported: use one of transformers")


def _check_tokenizer(path: Path) -> None:
    """Check a tokenizer's configuration: text only where it is text, and opens nothing."""
    document = _settings(path)
    for key, value in document.items():
        if key == "tokenizer_class" and not (
            value is None or (isinstance(value, str) and TOKENIZER_CLASS.fullmatch(value))
        ):
            raise CrossFLError(f"{path}: tokenizer_class is {value!a:.80}, which is no tokenizer")
        _check_reference(path, key, value)
        known = key in TOKENIZER_TEXTS or key.endswith("_token")
        if not known and _has_text(value):
            raise CrossFLError(f"{path}: {key!a:.80} is not a key that may hold text: remove it")


def _check_added_tokens(path: Path) -> None:
    if not all(type(number) is int for number in _settings(path).values()):
        raise CrossFLError(f"{path} has a token without a number")


def _check_adapter(path: Path) -> None:
    """Check that `adapter_config.json` is of an adapter as `crossfl.learning.lora` makes it."""
    document = _settings(path)
    texts = {key for key, value in document.items() if isinstance(value, str)}
    for key in ("peft_type", "task_type"):
        if key not in texts:
            raise CrossFLError(f"{path} has no {key}: it is not an adapter made by crossfl")
    for key, value in document.items():
        if value and isinstance(value, dict | list) and key not in ADAPTER_LISTS:
            raise CrossFLError(f"{path}: {key!a:.80} is set, which crossfl does not use: remove it")
        pattern = ADAPTER_TEXTS.get(key)
        for text in value if isinstance(value, list | dict) else [value]:
            if isinstance(text, str) and not (pattern and pattern.fullmatch(text)):
                raise CrossFLError(f"{path}: {key!a:.80} is {text!a:.80}: remove it")


def _check_reference(path: Path, key: str, value: Any) -> None:
    """Refuse a key that a library follows, unless its value is a number or empty."""
    plain = key.lstrip("_").removesuffix("_internal")
    follows = plain in FOLLOWED and value not in (None, False, "", {}, [])
    if follows or (NAMING.search(plain) and _has_text(value)):
        raise CrossFLError(
            f"{path}: {key!a:.80} names a file, code or a format of its own, which crossfl never "
            "follows: remove it"
        )


def _walk(document: Any) -> Iterator[tuple[str, Any]]:
    """Every value in a document with the nearest key above it, containers before their content."""
    pending: list[tuple[str, Any]] = [("", document)]
    while pending:
        key, value = pending.pop()
        if key:
            yield key, value
        if isinstance(value, dict):
            pending += value.items()
        elif isinstance(value, list):
            pending += [(key, item) for item in value]


def _nested(values: Iterable[Any]) -> bool:
    return any(isinstance(value, dict | list) for value in values)


def _has_text(value: Any) -> bool:
    return any(isinstance(item, str) and item for _, item in _walk({"value": value}))


CHECKS: Mapping[str, Callable[[Path], None]] = MappingProxyType(
    {
        CONFIG: _check_config,
        GENERATION: _check_config,
        TOKENIZER_CONFIG: _check_tokenizer,
        SPECIAL_TOKENS: _check_tokenizer,
        ADDED_TOKENS: _check_added_tokens,
        ADAPTER_CONFIG: _check_adapter,
        LORA: _check_object,
    }
)
"""What is looked at in the files of a model folder that a library parses."""
