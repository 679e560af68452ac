from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from socket_trt.errors import ConfigError, RequestError
from socket_trt.runtime.sampling import SamplingParameters
from socket_trt.runtime.scheduler import FinishReason, QueueFullError, Scheduler, TokenEvent
from socket_trt.runtime.session import FloatArray, SessionLimits, StepBatch
from tests.fake_session import FakeSession, tokens_alone

VOCABULARY = 31
EOS = 7
LIMITS = SessionLimits(vocabulary_size=VOCABULARY, page_size=4, num_pages=65, max_batch_size=4, max_seq_len=48)


class Harness:
    """A scheduler on a fake session, the tokens each request was given, and what it should be given."""

    def __init__(self, limits: SessionLimits = LIMITS, max_step_tokens: int = 16, **options: Any) -> None:
        self.session = FakeSession(limits, max_step_tokens, options.pop("fail_at", ()))
        self.scheduler = Scheduler(self.session, [EOS], max_step_tokens=max_step_tokens, **options)
        self.requests: dict[int, tuple[list[int], SamplingParameters, int]] = {}
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.last: dict[int, TokenEvent] = {}

    def submit(self, prompt: list[int], decoded: int = 0, **parameters: Any) -> int:
        wanted = SamplingParameters(**{"max_tokens": 8, "temperature": 1.0, "seed": 1, **parameters})
        request_id = self.scheduler.submit(prompt, wanted, decoded=decoded)
        self.requests[request_id] = (prompt, wanted, decoded)
        return request_id

    def step(self) -> list[TokenEvent]:
        events = self.scheduler.step()
        assert len({event.request_id for event in events}) == len(events)
        for event in events:
            assert event.request_id not in self.last, "an event after the last"
            if event.token is not None:
                self.tokens[event.request_id].append(event.token)
            if event.finish_reason is not None:
                self.last[event.request_id] = event
        return events

    def run(self, most_steps: int = 5000) -> None:
        for _ in range(most_steps):
            if self.scheduler.idle:
                break
            before = self.scheduler.steps
            self.step()
            assert self.scheduler.steps == before + 1, "nothing ran while requests were live"
        assert self.scheduler.idle, "requests are left over"
        assert (self.scheduler.pages_in_use, self.scheduler.queue_length, self.scheduler.running_requests) == (0, 0, 0)

    def alone(self, request_id: int) -> list[int]:
        prompt, parameters, decoded = self.requests[request_id]
        limits = self.session.limits
        return tokens_alone(
            prompt,
            parameters,
            vocabulary_size=limits.vocabulary_size,
            max_seq_len=limits.max_seq_len,
            stop_token_ids=[EOS],
            decoded=decoded,
        )

    def check_finished(self, request_id: int) -> None:
        expected = self.alone(request_id)
        assert self.tokens[request_id] == expected
        _, parameters, _ = self.requests[request_id]
        stops = {*parameters.stop_token_ids, *(() if parameters.ignore_eos else (EOS,))}
        reason = FinishReason.stop_token if expected[-1] in stops else FinishReason.length
        assert self.last[request_id].finish_reason is reason
        assert self.last[request_id].error is None

    def row_counts(self) -> list[list[int]]:
        """Tokens of each row of each step."""
        return [np.diff(batch.query_start).tolist() for batch in self.session.batches]


@st.composite
def pools(draw: st.DrawFn) -> tuple[SessionLimits, int]:
    """Limits of a small session, and max_step_tokens: from pools for one request to pools for all."""
    page_size = draw(st.sampled_from([1, 2, 4, 8]))
    limits = SessionLimits(
        vocabulary_size=VOCABULARY,
        page_size=page_size,
        num_pages=draw(st.sampled_from([16, 24, 32, 80])) // page_size + 1,
        max_batch_size=draw(st.integers(1, 6)),
        max_seq_len=draw(st.integers(8, 40)),
    )
    return limits, draw(st.integers(3, 24))


REQUESTS = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12),
        "max_tokens": st.integers(1, 20),
        "seed": st.integers(0, 3),
        "temperature": st.sampled_from([0.0, 1.0]),
        "ignore_eos": st.booleans(),
        "stop_token_ids": st.sampled_from([(), (3,), (EOS, 11)]),
        "decoded": st.integers(0, 12),
    }
)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), REQUESTS),
        st.tuples(st.just("submit"), REQUESTS),
        st.tuples(st.just("step"), st.integers(1, 6)),
        st.tuples(st.just("cancel"), st.integers(0, 12)),
    ),
    min_size=6,
    max_size=30,
)


@settings(max_examples=600, derandomize=True, deadline=None)
@given(pool=pools(), actions=ACTIONS)
def test_any_interleaving_gives_each_request_the_tokens_it_gets_alone(
    pool: tuple[SessionLimits, int], actions: list[tuple[str, Any]]
) -> None:
    limits, max_step_tokens = pool
    harness = Harness(limits, max_step_tokens)
    cancelled: set[int] = set()
    for action, argument in actions:
        if action == "submit":
            room = (limits.num_pages - 1) * limits.page_size + 1
            argument["decoded"] %= len(argument["prompt"])
            length = min(len(argument["prompt"]) + argument["max_tokens"], limits.max_seq_len)
            if len(argument["prompt"]) < limits.max_seq_len and length <= room:
                harness.submit(**argument)
            else:
                with pytest.raises(RequestError):
                    harness.submit(**argument)
        elif action == "step":
            for _ in range(argument):
                harness.step()
        else:
            live = argument in harness.requests and argument not in harness.last and argument not in cancelled
            assert harness.scheduler.cancel(argument) is live
            if live:
                cancelled.add(argument)
    harness.run()
    for request_id in harness.requests:
        if request_id in cancelled:
            given_tokens = harness.tokens[request_id]
            assert given_tokens == harness.alone(request_id)[: len(given_tokens)]
            assert request_id not in harness.last
        else:
            harness.check_finished(request_id)
    assert harness.scheduler.generated_tokens == sum(map(len, harness.tokens.values()))


@settings(max_examples=100, derandomize=True, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 12), min_size=2, max_size=6),
    spare_pages=st.integers(0, 6),
    max_step_tokens=st.integers(6, 20),
    page_size=st.sampled_from([1, 2, 4]),
)
def test_a_pool_that_is_too_small_preempts_and_changes_nothing(
    prompts: list[int], spare_pages: int, max_step_tokens: int, page_size: int
) -> None:
    """Room for little more than the longest request, and no stop: much preemption, bounded work."""
    most = 12
    pages = -(-(max(prompts) + most - 1) // page_size) + spare_pages
    limits = dataclasses.replace(LIMITS, page_size=page_size, num_pages=pages + 1)
    harness = Harness(limits, max_step_tokens)
    for seed, length in enumerate(prompts):
        harness.submit([(seed + i) % VOCABULARY for i in range(length)], max_tokens=most, seed=seed, ignore_eos=True)
    # One after the other would take: the chunks of each prompt, then a step a token.
    harness.run(most_steps=sum(length + most for length in prompts))
    for request_id in harness.requests:
        harness.check_finished(request_id)


def test_decodes_come_first_and_prefill_takes_the_rest_of_the_budget() -> None:
    harness = Harness(max_step_tokens=8)
    harness.submit([1, 2], max_tokens=8, ignore_eos=True)
    harness.step()
    harness.submit([3] * 12, max_tokens=4, ignore_eos=True)
    harness.submit([4] * 4, max_tokens=4, ignore_eos=True)
    for _ in range(4):
        harness.step()
    # 7 of 12, then 5 of 12 and 2 of 4, then the other 2, then three decodes.
    assert harness.row_counts() == [[2], [1, 7], [1, 5, 2], [1, 1, 2], [1, 1, 1]]
    harness.run()


@pytest.mark.parametrize("length", range(2, 30))
@pytest.mark.parametrize("max_step_tokens", [3, 4, 5, 8])
def test_no_prefill_chunk_has_one_token(length: int, max_step_tokens: int) -> None:
    harness = Harness(max_step_tokens=max_step_tokens)
    request_id = harness.submit(list(range(length)), max_tokens=1)
    harness.run()
    counts = [count for [count] in harness.row_counts()]
    assert min(counts) >= 2
    assert sum(counts) == length
    assert len(counts) <= -(-length // (max_step_tokens - 1))
    harness.check_finished(request_id)


def test_a_prompt_of_one_token_is_a_row_of_one_token() -> None:
    harness = Harness()
    request_id = harness.submit([5], max_tokens=3, ignore_eos=True)
    harness.run()
    assert harness.row_counts() == [[1], [1], [1]]
    harness.check_finished(request_id)


def test_the_end_of_a_prompt_may_be_computed_in_decode_rows() -> None:
    harness = Harness(max_step_tokens=8)
    request_id = harness.submit([1, 2, 3, 4, 5, 6], decoded=2, max_tokens=2, ignore_eos=True)
    harness.run()
    assert harness.row_counts() == [[4], [1, 1], [1]]
    harness.check_finished(request_id)


@pytest.mark.parametrize("decoded", [-1, 3, 4])
def test_a_prompt_is_not_computed_in_decode_rows_from_its_beginning(decoded: int) -> None:
    with pytest.raises(RequestError, match="fewer than the prompt's 3 tokens"):
        Harness().submit([1, 2, 3], decoded=decoded)


def test_preemption_takes_the_latest_and_replays_its_tokens_in_decode_rows() -> None:
    limits = dataclasses.replace(LIMITS, num_pages=6)  # 5 pages of 4 tokens
    harness = Harness(limits, max_step_tokens=8)
    first = harness.submit([1] * 4, max_tokens=10, ignore_eos=True)
    second = harness.submit([2] * 4, max_tokens=9, ignore_eos=True)
    third = harness.submit([3] * 2, max_tokens=2, ignore_eos=True)
    harness.run()
    # The second had generated 5 tokens when the first needed the last page; 4 of them were cached.
    assert harness.scheduler.preemptions == 1
    assert list(harness.last) == [third, first, second]
    replay = harness.session.batches[-6:]
    assert [np.diff(batch.query_start).tolist() for batch in replay][:2] == [[4], [1, 1, 1, 1]]
    assert replay[1].past_length.tolist() == [4, 5, 6, 7]
    assert harness.scheduler.replayed_tokens == 4
    assert harness.scheduler.prefilled_tokens == 4 + 4 + 2 + 4
    for request_id in harness.requests:
        harness.check_finished(request_id)


def test_a_preempted_request_comes_before_those_that_were_waiting() -> None:
    harness = Harness(dataclasses.replace(LIMITS, num_pages=6), max_step_tokens=8)  # 5 pages of 4 tokens
    first, second = (harness.submit([n] * 4, max_tokens=9, ignore_eos=True) for n in (1, 2))
    waiting = harness.submit([3] * 13, max_tokens=2, ignore_eos=True)  # 4 pages
    harness.step()
    assert (harness.scheduler.running_requests, harness.scheduler.queue_length) == (2, 1)
    harness.run()
    # The second loses its pages to the first.  When that ends, there is room for either of the others, not for both.
    assert harness.scheduler.preemptions == 1
    assert list(harness.last) == [first, second, waiting]
    for request_id in harness.requests:
        harness.check_finished(request_id)


def test_requests_are_admitted_in_the_order_of_their_arrival() -> None:
    """A small request that would fit does not overtake a large one that has to wait."""
    limits = dataclasses.replace(LIMITS, num_pages=9)
    harness = Harness(limits, max_step_tokens=64)
    harness.submit([1] * 20, max_tokens=3, ignore_eos=True)
    large = harness.submit([2] * 28, max_tokens=1)
    small = harness.submit([3] * 2, max_tokens=1)
    harness.step()
    assert (harness.scheduler.running_requests, harness.scheduler.queue_length) == (1, 2)
    harness.run()
    finished = list(harness.last)
    assert finished.index(large) <= finished.index(small)


def test_a_stream_of_late_requests_does_not_starve_an_early_one() -> None:
    limits = dataclasses.replace(LIMITS, num_pages=13, max_batch_size=3)
    harness = Harness(limits, max_step_tokens=5)
    early = harness.submit([1] * 20, max_tokens=20, ignore_eos=True)
    for step in range(60):
        harness.submit([2, step % VOCABULARY], max_tokens=12, ignore_eos=True)
        harness.step()
        if early in harness.last:
            break
    # 20 tokens in chunks of 3 at least, then a token a step.
    assert step < 7 + 20
    harness.run()
    for request_id in harness.requests:
        harness.check_finished(request_id)


@pytest.mark.parametrize("max_step_tokens", range(3, 9))
def test_a_step_of_few_tokens_keeps_room_for_the_chunk_of_a_prompt(max_step_tokens: int) -> None:
    """A prompt of three tokens cannot be cut: where the decodes leave two, requests after it would take them."""
    harness = Harness(dataclasses.replace(LIMITS, max_batch_size=8), max_step_tokens)
    decoding = max_step_tokens - 2
    for i in range(decoding):
        harness.submit([i], max_tokens=5 + i, ignore_eos=True)
    prompt = harness.submit([9, 8, 7], max_tokens=4, ignore_eos=True)
    for step in range(12):
        harness.submit([step], max_tokens=20, ignore_eos=True)
        harness.step()
        assert harness.scheduler.running_requests <= max_step_tokens - 2
    # The earliest has its last token in the fifth step; the prompt runs in the next, beside the others' decodes.
    counts = harness.row_counts()
    assert counts[:5] == [[1] * decoding] * 5
    assert counts[5] == [1] * (decoding - 1) + [3]
    harness.run()
    harness.check_finished(prompt)


def test_cancelling_returns_the_pages_at_once_wherever_the_request_stands() -> None:
    limits = dataclasses.replace(LIMITS, num_pages=11, max_batch_size=2)
    harness = Harness(limits, max_step_tokens=8)
    decoding, prefilling, waiting = (harness.submit([n] * 12, ignore_eos=True) for n in (1, 2, 3))
    for _ in range(2):
        harness.step()
    assert harness.scheduler.running_requests == 2
    assert harness.scheduler.queue_length == 1
    in_use = harness.scheduler.pages_in_use
    assert harness.scheduler.cancel(prefilling)
    assert harness.scheduler.pages_in_use == in_use - 3
    assert harness.scheduler.cancel(waiting)
    assert harness.scheduler.queue_length == 0
    assert harness.scheduler.cancel(decoding)
    assert harness.scheduler.pages_in_use == 0
    assert harness.scheduler.idle
    assert not harness.scheduler.cancel(decoding)
    assert not harness.scheduler.cancel(999)
    assert harness.step() == []


@pytest.mark.parametrize("fail_at", range(6))
def test_a_step_that_raises_ends_its_own_requests_only(fail_at: int) -> None:
    limits = dataclasses.replace(LIMITS, num_pages=13)
    harness = Harness(limits, max_step_tokens=6, fail_at=[fail_at])
    for seed in range(6):
        harness.submit([seed + 1] * 8, max_tokens=6, seed=seed, ignore_eos=True)
    while harness.scheduler.steps <= fail_at:
        events = harness.step()
    rows = harness.session.batches[fail_at]
    assert {event.finish_reason for event in events} == {FinishReason.error}
    assert all(isinstance(event.error, RuntimeError) and event.token is None for event in events)
    assert len(events) == len(set(rows.page_table[:, 0].tolist()))
    harness.run()
    failed = {event.request_id for event in events}
    for request_id in harness.requests:
        if request_id in failed:
            expected = harness.alone(request_id)
            assert harness.tokens[request_id] == expected[: len(harness.tokens[request_id])]
        else:
            harness.check_finished(request_id)
    assert len(failed) < len(harness.requests)


class NotANumber(FakeSession):
    """Logits of the first row are NaN in the third step."""

    def step(self, batch: StepBatch) -> FloatArray:
        logits = super().step(batch)
        if len(self.batches) == 3:
            logits[0] = np.nan
        return logits


def test_logits_that_are_not_finite_end_their_own_request_only() -> None:
    harness = Harness()
    harness.scheduler = Scheduler(NotANumber(LIMITS), [EOS], max_step_tokens=16)
    first, second = (harness.submit([n, n], ignore_eos=True) for n in (1, 2))
    harness.run()
    assert harness.last[first].finish_reason is FinishReason.error
    assert isinstance(harness.last[first].error, FloatingPointError)
    assert harness.tokens[first] == harness.alone(first)[:2]
    harness.check_finished(second)


def test_the_sequence_limit_ends_a_generation() -> None:
    harness = Harness()
    request_id = harness.submit([1] * 45, max_tokens=100, ignore_eos=True)
    harness.run()
    assert len(harness.tokens[request_id]) == 3
    harness.check_finished(request_id)


def test_without_a_seed_each_request_has_its_own_stream() -> None:
    harness = Harness()
    first, second = (harness.submit([1, 2], seed=None, max_tokens=20, ignore_eos=True) for _ in range(2))
    harness.run()
    assert harness.tokens[first] != harness.tokens[second]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [
        ([], 1, "the prompt has no tokens"),
        ([0, VOCABULARY], 1, r"token ids outside 0 \.\.\. 30"),
        ([-1], 1, r"token ids outside 0 \.\.\. 30"),
        ([1] * 48, 1, "the prompt has 48 tokens; this engine's limit is 48"),
        ([1] * 21, 1, "the prompt has 21 tokens; the cache holds 20"),
        ([1] * 16, 6, "lower max_tokens to 5 or shorten the prompt"),
    ],
)
def test_requests_that_can_never_be_served_are_refused(prompt: list[int], max_tokens: int, message: str) -> None:
    harness = Harness(dataclasses.replace(LIMITS, num_pages=6))  # 20 tokens
    with pytest.raises(RequestError, match=message) as caught:
        harness.submit(prompt, max_tokens=max_tokens)
    assert "\n" not in str(caught.value)
    assert harness.scheduler.idle


@pytest.mark.parametrize(("length", "max_tokens"), [(20, 1), (16, 5)])
def test_the_largest_requests_that_fit_are_served(length: int, max_tokens: int) -> None:
    harness = Harness(dataclasses.replace(LIMITS, num_pages=6))
    request_id = harness.submit([1] * length, max_tokens=max_tokens, ignore_eos=True)
    harness.run()
    harness.check_finished(request_id)


def test_the_queue_limit() -> None:
    harness = Harness(dataclasses.replace(LIMITS, max_batch_size=1), max_waiting=2)
    first = harness.submit([1, 2])
    harness.submit([1, 2])
    with pytest.raises(QueueFullError, match="2 requests wait already"):
        harness.submit([1, 2])
    harness.step()  # admits the first
    harness.submit([1, 2])
    harness.run()
    harness.check_finished(first)


@pytest.mark.parametrize(("option", "value"), [("max_step_tokens", 2), ("max_waiting", 0)])
def test_limits_under_which_nothing_could_be_served_are_refused(option: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{option} is {value}"):
        Scheduler(FakeSession(LIMITS), **{option: value})


def test_a_step_says_whom_it_admitted() -> None:
    harness = Harness(limits=dataclasses.replace(LIMITS, num_pages=8), max_step_tokens=16)
    first = harness.submit([1] * 8, max_tokens=14, ignore_eos=True)
    second = harness.submit([2] * 8, max_tokens=14, ignore_eos=True)
    harness.step()
    assert harness.scheduler.admitted == [first, second]
    again = []
    while not harness.scheduler.idle:
        harness.step()
        again += harness.scheduler.admitted
    assert again == [second] * harness.scheduler.preemptions != []
