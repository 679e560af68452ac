"""The ONNX schema of `SocketAttention`, registered on import so that checkers and shape inference know it."""

from __future__ import annotations

import dataclasses

import onnx
from onnx.defs import OpSchema

from socket_trt import names
from socket_trt.config import OperatorAttributes

_TYPES = {"T": ["tensor(float16)", "tensor(bfloat16)", "tensor(float)"], "I": ["tensor(int32)"]}
_DOC = """SOCKET attention on packed tokens and a paged cache: appends the step's keys and values with their codes and
value norms to the cache, then attends; decode queries only to a sink, a window and the best scored tokens."""


def _parameter(name: str, input_name: str) -> OpSchema.FormalParameter:
    return OpSchema.FormalParameter(name, "I" if input_name in names.INTEGER_INPUTS else "T")


def _attribute(field: dataclasses.Field[object]) -> OpSchema.Attribute:
    if field.default is not dataclasses.MISSING:
        return OpSchema.Attribute(field.name, onnx.helper.make_attribute(field.name, field.default))
    kind = OpSchema.AttrType.FLOAT if field.type == "float" else OpSchema.AttrType.INT
    return OpSchema.Attribute(field.name, kind, required=True)


def socket_attention_schema() -> OpSchema:
    """The schema: inputs and outputs in `names`' order, attributes in `OperatorAttributes`' order."""
    plugin = [
        OpSchema.Attribute(name, onnx.helper.make_attribute(name, value), "plugin field of TensorRT's parser")
        for name, value in (("plugin_version", str(names.OPERATOR_VERSION)), ("plugin_namespace", names.DOMAIN))
    ]
    return OpSchema(
        names.OPERATOR,
        names.DOMAIN,
        names.OPERATOR_VERSION,
        doc=_DOC,
        inputs=[_parameter(name, name) for name in names.OPERATOR_INPUTS],
        outputs=[_parameter(name, name.removesuffix("_out")) for name in names.OPERATOR_OUTPUTS],
        type_constraints=[(name, types, "") for name, types in _TYPES.items()],
        attributes=[_attribute(field) for field in dataclasses.fields(OperatorAttributes)] + plugin,
    )


if not onnx.defs.has(names.OPERATOR, names.DOMAIN):
    onnx.defs.register_schema(socket_attention_schema())
