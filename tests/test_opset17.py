"""From opset 18 to 17: what is rewritten, and what is refused."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from socket_trt.errors import GraphError
from socket_trt.onnx.opset17 import lower_to_opset17

X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def model(*nodes: object, outputs: list[str], constants: dict[str, np.ndarray] | None = None) -> ir.Model:
    initializers = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape)]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph(nodes, "g", inputs, results, initializers)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))


def run(lowered: ir.Model) -> list[np.ndarray]:
    proto = ir.to_proto(lowered)
    assert proto.opset_import[0].version == 17
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": X})


@pytest.mark.parametrize("keepdims", [0, 1])
def test_axes_become_an_attribute(keepdims: int) -> None:
    node = helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=keepdims, noop_with_empty_axes=0)
    lowered = model(node, outputs=["y"], constants={"axes": np.array([-1, 0])})
    lower_to_opset17(lowered)
    np.testing.assert_allclose(run(lowered)[0], X.mean((0, 2), keepdims=bool(keepdims)))


def test_a_reduction_over_everything_stays() -> None:
    lowered = model(helper.make_node("ReduceMax", ["x"], ["y"], keepdims=0), outputs=["y"])
    lower_to_opset17(lowered)
    assert run(lowered)[0] == 23


def test_an_even_split() -> None:
    lowered = model(helper.make_node("Split", ["x"], ["a", "b"], axis=2, num_outputs=2), outputs=["a", "b"])
    lower_to_opset17(lowered)
    a, b = run(lowered)
    np.testing.assert_array_equal(np.concatenate([a, b], 2), X)


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (helper.make_node("Split", ["x"], ["y", "z"], name="s", axis=1, num_outputs=2), "node s: Split into 2 parts"),
        (helper.make_node("Mish", ["x"], ["y"], name="m"), "node m: opset 17 has no Mish"),
    ],
)
def test_what_opset_17_cannot_say(node: object, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        lower_to_opset17(model(node, outputs=["y"]))


def test_axes_that_are_computed() -> None:
    rank = helper.make_node("Shape", ["x"], ["axes"], start=0, end=1)
    reduce = helper.make_node("ReduceMean", ["x", "axes"], ["y"], name="r")
    with pytest.raises(GraphError, match="node r: ReduceMean has axes that are no constant"):
        lower_to_opset17(model(rank, reduce, outputs=["y"]))
