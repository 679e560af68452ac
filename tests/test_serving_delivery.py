"""Answers on their way: joined, lost, and held up by a call that does not come back."""

from __future__ import annotations

import threading
import time

import pytest

from socket_trt.serving import metrics
from socket_trt.serving.delivery import Delivery
from socket_trt.serving.reply import ErrorCode, Piece
from tests.serving import (
    PATIENCE,
    Client,
    alone,
    assert_everything_is_counted,
    request,
    serving,
    wait_until,
)


def test_parts_that_come_faster_than_they_are_sent_are_joined() -> None:
    sending, go = threading.Event(), threading.Event()

    class Slow(Client):
        def send(self, piece: Piece) -> None:
            sending.set()
            assert go.wait(PATIENCE)
            super().send(piece)

    delivery = Delivery(lambda: None)
    client = Slow()
    delivery.open(client, lambda: None)
    delivery.put(client, Piece("a", [1]))
    assert sending.wait(PATIENCE)
    for i in range(100):
        delivery.put(client, Piece("b", [i]))
    delivery.put(client, Piece("c", final=True, finish_reason="length"))
    go.set()
    delivery.close()
    assert client.pieces == [
        Piece("a", [1]),
        Piece("b" * 100 + "c", list(range(100)), finish_reason="length", final=True),
    ]


def test_an_error_follows_what_was_generated_before() -> None:
    delivery = Delivery(lambda: None)
    client = Client()
    delivery.open(client, lambda: None)
    delivery.put(client, Piece("half an ans"))
    delivery.fail(client, ErrorCode.internal, "failed")
    delivery.close()
    assert client.text == "half an ans"
    assert client.error == (ErrorCode.internal, "failed")


def test_delivery_survives_what_is_not_its_own_fault(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(Client):
        def cancelled(self) -> bool:
            raise OSError("no such process")

    def publish() -> None:
        raise OSError("no such endpoint")

    lost = threading.Event()
    delivery = Delivery(publish, publish_interval=0.0)
    odd, client = Odd(), Client()
    delivery.open(odd, lost.set)
    delivery.open(client, lambda: None)
    assert lost.wait(PATIENCE)
    delivery.put(client, Piece("text", final=True))
    delivery.fail(odd, ErrorCode.cancelled, "cancelled")
    delivery.close()
    assert client.text == "text"
    assert [record.message for record in caplog.records].count("metrics cannot be published") == 1


class Holding(Client):
    """Does not come back from sending its first part before the test lets it."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go = threading.Event(), threading.Event()

    def send(self, piece: Piece) -> None:
        self.entered.set()
        assert self.go.wait(PATIENCE)
        super().send(piece)


def test_a_call_that_does_not_come_back_holds_up_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Delivery, "look_interval", 0.02)
    stuck = []
    holding = Holding()
    with serving(on_stuck=lambda: stuck.append(holding.entered.is_set())) as harness:
        harness.loop.submit(request("held", max_tokens=40, ignore_eos=True), holding)
        assert holding.entered.wait(PATIENCE)
        others = [harness.submit(request(f"other {i}", seed=i)).wait() for i in range(5)]
        assert [client.token_ids for client in others] == [alone(request(f"other {i}", seed=i)) for i in range(5)]
        assert stuck == [True]
        wait_until(lambda: harness.recorder[metrics.ENDED, "finished"].total >= 5)
        wait_until(lambda: harness.recorder[metrics.PAGES_IN_USE].level == 0)
        holding.go.set()  # it comes back in the end, to a thread that has been replaced
        assert harness.submit(request("after")).wait().token_ids == alone(request("after"))
    assert stuck == [True]
    assert len(holding.pieces) == 1
    assert_everything_is_counted(harness)


def test_closing_does_not_wait_for_a_call_that_does_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Delivery, "look_interval", 0.02)
    delivery = Delivery(lambda: None)
    holding, client = Holding(), Client()
    for reply in (holding, client):
        delivery.open(reply, lambda: None)
    delivery.put(holding, Piece("a"))
    assert holding.entered.wait(PATIENCE)
    delivery.put(client, Piece("b", final=True))
    delivery.fail(holding, ErrorCode.internal, "failed")
    delivery.close()
    assert client.text == "b"
    assert not holding.ended
    holding.go.set()


def test_metrics_that_cannot_be_published_hold_up_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Delivery, "look_interval", 0.02)
    stuck, never = threading.Event(), threading.Event()

    def publish() -> None:
        assert never.wait(PATIENCE)

    delivery = Delivery(publish, stuck.set, publish_interval=0.0)
    client = Client()
    delivery.open(client, lambda: None)
    assert stuck.wait(PATIENCE)
    delivery.put(client, Piece("text", final=True))
    assert client.wait().text == "text"
    delivery.close()
    never.set()


def test_a_slow_call_is_not_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many calls one after the other are not one that does not come back."""
    monkeypatch.setattr(Delivery, "look_interval", 0.02)

    class Slow(Client):
        def send(self, piece: Piece) -> None:
            time.sleep(0.05)
            super().send(piece)

    stuck: list[bool] = []
    delivery = Delivery(lambda: None, lambda: stuck.append(True))
    clients = [Slow() for _ in range(20)]
    for client in clients:
        delivery.open(client, lambda: None)
        delivery.put(client, Piece("text", final=True))
    delivery.close()
    assert all(client.text == "text" for client in clients)
    assert not stuck
