"""Text in, text out: a tokenizer on either side of the scheduler."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from tokenizers import Tokenizer

from socket_trt.errors import RequestError
from socket_trt.runtime.detokenizer import Detokenizer, StopStrings
from socket_trt.runtime.sampling import SamplingParameters
from socket_trt.runtime.scheduler import FinishReason, Scheduler, TokenEvent
from socket_trt.runtime.session import Session

Prompt = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """A generation that has ended.

    text                   without the stop token or the stop string
    token_ids              all generated tokens, those of the stop included
    prompt_tokens          number of tokens of the prompt
    time_to_first_token    seconds from submission; None where no token came
    time_per_output_token  seconds, mean over the tokens after the first; None where there are none
    error                  what went wrong, where finish_reason is `error`
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    time_to_first_token: float | None
    time_per_output_token: float | None
    error: Exception | None = None


class Generation(Iterator[str]):
    """The text of one request as it comes; `result` once it has ended.

    Iterating over it runs the generator, and with it all requests that are live.  As a context manager it ends the
    request on leaving.
    """

    def __init__(self, generator: TextGenerator, request_id: int, prompt_tokens: int, parameters: SamplingParameters):
        """For `TextGenerator.stream`."""
        self.request_id = request_id  # as the scheduler counts
        self._generator = generator
        self._prompt_tokens = prompt_tokens
        self._detokenizer = Detokenizer(generator.tokenizer)
        self._stop_strings = StopStrings(parameters.stop)
        self._token_ids: list[int] = []
        self._text = ""
        self._unread = ""
        self._submitted = generator.clock()
        self._token_times: tuple[float, float] | None = None  # of the first and the last token
        self._result: GenerationResult | None = None

    @property
    def result(self) -> GenerationResult:
        """Raises RuntimeError while the generation has not ended."""
        if self._result is None:
            raise RuntimeError("the generation has not ended: iterate over it, or close it")
        return self._result

    @property
    def ended(self) -> bool:
        return self._result is not None

    @property
    def token_ids(self) -> Sequence[int]:
        """The tokens that have come so far."""
        return self._token_ids

    def take(self) -> str:
        """The text that has come since it was last read; runs nothing, for whoever calls `TextGenerator.advance`."""
        piece, self._unread = self._unread, ""
        return piece

    def __next__(self) -> str:
        while not self._unread and self._result is None:
            self._generator.advance()
        if not self._unread:
            raise StopIteration
        return self.take()

    def close(self) -> None:
        """Cancel the request where it has not ended; `result` then holds what was generated."""
        if self._result is None:
            self._generator.end(self.request_id)
            self._finish(FinishReason.cancelled)

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def accept(self, event: TokenEvent) -> None:
        """Take an event of this request; for `TextGenerator`."""
        if event.token is not None:
            now = self._generator.clock()
            self._token_times = (self._token_times[0] if self._token_times else now, now)
            self._token_ids.append(event.token)
            if event.finish_reason is not FinishReason.stop_token:
                self._show(self._stop_strings.push(self._detokenizer.push(event.token)))
        if event.finish_reason is not None:
            self._finish(event.finish_reason, event.error)
        elif self._stop_strings.matched:
            self._generator.end(self.request_id)
            self._finish(FinishReason.stop_string)

    def fail(self, error: Exception) -> None:
        """End the request with `error`; for `TextGenerator`."""
        self._detokenizer, self._stop_strings = Detokenizer(self._generator.tokenizer), StopStrings(())
        self._finish(FinishReason.error, error)

    def _show(self, text: str) -> None:
        self._text += text
        self._unread += text

    def _finish(self, reason: FinishReason, error: Exception | None = None) -> None:
        self._show(self._stop_strings.push(self._detokenizer.flush()) + self._stop_strings.flush())
        if self._stop_strings.matched and reason in (FinishReason.length, FinishReason.stop_token):
            reason = FinishReason.stop_string  # the last token, or what it left of a character, completed it
        to_first = per_token = None
        if self._token_times is not None:
            first, last = self._token_times
            to_first = first - self._submitted
            per_token = (last - first) / (len(self._token_ids) - 1) if len(self._token_ids) > 1 else None
        self._result = GenerationResult(
            text=self._text,
            token_ids=tuple(self._token_ids),
            finish_reason=reason,
            prompt_tokens=self._prompt_tokens,
            time_to_first_token=to_first,
            time_per_output_token=per_token,
            error=error,
        )


class TextGenerator:
    """Generates text on a session whose pool belongs to it; all live requests share its batch.

    Not thread-safe, as the scheduler is not.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        stop_token_ids: Sequence[int] = (),
        *,
        max_step_tokens: int = 2048,
        max_waiting: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`stop_token_ids`: the model's own; `max_step_tokens`, `max_waiting`: see `Scheduler`; `clock`: in seconds.

        Raises ConfigError for limits under which no request could be served.
        """
        self.tokenizer = tokenizer
        self.clock = clock
        self.scheduler = Scheduler(session, stop_token_ids, max_step_tokens=max_step_tokens, max_waiting=max_waiting)
        self._live: dict[int, Generation] = {}

    def stream(self, prompt: Prompt, parameters: SamplingParameters) -> Generation:
        """Submit `prompt` (text, to which the tokenizer adds its special tokens, or token ids) and return its text.

        Raises RequestError, now and not at the first piece, for a request that cannot be served (QueueFullError where
        it could be later).
        """
        tokens = self.tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt
        request_id = self.scheduler.submit(tokens, parameters)
        generation = Generation(self, request_id, len(tokens), parameters)
        self._live[request_id] = generation
        return generation

    def generate(
        self, prompts: Sequence[Prompt], parameters: SamplingParameters | Sequence[SamplingParameters]
    ) -> list[GenerationResult]:
        """Generate for all prompts together; results in their order.

        parameters  of all prompts, or one for each

        Raises RequestError where one of the requests cannot be served, before any runs.  A request whose step fails
        has a result with finish_reason `error`.
        """
        if isinstance(parameters, SamplingParameters):
            parameters = [parameters] * len(prompts)
        if len(parameters) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts, but sampling parameters for {len(parameters)}")
        generations: list[Generation] = []
        try:
            for prompt, own_parameters in zip(prompts, parameters, strict=True):
                generations.append(self.stream(prompt, own_parameters))
            for generation in generations:
                for _ in generation:
                    pass
        finally:
            for generation in generations:
                generation.close()
        return [generation.result for generation in generations]

    def advance(self) -> None:
        """Run one step and hand its events to their generations.

        Where an event's text cannot be made, its request ends with `error` and the others go on.
        """
        for event in self.scheduler.step():
            generation = self._live[event.request_id]
            try:
                generation.accept(event)
            except Exception as error:  # whatever a tokenizer raises, only its own request may suffer
                generation.fail(error)
                self.scheduler.cancel(event.request_id)
            if generation.ended:
                self._live.pop(event.request_id, None)

    def end(self, request_id: int) -> None:
        """End a request before its own end; for `Generation`."""
        self.scheduler.cancel(request_id)
        del self._live[request_id]
