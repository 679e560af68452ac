"""The real tritonserver, its python backend and real clients on the engine of `tiny`."""

from __future__ import annotations

import asyncio
import dataclasses
import http.client
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc.aio as grpc

from examples.grpc_stream import generate
from serving.local import ROOT, LocalServer, ServerError, deploy, local_server
from socket_trt.engine.manifest import EngineDirectory
from socket_trt.runtime.generator import GenerationResult, TextGenerator
from socket_trt.runtime.onnxruntime_session import OnnxRuntimeSession
from socket_trt.runtime.open import load_tokenizer
from socket_trt.runtime.sampling import SamplingParameters
from tests.engines import tiny_engine

pytestmark = pytest.mark.skipif(
    not (ROOT / "build" / "serving" / "bin" / "python").exists(),
    reason="build/serving, the environment of tritonserver, is not there: run make serving",
)

PATIENCE = 60.0

# An engine whose session raises in the steps that a test asks for: `fail` in the entry's directory says how many.
FAULTY_MODEL = """
import pathlib

from socket_trt.runtime.open import open_session
from socket_trt.runtime.session import Session
from socket_trt.serving import triton_model

FAIL = pathlib.Path(__file__).parent / "fail"


class Faulty(Session):
    def __init__(self, *args, **options):
        self._session = open_session(*args, **options)

    @property
    def limits(self):
        return self._session.limits

    def step(self, batch):
        logits = self._session.step(batch)
        left = int(FAIL.read_text() or 0)
        if left:
            FAIL.write_text(str(left - 1))
            raise RuntimeError("the device fell off the bus")
        return logits


class TritonPythonModel(triton_model.TritonPythonModel):
    open_session = Faulty
"""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """A request and how it is sent."""

    prompt: str
    parameters: dict[str, Any]
    transport: str = "grpc"
    cancel_after: int | None = None  # parts


@dataclasses.dataclass(frozen=True)
class Got:
    text: str
    token_ids: list[int]
    finish_reason: str | None  # None where the client cancelled
    error: str | None = None


def make_faulty(entry: Path, failures: int) -> None:
    (entry / "1" / "model.py").write_text(FAULTY_MODEL)
    (entry / "1" / "fail").write_text(str(failures))


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


def open_reference(directory: Path) -> TextGenerator:
    """Answers one request at a time, in this process."""
    engine = EngineDirectory.open(directory)
    return TextGenerator(OnnxRuntimeSession(engine), load_tokenizer(engine), engine.manifest.model.stop_token_ids)


def alone(reference: TextGenerator, wanted: Wanted) -> GenerationResult:
    values = {("stop" if name == "stop_words" else name): value for name, value in wanted.parameters.items()}
    if "temperature" in values:
        values["temperature"] = float(np.float32(values["temperature"]))  # as it travels
    [result] = reference.generate([wanted.prompt], SamplingParameters(**values))
    return result


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


async def over_grpc(client: grpc.InferenceServerClient, model: str, wanted: Wanted) -> Got:
    text, tokens, reason, parts = "", list[int](), None, 0
    flags = {"stream": True, "return_token_ids": True, "return_finish_reason": True}
    responses = generate(client, model, text_input=wanted.prompt, **wanted.parameters, **flags)
    try:
        async for part in responses:
            text += part["text_output"][0].decode()
            tokens += part.get("output_ids", np.array([], int)).tolist()
            if "finish_reason" in part:
                reason = part["finish_reason"][0].decode()
            parts += 1
            if parts == wanted.cancel_after:
                break
    except grpc.InferenceServerException as error:
        return Got(text, tokens, None, error.message())
    finally:
        await responses.aclose()
    return Got(text, tokens, reason)


def over_http(address: str, model: str, wanted: Wanted) -> Got:
    connection = http.client.HTTPConnection(address, timeout=PATIENCE)
    stream = wanted.transport == "http"
    body = {"text_input": wanted.prompt, "stream": stream, "return_token_ids": True, "return_finish_reason": True}
    body |= wanted.parameters
    connection.request(
        "POST", f"/v2/models/{model}/{'generate_stream' if stream else 'generate'}", json.dumps(body).encode()
    )
    text, tokens, reason, parts = "", list[int](), None, 0
    response = connection.getresponse()
    try:
        while line := response.readline():
            part = json.loads(line.removeprefix(b"data: ")) if line.strip() else {}
            if "error" in part:
                return Got(text, tokens, None, part["error"])
            text += part.get("text_output", "")
            ids = part.get("output_ids", [])
            tokens += ids if isinstance(ids, list) else [ids]
            reason = part.get("finish_reason", reason)
            parts += bool(part)
            if parts == wanted.cancel_after:
                break
    finally:
        response.close()
        connection.close()
    return Got(text, tokens, reason)


def send_all(server: LocalServer, model: str, requests: list[Wanted]) -> list[Got]:
    """All at once, each on a connection of its own kind; answers in their order."""

    async def run() -> list[Got]:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(len(requests)) as pool:
            async with grpc.InferenceServerClient(server.grpc) as client:
                return await asyncio.gather(
                    *[
                        over_grpc(client, model, wanted)
                        if wanted.transport == "grpc"
                        else loop.run_in_executor(pool, over_http, server.http, model, wanted)
                        for wanted in requests
                    ]
                )

    return asyncio.run(run())


def send(server: LocalServer, model: str, prompt: str = "Hello", transport: str = "grpc", **parameters: Any) -> Got:
    return send_all(server, model, [Wanted(prompt, parameters, transport)])[0]


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.05)


class Counters:
    """The model's metrics, from now on."""

    def __init__(self, server: LocalServer, model: str) -> None:
        self._server, self._model = server, model
        self._before = self._read()

    def _read(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for sample in self._server.samples():
            if sample.labels.get("model") == self._model and sample.name.startswith("socket_trt_"):
                name = sample.name.removeprefix("socket_trt_") + sample.labels.get("outcome", "")
                found[name] = found.get(name, 0) + sample.value
        return found

    def wait_for_idle(self, received: int) -> dict[str, float]:
        """What has been counted once `received` requests have come and ended; gauges as they stand."""

        def since() -> dict[str, float]:
            return {name: value - self._before.get(name, 0) for name, value in self._read().items()}

        def ended() -> bool:
            counted = since()
            outcomes = [value for name, value in counted.items() if name.startswith("requests_total")]
            return counted["requests_received_total"] == received == sum(outcomes)

        def idle() -> bool:
            now = self._read()
            return now["pages_in_use"] == now["running_requests"] == now["waiting_requests"] == 0

        wait_until(ended)
        wait_until(idle)  # gauges follow within a moment
        return since()


def assert_equal_alone(reference: TextGenerator, wanted: Wanted, got: Got) -> None:
    expected = alone(reference, wanted)
    assert got.error is None
    if got.finish_reason is None:
        assert wanted.cancel_after is not None
        assert expected.text.startswith(got.text)
        assert list(expected.token_ids[: len(got.token_ids)]) == got.token_ids
    else:
        assert (got.text, got.token_ids) == (expected.text, list(expected.token_ids))
        assert got.finish_reason == expected.finish_reason.value


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


def test_an_engine_that_keeps_failing_ends_the_server(tmp_path: Path) -> None:
    deploy(tiny_engine(), tmp_path / "models", "--name", "faulty")
    make_faulty(tmp_path / "models" / "faulty", 0)
    with local_server(tmp_path / "models", tmp_path / "log") as server:
        (tmp_path / "models" / "faulty" / "1" / "fail").write_text("1000")
        errors = {send(server, "faulty", max_tokens=3).error for _ in range(3)}
        assert errors == {"a step of the engine failed: the device fell off the bus"}
        assert server.process.wait(PATIENCE) == 0
    assert "the engine failed 3 times in a row: no more requests are served" in server.log.read_text(errors="replace")


def test_ready_only_when_a_step_has_run(tmp_path: Path) -> None:
    """The engine opens, and its first step fails: never ready, whatever else the server serves."""
    deploy(tiny_engine(), tmp_path / "models", "--name", "fine")
    deploy(tiny_engine(), tmp_path / "models", "--name", "faulty")
    make_faulty(tmp_path / "models" / "faulty", 1)
    with local_server(tmp_path / "models", tmp_path / "log", "--exit-on-error=false") as server:
        assert server.status("/v2/models/fine/ready") == 200
        assert server.status("/v2/models/faulty/ready") == 400
        assert server.status("/v2/health/ready") == 400
        assert send(server, "fine").error is None
    make_faulty(tmp_path / "models" / "faulty", 1)
    with (
        pytest.raises(ServerError, match="the device fell off the bus"),
        local_server(tmp_path / "models", tmp_path / "log"),
    ):
        raise AssertionError("started")


def test_stopping_finishes_what_runs(tmp_path: Path) -> None:
    engine = tiny_engine(max_seq_len=8192)
    deploy(engine, tmp_path / "models", "--name", "tiny")
    requests = [
        Wanted(f"{i}", {"max_tokens": 600, "seed": i, "ignore_eos": True}, transport)
        for i, transport in enumerate(["grpc", "http", "http whole"])
    ]
    with local_server(tmp_path / "models", tmp_path / "log") as server, ThreadPoolExecutor(1) as pool:
        running = pool.submit(send_all, server, "tiny", requests)
        wait_until(lambda: server.metric("socket_trt_running_requests") == 3)
        assert server.stop() == 0
        for wanted, got in zip(requests, running.result(), strict=True):
            assert_equal_alone(open_reference(engine), wanted, got)


def test_stopping_does_not_wait_for_ever(tmp_path: Path) -> None:
    engine = tiny_engine(max_seq_len=8192)
    deploy(engine, tmp_path / "models", "--name", "tiny")
    requests = [
        Wanted("a", {"max_tokens": 8000, "ignore_eos": True}, transport) for transport in ("grpc", "http", "http whole")
    ]
    with local_server(tmp_path / "models", tmp_path / "log", "--exit-timeout-secs=2") as server:
        threads = [
            threading.Thread(target=lambda w=wanted: _ignore(lambda: send_all(server, "tiny", [w])))
            for wanted in requests
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: server.metric("socket_trt_running_requests") == 3)
        stubs = server.children()
        began = time.monotonic()
        server.stop(30)
        assert time.monotonic() - began < 15
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        wait_until(lambda: not any(os.path.exists(f"/proc/{stub}") for stub in stubs))


def _ignore(call: Callable[[], Any]) -> None:
    """Whether a client of a server that ends is told so, or finds its connection closed, is Triton's affair."""
    try:
        call()
    except Exception as error:
        print("the client saw", repr(error), file=sys.stderr)


def test_an_entry_can_be_unloaded_and_loaded_again(tmp_path: Path) -> None:
    deploy(tiny_engine(), tmp_path / "models", "--name", "tiny")
    options = ("--model-control-mode=explicit", "--load-model=tiny")
    with local_server(tmp_path / "models", tmp_path / "log", *options) as server:
        first = send(server, "tiny")
        for action in ("unload", "load", "unload", "load"):
            connection = http.client.HTTPConnection(server.http, timeout=PATIENCE)
            connection.request("POST", f"/v2/repository/models/tiny/{action}", b"{}")
            assert connection.getresponse().status == 200
            connection.close()
            wanted_status = 200 if action == "load" else 400
            wait_until(lambda status=wanted_status: server.status("/v2/models/tiny/ready") == status)
        assert send(server, "tiny") == first
        assert server.metric("socket_trt_requests_received_total", model="tiny") == 1


def test_curl_and_python_examples_run(server: LocalServer) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
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
