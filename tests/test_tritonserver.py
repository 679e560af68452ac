"""The real tritonserver, its python backend and real clients on the engine of `tiny`."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc.aio as grpc

from examples.grpc_stream import generate
from serving.local import ROOT, LocalServer, deploy, local_server
from socket_trt.runtime.generator import TextGenerator
from socket_trt.runtime.sampling import SamplingParameters
from tests.engines import tiny_engine
from tests.serving import PATIENCE
from tests.tritonserver import (
    Counters,
    Wanted,
    assert_equal_alone,
    make_faulty,
    needs_tritonserver,
    open_reference,
    send,
    send_all,
)

pytestmark = needs_tritonserver


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("models")
    engine = tiny_engine()
    # So few pages that eight long requests do not fit at once: they preempt each other.
    deploy(engine, repository, "--name", "tiny", "--num-pages", "40", "--max-step-tokens", "256")
    deploy(engine, repository, "--name", "small", "--max-waiting", "1", "--max-seconds", "20")
    deploy(engine, repository, "--name", "pair", "--instances", "2")
    deploy(engine, repository, "--name", "faulty")
    make_faulty(repository / "faulty", 0)
    return repository


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    with local_server(repository, tmp_path_factory.mktemp("log") / "log") as server:
        assert server.status("/v2/health/ready") == 200
        yield server  # how it stops, after clients that cancelled, is another test's question


@pytest.fixture(scope="module")
def reference() -> TextGenerator:
    return open_reference(tiny_engine())


def ragged(number: int) -> list[Wanted]:
    """Requests of every kind and length; every tenth is cancelled by its client."""
    rng = random.Random(number)
    requests = []
    for i in range(number):
        parameters: dict[str, Any] = {"max_tokens": rng.randint(1, 40), "seed": i, "temperature": rng.choice([0, 0.7])}
        parameters |= rng.choice([{}, {"top_k": 20}, {"top_p": 0.9}, {"ignore_eos": True}, {"stop_words": ["a", "7"]}])
        prompt = "".join(chr(rng.randint(32, 0x250)) for _ in range(rng.randint(1, rng.choice([20, 170]))))
        cancelled = i % 10 == 3
        if cancelled:
            parameters |= {"max_tokens": 300, "ignore_eos": True, "stop_words": []}
        transport = rng.choice(["grpc", "http"] if cancelled else ["grpc", "grpc", "http", "http whole"])
        requests.append(Wanted(prompt, parameters, transport, rng.randint(1, 4) if cancelled else None))
    return requests


def test_two_hundred_clients_at_once_each_get_what_they_get_alone(
    server: LocalServer, reference: TextGenerator
) -> None:
    requests = ragged(200)
    counters = Counters(server, "tiny")
    answers = send_all(server, "tiny", requests)
    counted = counters.wait_for_idle(len(requests))
    for wanted, got in zip(requests, answers, strict=True):
        assert_equal_alone(reference, wanted, got)
    finished = sum(got.finish_reason is not None for got in answers)
    cancelled = [got for got in answers if got.finish_reason is None]
    assert len(cancelled) == 20
    assert counted["requests_totalfinished"] == finished
    assert counted["requests_totalcancelled"] == len(cancelled)
    assert counted["requests_totalrefused"] == counted["requests_totalfailed"] == counted["failed_steps_total"] == 0
    assert counted["preemptions_total"] > 0
    assert counted["prompt_tokens_total"] == sum(
        1 + len(wanted.prompt.encode()) for wanted in requests
    )  # the tokenizer of bytes puts one token before each
    assert counted["generated_tokens_total"] >= sum(len(got.token_ids) for got in answers)
    assert counted["request_seconds_count"] == finished
    assert finished <= counted["time_to_first_token_seconds_count"] <= len(requests)
    assert counted["step_seconds_count"] == counted["steps_total"]
    assert 0 < counted["attended_tokens_total"] < counted["context_tokens_total"]


def test_clients_that_disappear_give_their_pages_back(server: LocalServer) -> None:
    counters = Counters(server, "tiny")
    code = (
        "import asyncio, os, sys\n"
        "import tritonclient.grpc.aio as grpc\n"
        "from examples.grpc_stream import generate\n"
        "async def main():\n"
        "    async with grpc.InferenceServerClient(sys.argv[1]) as client:\n"
        "        async for part in generate(client, 'tiny', text_input='a', max_tokens=480, ignore_eos=True, stream=True):\n"
        "            os._exit(7)\n"
        "asyncio.run(main())\n"
    )
    died = subprocess.run([sys.executable, "-c", code, server.grpc], cwd=ROOT, check=False)
    assert died.returncode == 7
    body = json.dumps({"text_input": "b", "max_tokens": 480, "ignore_eos": True, "stream": True}).encode()
    host, port = server.http.split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as connection:
        head = f"POST /v2/models/tiny/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    counted = counters.wait_for_idle(2)
    assert counted["requests_totalcancelled"] == 2


BAD_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"text_input": ""}, "text_input is empty"),
    ({"text_input": None}, "give one of text_input, input_ids, messages"),
    ({"text_input": "x" * 600}, "the prompt has 601 tokens; this engine's limit is 512"),
    ({"text_input": "x" * 200_000}, "the prompt has 200000 characters"),
    ({"max_tokens": -1}, "max_tokens is -1: expected at least 1"),
    ({"top_p": 2.0}, "top_p is 2.0"),
    ({"temperature": -0.5}, "temperature is -0.5"),
    ({"stop_words": [f"w{i}" for i in range(10_000)]}, "stop_words has 10000 entries: expected 64 at most"),
    ({"input_ids": [5]}, "give one of text_input, input_ids, messages"),
    ({"text_input": None, "input_ids": [5, 700]}, "token ids outside 0 ... 259"),
    ({"text_input": None, "messages": "[]"}, "messages is not a list"),
    ({"text_input": None, "messages": '[{"role": "pirate", "content": "x"}]'}, "chat template refuses"),
]


def test_bad_requests_are_answered_and_disturb_nobody(server: LocalServer, reference: TextGenerator) -> None:
    counters = Counters(server, "tiny")
    good = Wanted("stays the same", {"max_tokens": 300, "temperature": 0.7, "seed": 1, "ignore_eos": True})
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(send_all, server, "tiny", [good])
        for changes, message in BAD_REQUESTS:
            values = {k: v for k, v in ({"text_input": "Hello"} | changes).items() if v is not None}
            assert message in http_error(server, values)
            assert message in grpc_error(server, values)
        assert "no UTF-8 text" in grpc_error(server, {"text_input": b"\xff\xfe"})
        assert "no UTF-8 text" in http_error(server, b'{"text_input": "\xff\xfe"}')
        [got] = running.result()
    assert_equal_alone(reference, good, got)
    number = 2 * (len(BAD_REQUESTS) + 1)
    assert counters.wait_for_idle(number + 1)["requests_totalrefused"] == number


def http_error(server: LocalServer, values: dict[str, Any] | bytes) -> str:
    connection = http.client.HTTPConnection(server.http, timeout=PATIENCE)
    body = values if isinstance(values, bytes) else json.dumps(values).encode()
    connection.request("POST", "/v2/models/tiny/generate", body)
    response = connection.getresponse()
    error: str = json.loads(response.read())["error"]
    connection.close()
    assert response.status == 400
    return error


def grpc_error(server: LocalServer, values: dict[str, Any]) -> str:
    async def run() -> str:
        async with grpc.InferenceServerClient(server.grpc) as client:
            with pytest.raises(grpc.InferenceServerException) as caught:
                async for _ in generate(client, "tiny", **values):
                    pass
            return str(caught.value.message())

    return asyncio.run(run())


def test_chat_and_token_ids(server: LocalServer, reference: TextGenerator) -> None:
    counters = Counters(server, "tiny")
    messages = json.dumps([{"role": "user", "content": "Hi"}])
    prompt = [256, *b"[user] Hi\n[assistant] "]
    [expected] = reference.generate([prompt], SamplingParameters(max_tokens=10))

    async def run(**values: Any) -> str:
        async with grpc.InferenceServerClient(server.grpc) as client:
            parts = [part async for part in generate(client, "tiny", max_tokens=10, **values)]
        assert len(parts) == 1
        return str(parts[0]["text_output"][0].decode())

    assert asyncio.run(run(messages=messages)) == expected.text
    assert asyncio.run(run(input_ids=prompt)) == expected.text
    counters.wait_for_idle(2)  # or the next test would count them


def test_a_deadline_ends_one_request(server: LocalServer) -> None:
    async def run() -> str:
        async with grpc.InferenceServerClient(server.grpc) as client:
            with pytest.raises(grpc.InferenceServerException) as caught:
                async for _ in generate(client, "tiny", 0.2, text_input="a", max_tokens=480, ignore_eos=True):
                    pass
            return str(caught.value.message())

    counters = Counters(server, "tiny")
    busy = [Wanted(f"{i}", {"max_tokens": 400, "ignore_eos": True}) for i in range(6)]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(send_all, server, "tiny", busy)
        assert "the request's time was over after" in asyncio.run(run())
        body = {"text_input": "a", "max_tokens": 480, "ignore_eos": True, "timeout": 150_000}
        assert "the request's time was over after" in http_error(server, body)
        assert all(got.error is None for got in running.result())
    assert counters.wait_for_idle(8)["requests_totaltimed_out"] == 2


def test_requests_past_the_queue_limit_are_refused(server: LocalServer, reference: TextGenerator) -> None:
    counters = Counters(server, "small")
    requests = [Wanted(f"{i}", {"max_tokens": 200, "seed": i, "ignore_eos": True}) for i in range(40)]
    answers = send_all(server, "small", requests)
    refused = [got for got in answers if got.error is not None]
    assert all(got.error == "1 requests wait already; try again later" for got in refused)
    assert 1 <= len(refused) < len(requests)
    for wanted, got in zip(requests, answers, strict=True):
        if got.error is None:
            assert_equal_alone(reference, wanted, got)
    assert counters.wait_for_idle(len(requests))["requests_totalrefused"] == len(refused)


def test_instances_share_the_load(server: LocalServer, reference: TextGenerator) -> None:
    requests = [Wanted(f"{i}", {"max_tokens": 20, "seed": i, "temperature": 0.7}) for i in range(20)]
    counters = Counters(server, "pair")
    for wanted, got in zip(requests, send_all(server, "pair", requests), strict=True):
        assert_equal_alone(reference, wanted, got)
    counters.wait_for_idle(len(requests))
    for instance in ("pair_0_0", "pair_0_1"):
        assert server.metric("socket_trt_requests_received_total", model="pair", instance=instance) > 0


def test_a_step_that_raises_fails_its_requests_and_no_others(
    server: LocalServer, reference: TextGenerator, repository: Path
) -> None:
    counters = Counters(server, "faulty")
    before = Wanted("before", {"max_tokens": 30, "ignore_eos": True})
    assert_equal_alone(reference, before, send_all(server, "faulty", [before])[0])
    (repository / "faulty" / "1" / "fail").write_text("1")
    got = send(server, "faulty", max_tokens=10)
    assert got.error == "a step of the engine failed: the device fell off the bus"
    after = [Wanted(f"after {i}", {"max_tokens": 30, "seed": i, "temperature": 0.7}) for i in range(20)]
    for wanted, got in zip(after, send_all(server, "faulty", after), strict=True):
        assert_equal_alone(reference, wanted, got)
    counted = counters.wait_for_idle(22)
    assert (counted["requests_totalfailed"], counted["failed_steps_total"]) == (1, 1)


def test_curl_and_python_examples_run(server: LocalServer) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    counters = Counters(server, "tiny")
    done = subprocess.run(
        [str(ROOT / "examples" / "curl.sh"), "tiny", f"http://{server.http}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert '"finish_reason"' in done.stdout
    assert done.stdout.count("data: {") >= 1
    assert '{"error":"max_tokens is 0: expected at least 1"}' in done.stdout
    command = [sys.executable, "examples/grpc_stream.py", "--url", server.grpc, "--model", "tiny", "--max-tokens", "5"]
    done = subprocess.run([*command, "--chat", "Hi"], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "tokens" in done.stderr
    assert counters.wait_for_idle(5)["requests_totalrefused"] == 1
