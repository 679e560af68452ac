"""What an attention mask admits: causal, or causal within a sliding window; anything else is refused.

The mask's own nodes are run for several batches, past lengths and paddings, and every entry is compared.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from socket_trt.onnx.rewrite.evaluation import ATTENTION_MASK, Array, Evaluator, Situation
from socket_trt.onnx.rewrite.graph import MismatchError

# A single query this far along sees every narrower window's edge; longer ones follow from the mask's own constants.
_FAR = (1 << 17) + 3
_MAX_FAR = 1 << 21
_PROBE = 515  # a length at which a tensor that grows with its square is told from one that does not
_HIDDEN = -1e4  # an additive mask hides with this or less; float16 exports use -65504

_SMALL = [
    Situation(1, 0),
    Situation(5, 0),
    Situation(7, 6, padding=(0, 0)),
    Situation(1, 37),
    Situation(4, 3, padding=(0, 2)),
    Situation(6, 0, padding=(3, 0, 1)),
]


class MaskReader:
    """Reads the sliding window out of masks; layers that share a mask share the answer.

    sliding_window   the caller's word for masks that cannot be read (-1: plain causal), None if there is none
    """

    def __init__(self, evaluator: Evaluator, sliding_window: int | None) -> None:
        self._evaluator = evaluator
        self.given = sliding_window
        self._known: dict[ir.Value, int] = {}

    @property
    def has_cache(self) -> bool:
        """Whether the graph takes a KV cache in."""
        return bool(self._evaluator.caches)

    def window(self, mask: ir.Value, causal: bool) -> int:
        """The window of a mask input of an attention node, -1 if it is causal and nothing else.

        causal: the node is causal by itself, whatever the mask admits.
        Raises MismatchError where the mask admits something else and the caller has not said what.
        """
        if mask not in self._known:
            self._known[mask] = self._read(mask, causal)
        return self._known[mask]

    def _read(self, mask: ir.Value, causal: bool) -> int:
        try:
            return self._computed_window(mask, causal)
        except MismatchError as error:
            if self.given is not None:
                return self.given
            raise MismatchError(
                f"its mask '{mask.name}' {error}; give the sliding window explicitly, -1 if the mask is only causal"
            ) from None

    def _computed_window(self, mask: ir.Value, causal: bool) -> int:
        if not self.has_cache:
            raise MismatchError("cannot be checked far along because the graph has no cache")
        probe = Situation(1, _PROBE - 1)
        if self._evaluator.largest(mask, probe) >= _PROBE * _PROBE // 2:
            raise MismatchError("cannot be checked far along because it is cut out of a square of all tokens")
        constants = [c for c in self._evaluator.integer_constants(mask) if 0 < c <= _MAX_FAR // 2]
        far = Situation(1, max(_FAR, 2 * max(constants, default=0) + 3) - 1)
        row = self._admitted(mask, far, causal)[0, 0]
        width = int(row.sum())
        if not row[row.size - width :].all() or width == 0:
            raise MismatchError("is not causal")
        window = -1 if width == row.size else width
        edges = [] if window < 0 else [Situation(3, p) for p in {max(window - 2, 0), window, 2 * window + 5}]
        padded = ATTENTION_MASK in self._evaluator.roles.values()
        small = [s for s in _SMALL if padded or not any(s.padding)]
        for situation in [*small, *edges]:
            admitted = self._admitted(mask, situation, causal)
            expected, used = _expected(situation, window)
            if not np.array_equal(admitted & used, expected & used):
                raise MismatchError(f"is neither causal nor a sliding window (seen with {situation})")
        return window

    def _admitted(self, mask: ir.Value, situation: Situation, causal: bool) -> npt.NDArray[np.bool_]:
        """What the mask admits: bool [batch, tokens, past + tokens]."""
        values = _run_one(self._evaluator, mask, situation)
        if values.dtype != np.bool_:
            numbers = values.astype(np.float64)
            hidden = numbers <= _HIDDEN
            if not np.all(hidden | (numbers == 0)):
                raise MismatchError("adds a bias to the scores")
            values = ~hidden
        shown = np.asarray(values, np.bool_).reshape((1,) * (4 - values.ndim) + values.shape)
        if not np.array_equal(shown, np.broadcast_to(shown[:, :1], shown.shape)):
            raise MismatchError("differs between heads")
        try:
            admitted = np.broadcast_to(shown[:, 0], (situation.batch, situation.tokens, situation.length))
        except ValueError:
            raise MismatchError(f"has shape {list(values.shape)} in {situation}") from None
        return admitted & _expected(situation, -1)[0] if causal else admitted


def _run_one(evaluator: Evaluator, value: ir.Value, situation: Situation) -> Array:
    return evaluator.run([value], [situation])[0][0]


def _expected(situation: Situation, window: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """What the operator admits, and which queries count: exporters admit anything to a padding token."""
    query = np.arange(situation.past, situation.length)[:, None]
    key = np.arange(situation.length)
    seen = (key <= query) & ((query - key < window) | (window < 0))
    padding = np.array(situation.padding)[:, None, None]
    return seen & (key >= padding), query >= padding
