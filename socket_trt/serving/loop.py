"""The serving loop: requests join and leave the running batch, in one thread that owns session and scheduler."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from tokenizers import Tokenizer
from tokenizers.models import BPE

from socket_trt.engine.manifest import Manifest
from socket_trt.errors import RequestError
from socket_trt.runtime.generator import Generation, TextGenerator
from socket_trt.runtime.sampling import SamplingParameters
from socket_trt.runtime.scheduler import QueueFullError, Scheduler
from socket_trt.runtime.session import Session
from socket_trt.serving import metrics
from socket_trt.serving.delivery import Delivery
from socket_trt.serving.meter import MeteredSession
from socket_trt.serving.metrics import Metrics
from socket_trt.serving.reply import ErrorCode, Piece, Reply
from socket_trt.serving.requests import TextRequest

logger = logging.getLogger(__name__)

# A session that fails so often without a step between that works will not recover by itself.
MAX_FAILURES_IN_A_ROW = 3

_SHUTTING_DOWN = "the server is shutting down"


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """How requests are served.

    max_waiting      requests that may wait for pages; None: any number
    max_step_tokens  tokens a step may have
    max_seconds      that a request may take from its arrival; None: any time
    """

    max_waiting: int | None = None
    max_step_tokens: int = 2048
    max_seconds: float | None = None


# A request, or what was found wrong with it; the way back; when it came.
_Arrival = tuple[TextRequest | Exception, Reply, float]


@dataclasses.dataclass(eq=False)
class _Live:
    """A request that has not ended.  `sent`: tokens that are on their way to the client."""

    request: TextRequest
    reply: Reply
    arrival: float
    deadline: float | None
    generation: Generation
    prefix: str
    sent: int = 0
    admitted: bool = False
    began: bool = False


class ServingLoop:
    """Serves requests on a session that it opens, uses and closes in its own thread."""

    def __init__(
        self,
        open_session: Callable[[], Session],
        manifest: Manifest,
        tokenizer: Tokenizer | None,
        sink: Metrics,
        options: LoopOptions,
        on_broken: Callable[[], None],
        on_stuck: Callable[[], None] = lambda: None,
    ) -> None:
        """Open the session and return once it has run steps.

        tokenizer  None: token ids are all that is answered
        on_broken  called, once, when the session can no longer be used: every request is refused from then on
        on_stuck   called, once, when a reply does not come back from a call: others are still answered

        Raises what `open_session` or the first steps raise, and ConfigError for options that serve nobody.
        """
        self._open_session = open_session
        self._manifest = manifest
        self._tokenizer = tokenizer or Tokenizer(BPE())  # to which every token is unknown, and has no text
        self._metrics = sink
        self._options = options
        self._on_broken = on_broken
        self._wake = threading.Condition()
        self._inbox: deque[_Arrival] = deque()
        self._gone: list[Reply] = []
        self._closing = self._closed = False
        self._refusal: str | None = None
        self._live: dict[Reply, _Live] = {}
        self._delivery = Delivery(sink.publish, on_stuck)
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="serving", daemon=True)
        self._thread.start()
        try:
            self._started.result()
        except BaseException:
            self._delivery.close()
            raise

    def submit(self, request: TextRequest | Exception, reply: Reply) -> None:
        """Serve a request, or answer what was found wrong with it.

        From any thread; answers come from another one, and from this one once the loop is closed.
        """
        with self._wake:
            if not self._closed:
                self._inbox.append((request, reply, time.monotonic()))
                self._wake.notify()
                return
        reply.fail(ErrorCode.unavailable, _SHUTTING_DOWN)

    def close(self) -> None:
        """Refuse what has not ended, answer everybody, and close the session."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        self._delivery.close()

    def _run(self) -> None:
        try:
            with contextlib.closing(self._open_session()) as session:
                _warm_up(session)
                metered = MeteredSession(session, self._manifest, self._metrics)
                generator = TextGenerator(
                    metered,
                    self._tokenizer,
                    self._manifest.model.stop_token_ids,
                    max_step_tokens=self._options.max_step_tokens,
                    max_waiting=self._options.max_waiting,
                )
                self._metrics.levels[metrics.PAGES] = session.limits.num_pages - 1
                self._started.set_result(None)
                self._serve(generator, metered)
        except BaseException as error:
            if not self._started.done():
                self._started.set_exception(error)
                return
            logger.exception("serving ended with an error")
            if not self._closed:  # nobody is left to answer
                self._on_broken()

    def _serve(self, generator: TextGenerator, session: MeteredSession) -> None:
        while not self._closing:
            arrivals, gone = self._wait(generator)
            try:
                while arrivals:
                    self._accept(generator, *arrivals.popleft())
                for reply in gone:
                    if reply in self._live:
                        self._end(self._live[reply], "cancelled", ErrorCode.cancelled, "cancelled by the client")
                self._expire()
                if self._refusal is None and not generator.scheduler.idle:
                    began = time.monotonic()
                    generator.advance()
                    self._collect(generator, began)
                self._count(generator.scheduler)
            except Exception as error:  # a mistake of this program: what it leaves behind cannot be trusted
                logger.exception("the serving loop failed")
                with self._wake:
                    self._inbox.extendleft(reversed(arrivals))  # to be refused
                self._break(f"the server failed ({_one_line(error)})")
            if session.failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
                self._break(f"the engine failed {session.failures_in_a_row} times in a row")
        self._refuse_all(_SHUTTING_DOWN)
        self._count(generator.scheduler)

    def _wait(self, generator: TextGenerator) -> tuple[deque[_Arrival], list[Reply]]:
        """What has come since; waits for it where there is nothing else to do."""
        with self._wake:
            if generator.scheduler.idle or self._refusal is not None:
                self._wake.wait_for(lambda: self._inbox or self._gone or self._closing)
            arrivals, self._inbox = self._inbox, deque()
            gone, self._gone = self._gone, []
        return arrivals, gone

    def _accept(self, generator: TextGenerator, request: TextRequest | Exception, reply: Reply, arrival: float) -> None:
        self._metrics.totals[metrics.RECEIVED] += 1
        self._delivery.open(reply, lambda: self._lose(reply))
        if self._refusal is not None:
            self._refuse(reply, ErrorCode.unavailable, self._refusal)
            return
        try:
            if isinstance(request, Exception):
                raise request
            generation = generator.stream(request.prompt, request.parameters)
        except QueueFullError as error:
            self._refuse(reply, ErrorCode.unavailable, str(error))
        except RequestError as error:
            self._refuse(reply, ErrorCode.invalid, str(error))
        except Exception as error:  # a mistake of this program that one request has found
            logger.error("a request could not be read", exc_info=error)
            self._refuse(reply, ErrorCode.internal, f"the request could not be read: {_one_line(error)}")
        else:
            self._metrics.totals[metrics.PROMPT_TOKENS] += len(request.prompt)
            limits = [limit for limit in (request.timeout, self._options.max_seconds) if limit is not None]
            deadline = arrival + min(limits) if limits else None
            self._live[reply] = _Live(request, reply, arrival, deadline, generation, request.prefix)

    def _collect(self, generator: TextGenerator, began: float) -> None:
        """Pass on what the last step, which began at `began`, did."""
        now = time.monotonic()
        admitted = set(generator.scheduler.admitted)
        for live in list(self._live.values()):
            generation = live.generation
            if not live.admitted and generation.request_id in admitted:
                live.admitted = True
                self._metrics.observe(metrics.QUEUE_SECONDS, began - live.arrival)
            if not live.began and generation.token_ids:
                live.began = True
                self._metrics.observe(metrics.FIRST_TOKEN_SECONDS, now - live.arrival)
            if generation.ended:
                self._finish(live, now)
            elif live.request.stream:
                self._pass_on(live)

    def _pass_on(self, live: _Live) -> None:
        tokens = live.generation.token_ids[live.sent :] if live.request.return_token_ids else ()
        text = live.prefix + live.generation.take()
        live.prefix = ""
        if text or tokens:
            self._delivery.put(live.reply, Piece(text, list(tokens)))
            live.sent += len(tokens)

    def _finish(self, live: _Live, now: float) -> None:
        request, result = live.request, live.generation.result
        if result.error is not None:
            self._drop(live, "failed", ErrorCode.internal, f"a step of the engine failed: {_one_line(result.error)}")
            return
        piece = Piece(
            text=live.prefix + (live.generation.take() if request.stream else result.text),
            token_ids=list(result.token_ids[live.sent :]) if request.return_token_ids else [],
            finish_reason=result.finish_reason.value if request.return_finish_reason else None,
            num_input_tokens=result.prompt_tokens if request.return_num_input_tokens else None,
            num_output_tokens=len(result.token_ids) if request.return_num_output_tokens else None,
            final=True,
        )
        del self._live[live.reply]
        self._metrics.outcomes["finished"] += 1
        self._metrics.observe(metrics.REQUEST_SECONDS, now - live.arrival)
        if result.time_per_output_token is not None:
            self._metrics.observe(metrics.OUTPUT_TOKEN_SECONDS, result.time_per_output_token)
        self._delivery.put(live.reply, piece)

    def _expire(self) -> None:
        now = time.monotonic()
        for live in [live for live in self._live.values() if live.deadline is not None and live.deadline <= now]:
            tokens = len(live.generation.token_ids)
            message = f"the request's time was over after {now - live.arrival:.3f} s and {tokens} generated tokens"
            self._end(live, "timed_out", ErrorCode.unavailable, message)

    def _end(self, live: _Live, outcome: str, code: ErrorCode, message: str) -> None:
        """End a request before its answer is whole; its pages are free at once."""
        live.generation.close()
        if live.request.stream:
            self._pass_on(live)
        self._drop(live, outcome, code, message)

    def _drop(self, live: _Live, outcome: str, code: ErrorCode, message: str) -> None:
        del self._live[live.reply]
        self._metrics.outcomes[outcome] += 1
        self._delivery.fail(live.reply, code, message)

    def _refuse(self, reply: Reply, code: ErrorCode, message: str) -> None:
        self._metrics.outcomes["refused"] += 1
        self._delivery.fail(reply, code, message)

    def _break(self, reason: str) -> None:
        """Answer everybody and refuse all that comes."""
        if self._refusal is not None:
            return
        self._refusal = f"{reason}; the server has to be started again"
        logger.error("%s: no more requests are served", reason)
        for live in list(self._live.values()):
            with contextlib.suppress(Exception):  # whatever state the scheduler is in
                live.generation.close()
            self._drop(live, "failed", ErrorCode.internal, self._refusal)
        self._on_broken()

    def _refuse_all(self, message: str) -> None:
        for live in list(self._live.values()):
            self._end(live, "failed", ErrorCode.unavailable, message)
        with self._wake:
            arrivals, self._inbox = self._inbox, deque()
            self._closed = True
        for _, reply, _ in arrivals:
            self._metrics.totals[metrics.RECEIVED] += 1
            self._delivery.open(reply, lambda: None)
            self._refuse(reply, ErrorCode.unavailable, message)

    def _lose(self, reply: Reply) -> None:
        """The client of `reply` is gone; from the delivery's thread."""
        with self._wake:
            self._gone.append(reply)
            self._wake.notify()

    def _count(self, scheduler: Scheduler) -> None:
        self._metrics.totals |= {
            metrics.GENERATED_TOKENS: scheduler.generated_tokens,
            metrics.PREFILLED_TOKENS: scheduler.prefilled_tokens,
            metrics.REPLAYED_TOKENS: scheduler.replayed_tokens,
            metrics.PREEMPTIONS: scheduler.preemptions,
        }
        self._metrics.levels |= {
            metrics.RUNNING: scheduler.running_requests,
            metrics.WAITING: scheduler.queue_length,
            metrics.PAGES_IN_USE: scheduler.pages_in_use,
        }


def _warm_up(session: Session) -> None:
    """Run a prefill and decode steps; the pages that they wrote are free afterwards.  Raises what the session raises."""
    scheduler = Scheduler(session)
    scheduler.submit([0] * min(2, session.limits.max_seq_len - 1), SamplingParameters(max_tokens=3))
    while not scheduler.idle:
        for event in scheduler.step():
            if event.error is not None:
                raise event.error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
