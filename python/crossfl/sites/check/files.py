"""Check the files on this machine that a deployment names: keys, host keys, data, base models."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crossfl.engine.placement import LOCAL
from crossfl.errors import CrossFLError
from crossfl.protocol import variables
from crossfl.sites.check.findings import Base, Finding, Result, Site
from crossfl.storage.weight_files import weights_digest

NAMED = {
    "sshKey": "key",
    "sshKeyPassphraseFile": None,
    "passwordFile": None,
    "knownHosts": "known_hosts",
}
"""Files that a connection may name, each with the setting that it comes from, if there is one."""
MADE = ("state", "journal")
"""Folders that a deployment on this machine may name, which are made where they are not there."""


def problems(site: Site) -> Iterator[tuple[str, str]]:
    """What is wrong with the files and folders that a site names, and what to correct."""
    for config in (site.config, site.wraps.config if site.wraps else {}):
        for connection in _connections(config):
            for key, setting in NAMED.items():
                if (name := connection.get(key)) and (problem := _problem(site, connection, key)):
                    remedy = site.setting(setting) if setting else f"correct its `{key}`"
                    yield f"{key} {_path(site, name)} {problem}", remedy
    for key in MADE if site.kind == LOCAL else ():
        if name := site.config.get(key):
            path = _path(site, name)
            nearest = next(p for p in (path, *path.parents) if p.exists())
            if not nearest.is_dir() or not os.access(nearest, os.W_OK):
                problem = f"{key} {path} cannot be a folder: {nearest} is none, or not writable"
                yield problem, f"correct its `{key}`"


def examine(site: Site) -> Iterator[Result]:
    """Check the datasets and the base models of a facility on this machine."""
    if site.kind == LOCAL:
        for name in dict.fromkeys(site.datasets):
            yield Result(site.name, f"dataset {name}", *_dataset(site, name))
        for base in dict.fromkeys(site.bases):
            yield Result(site.name, f"base model {base.name}", *_base(site, base))


def _connections(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The connection that a configuration describes, and those inside it."""
    yield config
    nodes = config.get("nodes") or []
    for inner in (*nodes, config.get("tunnel"), config.get("dataTransferConnection")):
        if isinstance(inner, dict):
            yield from _connections(inner)


def _path(site: Site, name: str) -> Path:
    return site.folder.resolve() / Path(name).expanduser()


def _problem(site: Site, connection: Mapping[str, Any], key: str) -> str | None:
    """Why a file cannot be used; a private key is opened as the connector opens it."""
    path = _path(site, connection[key])
    try:
        path.open("rb").close()
        if key == "sshKey":
            import asyncssh
            from streamflow.deployment.connector.ssh import get_param_from_file

            phrase = get_param_from_file(connection.get("sshKeyPassphraseFile"), str(site.folder))
            asyncssh.load_keypairs([str(path)], phrase)
    except OSError as error:
        return f"cannot be read: {error.strerror}" if error.filename == str(path) else None
    except ValueError as error:
        return f"is no private key that can be opened: {error}"
    return None


def _dataset(site: Site, name: str) -> Finding:
    root, remedy = site.config.get("data"), f"{site.setting('folder')}, or put it there"
    if not root:
        return Finding("fail", "its deployment names no `data`", remedy)
    path = _path(site, root) / name
    if not os.access(path, os.R_OK):
        return Finding("fail", f"{path} is not there, or not readable", remedy)
    return Finding("pass", str(path))


def _base(site: Site, base: Base) -> Finding:
    """The base model of an adapter has to be the one that the job means, to the last bit."""
    named = site.config.get("models") or os.environ.get(variables.MODELS)
    remedy = f"{site.setting('models')}, or put it there"
    if not named:
        return Finding("fail", f"its deployment names no `models`, nor {variables.MODELS}", remedy)
    path = _path(site, named) / base.name
    try:
        own = weights_digest(path)
        wanted = base.digest or (base.model and weights_digest(base.model))
    except (OSError, CrossFLError) as error:
        return Finding("fail", str(error), remedy)
    if wanted and own != wanted:
        return Finding("fail", f"{path} has the digest {own}, and the job's base {wanted}", remedy)
    return Finding("pass", f"{path}, its weights are those of the job")
