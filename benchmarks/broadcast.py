"""Measure what it takes to send a model to four facilities over lines of the same rate.

    python benchmarks/broadcast.py --work /tmp/broadcast

The connectors of a run, and an sshd of its own for each facility, on this machine. What unpacks an
upload at a site reads it at a fixed rate, so that the lines are slow and not the machine. As the
engine does, each facility is asked for one after another; then the jobs begin. No job is submitted.
What is printed, as JSON:

* `one`, `four`: seconds until the model is at one facility, and at all four.
* `again`: seconds of a second attempt at all four, and how many uploads it took.
"""

import argparse
import asyncio
import getpass
import json
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from uuid import uuid4

import torch
from safetensors.torch import save_file
from streamflow.core.deployment import ExecutionLocation

from crossfl.engine.connectors.slurm import SlurmConnector
from crossfl.engine.connectors.ssh import SSHConnector
from crossfl.protocol.manifest import ModelManifest
from crossfl.storage import manifest

MODEL_BYTES = 24 * 2**20
RATE = 2 * 2**20
"""Bytes a second."""
FACILITIES = ("alpha", "beta", "gamma", "delta")
FIRST_PORT = 24110
SSHD = """\
ListenAddress 127.0.0.1
Port {port}
HostKey {work}/hostkey
AuthorizedKeysFile {work}/key.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
SetEnv PATH={home}/bin:/usr/local/bin:/usr/bin:/bin HOME={home}
"""
THROTTLE = """\
#!/usr/bin/python3
# Unpacks what it is sent, read at a fixed rate.
import os, subprocess, sys, time

if not sys.argv[1].startswith("x"):
    os.execv("/bin/tar", ["tar", *sys.argv[1:]])
with open("{home}/uploads", "a") as log:
    log.write("1\\n")
tar = subprocess.Popen(["/bin/tar", *sys.argv[1:]], stdin=subprocess.PIPE)
begun, count = time.monotonic(), 0
while chunk := os.read(0, 2**16):
    count += len(chunk)
    time.sleep(max(0.0, begun + count / {rate} - time.monotonic()))
    tar.stdin.write(chunk)
tar.stdin.close()
sys.exit(tar.wait())
"""


class Bench:
    """Login nodes with slow lines, and connectors to four facilities there.

    Args:
        work: an absolute path, for everything.
    """

    def __init__(self, work: Path) -> None:
        self.work, self.model = work, work / "model"
        self.connectors: dict[str, SlurmConnector] = {}
        self.logins: list[subprocess.Popen[bytes]] = []
        known = []
        for name in ("key", "hostkey"):
            if not (work / name).exists():
                words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(work / name)]
                subprocess.run(words, check=True)
        host_key = " ".join((work / "hostkey.pub").read_text("utf-8").split()[:2])
        for port, name in enumerate(FACILITIES, FIRST_PORT):
            home = self.root(name)
            (home / "bin").mkdir(parents=True)
            (home / "bin" / "tar").write_text(THROTTLE.format(rate=RATE, home=home), "utf-8")
            (home / "bin" / "tar").chmod(0o755)
            config = work / f"{name}.conf"
            config.write_text(SSHD.format(port=port, work=work, home=home), "utf-8")
            self.logins.append(subprocess.Popen(["/usr/sbin/sshd", "-D", "-f", str(config)]))
            known.append(f"[127.0.0.1]:{port} {host_key}\n")
            login = SSHConnector(
                deployment_name=f"{name}-login", config_dir="/", nodes=[f"127.0.0.1:{port}"],
                username=getpass.getuser(), sshKey=str(work / "key"),
                knownHosts=str(work / "known_hosts"),
            )  # fmt: skip
            self.connectors[name] = SlurmConnector(name, "/", login, None, maxConcurrentJobs=2)
        (work / "known_hosts").write_text("".join(known), "utf-8")

    def stop(self) -> None:
        """End the login nodes."""
        for login in self.logins:
            login.terminate()
            login.wait()

    def uploads(self) -> int:
        """Uploads that the sites have seen."""
        logs = [self.root(name) / "uploads" for name in FACILITIES]
        return sum(len(log.read_text("utf-8").splitlines()) for log in logs if log.exists())

    def root(self, facility: str) -> Path:
        """The work folder of a facility."""
        return self.work / facility

    def new_model(self) -> None:
        """Another model, of random bytes."""
        shutil.rmtree(self.model, ignore_errors=True)
        self.model.mkdir(parents=True)
        weights = torch.randint(0, 256, (MODEL_BYTES,), dtype=torch.uint8)
        save_file({"weight": weights}, self.model / "model.safetensors")
        manifest.write(self.model, ModelManifest(round=0))

    async def send(self, facilities: list[str]) -> float:
        """Ask for a model as the engine does, let jobs begin; seconds until all have it."""
        begun, jobs = time.monotonic(), []
        for name in facilities:
            connector = self.connectors[name]
            (found,) = (await connector.get_available_locations()).values()
            location: ExecutionLocation = found.location
            folder = self.root(name) / str(uuid4()) / str(uuid4())
            await connector.run(
                location, ["mkdir", "-m", "777", "-p", str(folder)], capture_output=True
            )
            await connector.copy_local_to_remote(
                str(self.model), str(folder / "model"), [location], read_only=True
            )
            jobs.append((connector, location, name, folder / "model"))
        await asyncio.gather(
            *(c.begin(where, f"/train/{name}", self.root(name)) for c, where, name, _ in jobs)
        )
        seconds = time.monotonic() - begun
        for *_, path in jobs:
            manifest.verify(Path(path), ModelManifest)
        return seconds

    async def close(self) -> None:
        """Close the connections."""
        for connector in self.connectors.values():
            await connector.connector.undeploy(external=False)


async def measure(bench: Bench, repeats: int) -> dict[str, float]:
    """Medians of the seconds, and the uploads of second attempts."""
    one, four, again, uploads = [], [], [], 0
    for _ in range(repeats):
        bench.new_model()
        one.append(await bench.send(["beta"]))
        bench.new_model()
        four.append(await bench.send(list(FACILITIES)))
        before = bench.uploads()
        again.append(await bench.send(list(FACILITIES)))
        uploads += bench.uploads() - before
    await bench.close()
    medians = [statistics.median(seconds) for seconds in (one, four, again)]
    names = ("one", "four", "again")
    rounded = {name: round(median, 2) for name, median in zip(names, medians, strict=True)}
    return rounded | {"ratio": round(medians[1] / medians[0], 2), "uploads_again": uploads}


def main() -> None:
    """Measure, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the model")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    bench = Bench(arguments.work.resolve())
    time.sleep(2)  # the login nodes begin to listen
    try:
        results = asyncio.run(measure(bench, arguments.repeats))
    finally:
        bench.stop()
    print(json.dumps({"bytes": MODEL_BYTES, "rate": RATE, "repeats": arguments.repeats} | results))


if __name__ == "__main__":
    main()
