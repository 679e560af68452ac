r"""Throughput and latency of engines in tritonserver under Poisson arrivals of ragged requests.

    python -m benchmarks.serving --engine socket=engines/tiny --engine dense=engines/tiny-dense \
        --rate 2,8,inf --requests 100 --prompt-tokens 64-512 --output-tokens 16-64 --output benchmarks/results/serving-cpu

It deploys each engine, starts a server of its own (`make serving`; SOCKET_TRT_SERVING names another environment), sends
the same requests at the same times to each, and writes OUTPUT.json and OUTPUT.md.  Prompts are random token ids, and
every request generates as many tokens as it asks for.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc.aio as grpc
from rich.progress import Progress

from benchmarks.files import write_results
from examples.grpc_stream import generate
from serving.local import ROOT, LocalServer, deploy, local_server, tail
from socket_trt import environment
from socket_trt.cli.console import err, out, table
from socket_trt.engine.manifest import EngineDirectory, Manifest
from socket_trt.serving.loop import LoopOptions

PERCENTILES = (50, 90, 99)
CPU_NOTE = (
    "On ONNX Runtime the operator is a function of standard operators, which scores every key at length: sparse attention "
    "costs more than dense there. The table shows the server at work, not the speed of the method."
)


@dataclasses.dataclass(frozen=True)
class Request:
    """`at`: seconds from the beginning."""

    at: float
    prompt: list[int]
    output_tokens: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """Seconds from the request's sending to its first and its last token; `tokens` generated."""

    first: float
    last: float
    tokens: int

    @property
    def per_token(self) -> float | None:
        """Mean seconds between tokens; None for a single one."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else None


def make_requests(arguments: argparse.Namespace, rate: float, vocabulary: int) -> list[Request]:
    rng = np.random.default_rng(arguments.seed)
    number = arguments.requests
    gaps = rng.exponential(1 / rate, number) if math.isfinite(rate) else np.zeros(number)
    prompts = rng.integers(*arguments.prompt_tokens, number, endpoint=True)
    outputs = rng.integers(*arguments.output_tokens, number, endpoint=True)
    return [
        Request(float(at), rng.integers(0, vocabulary, length).tolist(), int(tokens))
        for at, length, tokens in zip(np.cumsum(gaps), prompts, outputs, strict=True)
    ]


def warming(requests: list[Request], rows: int) -> list[Request]:
    """Requests after which decode steps of every number of rows have run: the longest prompt, and prompts of one token
    that are answered while it is prefilled and then end one after another.

    rows  of a step, at most
    """
    longest = max(requests, key=lambda request: len(request.prompt))
    rows = min(rows, len(requests))
    chunks = -(-len(longest.prompt) // LoopOptions().max_step_tokens)
    others = [Request(0.0, longest.prompt[:1], chunks + 2 * i) for i in range(1, rows)]
    return [Request(0.0, longest.prompt, min(longest.output_tokens, 2 * rows)), *others]


async def send(client: grpc.InferenceServerClient, model: str, request: Request) -> Answer:
    sent = time.perf_counter()
    first = last = sent
    tokens = 0
    parts = generate(
        client,
        model,
        input_ids=request.prompt,
        max_tokens=request.output_tokens,
        ignore_eos=True,
        stream=True,
        return_token_ids=True,
    )
    async for part in parts:
        if "output_ids" in part:
            last = time.perf_counter()
            first = last if tokens == 0 else first
            tokens += len(part["output_ids"])
    if tokens != request.output_tokens:
        raise RuntimeError(f"{tokens} tokens came, {request.output_tokens} were asked for")
    return Answer(first - sent, last - sent, tokens)


async def run(
    server: LocalServer, model: str, requests: list[Request], progress: Progress
) -> tuple[list[Answer], float]:
    """All answers, and the seconds from the first arrival to the last token."""
    task = progress.add_task(model, total=len(requests))
    began = time.perf_counter()

    async def one(request: Request) -> Answer:
        await asyncio.sleep(request.at - (time.perf_counter() - began))
        answer = await send(client, model, request)
        progress.advance(task)
        return answer

    async with grpc.InferenceServerClient(server.grpc) as client:
        answers = await asyncio.gather(*map(one, requests))
    return answers, time.perf_counter() - began


def percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(values, p)), 6) for p in PERCENTILES}


def counters(server: LocalServer) -> dict[str, float]:
    wanted = ("steps_total", "preemptions_total", "attended_tokens_total", "context_tokens_total", "step_seconds_sum")
    return {name: server.metric(f"socket_trt_{name}") for name in wanted}


def measure(
    arguments: argparse.Namespace, name: str, engine: EngineDirectory, progress: Progress
) -> Iterator[dict[str, Any]]:
    """One row a rate, as it is measured."""
    with tempfile.TemporaryDirectory() as directory:
        repository = Path(directory) / "models"
        deploy(engine.path, repository, "--name", name, *shlex.split(arguments.deploy_options))
        with local_server(repository, Path(directory) / "log", start_timeout=600) as server:
            try:
                yield from measure_rates(arguments, name, engine, server, progress)
            except Exception:
                err.print(f"the last lines of the server's log:\n{tail(server.log)}", markup=False, highlight=False)
                raise


def measure_rates(
    arguments: argparse.Namespace, name: str, engine: EngineDirectory, server: LocalServer, progress: Progress
) -> Iterator[dict[str, Any]]:
    vocabulary = engine.manifest.model.vocabulary_size
    warm = warming(make_requests(arguments, math.inf, vocabulary), engine.manifest.max_batch_size)
    asyncio.run(run(server, name, warm, progress))
    for rate in arguments.rate:
        requests = make_requests(arguments, rate, vocabulary)
        before = counters(server)
        answers, seconds = asyncio.run(run(server, name, requests, progress))
        time.sleep(1)  # for the server to publish its counters
        counted = {key: value - before[key] for key, value in counters(server).items()}
        yield summary(name, rate, answers, seconds, counted)


def summary(name: str, rate: float, answers: list[Answer], seconds: float, counted: dict[str, float]) -> dict[str, Any]:
    tokens = sum(answer.tokens for answer in answers)
    context = counted["context_tokens_total"]
    return {
        "engine": name,
        "rate": "inf" if math.isinf(rate) else rate,
        "requests": len(answers),
        "seconds": round(seconds, 3),
        "output_tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 2),
        "requests_per_second": round(len(answers) / seconds, 3),
        "time_to_first_token": percentiles([answer.first for answer in answers]),
        "time_per_output_token": percentiles([t for a in answers if (t := a.per_token) is not None]),
        "request_seconds": percentiles([answer.last for answer in answers]),
        "kept_fraction": round(counted["attended_tokens_total"] / context, 4) if context else None,
        "preemptions": int(counted["preemptions_total"]),
        "steps": int(counted["steps_total"]),
        "step_seconds_mean": round(counted["step_seconds_sum"] / max(counted["steps_total"], 1), 6),
    }


def machine() -> dict[str, Any]:
    packages = ("onnxruntime", "tensorrt", "numpy", "tritonclient")
    found = {part.name: part.found for part in environment.survey() if part.name in ("GPU", "driver") and part.found}
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load average before": round(os.getloadavg()[0], 1),
        **found,
        "python": platform.python_version(),
        "tritonserver": "2.51.0",
        **{package: version for package in packages if (version := environment.package_version(package))},
    }


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def shape(manifest: Manifest) -> str:
    model, socket = manifest.model, manifest.socket
    attention = (
        f"SOCKET: L = {socket.tables}, R = {socket.planes}, sink {socket.sink}, window {socket.window}, "
        f"budget max({socket.budget_tokens}, {socket.budget_permille / 10:g} %) by {socket.selection.name}"
        if manifest.attention.value == "socket"
        else "dense"
    )
    return (
        f"{model.name} ({model.layers} layers, {model.query_heads} query heads, {model.kv_heads} KV heads of "
        f"{model.head_size}{', random weights' if model.random_weights else ''}), {manifest.dtype} on {manifest.backend}, "
        f"{manifest.max_batch_size} rows a step, {attention}"
    )


COLUMNS = (
    "engine",
    "requests/s offered",
    "tokens/s",
    "first token p50 / p90 / p99",
    "per token p50 / p90 / p99",
    "kept",
)


def table_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    def milliseconds(values: dict[str, float]) -> str:
        return " / ".join(f"{values[f'p{p}'] * 1000:.4g}" for p in PERCENTILES) + " ms"

    return [
        [
            row["engine"],
            "all at once" if row["rate"] == "inf" else f"{row['rate']:g}",
            f"{row['tokens_per_second']:.4g}",
            milliseconds(row["time_to_first_token"]),
            milliseconds(row["time_per_output_token"]),
            "" if row["kept_fraction"] is None else f"{row['kept_fraction']:.1%}",
        ]
        for row in rows
    ]


def markdown(result: dict[str, Any]) -> str:
    low, high = result["prompt_tokens"]
    least, most = result["output_tokens"]
    lines = [
        "# Serving",
        "",
        f"{result['requests']} requests, prompts of {low} to {high} tokens, answers of {least} to {most}, Poisson arrivals; "
        "times as a streaming gRPC client on the same machine sees them.",
        "",
        f"Machine: {', '.join(f'{key} {value}' for key, value in result['machine'].items())}.",
        "",
        *[f"- {name}: {text}" for name, text in result["engines"].items()],
        "",
        *([CPU_NOTE, ""] if any("onnxruntime" in text for text in result["engines"].values()) else []),
        f"Made by `{result['command']}`.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *["| " + " | ".join(row) + " |" for row in table_rows(result["rows"])],
    ]
    return "\n".join(lines) + "\n"


def numbers(text: str) -> tuple[int, int]:
    """Least and most: of "64-512", or of "64" alone."""
    low, _, high = text.partition("-")
    return int(low), int(high or low)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="append", required=True, metavar="NAME=DIR", help="may be given again")
    parser.add_argument(
        "--rate", default="inf", help="requests a second, several separated by commas; inf: all at once"
    )
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--prompt-tokens", type=numbers, default=(64, 512), help="such as 64-512")
    parser.add_argument("--output-tokens", type=numbers, default=(16, 64), help="such as 16-64")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deploy-options", default="", help="of socket-trt deploy, in one string")
    parser.add_argument("--output", type=Path, help="where to write OUTPUT.json and OUTPUT.md")
    parsed = parser.parse_args(arguments)
    if parsed.output_tokens[0] < 2:
        parser.error("--output-tokens: 2 at least, since times per token are between tokens")
    parsed.rate = [float(rate) for rate in parsed.rate.split(",")]
    return parsed


def write(result: dict[str, Any], output: Path) -> None:
    write_results(output, result, markdown(result))


def commit() -> str | None:
    """Of this working tree; None outside of a repository."""
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT)
    return done.stdout.strip() or None


def main(arguments: list[str] | None = None) -> None:
    parsed = parse(arguments)
    engines = {name: EngineDirectory.open(Path(path)) for name, _, path in (e.partition("=") for e in parsed.engine)}
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.serving", *(arguments or sys.argv[1:])]),
        "commit": commit(),
        "machine": machine(),
        "engines": {name: shape(engine.manifest) for name, engine in engines.items()},
        "requests": parsed.requests,
        "prompt_tokens": parsed.prompt_tokens,
        "output_tokens": parsed.output_tokens,
        "rows": [],
    }
    with Progress(console=err) as progress:
        for name, engine in engines.items():
            for row in measure(parsed, name, engine, progress):
                result["rows"].append(row)
                if parsed.output:  # at once: what comes later may fail, or be stopped
                    write(result, parsed.output)
    out.print(table("Serving", COLUMNS, table_rows(result["rows"])))


if __name__ == "__main__":
    main()
