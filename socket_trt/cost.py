"""What attention of a decode step costs on a GPU, from measurements: fixed time, and bytes over the bandwidth they are read at.

    SOCKET  = fixed + code bytes / code bandwidth + attended bytes / attended bandwidth
    dense   = fixed + bytes of keys and values / bandwidth

one layer, microseconds.  The constants of a GPU are fitted by `benchmarks/fit_cost_model.py` to the rows of
`benchmarks/attention.py` and live in `socket_trt/cost_models`.  They hold for 16-bit keys and values, up to 8 planes a
table or more (16-bit codes) alike, and say nothing of the rest of a model.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from socket_trt.config import Selection, SocketConfig
from socket_trt.errors import ConfigError

DIRECTORY = Path(__file__).parent / "cost_models"
DEFAULT = "h100"
ITEM = 2  # bytes of a key's or value's number


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of one layer's attention: heads, and size of a head."""

    query_heads: int
    kv_heads: int
    head_size: int


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Constants of one GPU: microseconds, and bytes a microsecond (a thousand of them are a GB/s)."""

    gpu: str
    source: str
    socket_fixed_us: float
    code_bytes_per_us: float
    attended_bytes_per_us: float
    dense_fixed_us: float
    dense_bytes_per_us: float

    def socket_us(self, shape: Shape, socket: SocketConfig, batch: int, length: int) -> float:
        """Attention of one layer in a step of `batch` sequences of `length` tokens."""
        code, attended = socket_bytes(shape, socket, batch, length)
        return self.socket_fixed_us + code / self.code_bytes_per_us + attended / self.attended_bytes_per_us

    def dense_us(self, shape: Shape, batch: int, length: int) -> float:
        return self.dense_fixed_us + dense_bytes(shape, batch, length) / self.dense_bytes_per_us

    def crossover(self, shape: Shape, socket: SocketConfig, batch: int, longest: int) -> int | None:
        """Tokens from which SOCKET is predicted to be the faster one, `longest` at most; None where it is at none.

        From there on it stays so: sink, window and the fixed time weigh less the longer the sequence.
        """

        def faster(length: int) -> bool:
            return self.socket_us(shape, socket, batch, length) < self.dense_us(shape, batch, length)

        if not faster(longest):
            return None
        low, high = 0, longest
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if faster(middle) else (middle, high)
        return high


def socket_bytes(shape: Shape, socket: SocketConfig, batch: int, length: int) -> tuple[int, int]:
    """Bytes read of codes and value norms, and of the keys and values attended to."""
    code = batch * shape.kv_heads * length * (socket.tables * socket.code_bits // 8 + ITEM)
    kept = min(length, socket.sink + socket.window + socket.budget(length))
    lists = shape.query_heads if socket.selection == Selection.query_head else shape.kv_heads
    return code, batch * lists * kept * 2 * shape.head_size * ITEM


def dense_bytes(shape: Shape, batch: int, length: int) -> int:
    return batch * shape.kv_heads * length * 2 * shape.head_size * ITEM


def load_cost_model(name: str = DEFAULT) -> CostModel:
    """Raises ConfigError where no GPU of that name was measured."""
    path = DIRECTORY / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in DIRECTORY.glob("*.json")))
        raise ConfigError(f"--gpu {name}: no cost model of that GPU; there are {known} (benchmarks/fit_cost_model.py)")
    return CostModel(**json.loads(path.read_text(encoding="utf-8")))
