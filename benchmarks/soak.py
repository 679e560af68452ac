"""Hours in minutes: random requests, cancellations, deadlines, lost clients and bad input at a server, its memory watched.

    python -m benchmarks.soak --engine engines/tiny --minutes 20 --output benchmarks/results/soak-cpu

It deploys the engine, starts a server of its own (`make serving`) and exits with 1 where a good request fails or is
answered otherwise than it was alone, where a bad one is not refused with its own error, where the server's counters do
not add up or pages are not given back, or where memory grows.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import tritonclient.grpc.aio as grpc
from rich.progress import Progress

from benchmarks.serving import machine
from examples.grpc_stream import generate
from serving.local import LocalServer, deploy, local_server
from socket_trt.cli.console import err, out, table
from socket_trt.cli.sizes import human_bytes
from socket_trt.engine.manifest import EngineDirectory

MODEL = "soak"
PROCESSES = ("server", "stubs", "shared")
CLIENTS = 24
GOOD_REQUESTS = 60
SAMPLE_SECONDS = 1.0
# Memory grows while allocators and pools reach their size; afterwards the rest of the run is compared with itself.
SETTLING = 0.4
ALLOWED_GROWTH = 0.02
ALLOWED_BYTES = 2 << 20  # below which a fraction says nothing


@dataclasses.dataclass
class Tally:
    """What happened, by kind of request, and everything that should not have."""

    done: Counter[str] = dataclasses.field(default_factory=Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)

    def blame(self, what: str) -> None:
        self.wrong.append(what)
        err.print(f"[red]wrong:[/] {what[:300]}")


class Soak:
    def __init__(self, server: LocalServer, engine: EngineDirectory, num_pages: int, seed: int) -> None:
        self._server = server
        manifest = engine.manifest
        self._max_seq_len = manifest.max_seq_len
        # Tokens that any request may have: what the pool holds of a single one.
        self._limit = min(manifest.max_seq_len, (num_pages - 1) * manifest.socket.page_size)
        self._rng = random.Random(seed)
        self.tally = Tally()
        self.sent = 0
        self.memory: list[tuple[float, dict[str, int]]] = []
        self._good = [self._good_request(i) for i in range(GOOD_REQUESTS)]
        self._alone: list[list[int]] = []

    def _good_request(self, seed: int) -> dict[str, Any]:
        rng = self._rng
        return {
            "input_ids": [rng.randrange(256) for _ in range(rng.randint(1, min(300, self._limit // 2)))],
            "max_tokens": rng.randint(1, min(60, self._limit // 4)),
            "temperature": rng.choice([0.0, 0.8]),
            "seed": seed,
            "ignore_eos": True,
        }

    async def run(self, seconds: float, progress: Progress) -> None:
        """Every good request alone, then all kinds at random from many clients."""
        async with grpc.InferenceServerClient(self._server.grpc) as client:
            self._client = client
            for request in self._good:
                self._alone.append(await self._tokens(**request))
            task = progress.add_task("soaking", total=seconds)
            began = time.monotonic()
            until = began + seconds
            clients = [asyncio.create_task(self._be_a_client(until)) for _ in range(CLIENTS)]
            while (now := time.monotonic()) < until and self._server.running:
                self.memory.append((now - began, self._server.memory()))
                progress.update(task, completed=now - began, description=f"{self.sent} requests")
                await asyncio.sleep(SAMPLE_SECONDS)
            await asyncio.gather(*clients)

    async def _be_a_client(self, until: float) -> None:
        kinds: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (50, self._good_one),
            (15, self._cancelled),
            (10, self._timed_out),
            (15, self._bad),
            (5, self._bad_over_http),
            (5, self._gone_over_http),
        ]
        while time.monotonic() < until and self._server.running:
            [kind] = self._rng.choices([kind for _, kind in kinds], [weight for weight, _ in kinds])
            try:
                await asyncio.wait_for(kind(), 120)
                self.tally.done[kind.__name__.strip("_").replace("_", " ")] += 1
            except Exception as error:
                if not self._server.running:
                    break  # which is said once, at the end
                self.tally.blame(f"{kind.__name__}: {error!r}")
            await asyncio.sleep(self._rng.expovariate(20))

    async def _tokens(self, timeout: float | None = None, most: int | None = None, **values: Any) -> list[int]:
        """The tokens of an answer; `most`: leave after as many parts."""
        self.sent += 1
        flags = {"stream": True, "return_token_ids": True}
        tokens: list[int] = []
        parts = generate(self._client, MODEL, timeout, **values, **flags)
        try:
            count = 0
            async for part in parts:
                tokens += part["output_ids"].tolist() if "output_ids" in part else []
                count += 1
                if count == most:
                    break
        finally:
            await parts.aclose()
        return tokens

    async def _good_one(self) -> None:
        index = self._rng.randrange(GOOD_REQUESTS)
        tokens = await self._tokens(**self._good[index])
        if tokens != self._alone[index]:
            self.tally.blame(f"request {index} was answered {tokens}, alone {self._alone[index]}")

    async def _cancelled(self) -> None:
        index = self._rng.randrange(GOOD_REQUESTS)
        request = self._good[index] | {"max_tokens": self._limit // 4}
        tokens = await self._tokens(**request, most=self._rng.randint(1, 5))
        shared = min(len(tokens), len(self._alone[index]))
        if tokens[:shared] != self._alone[index][:shared]:
            self.tally.blame(f"request {index}, cancelled, was answered {tokens}, alone {self._alone[index]}")

    async def _timed_out(self) -> None:
        request = self._rng.choice(self._good) | {"max_tokens": self._limit // 2}
        await self._expect("time was over", timeout=self._rng.uniform(0.001, 0.1), **request)

    async def _bad(self) -> None:
        values, message = self._rng.choice(
            [
                ({"text_input": ""}, "text_input is empty"),
                ({"text_input": b"\xc3("}, "no UTF-8 text"),
                ({"text_input": "x" * self._max_seq_len}, "this engine's limit is"),
                ({"input_ids": [1, 2**31 - 1]}, "token ids outside"),
                ({"input_ids": [1], "max_tokens": -5}, "max_tokens is -5"),
                ({"input_ids": [1], "top_p": 1.5}, "top_p is 1.5"),
                ({"input_ids": [1], "stop_words": [str(i) for i in range(10_000)]}, "stop_words has 10000 entries"),
                ({"messages": "nothing"}, "messages is no JSON"),
                ({"text_input": "a", "input_ids": [1]}, "give one of"),
                ({}, "give one of"),
            ]
        )
        await self._expect(message, **values)

    async def _expect(self, message: str, **values: Any) -> None:
        try:
            await self._tokens(**values)
        except grpc.InferenceServerException as error:
            if message not in (error.message() or ""):
                self.tally.blame(f"expected '{message}', got '{error.message()}'")
        else:
            self.tally.blame(f"expected '{message}', got an answer to {str(values)[:200]}")

    async def _bad_over_http(self) -> None:
        """Refused by Triton itself: the model never sees it."""
        reader, writer = await self._post(b'{"text_input": [')
        status = await reader.readline()
        writer.close()
        if b" 400 " not in status and b" 500 " not in status:
            self.tally.blame(f"bad JSON was answered {status!r}")

    async def _gone_over_http(self) -> None:
        self.sent += 1
        body = {"text_input": "a", "max_tokens": self._limit // 2, "ignore_eos": True, "stream": True}
        reader, writer = await self._post(json.dumps(body).encode())
        await reader.readline()
        writer.transport.abort()

    async def _post(self, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port = self._server.http.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = (
            f"POST /v2/models/{MODEL}/generate_stream HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
        return reader, writer

    def check_counters(self) -> dict[str, float]:
        """Wait until the server is idle; every request is counted once and no page is held."""
        until = time.monotonic() + 60
        while True:
            received = self._server.metric("socket_trt_requests_received_total")
            ended = self._server.metric("socket_trt_requests_total")
            pages = self._server.metric("socket_trt_pages_in_use")
            if received == ended == self.sent and pages == 0:
                break
            if time.monotonic() > until:
                self.tally.blame(f"{self.sent} sent, {received:g} received, {ended:g} ended, {pages:g} pages in use")
                break
            time.sleep(0.2)
        if failed := self._server.metric("socket_trt_requests_total", outcome="failed"):
            self.tally.blame(f"{failed:g} requests failed")
        names = ("generated_tokens_total", "steps_total", "preemptions_total", "failed_steps_total")
        return {name: self._server.metric(f"socket_trt_{name}") for name in names}


def growth(memory: list[tuple[float, dict[str, int]]], process: str) -> tuple[float, float, float]:
    """Median bytes of the first and of the last third after settling, and the growth as a fraction."""
    values = [sample[process] for _, sample in memory]
    rest = values[int(len(values) * SETTLING) :]
    third = max(len(rest) // 3, 1)
    before, after = (sorted(part)[len(part) // 2] for part in (rest[:third], rest[-third:]))
    return before, after, after / before - 1 if before else 0.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True, help="engine directory")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--num-pages", type=int, default=80, help="of the cache: few enough that requests are preempted"
    )
    parser.add_argument("--allowed-growth", type=float, default=ALLOWED_GROWTH, help="of memory, as a fraction")
    parser.add_argument("--output", type=Path, help="where to write OUTPUT.json")
    parsed = parser.parse_args(arguments)
    engine = EngineDirectory.open(parsed.engine)
    with tempfile.TemporaryDirectory() as directory:
        repository = Path(directory) / "models"
        deploy(parsed.engine, repository, "--name", MODEL, "--num-pages", str(parsed.num_pages))
        with (
            local_server(repository, Path(directory) / "log", "--exit-timeout-secs=10") as server,
            Progress(console=err) as progress,
        ):
            soak = Soak(server, engine, parsed.num_pages, parsed.seed)
            asyncio.run(soak.run(parsed.minutes * 60, progress))
            ended_early = not server.running
            counted = {} if ended_early else soak.check_counters()
            log = server.log.read_text(errors="replace").splitlines()
        exit_status = server.process.returncode
    # 1: its exit timeout was over, which a stream that was cancelled as it ended can cause in server 2.51.
    if ended_early or exit_status not in (0, 1):
        soak.tally.blame(f"the server ended with {exit_status}")
    memory = {process: growth(soak.memory, process) for process in PROCESSES}
    for process, (before, after, _) in memory.items():
        if after - before > max(parsed.allowed_growth * before, ALLOWED_BYTES):
            soak.tally.blame(f"{process}: memory grew from {human_bytes(before)} to {human_bytes(after)}")
    # Without a GPU Triton complains of its driver.
    errors = [line for line in log if re.match(r"E\d{4} ", line) and "CudaDriverHelper" not in line]
    for line in errors[:5]:
        soak.tally.blame(f"in the server's log: {line}")
    rows = [(f"{kind} requests", str(number)) for kind, number in sorted(soak.tally.done.items())]
    rows += [(name.replace("_", " "), f"{value:g}") for name, value in counted.items()]
    rows += [
        (f"memory, {process}", f"{human_bytes(before)}, later {human_bytes(after)} ({grown:+.2%})")
        for process, (before, after, grown) in memory.items()
    ]
    rows += [("wrong", str(len(soak.tally.wrong)))]
    out.print(table(f"{parsed.minutes:g} minutes", ("", ""), rows))
    if parsed.output:
        result = {
            "minutes": parsed.minutes,
            "machine": machine(),
            "requests": dict(soak.tally.done),
            "counters": counted,
            "memory": [[round(at, 1), *(values[process] for process in PROCESSES)] for at, values in soak.memory],
            "growth": {process: grown for process, (_, _, grown) in memory.items()},
            "wrong": soak.tally.wrong,
        }
        parsed.output.parent.mkdir(parents=True, exist_ok=True)
        parsed.output.with_suffix(".json").write_text(json.dumps(result) + "\n")
    return 1 if soak.tally.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
