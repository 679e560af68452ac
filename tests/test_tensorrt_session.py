"""The TensorRT session's own logic on a fake TensorRT and a fake GPU: bindings, shapes, graphs, weights, errors."""

from __future__ import annotations

import numpy as np
import pytest

from socket_trt.runtime.onnxruntime_session import OnnxRuntimeSession
from socket_trt.runtime.sampling import SamplingParameters
from socket_trt.runtime.scheduler import Scheduler
from socket_trt.runtime.session import Session
from socket_trt.runtime.tensorrt_session import TensorRTSession
from socket_trt.validation.scenario import make_scenario
from tests.tensorrt_fixtures import FakeMachine


def greedy(session: Session, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    scheduler = Scheduler(session, max_step_tokens=64)
    ids = [scheduler.submit(prompt, SamplingParameters(max_tokens=tokens)) for prompt in prompts]
    found: dict[int, list[int]] = {request: [] for request in ids}
    while not scheduler.idle:
        for event in scheduler.step():
            assert event.error is None, event.error
            found[event.request_id].append(event.token)
    return [found[request] for request in ids]


@pytest.mark.parametrize("version", ["8.6.0", "10.16.1", "11.4.0"])
def test_steps_and_texts_are_those_of_onnx_runtime(version: str, machine: FakeMachine) -> None:
    trt = machine.install(version)
    engine = machine.compiled()
    session = TensorRTSession(engine)
    expected = OnnxRuntimeSession(engine)
    for step in make_scenario(engine.manifest, seed=3).steps:
        np.testing.assert_allclose(session.step(step), expected.step(step), atol=2e-2)
    prompts = [np.random.default_rng(i).integers(0, 256, 90 + 7 * i).tolist() for i in range(5)]
    assert greedy(session, prompts, 12) == greedy(expected, prompts, 12)
    assert trt.driver.launches > 10
    session.close()
    assert not trt.driver.allocations
    assert not trt.driver.pinned
    assert not trt.driver.graphs
