"""The scheduler on a real, sparse engine: what a request gets does not depend on what else runs."""

from __future__ import annotations

import numpy as np

from socket_trt.engine.manifest import EngineDirectory
from socket_trt.runtime.onnxruntime_session import OnnxRuntimeSession
from socket_trt.runtime.sampling import SamplingParameters
from socket_trt.runtime.scheduler import Scheduler
from tests.engines import tiny_engine

ENGINE = EngineDirectory.open(tiny_engine())


def generate(
    prompts: list[list[int]],
    parameters: list[SamplingParameters],
    num_pages: int | None = None,
    max_step_tokens: int = 2048,
) -> tuple[list[list[int]], Scheduler]:
    """Tokens of each request, all submitted at once."""
    scheduler = Scheduler(OnnxRuntimeSession(ENGINE, num_pages), max_step_tokens=max_step_tokens)
    ids = [scheduler.submit(prompt, own) for prompt, own in zip(prompts, parameters, strict=True)]
    tokens: dict[int, list[int]] = {request_id: [] for request_id in ids}
    while not scheduler.idle:
        for event in scheduler.step():
            assert event.error is None
            assert event.token is not None
            tokens[event.request_id].append(event.token)
    return [tokens[request_id] for request_id in ids], scheduler


def requests() -> tuple[list[list[int]], list[SamplingParameters]]:
    """Prompts long enough that decode queries leave tokens out, greedy and sampled."""
    rng = np.random.default_rng(4)
    prompts = [rng.integers(0, 256, length).tolist() for length in (150, 40, 97, 33, 120, 64)]
    parameters = [
        SamplingParameters(max_tokens=20 + 3 * i, temperature=0.0 if i % 2 else 0.8, seed=i)
        for i in range(len(prompts))
    ]
    return prompts, parameters


def test_batches_chunks_and_preemptions_change_no_token() -> None:
    prompts, parameters = requests()
    alone = [generate([prompt], [own])[0][0] for prompt, own in zip(prompts, parameters, strict=True)]
    together, _ = generate(prompts, parameters)
    assert together == alone
    chunked, scheduler = generate(prompts, parameters, max_step_tokens=24)
    assert chunked == alone
    assert scheduler.steps > 20
    squeezed, scheduler = generate(prompts, parameters, num_pages=1 + 20)
    assert squeezed == alone
    assert scheduler.preemptions > 0  # else the pool was not small enough to show anything
    assert scheduler.replayed_tokens > 0
    assert scheduler.pages_in_use == 0


def test_sampled_tokens_are_not_all_the_same() -> None:
    """The test above would prove little if every request repeated one token."""
    prompts, parameters = requests()
    tokens, _ = generate(prompts, parameters)
    assert all(len(set(request)) > 5 for request in tokens[::2])
