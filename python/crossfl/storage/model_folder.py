"""A model folder: which files it may hold, which of them are the weights, what is loaded.

A federation's model folder comes from another party. Libraries that load it look for files by
rules of their own and follow file names, class names and code named in its JSON files. Here one
list of files decides instead, the manifest's; a folder that names anything else is refused, and
libraries are shown nothing but the files of the list (`ModelFolder.view`).

A user's own folder (`ModelFolder.own`) may hold what Hugging Face repositories hold: links into a
cache, code, pickles, other formats. There the safetensors weights, `config.json` and the files of
the tokenizer are loaded, and all else is ignored.
"""

import contextlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossfl.errors import CrossFLError
from crossfl.protocol.layout import MANIFEST, SIGNATURE
from crossfl.protocol.manifest import ModelManifest
from crossfl.storage import manifest
from crossfl.storage.model_settings import (
    ADAPTER_CONFIG,
    ADDED_TOKENS,
    CHECKS,
    CONFIG,
    GENERATION,
    LORA,
    SPECIAL_TOKENS,
    TOKENIZER_CONFIG,
    check_size,
    read_json,
)
from crossfl.storage.weight_files import ADAPTER, INDEX, SINGLE, WEIGHTS, weight_files, weight_map

TOKENIZER = (
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS,
    ADDED_TOKENS,
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer.model",
    "tiktoken.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "bpe.codes",
    "spiece.model",
    "spm.model",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
    "emoji.json",
    "normalizer.json",
)
"""What tokenizers of language models write in transformers 5 (`vocab_files_names`)."""
PASSED_ON = (GENERATION, LORA, ADAPTER_CONFIG, "README.md")
"""What travels with a model and is not read by `transformers` here."""
ALLOWED = frozenset((*TOKENIZER, *PASSED_ON, CONFIG, INDEX, SINGLE, ADAPTER, MANIFEST, SIGNATURE))
SHARD = re.compile(r"model-[0-9]{5}-of-[0-9]{5}\.safetensors")

MOST_FILES = 10_000


@dataclass(frozen=True)
class ModelFolder:
    """A model folder whose files have been checked.

    Attributes:
        path: the folder.
        weights: its weight files, in order.
        others: names of the other files that may be loaded.
        is_adapter: whether the weights are those of an adapter.
        manifest: its manifest; None for a user's own folder.
    """

    path: Path
    weights: tuple[Path, ...]
    others: tuple[str, ...]
    is_adapter: bool
    manifest: ModelManifest | None = None

    @property
    def digest(self) -> str:
        """The digest that its manifest gives the model; empty for a user's own folder."""
        return self.manifest.digest if self.manifest else ""

    @classmethod
    def received(cls, directory: Path, only: Collection[str] | None = None) -> "ModelFolder":
        """A folder that came from another party, checked against its manifest.

        It holds regular files with known names and nothing else, one family of weights, and no
        configuration that names a file or code. The folder itself may be a link: engines stage
        folders so. With `only`, the contents of the named files alone are compared with their
        sha256, after all else was checked.

        Raises:
            CrossFLError: the folder is not such a one; the message names what is wrong with it.
        """
        names = _entries(directory)
        read_json(directory / MANIFEST)
        described = manifest.verify(directory, ModelManifest, only=())
        weights = weight_files(directory)
        _check_family(directory, names, {path.name for path in weights})
        for name in sorted(names & CHECKS.keys()):
            CHECKS[name](directory / name)
        for name in sorted(names - CHECKS.keys() - {path.name for path in weights}):
            check_size(directory / name)
        _check_headers(directory, weights)
        if only is None or only:
            manifest.check(directory, described, only)
        others = tuple(sorted(names & {CONFIG, *TOKENIZER}))
        return cls(directory, tuple(weights), others, LORA in names, described)

    @classmethod
    def own(cls, directory: Path) -> "ModelFolder":
        """A user's own folder, as from Hugging Face: links are followed, other files ignored.

        Raises:
            CrossFLError: it has no weights in safetensors format, or a damaged file of them.
        """
        weights = weight_files(directory)
        _check_headers(directory, weights)
        others = tuple(n for n in sorted((CONFIG, *TOKENIZER)) if (directory / n).is_file())
        return cls(directory, tuple(weights), others, (directory / LORA).is_file())

    @contextlib.contextmanager
    def view(self) -> Iterator[Path]:
        """A private temporary folder with links to exactly the files that a library may load.

        Of several weight files it holds an index made anew from their headers. Weights that a
        library maps stay valid after the folder is removed.
        """
        with temporary_view([*self.weights, *(self.path / name for name in self.others)]) as folder:
            if self.is_adapter:
                (folder / ADAPTER_CONFIG).symlink_to((self.path / ADAPTER_CONFIG).resolve())
            elif [path.name for path in self.weights] != [SINGLE]:
                files = _tensors(list(self.weights)).file_of
                index = {name: file.path.name for name, file in files.items()}
                text = json.dumps({"metadata": {}, "weight_map": index})
                (folder / INDEX).write_text(text, encoding="utf-8")
            yield folder


@contextlib.contextmanager
def tokenizer_view(directory: Path) -> Iterator[Path]:
    """A private temporary folder with links to the files of a user's own tokenizer."""
    paths = (directory / name for name in (CONFIG, *TOKENIZER))
    with temporary_view([path for path in paths if path.is_file()]) as folder:
        yield folder


@contextlib.contextmanager
def temporary_view(files: Collection[Path]) -> Iterator[Path]:
    """A private temporary folder with links to the given files."""
    with tempfile.TemporaryDirectory(prefix="crossfl-model-") as folder:
        for path in files:
            Path(folder, path.name).symlink_to(path.resolve())
        yield Path(folder)


def _entries(directory: Path) -> set[str]:
    """The names in a folder, none of which is a link, a folder, a device or unknown."""
    if not directory.is_dir():
        raise CrossFLError(f"{directory} is not a folder: give the folder of a model")
    names: set[str] = set()
    with os.scandir(directory) as entries:
        for entry in entries:
            place = f"{entry.name!a} in the model folder {directory}"
            if not stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode):
                raise CrossFLError(f"{place} is no regular file: a model folder holds no other")
            if entry.name not in ALLOWED and not SHARD.fullmatch(entry.name):
                raise CrossFLError(f"{place} is not a file that a model folder may hold: remove it")
            names.add(entry.name)
            if len(names) > MOST_FILES:
                raise CrossFLError(f"{directory} has more than {MOST_FILES} files: it is no model")
    return names


def _check_family(directory: Path, names: set[str], weights: set[str]) -> None:
    """Check that a folder has one family of weights, and the files that go with it."""
    expected = {LORA, ADAPTER_CONFIG} if LORA in names else {CONFIG}
    if missing := sorted(expected - names):
        raise CrossFLError(f"{directory / missing[0]} is missing: a model folder needs it")
    if INDEX in names and (LORA in names or weights == {SINGLE}):
        raise CrossFLError(f"{directory / INDEX} is one index too many: remove it")
    if LORA not in names and ADAPTER_CONFIG in names:
        raise CrossFLError(f"{directory / ADAPTER_CONFIG} is there without {LORA}: remove it")
    surplus = {name for name in names if name.endswith(WEIGHTS)} - weights
    if surplus:
        raise CrossFLError(
            f"{directory / min(surplus)} is not one of the model's weight files "
            f"({', '.join(sorted(weights)[:3])}): remove it"
        )


def _check_headers(directory: Path, weights: list[Path]) -> None:
    """Check every header, that no tensor is in two files, and that an index tells the same."""
    tensors = _tensors(weights)
    if not len(tensors):
        raise CrossFLError(f"{directory} has no tensor in its weight files: it is no model")
    if weights[0].name in (SINGLE, ADAPTER):
        return
    index = weight_map(directory / INDEX)
    if index != {name: file.path.name for name, file in tensors.file_of.items()}:
        raise CrossFLError(f"{directory / INDEX} does not list the tensors of the weight files")


def _tensors(weights: list[Path]) -> Any:
    from crossfl.storage.checkpoint import Tensors  # it imports torch: cheap refusals come before

    return Tensors(weights)
