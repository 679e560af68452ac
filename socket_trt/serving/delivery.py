"""Sends answers and watches for clients that are gone, beside the engine and not between its steps."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator

from socket_trt.serving.reply import ErrorCode, Piece, Reply

logger = logging.getLogger(__name__)

# Seconds between two looks at who has cancelled, at least; where looking takes longer, half of the time is spent on it.
_SWEEP_INTERVAL = 0.01

# So many looks that find one and the same call, which should take a thousandth of a second, call it stuck.  Looks and
# not seconds: a process that was itself stopped for a while is not stuck.
_PATIENCE = 10


@dataclasses.dataclass(eq=False)
class _Channel:
    """What is to be sent on one reply.

    gone   its client cancelled, or cannot be reached
    stuck  a call has not come back: nothing more is sent
    """

    reply: Reply
    on_cancelled: Callable[[], None]
    piece: Piece | None = None
    failure: tuple[ErrorCode, str] | None = None
    gone: bool = False
    stuck: bool = False

    @property
    def ends(self) -> bool:
        return self.failure is not None or (self.piece is not None and self.piece.final)


class _ReplacedError(Exception):
    """Another thread delivers in the place of this one, whose call took too long."""


class Delivery:
    """One thread that sends what others put, and one that looks whether the first is stuck.

    Parts of one answer that come faster than they can be sent are sent as one part: nothing piles up.  A call that does
    not come back is left alone with the thread that made it, and another thread goes on with all the other answers.
    """

    look_interval = 1.0  # seconds

    def __init__(
        self,
        publish: Callable[[], None],
        on_stuck: Callable[[], None] = lambda: None,
        publish_interval: float = 0.25,
    ) -> None:
        """Begin to deliver.

        publish   called every `publish_interval` seconds while there is something to send, and at the end
        on_stuck  called, once, when a call of a reply or of `publish` has not come back within ten `look_interval`s
        """
        self._publish = publish
        self._on_stuck: Callable[[], None] | None = on_stuck
        self._publish_interval = publish_interval
        self._wake = threading.Condition()
        self._channels: dict[Reply, _Channel] = {}
        self._ready: dict[_Channel, None] = {}
        self._closing = False
        self._ended = threading.Event()
        # The call that is being made, by number, and for whom; None outside of calls.
        self._calls = 0
        self._call: tuple[int, _Channel | None] | None = None
        self._may_publish = self._published = True
        self._start()
        self._watch = threading.Thread(target=self._look, name="delivery watch", daemon=True)
        self._watch.start()

    def open(self, reply: Reply, on_cancelled: Callable[[], None]) -> None:
        """Watch `reply` until its last part; `on_cancelled` is called once, from another thread, if its client is gone."""
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
        """Send everything that was put, to whom it can be sent, and stop."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._ended.wait()
        self._watch.join()

    def _start(self) -> None:
        threading.Thread(target=self._run, name="delivery", daemon=True).start()

    def _run(self) -> None:
        try:
            self._deliver()
        except _ReplacedError:
            return
        except Exception:  # a mistake of this program: nobody would be answered any more
            logger.exception("answers are not delivered any more")
            self._say_stuck()
        self._ended.set()

    def _deliver(self) -> None:
        published = swept = time.monotonic()
        pause = _SWEEP_INTERVAL
        while True:
            self._send_all(pause)
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

    def _send_all(self, timeout: float) -> None:
        """Send what is ready; wait for it for `timeout` seconds at most."""
        with self._wake:
            if not self._ready and not self._closing:
                self._wake.wait(timeout)
            ready = len(self._ready)
        for _ in range(ready):
            with self._wake:
                channel = next(iter(self._ready))
                piece, failure = channel.piece, channel.failure
                del self._ready[channel]
                if channel.ends:
                    del self._channels[channel.reply]
                channel.piece = None
            if not channel.stuck:
                self._send(channel, piece, failure)

    def _send(self, channel: _Channel, piece: Piece | None, failure: tuple[ErrorCode, str] | None) -> None:
        try:
            with self._calling(channel):
                if piece is not None:
                    channel.reply.send(piece)
                if failure is not None:
                    channel.reply.fail(*failure)
        except _ReplacedError:
            raise
        except Exception:
            logger.exception("a part of an answer could not be sent")
            self._lose(channel)

    def _sweep(self) -> None:
        with self._wake:
            channels = [channel for channel in self._channels.values() if not channel.gone]
        for channel in channels:
            try:
                with self._calling(channel):
                    gone = channel.reply.cancelled()
            except _ReplacedError:
                raise
            except Exception:
                logger.exception("a client could not be asked whether it still waits")
                gone = True
            if gone:
                self._lose(channel)

    @contextlib.contextmanager
    def _calling(self, channel: _Channel | None) -> Iterator[None]:
        """A call that leaves this process.  Raises _ReplacedError where another thread has taken over meanwhile."""
        with self._wake:
            self._calls += 1
            self._call = call = (self._calls, channel)
        try:
            yield
        finally:
            with self._wake:
                if self._call is not call:
                    raise _ReplacedError
                self._call = None

    def _look(self) -> None:
        """Until the end: whether a call is stuck."""
        seen: tuple[int, _Channel | None] | None = None
        looks = 0
        while not self._ended.wait(self.look_interval):
            with self._wake:
                call = self._call
                looks = looks + 1 if call is not None and call == seen else 0
                seen = call
                if call is None or looks < _PATIENCE:
                    continue
                self._call = None  # whose thread, should it come back, ends
                channel = call[1]
                if channel is None:
                    self._may_publish = False
                else:
                    channel.stuck = True
            logger.error(
                "the server has not taken %s for %g s and has to be started again; other answers go on",
                "metrics" if channel is None else "a part of an answer",
                _PATIENCE * self.look_interval,
            )
            if channel is not None:
                self._lose(channel)
            self._start()
            self._say_stuck()

    def _say_stuck(self) -> None:
        with self._wake:
            on_stuck, self._on_stuck = self._on_stuck, None
        if on_stuck is not None:
            on_stuck()

    def _lose(self, channel: _Channel) -> None:
        if not channel.gone:
            channel.gone = True
            channel.on_cancelled()

    def _try_to_publish(self) -> None:
        if not self._may_publish:
            return
        try:
            with self._calling(None):
                self._publish()
            self._published = True
        except _ReplacedError:
            raise
        except Exception:
            if self._published:  # said once, not four times a second
                logger.exception("metrics cannot be published")
            self._published = False


def _joined(first: Piece, second: Piece) -> Piece:
    return dataclasses.replace(second, text=first.text + second.text, token_ids=first.token_ids + second.token_ids)
