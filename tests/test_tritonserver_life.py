"""How a real tritonserver starts and ends: ready, stopped, with an engine or a front end that has failed."""

from __future__ import annotations

import asyncio
import http.client
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc.aio as grpc

from examples.grpc_stream import generate
from serving.local import ServerError, deploy, local_server
from tests.engines import tiny_engine
from tests.serving import PATIENCE, wait_until
from tests.tritonserver import (
    Wanted,
    assert_equal_alone,
    make_faulty,
    needs_tritonserver,
    open_reference,
    send,
    send_all,
)

pytestmark = needs_tritonserver

IMPATIENT_MODEL = """
from socket_trt.serving import delivery, triton_model

delivery.Delivery.look_interval = 0.3
triton_model.STUCK_EXIT_SECONDS = 3.0
TritonPythonModel = triton_model.TritonPythonModel
"""


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


def test_a_server_whose_grpc_streams_are_stuck_answers_the_others_and_ends(tmp_path: Path) -> None:
    """A client that cancels while a response is being written makes Triton's stream handler and the writer wait for each
    other for ever; Triton's own delay for tests, in milliseconds, makes the moment long enough to hit.
    """
    deploy(tiny_engine(), tmp_path / "models", "--name", "tiny")
    (tmp_path / "models" / "tiny" / "1" / "model.py").write_text(IMPATIENT_MODEL)
    delay = {"TRITONSERVER_DELAY_GRPC_RESPONSE": "1000"}
    with local_server(tmp_path / "models", tmp_path / "log", environment=delay) as server:

        async def leave_while_a_response_is_written() -> None:
            async with grpc.InferenceServerClient(server.grpc) as client:
                parts = generate(client, "tiny", text_input="a", max_tokens=400, ignore_eos=True, stream=True)
                first = asyncio.create_task(parts.__anext__())
                while b"Delaying the write of the response" not in server.log.read_bytes():
                    await asyncio.sleep(0.01)
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)

        stubs = server.children()
        asyncio.run(leave_while_a_response_is_written())
        wanted = Wanted("another", {"max_tokens": 20, "seed": 1, "temperature": 0.7}, "http whole")
        assert_equal_alone(open_reference(tiny_engine()), wanted, send_all(server, "tiny", [wanted])[0])
        assert server.process.wait(PATIENCE) == -signal.SIGKILL
        wait_until(lambda: not any(os.path.exists(f"/proc/{stub}") for stub in stubs))
    log = server.log.read_text(errors="replace")
    assert "the server has not taken a part of an answer for 3 s and has to be started again" in log
    assert "the server is asked to end, and killed in 3 s" in log


def test_an_entry_can_be_unloaded_and_loaded_again(tmp_path: Path) -> None:
    """And the server may run anywhere: its Python finds the package."""
    deploy(tiny_engine(), tmp_path / "models", "--name", "tiny")
    options = ("--model-control-mode=explicit", "--load-model=tiny")
    with local_server(tmp_path / "models", tmp_path / "log", *options, cwd=tmp_path) as server:
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
