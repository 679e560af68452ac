"""Variants of an engine's graph: the same graph with other attributes, and its operators one by one."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper

from socket_trt import names
from socket_trt.config import OperatorAttributes
from socket_trt.engine.manifest import EngineDirectory
from socket_trt.errors import GraphError
from socket_trt.onnx.single import operator_model


class EngineGraph:
    """The ONNX graph of an engine directory, without its weights."""

    def __init__(self, engine: EngineDirectory) -> None:
        self._model = onnx.load(str(engine.graph), load_external_data=False)
        self.nodes = [node for node in self._model.graph.node if _is_attention(node)]
        if len(self.nodes) != engine.manifest.model.layers:
            raise GraphError(
                f"{engine.graph}: {len(self.nodes)} {names.OPERATOR} nodes for {engine.manifest.model.layers} layers"
            )
        functions = [f for f in self._model.functions if (f.domain, f.name) == (names.DOMAIN, names.OPERATOR)]
        if not functions:
            raise GraphError(f"{engine.graph}: carries no function body for {names.OPERATOR}")
        self.function = functions[0]
        self.opset: int = engine.manifest.graph.opset
        self._half = engine.manifest.dtype == "float16"

    def attributes(self, layer: int) -> OperatorAttributes:
        """Attributes of the `layer`th operator, as the graph has them."""
        fields = OperatorAttributes.__dataclass_fields__
        found = {a.name: helper.get_attribute_value(a) for a in self.nodes[layer].attribute if a.name in fields}
        return OperatorAttributes(**found)

    def with_attributes(self, **changes: Any) -> bytes:
        """The whole graph with attributes of every operator changed."""
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        for node in filter(_is_attention, model.graph.node):
            for attribute in [a for a in node.attribute if a.name in changes]:
                node.attribute.remove(attribute)
            node.attribute.extend(helper.make_attribute(name, value) for name, value in changes.items())
        return bytes(model.SerializeToString())

    def operator(self, layer: int, **changes: Any) -> bytes:
        """A model of the `layer`th operator alone, with the graph's own function body."""
        attributes = self.attributes(layer).replace(**changes)
        return bytes(operator_model(attributes, self.opset, self._half, self.function).SerializeToString())


def _is_attention(node: onnx.NodeProto) -> bool:
    return (node.domain, node.op_type) == (names.DOMAIN, names.OPERATOR)
