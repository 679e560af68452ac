"""A serving loop on a fake session, clients that keep what they were sent, and metrics that can be read."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer

from socket_trt.engine.manifest import EngineDirectory
from socket_trt.models.tiny import END_ID, byte_tokenizer
from socket_trt.runtime.sampling import SamplingParameters
from socket_trt.runtime.session import FloatArray, SessionLimits, StepBatch
from socket_trt.serving import metrics
from socket_trt.serving.loop import LoopOptions, ServingLoop
from socket_trt.serving.metrics import Metrics, MetricSpec
from socket_trt.serving.reply import ErrorCode, Piece
from socket_trt.serving.requests import TextRequest
from tests.engines import tiny_engine
from tests.fake_session import FakeSession, tokens_alone

MANIFEST = EngineDirectory.open(tiny_engine()).manifest
TOKENIZER = byte_tokenizer()
LIMITS = SessionLimits(vocabulary_size=260, page_size=4, num_pages=33, max_batch_size=4, max_seq_len=64)
WARM_UP_STEPS = 3
PATIENCE = 60.0


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.005)


class GatedSession(FakeSession):
    """After its warm-up it waits before every step until the test lets it go on; `entered` counts steps begun."""

    def __init__(self, limits: SessionLimits = LIMITS, fail_at: Sequence[int] = (), gated: bool = False) -> None:
        super().__init__(limits, None, [WARM_UP_STEPS + step for step in fail_at])
        self.gate = threading.Semaphore(0)
        self.gated = gated
        self.entered = threading.Semaphore(0)
        self.closed = False

    def step(self, batch: StepBatch) -> FloatArray:
        if self.gated and len(self.batches) >= WARM_UP_STEPS:
            self.entered.release()
            assert self.gate.acquire(timeout=PATIENCE)
        return super().step(batch)

    def wait_for_step(self) -> None:
        assert self.entered.acquire(timeout=PATIENCE)

    def close(self) -> None:
        self.closed = True


class Client:
    """A `Reply` that keeps what was sent."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.error: tuple[ErrorCode, str] | None = None
        self.gone = False
        self._done = threading.Event()

    def send(self, piece: Piece) -> None:
        assert not self._done.is_set(), "a piece after the end"
        self.pieces.append(piece)
        if piece.final:
            self._done.set()

    def fail(self, code: ErrorCode, message: str) -> None:
        assert not self._done.is_set(), "an error after the end"
        self.error = (code, message)
        self._done.set()

    def cancelled(self) -> bool:
        return self.gone

    @property
    def ended(self) -> bool:
        return self._done.is_set()

    def wait(self) -> Client:
        assert self._done.wait(PATIENCE), "no answer"
        return self

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def token_ids(self) -> list[int]:
        return [token for piece in self.pieces for token in piece.token_ids]


@dataclasses.dataclass
class Recorded:
    """A series; all of one loop are written from one thread."""

    total: float = 0.0
    level: float | None = None
    observations: list[float] = dataclasses.field(default_factory=list)

    def increment(self, value: float) -> None:
        assert value > 0
        self.total += value

    def set(self, value: float) -> None:
        self.level = value

    def observe(self, value: float) -> None:
        self.observations.append(value)

    __hash__ = object.__hash__


class Recorder:
    """An `Exporter` that keeps everything, by metric and labels."""

    def __init__(self) -> None:
        self.recorded: dict[tuple[MetricSpec, tuple[str, ...]], Recorded] = {}
        self.closed = False

    def series(self, spec: MetricSpec, labels: Mapping[str, str], buckets: Sequence[float]) -> Recorded:
        assert bool(buckets) == (spec.kind == "histogram")
        assert (spec, tuple(labels.values())) not in self.recorded
        self.recorded[spec, tuple(labels.values())] = Recorded()
        return self.recorded[spec, tuple(labels.values())]

    def __getitem__(self, key: MetricSpec | tuple[MetricSpec, str]) -> Recorded:
        spec, label = key if isinstance(key, tuple) else (key, None)
        return self.recorded[spec, () if label is None else (label,)]

    def close(self) -> None:
        self.closed = True


class Harness:
    """A loop and its surroundings."""

    def __init__(
        self,
        session: GatedSession,
        on_broken: Callable[[], None] = lambda: None,
        on_stuck: Callable[[], None] = lambda: None,
        tokenizer: Tokenizer | None = TOKENIZER,
        **options: Any,
    ) -> None:
        self.session = session
        self.recorder = Recorder()
        self.metrics = Metrics(self.recorder)
        self.loop = ServingLoop(
            lambda: session,
            MANIFEST,
            tokenizer,
            self.metrics,
            LoopOptions(**{"max_step_tokens": 16, **options}),
            on_broken,
            on_stuck,
        )

    def submit(self, wanted: TextRequest | Exception) -> Client:
        client = Client()
        self.loop.submit(wanted, client)
        return client


@contextlib.contextmanager
def serving(session: GatedSession | None = None, **options: Any) -> Iterator[Harness]:
    harness = Harness(session or GatedSession(), **options)
    try:
        yield harness
    finally:
        harness.session.gated = False
        harness.session.gate.release(10000)
        harness.loop.close()


def request(prompt: str | Sequence[int] = "Hello", timeout: float | None = None, **values: Any) -> TextRequest:
    """A streaming request that wants everything; `values` of TextRequest, the rest of SamplingParameters."""
    fields = {field.name for field in dataclasses.fields(TextRequest)}
    own = {name: values.pop(name) for name in list(values) if name in fields}
    returns = {name: True for name in fields if name.startswith("return_")}
    parameters = SamplingParameters(**{"max_tokens": 12, "temperature": 1.0, "seed": 0, **values})
    tokens = TOKENIZER.encode(prompt).ids if isinstance(prompt, str) else prompt
    return TextRequest(tuple(tokens), parameters, timeout=timeout, **{"stream": True, **returns, **own})


def alone(wanted: TextRequest, limits: SessionLimits = LIMITS) -> list[int]:
    """The tokens that a request gets on its own."""
    return tokens_alone(
        wanted.prompt,
        wanted.parameters,
        vocabulary_size=limits.vocabulary_size,
        max_seq_len=limits.max_seq_len,
        stop_token_ids=[END_ID],
    )


def assert_everything_is_counted(harness: Harness) -> None:
    """After the loop is closed: requests and tokens add up, and nothing holds a page."""
    recorder = harness.recorder
    ended = sum(recorder[metrics.ENDED, outcome].total for outcome in metrics.OUTCOMES)
    assert recorder[metrics.RECEIVED].total == ended
    for gauge in (metrics.RUNNING, metrics.WAITING, metrics.PAGES_IN_USE):
        assert recorder[gauge].level == 0
    finished = recorder[metrics.ENDED, "finished"].total
    assert len(recorder[metrics.REQUEST_SECONDS].observations) == finished
    assert len(recorder[metrics.FIRST_TOKEN_SECONDS].observations) >= finished
    steps = recorder[metrics.STEPS].total - recorder[metrics.FAILED_STEPS].total
    assert len(recorder[metrics.STEP_SECONDS].observations) == steps
