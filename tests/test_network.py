"""The graph for TensorRT's parser: computes what the engine's graph computes, with weights as inputs."""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from socket_trt import names
from socket_trt.engine.build import BuildOptions, build_engine
from socket_trt.engine.compile import load_network
from socket_trt.engine.manifest import EngineDirectory
from socket_trt.models.checkpoint import resolve_model
from socket_trt.onnx.function import function_body
from socket_trt.onnx.joined import parts_of
from socket_trt.onnx.network import NetworkGraph, network_graph
from socket_trt.progress import Silent
from socket_trt.runtime.device_weights import convert
from socket_trt.runtime.onnxruntime_session import OnnxRuntimeSession, session_options
from socket_trt.runtime.session import StepBatch
from socket_trt.validation.scenario import make_scenario
from socket_trt.weights import map_tensor
from tests.engines import SOCKET, shared_directory, tiny_engine
from tests.families import save_checkpoint
from tests.layer_bodies import layer_bodies


@functools.cache
def family_engine(name: str, stored: torch.dtype) -> EngineDirectory:
    """A float16 engine for TensorRT of a small model of a family, whose checkpoint has `stored` weights; to be read."""
    checkpoint = shared_directory(
        f"checkpoint,{name},{stored}", lambda directory: save_checkpoint(name, directory, dtype=stored)
    )
    options = BuildOptions(SOCKET, dtype="float16", backend="tensorrt", max_seq_len=256)
    source = resolve_model(str(checkpoint))
    engine = shared_directory(
        f"engine,{name},{stored}", lambda directory: build_engine(source, directory, options, Silent())
    )
    return EngineDirectory.open(engine)


def run(engine: EngineDirectory, graph: NetworkGraph, step: StepBatch, num_pages: int) -> np.ndarray:
    """Logits of the network on ONNX Runtime, with the function body put back."""
    model = ir.to_proto(graph.model)
    assert not model.functions
    model.functions.extend([function_body(model.opset_import[0].version), *layer_bodies()])
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), session_options(), providers=["CPUExecutionProvider"]
    )
    feeds = {name: getattr(step, name) for name in names.STEP_INPUTS}
    shapes = engine.manifest.cache_shapes(num_pages)
    for layer in range(engine.manifest.model.layers):
        for kind in names.CACHE_KINDS:
            feeds[names.past(layer, kind)] = np.zeros(shapes[kind], np.int32 if kind == "code" else np.float16)
    declared = {i.name: i.shape for i in session.get_inputs()}
    for name in graph.weights:
        parts = []
        for part in parts_of(name):
            location = engine.manifest.weights.tensors[part]
            source = map_tensor(engine.weights_directory, location)
            parts.append(np.empty(source.size, np.uint16))
            convert(source.reshape(-1), location.dtype, "float16", parts[-1])
        feeds[name] = np.concatenate(parts).view(np.float16).reshape(declared[name])
    return session.run([names.LOGITS], feeds)[0]


@pytest.mark.parametrize(
    ("family", "stored", "opset17", "cublas"),
    [
        ("llama3.2", torch.bfloat16, True, False),
        ("gemma2", torch.float16, True, False),
        ("qwen2", torch.float16, False, False),
        ("llama3.2", torch.bfloat16, True, True),
        ("gemma2", torch.float16, True, True),
        ("qwen3", torch.float16, True, True),
        ("phi3", torch.float16, True, True),
    ],
)
def test_the_network_computes_what_the_graph_computes(
    family: str, stored: torch.dtype, opset17: bool, cublas: bool
) -> None:
    engine = family_engine(family, stored)
    graph = load_network(engine, 8 if opset17 else 10, cublas=cublas)
    assert graph.model.graph.opset_imports[""] == (17 if opset17 else 18)
    assert {part for name in graph.weights for part in parts_of(name)} == set(engine.manifest.weights.tensors)
    assert not any(isinstance(v.const_value, ir.ExternalTensor) for v in graph.model.graph.initializers.values())
    products = [node for node in graph.model.graph if node.op_type == "MatMul"]
    assert {product.inputs[1].name for product in products} == set(graph.transposed)
    scenario = make_scenario(engine.manifest)
    expected = OnnxRuntimeSession(engine, scenario.num_pages).step(scenario.steps[0])
    found = run(engine, graph, scenario.steps[0], scenario.num_pages)
    np.testing.assert_allclose(found, expected, atol=1e-2)


def test_every_projection_is_a_transposed_weight_with_a_leading_one() -> None:
    engine = EngineDirectory.open(tiny_engine("float16"))
    graph = load_network(engine, 10)
    producers = {value.name: node for node in graph.model.graph for value in node.outputs}
    products = [node for node in graph.model.graph if node.op_type == "MatMul"]
    assert len(graph.transposed) == len(products) == 2 * 4 + 1  # qkv, o, gate and up, down
    for product in products:
        transpose = producers[product.inputs[1].name]
        assert transpose.outputs[0].name in graph.transposed
        assert list(transpose.attributes["perm"].as_ints()) == [0, 2, 1]
        weight = transpose.inputs[0]
        assert weight.name in graph.weights
        shapes = [engine.manifest.weights.tensors[part].shape for part in parts_of(weight.name)]
        assert list(weight.shape) == [1, sum(rows for rows, _ in shapes), shapes[0][1]]


def test_products_of_the_same_activations_are_joined() -> None:
    """The output projection and the one down have activations of their own; the head's weight is the embedding's."""
    engine = EngineDirectory.open(tiny_engine("float16"))
    names_of = [parts_of(name) for name in load_network(engine, 8).weights]
    joint = {tuple(part.split(".")[-2] for part in parts) for parts in names_of if len(parts) > 1}
    assert joint == {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")}


@pytest.mark.parametrize(
    ("family", "norms", "rotary", "gates"),
    [("phi3", 1, 2, 2), ("mistral", 1, 2, 2), ("gemma2", 5, 2, 0), ("qwen2", 1, 0, 2), ("qwen3", 5, 0, 2)],
)
def test_what_lies_around_attention_is_plugins(family: str, norms: int, rotary: int, gates: int) -> None:
    """Of two layers.  Qwen's queries and keys have a bias or a norm of their own, Gemma's gates are no silu."""
    engine = family_engine(family, torch.float16)
    nodes = list(load_network(engine, 8, cublas=True).model.graph)
    kinds = [node.op_type for node in nodes]
    assert [kinds.count(kind) for kind in names.LAYERS] == [2 * 4 + 1, norms, 4, rotary, gates]
    assert not {"MatMul", "ReduceMean", "Sqrt", "GatherND"} & set(kinds)
    for node in nodes:
        if node.op_type == names.LINEAR:
            activations, weight = node.inputs
            assert activations.dtype == weight.dtype == node.outputs[0].dtype == ir.DataType.FLOAT16
            assert len(activations.shape) == len(weight.shape) == 2
            assert list(node.outputs[0].shape)[1] == weight.shape[0]
            assert all(part in engine.manifest.weights.tensors for part in parts_of(weight.name))
    assert not set(names.LAYERS) & {node.op_type for node in load_network(engine, 10, cublas=True).model.graph}


def small_products(places: list[int], transposed_twice: bool = False) -> ir.Model:
    """Products x W^T of several W, each at one of `places` of a file."""
    nodes, outputs, weights = [], [], []
    for i, place in enumerate(places):
        name = f"w{i}"
        nodes.append(helper.make_node("Transpose", [name], [f"{name}t"], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", ["x", f"{name}t"], [f"y{i}"], name=f"product{i}"))
        if transposed_twice and i == 0:
            nodes.append(helper.make_node("Transpose", [name], ["again"], perm=[1, 0]))
            outputs.append(helper.make_tensor_value_info("again", TensorProto.FLOAT16, [4, 2]))
        outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT16, [3, 2]))
        tensor = helper.make_tensor(name, TensorProto.FLOAT16, [2, 4], bytes(16), raw=True)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "file"), ("offset", str(place)), ("length", "16")):
            tensor.external_data.add(key=key, value=value)
        weights.append(tensor)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [3, 4])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    graph.value_info.extend(
        helper.make_tensor_value_info(f"w{i}t", TensorProto.FLOAT16, [4, 2]) for i in range(len(places))
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))


@pytest.mark.parametrize(
    ("places", "transposed_twice", "weights"),
    [
        ([0, 16, 32], False, {"w0+w1+w2"}),
        ([0, 16, 0], False, {"w0", "w1", "w2"}),  # two of three share their bytes: one is left, alone
        ([0, 16, 32], True, {"w0", "w1+w2"}),
        ([0], False, {"w0"}),
    ],
)
def test_weights_that_are_used_elsewhere_stay_apart(
    places: list[int], transposed_twice: bool, weights: set[str]
) -> None:
    model = small_products(places, transposed_twice)
    graph = network_graph(model)
    assert set(graph.weights) == weights
    session = onnxruntime.InferenceSession(graph.serialize(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    x, own = rng.standard_normal((3, 4)).astype(np.float16), rng.standard_normal((3, 2, 4)).astype(np.float16)
    shapes = {value.name: value.shape for value in session.get_inputs()}
    feeds = {"x": x} | {
        name: np.concatenate([own[int(part[1:])] for part in parts_of(name)]).reshape(shapes[name])
        for name in graph.weights
    }
    found = dict(zip([value.name for value in session.get_outputs()], session.run(None, feeds), strict=True))
    for i in range(len(places)):
        np.testing.assert_allclose(found[f"y{i}"], x @ own[i].T, atol=2e-2)


def test_types_tell_what_is_float32_in_a_float16_graph() -> None:
    graph = load_network(EngineDirectory.open(tiny_engine("float16")), 8)
    kinds = {node.op_type for node in graph.model.graph if node.outputs[0].name in graph.float32}
    assert kinds == {"Cast", "Mul", "Concat", "Cos", "Sin", "ReduceMean", "Add", "Sqrt", "Reciprocal"}
    assert names.LOGITS in graph.float32
    assert names.past(0, "key") in graph.float16
    assert "model.norm.weight" in graph.float16
    assert not graph.float32 & graph.float16


@pytest.mark.parametrize(
    ("family", "stored"),
    [("llama3.2", torch.bfloat16), ("gemma2", torch.float16), ("phi3", torch.float16), ("qwen3", torch.float16)],
)
def test_hidden_states_are_matrices_where_tensorrt_times_every_layout_of_three_axes(
    family: str, stored: torch.dtype
) -> None:
    """Up to the last: what takes the rows whose logits are wanted.  Rotary tables and attention have four axes."""
    engine = family_engine(family, stored)
    wide = {
        major: [
            node.op_type
            for node in load_network(engine, major).model.graph
            if node.outputs[0].shape is not None and len(node.outputs[0].shape) == 3
        ]
        for major in (8, 10)
    }
    assert len(wide[10]) > 40
    assert set(wide[8]) <= {"Unsqueeze", "Transpose", "GatherND", "MatMul", "Div", "Tanh", "Mul"}
    assert len(wide[8]) <= 12


def test_attributes_can_be_changed() -> None:
    engine = EngineDirectory.open(tiny_engine("float16"))
    nodes = [n for n in load_network(engine, 8, {"min_length": 77}).model.graph if n.op_type == names.OPERATOR]
    assert [node.attributes["min_length"].as_int() for node in nodes] == [77, 77]
    nodes = [n for n in load_network(engine, 8).model.graph if n.op_type == names.OPERATOR]
    assert [node.attributes["min_length"].as_int() for node in nodes] == [0, 0]


def small(exponent: float) -> ir.Model:
    node = helper.make_node("Pow", ["x", "e"], ["y"], name="power")
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])]
    constant = numpy_helper.from_array(np.array(exponent, np.float32), "e")
    graph = helper.make_graph([node], "g", inputs, outputs, [constant])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))


@pytest.mark.parametrize(("exponent", "kinds"), [(2.0, ["Mul"]), (3.0, ["Mul", "Mul"]), (4.0, ["Pow"]), (0.5, ["Pow"])])
def test_small_powers_become_products(exponent: float, kinds: list[str]) -> None:
    graph = network_graph(small(exponent))
    assert [node.op_type for node in graph.model.graph] == kinds
    assert graph.float32 >= {"x", "y"}
    session = onnxruntime.InferenceSession(graph.serialize(), providers=["CPUExecutionProvider"])
    x = np.array([-1.5, 0.0, 3.0], np.float32) if len(kinds) > 1 or exponent == 2 else np.array([0.5, 0, 3], np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x**exponent)


def rotary(middle: int = 4, axis: int = 3) -> ir.Model:
    """Two tensors [1, 2, n, 8] that share their sines, each cut at `middle` and rotated as transformers does it."""
    constants = {"zero": [0], "middle": [middle], "end": [2**63 - 1], "axis": [axis]}
    nodes, outputs = [helper.make_node("Sin", ["angles"], ["sines"], name="sines")], []
    for x in ("q", "k"):
        nodes += [
            helper.make_node("Slice", [x, "zero", "middle", "axis"], [f"{x}1"], name=f"{x}1"),
            helper.make_node("Slice", [x, "middle", "end", "axis"], [f"{x}2"], name=f"{x}2"),
            helper.make_node("Neg", [f"{x}2"], [f"{x}n"], name=f"{x}n"),
            helper.make_node("Concat", [f"{x}n", f"{x}1"], [f"{x}r"], name=f"{x}r", axis=axis),
            helper.make_node("Mul", [f"{x}r", "sines"] if x == "q" else ["sines", f"{x}r"], [f"{x}s"], name=f"{x}s"),
        ]
        outputs.append(helper.make_tensor_value_info(f"{x}s", TensorProto.FLOAT16, [1, 2, "n", 8]))
    inputs = [helper.make_tensor_value_info(x, TensorProto.FLOAT16, [1, 2, "n", 8]) for x in ("q", "k", "angles")]
    initializers = [numpy_helper.from_array(np.array(values, np.int64), name) for name, values in constants.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    graph.value_info.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, [1, 2, "n", 8]) for name in ("qr", "kr", "sines")
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


@pytest.mark.parametrize(("middle", "axis", "rewritten"), [(4, 3, True), (3, 3, False), (1, 1, False)])
def test_halves_of_a_head_change_places_by_one_slice(middle: int, axis: int, rewritten: bool) -> None:
    """Bit for bit; what is no exchange of a head's halves stays as it is."""
    rng = np.random.default_rng(0)
    feeds = {x: rng.standard_normal((1, 2, 5, 8)).astype(np.float16) for x in ("q", "k", "angles")}

    def compute(data: bytes) -> list[np.ndarray]:
        return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, feeds)

    model = rotary(middle, axis)
    expected = compute(ir.to_proto(model).SerializeToString())
    graph = network_graph(model, opset17=True)
    kinds = sorted(node.op_type for node in graph.model.graph)
    if rewritten:
        assert kinds == ["Mul"] * 3 + ["Reshape"] * 4 + ["Sin"] + ["Slice"] * 2  # the sines get their signs once
    else:
        assert kinds == ["Concat"] * 2 + ["Mul"] * 2 + ["Neg"] * 2 + ["Sin"] + ["Slice"] * 4
    for one, other in zip(compute(graph.serialize()), expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("family", ["phi3", "gemma2"])
def test_a_graph_of_opset_18_is_lowered_where_the_parser_needs_it(family: str) -> None:
    """From the file: what lowering needs to know of shapes was saved."""
    engine = family_engine(family, torch.float16)
    assert engine.manifest.graph.opset == 18
    graph = load_network(engine, 8)
    assert graph.model.graph.opset_imports[""] == 17
    assert not any(node.op_type == "Pow" for node in graph.model.graph)
