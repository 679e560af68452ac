"""Sends answers and watches for clients that are gone, beside the engine and not between its steps."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable

from socket_trt.serving.reply import ErrorCode, Piece, Reply

logger = logging.getLogger(__name__)

# Seconds between two looks at who has cancelled, at least; where looking takes longer, half of the time is spent on it.
_SWEEP_INTERVAL = 0.01


@dataclasses.dataclass(eq=False)
class _Channel:
    """What is to be sent on one reply.  `gone`: its client cancelled, or cannot be reached."""

    reply: Reply
    on_cancelled: Callable[[], None]
    piece: Piece | None = None
    failure: tuple[ErrorCode, str] | None = None
    gone: bool = False

    @property
    def ends(self) -> bool:
        return self.failure is not None or (self.piece is not None and self.piece.final)


class Delivery:
    """One thread that sends what others put.

    Parts of one answer that come faster than they can be sent are sent as one part: nothing piles up.
    """

    def __init__(self, publish: Callable[[], None], publish_interval: float = 0.25) -> None:
        """`publish` is called every `publish_interval` seconds while there is something to send, and at the end."""
        self._publish = publish
        self._publish_interval = publish_interval
        self._wake = threading.Condition()
        self._channels: dict[Reply, _Channel] = {}
        self._ready: dict[_Channel, None] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)
        self._thread.start()

    def open(self, reply: Reply, on_cancelled: Callable[[], None]) -> None:
        """Watch `reply` until its last part; `on_cancelled` is called once, from this thread, if its client is gone."""
        with self._wake:
            self._channels[reply] = _Channel(reply, on_cancelled)
            self._wake.notify()

    def put(self, reply: Reply, piece: Piece) -> None:
        """Send a part; it may be joined with the one after it."""
        with self._wake:
            channel = self._channels[reply]
            channel.piece = piece if channel.piece is None else _joined(channel.piece, piece)
            self._ready[channel] = None
            self._wake.notify()

    def fail(self, reply: Reply, code: ErrorCode, message: str) -> None:
        """Send what is left, then an error."""
        with self._wake:
            channel = self._channels[reply]
            channel.failure = (code, message)
            self._ready[channel] = None
            self._wake.notify()

    def close(self) -> None:
        """Send everything that was put, and stop."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        published = swept = time.monotonic()
        pause = _SWEEP_INTERVAL
        while True:
            for channel, piece, failure in self._take(pause):
                self._send(channel, piece, failure)
            began = time.monotonic()
            if began - swept >= pause:
                self._sweep()
                swept = time.monotonic()
                pause = max(_SWEEP_INTERVAL, swept - began)
            if began - published >= self._publish_interval:
                self._try_to_publish()
                published = began
            with self._wake:
                if self._closing and not self._ready:
                    break
                idle = not self._channels
            if idle:
                # Nobody waits for anything.  What is counted is final a moment after the last answer was put.
                self._wait_for_requests(self._publish_interval)
                self._try_to_publish()
                self._wait_for_requests()
        self._try_to_publish()

    def _wait_for_requests(self, timeout: float | None = None) -> None:
        with self._wake:
            self._wake.wait_for(lambda: self._channels or self._closing, timeout)

    def _take(self, timeout: float) -> list[tuple[_Channel, Piece | None, tuple[ErrorCode, str] | None]]:
        """What is to be sent now; waits for it for `timeout` seconds at most."""
        with self._wake:
            if not self._ready and not self._closing:
                self._wake.wait(timeout)
            taken = [(channel, channel.piece, channel.failure) for channel in self._ready]
            for channel in self._ready:
                if channel.ends:
                    del self._channels[channel.reply]
                channel.piece = None
            self._ready.clear()
        return taken

    def _send(self, channel: _Channel, piece: Piece | None, failure: tuple[ErrorCode, str] | None) -> None:
        try:
            if piece is not None:
                channel.reply.send(piece)
            if failure is not None:
                channel.reply.fail(*failure)
        except Exception:
            logger.exception("a part of an answer could not be sent")
            self._lose(channel)

    def _sweep(self) -> None:
        with self._wake:
            channels = [channel for channel in self._channels.values() if not channel.gone]
        for channel in channels:
            try:
                gone = channel.reply.cancelled()
            except Exception:
                logger.exception("a client could not be asked whether it still waits")
                gone = True
            if gone:
                self._lose(channel)

    def _lose(self, channel: _Channel) -> None:
        if not channel.gone:
            channel.gone = True
            channel.on_cancelled()

    def _try_to_publish(self) -> None:
        try:
            self._publish()
        except Exception:
            logger.exception("metrics could not be published")


def _joined(first: Piece, second: Piece) -> Piece:
    return dataclasses.replace(second, text=first.text + second.text, token_ids=first.token_ids + second.token_ids)
