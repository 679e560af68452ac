"""Every name that the graph, the sessions and the validation share: the operator, its tensors, the graph's tensors."""

from __future__ import annotations

DOMAIN = "socket"
OPERATOR = "SocketAttention"
OPERATOR_VERSION = 1
# What lies around attention, in networks for TensorRT 8.6 (plugins/tensorrt/layers.h has their shapes).
LINEAR = "Linear"
RMS_NORM = "RMSNorm"
ADD_RMS_NORM = "AddRMSNorm"
SPLIT_ROTARY = "SplitRotary"
SWIGLU = "SwiGLU"
LAYERS = (LINEAR, RMS_NORM, ADD_RMS_NORM, SPLIT_ROTARY, SWIGLU)
LAYER_VERSION = 1

OPERATOR_INPUTS = (
    "query",
    "key",
    "value",
    "key_cache",
    "value_cache",
    "code_cache",
    "norm_cache",
    "page_table",
    "past_length",
    "query_start",
    "planes",
)
# The inputs that are int32 whatever T is.
INTEGER_INPUTS = frozenset({"code_cache", "page_table", "past_length", "query_start"})
OPERATOR_OUTPUTS = ("output", "key_cache_out", "value_cache_out", "code_cache_out", "norm_cache_out")

# Graph inputs besides the caches, and the one output besides them.
INPUT_IDS = "input_ids"
POSITION_IDS = "position_ids"
LOGITS_INDICES = "logits_indices"
PAGE_TABLE = "page_table"
PAST_LENGTH = "past_length"
QUERY_START = "query_start"
STEP_INPUTS = (INPUT_IDS, POSITION_IDS, LOGITS_INDICES, PAGE_TABLE, PAST_LENGTH, QUERY_START)
LOGITS = "logits"

PLANES = "socket.planes"

# The four caches of a layer, in the operator's order.
CACHE_KINDS = ("key", "value", "code", "norm")

# Symbolic dimensions of the graph's inputs and outputs.
DIM_TOKENS = "tokens"
DIM_SEQUENCES = "sequences"
DIM_BOUNDARIES = "sequences + 1"
DIM_PAGES = "pages"
DIM_PAGES_PER_SEQUENCE = "pages_per_sequence"


def past(layer: int, kind: str) -> str:
    """Graph input that brings in cache `kind` of `layer`."""
    return f"past_key_values.{layer}.{kind}"


def present(layer: int, kind: str) -> str:
    """Graph output that carries cache `kind` of `layer` after the step."""
    return f"present.{layer}.{kind}"
