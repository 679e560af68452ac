"""Methods side by side, one a module: each chooses the tokens that a decode query attends to."""

from __future__ import annotations

from collections.abc import Callable

from socket_trt.config import Selection
from socket_trt.quality.methods.base import Method
from socket_trt.quality.methods.dense import Dense
from socket_trt.quality.methods.hard_lsh import HardLsh
from socket_trt.quality.methods.oracle import ExactTopK
from socket_trt.quality.methods.quest import Quest
from socket_trt.quality.methods.random import Random
from socket_trt.quality.methods.socket import Socket
from socket_trt.quality.methods.window import SinkWindow

__all__ = ["COMPARED", "Dense", "ExactTopK", "HardLsh", "Method", "Quest", "Random", "SinkWindow", "Socket"]

# What a comparison runs, each made from a seed.  Hashing methods have 480 bits a token, but for the published 60 x 10.
# Hard LSH may want fewer planes a table than SOCKET, so it has its choice of them at equal bits.
COMPARED: tuple[Callable[[int], Method], ...] = (
    lambda seed: Dense(),
    lambda seed: ExactTopK(),
    lambda seed: Socket(seed=seed),
    lambda seed: Socket(selection=Selection.kv_head, seed=seed),
    lambda seed: Socket(value_norms=False, seed=seed),
    lambda seed: Socket(tables=48, planes=10, temperature=0.4, seed=seed),
    lambda seed: Socket(tables=60, planes=10, temperature=0.4, seed=seed),
    lambda seed: HardLsh(tables=60, planes=8, seed=seed),
    lambda seed: HardLsh(tables=120, planes=4, seed=seed),
    lambda seed: HardLsh(tables=240, planes=2, seed=seed),
    lambda seed: HardLsh(tables=120, planes=4, value_norms=True, seed=seed),
    lambda seed: Quest(),
    lambda seed: SinkWindow(),
    lambda seed: Random(seed=seed),
)
