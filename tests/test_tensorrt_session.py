"""The TensorRT session's own logic on a fake TensorRT and a fake GPU: bindings, shapes, graphs, weights, errors."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np
import pytest

from socket_trt.benchmark import decode_batch
from socket_trt.cases import Case
from socket_trt.engine.compile import compile_engine
from socket_trt.engine.manifest import EngineDirectory
from socket_trt.errors import ConfigError, EngineError, MissingDependencyError, RequestError
from socket_trt.progress import Silent
from socket_trt.runtime.cuda import OutOfGpuMemoryError
from socket_trt.runtime.onnxruntime_session import OnnxRuntimeSession
from socket_trt.runtime.open import open_generator, open_session
from socket_trt.runtime.sampling import SamplingParameters
from socket_trt.runtime.scheduler import Scheduler
from socket_trt.runtime.session import Session
from socket_trt.runtime.tensorrt_session import TensorRTSession, table_width
from socket_trt.validation.scenario import make_scenario
from tests.engines import tiny_engine
from tests.tensorrt_fixtures import OPTIONS, FakeMachine, FakePlugin


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


def test_logits_are_not_copied(machine: FakeMachine) -> None:
    machine.install()
    session = TensorRTSession(machine.compiled(), random_weights=True)
    batch = decode_batch(session, Case(2, 40), seed=0)
    logits = session.step(batch)
    assert logits.dtype == np.float32
    assert np.shares_memory(logits, session.step(batch))
    with pytest.raises(ValueError, match="read-only"):
        logits[0] = 0


def test_each_shape_has_a_context_and_its_graph_is_replayed(machine: FakeMachine) -> None:
    trt = machine.install()
    session = TensorRTSession(machine.compiled(), random_weights=True)
    made = len(trt.contexts)
    one, three = (decode_batch(session, Case(batch, 40), seed=0) for batch in (1, 3))
    first = session.step(one).copy()
    assert trt.driver.launches == 0
    assert np.array_equal(session.step(one), first)
    assert np.array_equal(session.step(one), first)
    assert trt.driver.launches == 2
    session.step(three)
    assert len(trt.contexts) == made + 2
    assert [context.profile for context in trt.contexts[made:]] == [0, 1]
    changes = [context.shape_changes for context in trt.contexts]
    for batch in (one, three, one, three):
        session.step(batch)
    assert [context.shape_changes for context in trt.contexts] == changes  # a graph's context is left alone
    longer = decode_batch(session, Case(1, 300), seed=0)
    assert not np.array_equal(session.step(longer), first)
    assert len(trt.contexts) == made + 3  # a wider page table is another shape
    session.close()


def test_the_least_used_graph_makes_room(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket_trt.runtime.tensorrt_session.MAX_DECODE_CONTEXTS", 2)
    trt = machine.install()
    session = TensorRTSession(machine.compiled(), random_weights=True)
    batches = [decode_batch(session, Case(size, 40), seed=0) for size in (1, 2, 3)]
    for batch in (*batches, *batches):
        session.step(batch)
    assert len(trt.driver.graphs) == 2
    assert trt.driver.launches == 0  # every shape had been evicted before it came again
    session.close()
    assert not trt.driver.graphs


def test_steps_that_cannot_be_captured_run_all_the_same(machine: FakeMachine, caplog: pytest.LogCaptureFixture) -> None:
    trt = machine.install()
    trt.refuse = "capture"
    session = TensorRTSession(machine.compiled(), random_weights=True)
    batch = decode_batch(session, Case(1, 40), seed=0)
    expected = session.step(batch)
    assert np.array_equal(session.step(batch), expected)
    assert "not replayed as a graph" in caplog.text
    assert len(caplog.records) == 1
    assert not trt.driver.graphs
    session.close()


@pytest.mark.parametrize(
    ("longest", "width"), [(1, 1), (16, 1), (17, 2), (33, 4), (64, 4), (65, 8), (257, 32), (512, 32)]
)
def test_page_tables_are_as_wide_as_needed_in_powers_of_two(longest: int, width: int) -> None:
    limits = EngineDirectory.open(tiny_engine(**OPTIONS)).manifest.limits()
    assert limits.pages_per_sequence == 32
    assert table_width(longest, limits) == width


def test_a_failed_step_says_why_and_the_next_one_works(machine: FakeMachine) -> None:
    machine.install()
    session = TensorRTSession(machine.compiled(), random_weights=True)
    batch = decode_batch(session, Case(1, 40), seed=0)
    expected = session.step(batch)
    other = decode_batch(session, Case(2, 40), seed=0)
    session._decoder(session._shape(other)).context.fail = True
    with pytest.raises(EngineError, match=r"TensorRT 8\.6\.0"):
        session.step(other)
    assert np.array_equal(session.step(batch), expected)
    session.close()


def test_steps_beyond_the_plan(machine: FakeMachine) -> None:
    machine.install()
    engine = machine.compiled()
    session = TensorRTSession(engine, random_weights=True)
    batch = decode_batch(session, Case(4, 40), seed=0)
    wide = dataclasses.replace(batch, input_ids=np.zeros(2049, np.int32))
    with pytest.raises(RequestError, match="this plan takes 2048 in 4"):
        session.step(wide)
    session.close()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"version": "10.16.1"}, r"built for TensorRT 8\.6\.0, here is TensorRT 10\.16\.1"),
        ({"name": "Other GPU"}, r"built for an Fake GPU \(9\.0\), here is an Other GPU \(9\.0\)"),
        ({"plugin": FakePlugin(sha256="1" * 64)}, r"built for plugin 0\.1\.0 \(000000000000\), here is plugin .*111"),
    ],
)
def test_a_plan_for_something_else_is_refused_before_anything_is_loaded(
    changes: dict[str, Any], match: str, machine: FakeMachine
) -> None:
    machine.install()
    engine = machine.compiled()
    trt = machine.install(**changes)
    with pytest.raises(EngineError, match=match):
        TensorRTSession(engine)
    assert not trt.driver.allocations


def test_products_by_cublas(machine: FakeMachine) -> None:
    """The same logits; and a machine without cuBLAS says what it lacks."""
    machine.install()
    own = TensorRTSession(machine.compiled())
    batch = decode_batch(own, Case(2, 40), seed=0)
    expected = own.step(batch).copy()
    own.close()
    machine.install(plugin=FakePlugin(cublas="12.9.1"))
    engine = machine.compiled()
    session = TensorRTSession(engine)
    np.testing.assert_allclose(session.step(batch), expected, atol=1e-2)
    session.close()
    trt = machine.install()
    with pytest.raises(EngineError, match=r"cuBLAS 12\.9\.1 computed its plan's products; there is no cuBLAS 12 .*pip"):
        TensorRTSession(engine)
    assert not trt.driver.allocations


def test_plans_that_are_missing_changed_or_damaged(machine: FakeMachine) -> None:
    trt = machine.install()
    engine = machine.compiled()
    plan = engine.path / "engine.plan"
    data = plan.read_bytes()
    for content, match in ((data + b"\0", "changed since it was built"), (None, "missing; run socket-trt compile")):
        plan.unlink(missing_ok=True)
        if content is not None:
            plan.write_bytes(content)
        with pytest.raises(EngineError, match=match):
            TensorRTSession(engine)
    plan.write_bytes(b"garbage")
    record = engine.manifest.plan
    assert record is not None
    damaged = record.model_copy(update={"sha256": hashlib.sha256(b"garbage").hexdigest()})
    with pytest.raises(EngineError, match="cannot load the plan: magic tag does not match"):
        TensorRTSession(EngineDirectory(engine.path, engine.manifest.model_copy(update={"plan": damaged})))
    assert not trt.driver.allocations


def test_too_little_memory_is_found_before_anything_big_is_loaded(machine: FakeMachine) -> None:
    machine.install()
    engine = machine.compiled()
    trt = machine.install(total=2 << 20)
    with pytest.raises(OutOfGpuMemoryError, match=r"for weights and activations, .* for 33 cache pages"):
        TensorRTSession(engine)
    assert not trt.driver.allocations
    page = engine.manifest.cache_bytes_per_page()
    trt = machine.install(total=(5 << 19) + 50 * page)  # weights, activations and some pages: not the whole pool
    session = TensorRTSession(engine)
    assert 33 <= session.limits.num_pages < 129
    session.close()
    with pytest.raises(OutOfGpuMemoryError, match="for 129 cache pages"):
        TensorRTSession(engine, num_pages=129)
    with pytest.raises(ConfigError, match="takes 2 to 129"):
        TensorRTSession(engine, num_pages=130)
    assert not trt.driver.allocations


def test_layers_are_timed_in_a_context_of_their_own(machine: FakeMachine) -> None:
    trt = machine.install()
    trt.IProfiler = type("IProfiler", (), {})
    session = TensorRTSession(machine.compiled(), random_weights=True)
    batch = decode_batch(session, Case(1, 40), seed=0)
    session.step(batch)
    made = len(trt.contexts)
    assert session.profile(batch, runs=2) == [("layer", pytest.approx(1.0))]
    assert len(trt.contexts) == made + 1
    session.close()


def test_opening_a_generator_takes_chunks_that_the_plan_takes(machine: FakeMachine) -> None:
    machine.install()
    engine = machine.compiled()
    compile_engine(engine, Silent(), max_step_tokens=32)
    with open_generator(engine) as generator:
        (result,) = generator.generate([list(range(100))], SamplingParameters(max_tokens=3))
    assert result.error is None
    assert len(result.token_ids) == 3


def test_random_weights_need_weights_outside_the_plan(machine: FakeMachine) -> None:
    machine.install()
    engine = EngineDirectory.open(tiny_engine("float32"))
    with pytest.raises(ConfigError, match="only a TensorRT engine"):
        open_session(engine, random_weights=True)


def test_the_gpu_that_was_asked_for(machine: FakeMachine) -> None:
    """The context of that GPU is current when memory is taken, though TensorRT was opened on the first one."""
    trt = machine.install(devices=2)
    engine = machine.compiled()
    for device in (0, 1):
        open_session(engine, device=device).close()
        assert trt.driver.current == 100 + device
    with pytest.raises(MissingDependencyError, match="GPU 2 is not visible, 2 are, from 0 on"):
        open_session(engine, device=2)
