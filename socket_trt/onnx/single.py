"""A model of one `SocketAttention` node with its function body: what tests, validation and debugging feed directly."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from socket_trt import names
from socket_trt.config import OperatorAttributes
from socket_trt.onnx.function import function_body

_SHAPES: dict[str, list[str | int]] = {
    "query": [1, "query_heads", "tokens", "head_size"],
    "key": [1, "kv_heads", "tokens", "head_size"],
    "value": [1, "kv_heads", "tokens", "head_size"],
    "key_cache": ["pages", "kv_heads", "page_size", "head_size"],
    "value_cache": ["pages", "kv_heads", "page_size", "head_size"],
    "code_cache": ["pages", "kv_heads", "tables", "words"],
    "norm_cache": ["pages", "kv_heads", "page_size"],
    "page_table": ["sequences", "pages_per_sequence"],
    "past_length": ["sequences"],
    "query_start": ["boundaries"],
    "planes": ["tables", "rank", "head_size"],
}


def operator_model(
    attributes: OperatorAttributes, opset: int, half: bool, function: onnx.FunctionProto | None = None
) -> onnx.ModelProto:
    """One node, its inputs and outputs named as in `names`; `half` makes T float16, else it is float32.

    `function` is the body to carry instead of the project's own (validation passes the one an engine carries).
    """
    float_type = TensorProto.FLOAT16 if half else TensorProto.FLOAT

    def tensor(name: str) -> onnx.ValueInfoProto:
        kind = name.removesuffix("_out")
        shape = _SHAPES["query" if kind == "output" else kind]
        return helper.make_tensor_value_info(
            name, TensorProto.INT32 if kind in names.INTEGER_INPUTS else float_type, shape
        )

    node = helper.make_node(
        names.OPERATOR,
        names.OPERATOR_INPUTS,
        names.OPERATOR_OUTPUTS,
        domain=names.DOMAIN,
        plugin_version=str(names.OPERATOR_VERSION),
        plugin_namespace=names.DOMAIN,
        **attributes.as_dict(),
    )
    graph = helper.make_graph(
        [node], "operator", [tensor(n) for n in names.OPERATOR_INPUTS], [tensor(n) for n in names.OPERATOR_OUTPUTS]
    )
    return helper.make_model(
        graph,
        functions=[function or function_body(opset)],
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(names.DOMAIN, names.OPERATOR_VERSION)],
        ir_version=8,
    )
