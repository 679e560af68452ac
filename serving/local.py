"""A tritonserver on this machine, for tests and benchmarks: start, ask for its metrics and its memory, stop."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = ROOT / "serving" / "tritonserver"

_SAMPLE = re.compile(r"(\w+)\{(.*)\} (\S+)")


class ServerError(Exception):
    """The server did not start; the text ends with the last lines of its log."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One line of the metrics endpoint."""

    name: str
    labels: Mapping[str, str]
    value: float


class LocalServer:
    """A running server.  `log`: the file that it writes to."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path, ports: tuple[int, int, int]) -> None:
        self.process = process
        self.log = log
        self.http = f"127.0.0.1:{ports[0]}"
        self.grpc = f"127.0.0.1:{ports[1]}"
        self._metrics = f"http://127.0.0.1:{ports[2]}/metrics"

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def status(self, path: str) -> int:
        """HTTP status of a GET; 0 where nobody answers."""
        try:
            with urllib.request.urlopen(f"http://{self.http}{path}", timeout=10) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def samples(self) -> list[Sample]:
        with urllib.request.urlopen(self._metrics, timeout=10) as response:
            text = response.read().decode()
        return [
            Sample(name, dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value))
            for name, labels, value in _SAMPLE.findall(text)
        ]

    def measures(self) -> bool:
        """Whether the metrics endpoint answers."""
        try:
            self.samples()
        except OSError:
            return False
        return True

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the metric's samples that have these labels."""
        matching = [s for s in self.samples() if s.name == name and labels.items() <= s.labels.items()]
        if not matching:
            raise KeyError(f"{name} {labels}")
        return sum(sample.value for sample in matching)

    def memory(self) -> dict[str, int]:
        """Resident bytes: the server's own, its stub processes' own, and what the stubs share with the server."""
        stubs = [_resident(child) for child in self.children()]
        return {
            "server": _resident(self.process.pid)["RssAnon"],
            "stubs": sum(stub["RssAnon"] for stub in stubs),
            "shared": sum(stub["RssShmem"] for stub in stubs),
        }

    def children(self) -> list[int]:
        """Process ids of the stubs."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(child) for child in path.read_text().split()]

    def stop(self, timeout: float = 60.0) -> int:
        """Ask the server to end and return its exit status.  Kills it, and raises, where it does not."""
        if self.running:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


@contextlib.contextmanager
def local_server(
    repository: Path,
    log: Path,
    *options: str,
    start_timeout: float = 120.0,
    environment: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
) -> Iterator[LocalServer]:
    """A server of `repository`, ready, stopped at the end; `environment`: variables that it gets besides this process's.

    Raises ServerError where it ends before it is ready, or takes longer than `start_timeout` seconds.
    """
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        http, grpc, metrics = (probe.getsockname()[1] for probe in sockets)
    ports = [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"]
    command = [str(LAUNCHER), f"--model-repository={repository.resolve()}", *ports, *options]
    with log.open("wb") as output:
        variables = os.environ | (environment or {})
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=variables, cwd=cwd)
    server = LocalServer(process, log, (http, grpc, metrics))
    try:
        until = time.monotonic() + start_timeout
        while server.status("/v2/health/live") != 200 or not server.measures():  # which it does last of all
            if process.poll() is not None:
                raise ServerError(f"the server ended with {process.returncode}:\n{tail(log)}")
            if time.monotonic() > until:
                raise ServerError(f"the server was not ready within {start_timeout:g} s:\n{tail(log)}")
            time.sleep(0.1)
        yield server
    finally:
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.stop()


def tail(log: Path, lines: int = 40) -> str:
    """The log's last lines, Triton's tables left out."""
    text = log.read_text(errors="replace").splitlines()
    return "\n".join([line for line in text if line and line[0] not in "|+"][-lines:])


def _resident(process: int) -> dict[str, int]:
    """Bytes by kind; 0 for a process that is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        status = ""
    found = dict(re.findall(r"(Rss\w+):\s+(\d+) kB", status))
    return {kind: int(found.get(kind, 0)) * 1024 for kind in ("RssAnon", "RssFile", "RssShmem")}


def deploy(engine: Path, repository: Path, *options: str) -> None:
    """Run `socket-trt deploy`, silently where it succeeds."""
    command = [sys.executable, "-m", "socket_trt.cli.main", "deploy", str(engine)]
    subprocess.run(
        [*command, "--model-repository", str(repository), *options], check=True, cwd=ROOT, stdout=subprocess.DEVNULL
    )
