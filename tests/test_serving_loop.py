"""The serving loop, on a session whose answers say what they were computed from."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from socket_trt.errors import ConfigError, RequestError
from socket_trt.models.tiny import END_ID
from socket_trt.runtime.generator import TextGenerator
from socket_trt.runtime.onnxruntime_session import OnnxRuntimeSession
from socket_trt.runtime.open import max_step_tokens, open_session
from socket_trt.runtime.session import FloatArray, SessionLimits, StepBatch
from socket_trt.serving import metrics
from socket_trt.serving.delivery import Delivery
from socket_trt.serving.loop import LoopOptions, ServingLoop
from socket_trt.serving.metrics import Metrics
from socket_trt.serving.reply import ErrorCode, Piece
from tests.serving import (
    LIMITS,
    PATIENCE,
    TOKENIZER,
    Client,
    GatedSession,
    Harness,
    Recorder,
    alone,
    assert_everything_is_counted,
    request,
    serving,
    wait_until,
)
from tests.tensorrt_fixtures import FakeMachine


def test_every_request_of_a_crowd_gets_what_it_gets_alone() -> None:
    """Ragged requests from several threads, in a pool that preempts, some of them cancelled and some bad."""
    rng = random.Random(1)
    limits = SessionLimits(vocabulary_size=260, page_size=4, num_pages=22, max_batch_size=4, max_seq_len=64)
    wanted = [
        request(
            [rng.randrange(256) for _ in range(rng.randint(1, 30))],
            max_tokens=rng.randint(1, 30),
            seed=seed,
            stream=rng.random() < 0.7,
        )
        for seed in range(120)
    ]
    cancelled, bad = set(range(5, 120, 10)), set(range(7, 120, 20))
    clients: dict[int, Client] = {}
    with serving(GatedSession(limits)) as harness:

        def send(start: int) -> None:
            for index in range(start, len(wanted), 3):
                clients[index] = harness.submit(RequestError("bad") if index in bad else wanted[index])
                clients[index].gone = index in cancelled

        threads = [threading.Thread(target=send, args=(start,)) for start in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for client in clients.values():
            client.wait()
    for index, client in clients.items():
        expected = alone(wanted[index], limits)
        if index in bad:
            assert client.error == (ErrorCode.invalid, "bad")
        elif client.error is not None:
            assert index in cancelled
            assert client.error[0] is ErrorCode.cancelled
            assert client.token_ids == expected[: len(client.token_ids)]
        else:
            assert client.token_ids == expected
            shown = expected[:-1] if expected[-1] == END_ID else expected
            assert client.text == TOKENIZER.decode(shown, skip_special_tokens=True)
    assert_everything_is_counted(harness)
    recorder = harness.recorder
    assert recorder[metrics.ENDED, "refused"].total == len(bad)
    assert recorder[metrics.ENDED, "cancelled"].total > 0
    assert recorder[metrics.PREEMPTIONS].total > 0
    assert recorder[metrics.GENERATED_TOKENS].total >= sum(len(client.token_ids) for client in clients.values())
    answered = [client for client in clients.values() if client.error is None]
    assert recorder[metrics.ENDED, "finished"].total == len(answered)


def let_the_first_part_pass(harness: Harness, client: Client) -> None:
    """Run steps until `client` has got something, then all that come."""
    while not client.pieces:
        harness.session.gate.release()
        harness.session.wait_for_step()
        time.sleep(0.05)
    harness.session.gated = False
    harness.session.gate.release()


def test_a_stream_and_a_whole_answer_say_the_same() -> None:
    with serving(GatedSession(gated=True)) as harness:
        stream = harness.submit(request(max_tokens=20))
        let_the_first_part_pass(harness, stream)
        stream.wait()
        whole = harness.submit(request(max_tokens=20, stream=False)).wait()
        terse = harness.submit(
            request(
                stream=False,
                return_token_ids=False,
                return_finish_reason=False,
                return_num_input_tokens=False,
                return_num_output_tokens=False,
                max_tokens=20,
                prefix="Hello",
            )
        ).wait()
        prefixed = harness.submit(request(prefix="Hello", max_tokens=20)).wait()
    tokens = alone(request(max_tokens=20))
    assert len(stream.pieces) > 1
    assert len(whole.pieces) == 1
    for client in (stream, whole):
        assert client.token_ids == tokens
        last = client.pieces[-1]
        assert (last.num_input_tokens, last.num_output_tokens) == (6, len(tokens))
        assert last.finish_reason == ("stop_token" if tokens[-1] == END_ID else "length")
        assert all(piece.finish_reason is None for piece in client.pieces[:-1])
    assert stream.text == whole.text
    assert terse.pieces == [Piece(text="Hello" + whole.text, final=True)]
    assert prefixed.pieces[0].text.startswith("Hello")
    assert prefixed.text == "Hello" + whole.text


def test_without_a_tokenizer_token_ids_are_answered() -> None:
    with serving(tokenizer=None) as harness:
        client = harness.submit(request("Hello", max_tokens=20)).wait()
    assert client.token_ids == alone(request("Hello", max_tokens=20))
    assert client.text == ""


def test_a_stream_without_token_ids_has_no_empty_pieces() -> None:
    with serving(GatedSession(gated=True)) as harness:
        client = harness.submit(request("你好", return_token_ids=False, max_tokens=30, ignore_eos=True))
        let_the_first_part_pass(harness, client)
        client.wait()
    assert len(client.pieces) > 1
    assert all(piece.text for piece in client.pieces[:-1])


def test_a_cancelled_request_gives_its_pages_back_before_the_next_step() -> None:
    session = GatedSession(gated=True)
    with serving(session) as harness:
        staying = harness.submit(request("stays", max_tokens=8, ignore_eos=True))
        leaving = harness.submit(request("leaves", max_tokens=40, ignore_eos=True))
        wait_for_rows(session, 2)
        leaving.gone = True
        wait_until(lambda: leaving in harness.loop._gone)  # the delivery sees it beside the step
        session.gate.release()
        session.wait_for_step()
        assert leaving.wait().error == (ErrorCode.cancelled, "cancelled by the client")
        session.gate.release()  # the first step after the one during which the client left
        session.wait_for_step()
        assert [len(batch.past_length) for batch in session.batches[-2:]] == [2, 1]
        session.gated = False
        session.gate.release()
        assert staying.wait().token_ids == alone(request("stays", max_tokens=8, ignore_eos=True))
    assert_everything_is_counted(harness)


def wait_for_rows(session: GatedSession, rows: int) -> None:
    """Run steps until one of `rows` sequences has run, and the next one waits at the gate."""
    session.wait_for_step()
    while len(session.batches[-1].past_length) != rows:
        session.gate.release()
        session.wait_for_step()


def test_a_waiting_request_can_be_cancelled() -> None:
    session = GatedSession(gated=True)
    with serving(session) as harness:
        first = [harness.submit(request(f"run {i}", max_tokens=5)) for i in range(4)]
        waiting = harness.submit(request("waits"))
        wait_for_rows(session, 4)
        waiting.gone = True
        wait_until(lambda: waiting in harness.loop._gone)  # the delivery sees it beside the step
        session.gated = False
        session.gate.release()
        assert waiting.wait().error is not None
        assert all(client.wait().error is None for client in first)
    assert_everything_is_counted(harness)


def test_a_step_that_raises_fails_its_own_requests_and_leaves_the_cache_whole() -> None:
    session = GatedSession(fail_at=[4], gated=True)
    with serving(session) as harness:
        failing = [harness.submit(request(f"fails {i}", max_tokens=30, ignore_eos=True)) for i in range(2)]
        wait_for_rows(session, 2)
        later = harness.submit(request("comes later"))
        session.gated = False
        session.gate.release()
        for client in failing:
            code, message = client.wait().error or (None, "")
            assert code is ErrorCode.internal
            assert message == "a step of the engine failed: the device fell off the bus"
        after = [harness.submit(request(f"after {i}", seed=i)).wait() for i in range(6)]
        later.wait()
    for i, client in enumerate(after):
        assert client.token_ids == alone(request(f"after {i}", seed=i))
    assert harness.recorder[metrics.FAILED_STEPS].total == 1
    assert harness.recorder[metrics.ENDED, "failed"].total >= 2
    assert_everything_is_counted(harness)


def test_a_session_that_fails_again_and_again_is_given_up() -> None:
    broken = threading.Event()
    with serving(GatedSession(fail_at=range(1000)), on_broken=broken.set) as harness:
        clients = [harness.submit(request()).wait() for _ in range(3)]
        assert all(client.error and client.error[0] is ErrorCode.internal for client in clients)
        assert broken.wait(PATIENCE)
        code, message = harness.submit(request()).wait().error or (None, "")
        assert code is ErrorCode.unavailable
        assert "failed 3 times in a row" in message
        assert harness.recorder[metrics.STEPS].total <= 3
    assert_everything_is_counted(harness)


def test_failures_with_successes_between_them_are_survived() -> None:
    def unexpected() -> None:
        raise AssertionError("given up")

    with serving(GatedSession(fail_at=range(0, 100, 2)), on_broken=unexpected) as harness:
        for i in range(20):
            harness.submit(request(max_tokens=1 + i % 3)).wait()
        assert harness.submit(request()).wait().error is not None
    assert_everything_is_counted(harness)


def test_a_mistake_of_the_loop_itself_answers_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = threading.Event()
    with serving(GatedSession(gated=True), on_broken=broken.set) as harness:
        clients = [harness.submit(request(f"{i}")) for i in range(3)]
        harness.session.wait_for_step()

        def advance(self: TextGenerator) -> None:
            raise KeyError("a mistake")

        monkeypatch.setattr(TextGenerator, "advance", advance)
        harness.session.gate.release(1000)
        for client in clients:
            assert client.wait().error == (
                ErrorCode.internal,
                "the server failed ('a mistake'); the server has to be started again",
            )
        assert broken.is_set()
        assert (harness.submit(request()).wait().error or ("",))[0] is ErrorCode.unavailable
    assert_everything_is_counted(harness)


def test_a_mistake_while_requests_arrive_answers_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    broken: list[bool] = []
    session = GatedSession(gated=True)
    with serving(session, on_broken=lambda: broken.append(True)) as harness:
        first = harness.submit(request("first"))
        session.wait_for_step()
        clients = [harness.submit(request(f"{i}")) for i in range(5)]
        put = Delivery.open

        def fail_once(self: Delivery, reply: Client, on_cancelled: Callable[[], None]) -> None:
            put(self, reply, on_cancelled)
            if reply is clients[2]:
                monkeypatch.undo()
                raise OSError("no memory")

        monkeypatch.setattr(Delivery, "open", fail_once)
        session.gate.release(1000)
        for client in (first, *clients[:2], *clients[3:]):
            assert "no memory" in (client.wait().error or ("", ""))[1]
    assert broken == [True]


def test_metrics_are_final_soon_after_the_last_answer() -> None:
    with serving() as harness:
        for i in range(5):
            tokens = len(harness.submit(request(seed=i, ignore_eos=True)).wait().token_ids)
            assert tokens == 12
            wait_until(lambda total=12 * (i + 1): harness.recorder[metrics.GENERATED_TOKENS].total == total)
            wait_until(lambda: harness.recorder[metrics.PAGES_IN_USE].level == 0)
            assert harness.recorder[metrics.ENDED, "finished"].total == i + 1


def test_deadlines() -> None:
    session = GatedSession(gated=True)
    with serving(session, max_seconds=600.0) as harness:
        late = harness.submit(request("late", timeout=0.01, max_tokens=40, ignore_eos=True))
        other = harness.submit(request("other", timeout=500.0))
        wait_for_rows(session, 2)
        time.sleep(0.02)
        session.gated = False
        session.gate.release()
        code, message = late.wait().error or (None, "")
        assert code is ErrorCode.unavailable
        assert "time was over after 0." in message
        assert "generated tokens" in message
        assert late.token_ids == alone(request("late", max_tokens=40, ignore_eos=True))[: len(late.token_ids)]
        assert other.wait().token_ids == alone(request("other"))
    assert harness.recorder[metrics.ENDED, "timed_out"].total == 1
    assert_everything_is_counted(harness)


def test_the_servers_own_limit_holds_where_a_request_has_none() -> None:
    session = GatedSession(gated=True)
    with serving(session, max_seconds=0.01) as harness:
        late = harness.submit(request(max_tokens=40, ignore_eos=True))
        session.wait_for_step()
        time.sleep(0.02)
        session.gate.release(1000)
        assert "time was over" in (late.wait().error or ("", ""))[1]


def test_the_queue_limit() -> None:
    session = GatedSession(gated=True)
    with serving(session, max_waiting=2) as harness:
        running = harness.submit(request("r0"))
        session.wait_for_step()
        waiting = [harness.submit(request(f"w{i}")) for i in range(3)]
        session.gate.release()
        session.wait_for_step()
        assert waiting[2].wait().error == (ErrorCode.unavailable, "2 requests wait already; try again later")
        session.gated = False
        session.gate.release()
        for client in (running, *waiting[:2]):
            assert client.wait().error is None
    assert harness.recorder[metrics.ENDED, "refused"].total == 1
    assert_everything_is_counted(harness)


@pytest.mark.parametrize(
    ("wanted", "code", "message"),
    [
        (request("x" * 70), ErrorCode.invalid, "this engine's limit is 64"),
        (request([]), ErrorCode.invalid, "no tokens"),
        (request([300]), ErrorCode.invalid, "token ids outside"),
        (RequestError("top_p is 2"), ErrorCode.invalid, "top_p is 2"),
        (ValueError("a mistake"), ErrorCode.internal, "could not be read: a mistake"),
    ],
)
def test_a_bad_request_is_refused_and_disturbs_nobody(wanted: Any, code: ErrorCode, message: str) -> None:
    with serving() as harness:
        good = harness.submit(request(max_tokens=30, ignore_eos=True))
        bad = harness.submit(wanted).wait()
        assert bad.error is not None
        assert bad.error[0] is code
        assert message in bad.error[1]
        assert good.wait().token_ids == alone(request(max_tokens=30, ignore_eos=True))
    assert harness.recorder[metrics.ENDED, "refused"].total == 1
    assert_everything_is_counted(harness)


def test_closing_answers_everybody() -> None:
    session = GatedSession(gated=True)
    with serving(session) as harness:
        clients = [harness.submit(request(f"{i}", max_tokens=40, ignore_eos=True)) for i in range(8)]
        session.wait_for_step()
        closing = threading.Thread(target=harness.loop.close)
        closing.start()
        late = harness.submit(request("late"))
        time.sleep(0.05)
        session.gate.release()
        closing.join(PATIENCE)
        assert not closing.is_alive()
        for client in (*clients, late):
            assert client.ended
            assert client.error == (ErrorCode.unavailable, "the server is shutting down")
        assert session.closed
    assert_everything_is_counted(harness)


def test_a_request_after_the_end_is_answered() -> None:
    with serving() as harness:
        pass
    assert harness.submit(request()).error == (ErrorCode.unavailable, "the server is shutting down")


def test_a_loop_that_ends_by_a_mistake_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = threading.Event()

    def mistaken(self: ServingLoop, reason: str) -> None:
        raise KeyError(reason)

    monkeypatch.setattr(ServingLoop, "_break", mistaken)
    with serving(GatedSession(fail_at=range(1000)), on_broken=broken.set) as harness:
        for _ in range(3):
            harness.submit(request()).wait()
        assert broken.wait(PATIENCE)


class FailingToOpen(GatedSession):
    def step(self, batch: StepBatch) -> FloatArray:
        raise RuntimeError("no kernel image is available")


def test_a_session_that_cannot_run_a_step_does_not_start() -> None:
    session = FailingToOpen()
    with pytest.raises(RuntimeError, match="no kernel image"):
        Harness(session)
    assert session.closed


def test_options_that_serve_nobody_do_not_start() -> None:
    session = GatedSession()
    with pytest.raises(ConfigError, match="max_step_tokens is 1"):
        Harness(session, max_step_tokens=1)
    assert session.closed


def test_a_client_that_cannot_be_reached_is_let_go() -> None:
    class Unreachable(Client):
        def send(self, piece: Piece) -> None:
            raise OSError("broken pipe")

    session = GatedSession(gated=True)
    with serving(session) as harness:
        client = Unreachable()
        harness.loop.submit(request(max_tokens=40, ignore_eos=True), client)
        session.gate.release()
        session.wait_for_step()
        session.wait_for_step()  # the second begins: the first one's token is on its way
        wait_until(lambda: client in harness.loop._gone)
        session.gated = False
        session.gate.release()
        wait_until(lambda: harness.metrics.outcomes["cancelled"] == 1)
        assert harness.submit(request()).wait().token_ids == alone(request())
    assert_everything_is_counted(harness)


def test_metrics_of_steps_and_tokens() -> None:
    with serving() as harness:
        tokens = [len(harness.submit(request("Hello", seed=i)).wait().token_ids) for i in range(4)]
    recorder = harness.recorder
    assert recorder[metrics.PROMPT_TOKENS].total == recorder[metrics.PREFILLED_TOKENS].total == 4 * 6
    assert recorder[metrics.GENERATED_TOKENS].total == sum(tokens)
    assert recorder[metrics.PAGES].level == LIMITS.num_pages - 1
    # Each request: a decode query at every length from the prompt's on, whole while it is short.
    lengths = [6 + i for count in tokens for i in range(1, count)]
    assert recorder[metrics.CONTEXT_TOKENS].total == sum(lengths)
    kept = [min(length, 16 + -(-length * 100 // 1000)) for length in lengths]
    assert recorder[metrics.ATTENDED_TOKENS].total == sum(kept)
    assert recorder[metrics.KEPT_FRACTION].level is not None
    assert 0 < recorder[metrics.KEPT_FRACTION].level <= 1
    harness.metrics.close()
    assert recorder.closed


def test_the_loop_serves_whatever_session_the_engine_opens(machine: FakeMachine) -> None:
    """The session of a TensorRT engine, on a fake TensorRT: opened, stepped and closed by the loop's own thread."""
    trt = machine.install("8.6.0")
    engine = machine.compiled()
    plan = engine.manifest.plan
    assert plan is not None
    assert max_step_tokens(engine) == plan.max_step_tokens
    rng = random.Random(3)
    wanted = [
        request([rng.randrange(256) for _ in range(rng.randint(30, 200))], max_tokens=12, temperature=0.0, seed=i)
        for i in range(6)
    ]
    loop = ServingLoop(
        lambda: open_session(engine, device=0),
        engine.manifest,
        TOKENIZER,
        Metrics(Recorder()),
        LoopOptions(max_step_tokens=max_step_tokens(engine)),
        lambda: None,
    )
    clients = [Client() for _ in wanted]
    for client, each in zip(clients, wanted, strict=True):
        loop.submit(each, client)
    for client in clients:
        client.wait()
    loop.close()
    assert trt.driver.launches > 0
    assert not trt.driver.allocations
    reference = TextGenerator(OnnxRuntimeSession(engine), TOKENIZER, engine.manifest.model.stop_token_ids)
    for client, each in zip(clients, wanted, strict=True):
        [expected] = reference.generate([each.prompt], each.parameters)
        assert client.error is None
        assert client.token_ids == list(expected.token_ids)
