"""Clients of a real tritonserver: requests, how they are sent, what they get, and what the server has counted."""

from __future__ import annotations

import asyncio
import dataclasses
import http.client
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc.aio as grpc

from examples.grpc_stream import generate
from serving.local import ROOT, LocalServer
from socket_trt.engine.manifest import EngineDirectory
from socket_trt.runtime.generator import GenerationResult, TextGenerator
from socket_trt.runtime.onnxruntime_session import OnnxRuntimeSession
from socket_trt.runtime.open import load_tokenizer
from socket_trt.runtime.sampling import SamplingParameters
from tests.serving import PATIENCE, wait_until

needs_tritonserver = pytest.mark.skipif(
    not (ROOT / "build" / "serving" / "bin" / "python").exists(),
    reason="build/serving, the environment of tritonserver, is not there: run make serving",
)

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
