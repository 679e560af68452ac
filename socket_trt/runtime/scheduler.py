"""In-flight batching: requests join and leave a running batch, tokens in, token events out.

A sequence is its known tokens, prompt and generated, of which the first `cached` are in the cache.  One rule computes
the rest, for a new request, a running one, and one that lost its pages:

- tokens of the prompt are computed in prefill chunks, rows of two tokens or more, attended densely;
- generated tokens are computed in decode rows, one token each, attended sparsely;
- the row of the last known token says what follows.

So a sequence's cache does not depend on what else was running: a prompt is never cut so that one token is left over
(it would be attended sparsely), and after a preemption the generated tokens are replayed by decode rows as they were
computed at first, several rows to a step, their logits unused.
"""

from __future__ import annotations

import dataclasses
import enum
import secrets
from collections import deque
from collections.abc import Sequence

import numpy as np

from socket_trt.errors import ConfigError, RequestError
from socket_trt.runtime.paged_cache import PagedCache
from socket_trt.runtime.sampling import MAX_SEED, SamplingParameters, sample
from socket_trt.runtime.session import FloatArray, Session, SessionLimits, StepBatch

# A remainder of 3 prompt tokens cannot be cut in two without leaving one token on its own.
_SMALLEST_SURE_CHUNK = 3


def check_length(tokens: int, limits: SessionLimits) -> None:
    """Raise RequestError where a prompt of so many tokens is longer than the engine's sequences may be."""
    if tokens >= limits.max_seq_len:
        raise RequestError(
            f"the prompt has {tokens} tokens; this engine's limit is {limits.max_seq_len}, prompt and generated tokens "
            "together"
        )


class QueueFullError(RequestError):
    """The request may be sent again later: as many wait as may."""


class FinishReason(str, enum.Enum):
    """Why a generation ended.  The scheduler itself knows no text and reports neither stop_string nor cancelled."""

    stop_token = "stop_token"
    stop_string = "stop_string"
    length = "length"
    cancelled = "cancelled"
    error = "error"


@dataclasses.dataclass(frozen=True)
class TokenEvent:
    """What a step did for one request.

    token          the generated token, a stop token included; None where the step failed
    finish_reason  set on the request's last event
    error          what went wrong, where finish_reason is `error`
    """

    request_id: int
    token: int | None
    finish_reason: FinishReason | None = None
    error: Exception | None = None


@dataclasses.dataclass(eq=False)
class _Sequence:
    """A live request.

    `tokens` are all known ones; the first `given` are the prompt's, the first `prompt_length` of these are prefilled.
    """

    id: int
    tokens: list[int]
    given: int
    prompt_length: int
    max_length: int
    parameters: SamplingParameters
    seed: int
    stop_token_ids: frozenset[int]
    cached: int = 0

    @property
    def pending(self) -> int:
        """Known tokens that are not in the cache; never 0."""
        return len(self.tokens) - self.cached

    @property
    def prefilling(self) -> bool:
        return self.cached < self.prompt_length

    def prefill_chunk(self, budget: int) -> int:
        """Tokens of the next prefill chunk within `budget`, 0 if none fits; leaves no single token behind."""
        remaining = self.prompt_length - self.cached
        chunk = min(remaining, budget)
        if remaining - chunk == 1:
            chunk -= 1
        # A prompt of one token is its whole sequence: attended sparsely or densely, it attends to itself.
        return chunk if chunk > 1 or chunk == self.prompt_length else 0


@dataclasses.dataclass(frozen=True)
class _Row:
    """`count` tokens of a sequence from position `past` on."""

    sequence: _Sequence
    past: int
    count: int

    @property
    def tokens(self) -> list[int]:
        return self.sequence.tokens[self.past : self.past + self.count]

    @property
    def says_what_follows(self) -> bool:
        return self.past + self.count == len(self.sequence.tokens)


class Scheduler:
    """Runs requests on a session, one step at a time.

    Requests are served in the order of their arrival: `_running` holds the earliest, `_waiting` all later ones.  A
    request is admitted when the pool has pages for all its known tokens, and takes one more whenever it has filled
    its last.  When none is left, the latest running request returns its pages and waits at the head of the queue.  The
    earliest request therefore keeps its pages and advances in every step: nothing starves, and nothing lives on
    preempting each other.

    Not thread-safe: a server calls it from one thread.

    Counters, since the beginning: `steps`, `prefilled_tokens` (prompt tokens computed, again after a preemption),
    `replayed_tokens` (known tokens computed in decode rows), `generated_tokens`, `preemptions`.  `admitted`: ids of the
    requests that the last step gave pages, those that come back from a preemption included.
    """

    def __init__(
        self,
        session: Session,
        stop_token_ids: Sequence[int] = (),
        *,
        max_step_tokens: int = 2048,
        max_waiting: int | None = None,
    ) -> None:
        """Serve requests on `session`, whose pool belongs to this scheduler alone.

        stop_token_ids   the model's own (end of text, end of turn)
        max_step_tokens  tokens a step may have; rows are limited by the session
        max_waiting      requests that may wait for admission; None: any number

        Raises ConfigError for limits under which no request could be served.
        """
        if max_step_tokens < _SMALLEST_SURE_CHUNK:
            raise ConfigError(f"max_step_tokens is {max_step_tokens}: expected at least {_SMALLEST_SURE_CHUNK}")
        if max_waiting is not None and max_waiting < 1:
            raise ConfigError(f"max_waiting is {max_waiting}: expected at least 1, or None for any number")
        self._session = session
        self._limits = session.limits
        self._stop_token_ids = frozenset(stop_token_ids)
        self._max_step_tokens = max_step_tokens
        self._max_waiting = max_waiting
        # However many decode, there is a row and a chunk left for the earliest prompt.
        self._max_running = min(self._limits.max_batch_size, max_step_tokens - _SMALLEST_SURE_CHUNK + 1)
        self._cache = PagedCache(self._limits)
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._next_id = 0
        self.steps = 0
        self.prefilled_tokens = 0
        self.replayed_tokens = 0
        self.generated_tokens = 0
        self.preemptions = 0
        self.admitted: list[int] = []

    @property
    def queue_length(self) -> int:
        """Requests that wait for admission, preempted ones included."""
        return len(self._waiting)

    @property
    def running_requests(self) -> int:
        """Requests that hold pages."""
        return len(self._running)

    @property
    def pages_in_use(self) -> int:
        return self._cache.pages_in_use

    @property
    def idle(self) -> bool:
        """No request is live: a step would do nothing."""
        return not self._waiting and not self._running

    def submit(self, prompt: Sequence[int], parameters: SamplingParameters, *, decoded: int = 0) -> int:
        """Queue a request and return its id.

        prompt      token ids, at least one and fewer than the session's max_seq_len
        parameters  `stop` is not looked at; a generation that reaches max_seq_len ends with `length`
        decoded     as many of the prompt's last tokens, not all, are computed in decode rows, as though they had been
                    generated: a question that is to be attended to sparsely

        Raises RequestError for a prompt that is empty, too long or no tokens of the model, and for a request that
        the pool could not hold even alone; QueueFullError where `max_waiting` requests wait already.
        """
        check_length(len(prompt), self._limits)
        tokens = [int(token) for token in prompt]
        if tokens and not 0 <= decoded < len(tokens):
            raise RequestError(
                f"decoded is {decoded}: expected 0 or more and fewer than the prompt's {len(tokens)} tokens"
            )
        max_length = min(len(tokens) + parameters.max_tokens, self._limits.max_seq_len)
        self._check(tokens, max_length)
        if self._max_waiting is not None and len(self._waiting) >= self._max_waiting:
            raise QueueFullError(f"{len(self._waiting)} requests wait already; try again later")
        model_stops = frozenset[int]() if parameters.ignore_eos else self._stop_token_ids
        sequence = _Sequence(
            id=self._next_id,
            tokens=tokens,
            given=len(tokens),
            prompt_length=len(tokens) - decoded,
            max_length=max_length,
            parameters=parameters,
            seed=secrets.randbelow(MAX_SEED + 1) if parameters.seed is None else parameters.seed,
            stop_token_ids=model_stops.union(parameters.stop_token_ids),
        )
        self._next_id += 1
        self._waiting.append(sequence)
        return sequence.id

    def cancel(self, request_id: int) -> bool:
        """End a request wherever it stands; its pages are free at once and it has no more events.

        Returns False where it is not live (finished, cancelled before, or never submitted).
        """
        for sequence in self._running:
            if sequence.id == request_id:
                self._release(sequence)
                return True
        for sequence in self._waiting:
            if sequence.id == request_id:
                self._waiting.remove(sequence)
                return True
        return False

    def step(self) -> list[TokenEvent]:
        """Run one step of the session and return what it did, at most one event a request.

        Where the session raises, the requests of the step end with `error` and the others go on.
        """
        self._extend_running()
        self._admit_waiting()
        rows = self._plan()
        if not rows:
            return []
        self.steps += 1
        try:
            logits = self._session.step(self._batch(rows))
        except Exception as error:  # whatever a backend raises, only its own requests may suffer
            return [self._fail(sequence, error) for sequence in dict.fromkeys(row.sequence for row in rows)]
        return self._advance(rows, logits)

    def _check(self, tokens: list[int], max_length: int) -> None:
        """Raise RequestError where the request could never be served."""
        if not tokens:
            raise RequestError("the prompt has no tokens")
        if min(tokens) < 0 or max(tokens) >= self._limits.vocabulary_size:
            raise RequestError(f"the prompt has token ids outside 0 ... {self._limits.vocabulary_size - 1}")
        # The last token is generated and never cached.
        room = self._cache.capacity * self._cache.page_size + 1 - len(tokens)
        if room < 1:
            raise RequestError(f"the prompt has {len(tokens)} tokens; the cache holds {len(tokens) + room - 1}")
        if max_length - len(tokens) > room:
            raise RequestError(
                f"{len(tokens)} prompt tokens leave room for {room} generated ones in the cache: "
                f"lower max_tokens to {room} or shorten the prompt"
            )

    def _extend_running(self) -> None:
        """Give every running sequence, the earliest first, pages for all its known tokens."""
        index = 0
        while index < len(self._running):
            sequence = self._running[index]
            if self._cache.grow(sequence.id, len(sequence.tokens)):
                index += 1
            else:
                self._preempt(self._running[-1])

    def _preempt(self, sequence: _Sequence) -> None:
        self._release(sequence)
        sequence.cached = 0
        self._waiting.appendleft(sequence)
        self.preemptions += 1

    def _admit_waiting(self) -> None:
        """Admit from the head of the queue only: nobody overtakes, so nobody starves."""
        self.admitted = []
        while self._waiting and len(self._running) < self._max_running:
            if not self._cache.grow(self._waiting[0].id, len(self._waiting[0].tokens)):
                break
            sequence = self._waiting.popleft()
            self._running.append(sequence)
            self.admitted.append(sequence.id)

    def _plan(self) -> list[_Row]:
        """Rows of the next step: one for every decode, then prefill chunks and replay by order of arrival."""
        tokens_left, rows_left = self._max_step_tokens, self._limits.max_batch_size
        decodes = sum(not sequence.prefilling for sequence in self._running)
        tokens_left -= decodes
        rows_left -= decodes
        rows: list[_Row] = []
        for sequence in self._running:
            if sequence.prefilling:
                chunk = sequence.prefill_chunk(tokens_left) if rows_left else 0
                if chunk:
                    rows.append(_Row(sequence, sequence.cached, chunk))
                    tokens_left -= chunk
                    rows_left -= 1
            else:
                replayed = min(sequence.pending - 1, tokens_left, rows_left)
                rows += [_Row(sequence, sequence.cached + i, 1) for i in range(replayed + 1)]
                tokens_left -= replayed
                rows_left -= replayed
        return rows

    def _batch(self, rows: list[_Row]) -> StepBatch:
        query_start = np.cumsum([0] + [row.count for row in rows], dtype=np.int32)
        return StepBatch(
            input_ids=np.concatenate([np.array(row.tokens, np.int32) for row in rows]),
            position_ids=np.concatenate([np.arange(row.past, row.past + row.count, dtype=np.int32) for row in rows]),
            logits_indices=query_start[1:] - np.int32(1),
            page_table=self._cache.page_table([row.sequence.id for row in rows]),
            past_length=np.array([row.past for row in rows], np.int32),
            query_start=query_start,
        )

    def _advance(self, rows: list[_Row], logits: FloatArray) -> list[TokenEvent]:
        """Account for the rows that were computed and sample where a row says what follows."""
        events = []
        for row, row_logits in zip(rows, logits, strict=True):
            sequence = row.sequence
            sequence.cached += row.count
            if row.past < sequence.prompt_length:
                self.prefilled_tokens += row.count
            elif not row.says_what_follows:
                self.replayed_tokens += row.count
            if row.says_what_follows:
                events.append(self._sample(sequence, row_logits))
        return events

    def _sample(self, sequence: _Sequence, logits: FloatArray) -> TokenEvent:
        index = len(sequence.tokens) - sequence.given
        try:
            token = sample(logits, sequence.parameters, sequence.seed, index)
        except FloatingPointError as error:
            return self._fail(sequence, error)
        sequence.tokens.append(token)
        self.generated_tokens += 1
        reason = None
        if token in sequence.stop_token_ids:
            reason = FinishReason.stop_token
        elif len(sequence.tokens) == sequence.max_length:
            reason = FinishReason.length
        if reason is not None:
            self._release(sequence)
        return TokenEvent(sequence.id, token, reason)

    def _fail(self, sequence: _Sequence, error: Exception) -> TokenEvent:
        self._release(sequence)
        return TokenEvent(sequence.id, None, FinishReason.error, error)

    def _release(self, sequence: _Sequence) -> None:
        """Take a running sequence out of the batch and its pages back."""
        self._running.remove(sequence)
        self._cache.free(sequence.id)
