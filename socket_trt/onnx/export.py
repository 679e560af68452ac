"""Hugging Face model -> ONNX graph with `SocketAttention` nodes, without reading a weight.

The model is built on fake tensors, so that an 8B graph takes seconds and a few hundred megabytes; its weights become
external tensors afterwards (`socket_trt.onnx.weights`).
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from onnxscript import optimizer
from onnxscript.values import Opset
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from socket_trt import __version__, names
from socket_trt.config import OperatorAttributes, SocketConfig
from socket_trt.models.families import head_size
from socket_trt.models.packed import IMPLEMENTATION, PackedModel, empty_caches, freeze_rope
from socket_trt.onnx.function import function_body
from socket_trt.onnx.opset17 import lower_to_opset17

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

EXPORT_OPSET = 18  # the lowest the exporter writes
WEIGHT_PREFIX = "model."  # PackedModel.model

_SOCKET = Opset(names.DOMAIN, names.OPERATOR_VERSION)
_ATTRIBUTES = tuple(OperatorAttributes.__dataclass_fields__)


def _translate(*arguments: object) -> object:
    """torch.ops.socket_trt.attention as an ONNX node: inputs first, attributes by name."""
    inputs = len(names.OPERATOR_INPUTS)
    return _SOCKET.SocketAttention(*arguments[:inputs], **dict(zip(_ATTRIBUTES, arguments[inputs:], strict=True)))


def parameter_shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters as a checkpoint stores them: tied ones once."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def fake_model(
    config: PretrainedConfig, dtype: torch.dtype, max_seq_len: int
) -> tuple[PreTrainedModel, FakeTensorMode]:
    """The model with parameters that have shapes and no storage; its buffers are real, being constants of the graph."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=IMPLEMENTATION)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                setattr(module, name, torch.nn.Parameter(fake, requires_grad=False))
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        for name, buffer in buffers.items():
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
        if buffers:  # constants of the model, which only its own initialisation knows
            model._init_weights(module)
    freeze_rope(model, max_seq_len)
    model.tie_weights()
    return model.eval(), mode


def export_model(
    config: PretrainedConfig, socket: SocketConfig, dtype: torch.dtype, max_seq_len: int, opset: int = EXPORT_OPSET
) -> ir.Model:
    """The graph of docs/engine-directory.md: packed tokens, paged caches, `SocketAttention` nodes.

    config       a supported configuration (`families.check_supported`)
    dtype        T, of weights, caches and activations
    max_seq_len  tokens of the longest sequence, for which longrope's frequencies are chosen
    opset        17 to 23

    Initializers named as the checkpoint's tensors hold no data yet.
    Raises GraphError for a graph that opset 17 cannot say.
    """
    model, mode = fake_model(config, dtype, max_seq_len)
    size = head_size(config)
    packed = PackedModel(model, socket, size)
    layers, kv_heads = config.num_hidden_layers, config.num_key_value_heads
    arguments = _example(layers, kv_heads, size, socket, dtype)
    with mode, torch.no_grad(), _quiet():
        program = torch.onnx.export(
            packed,
            arguments,
            dynamo=True,
            opset_version=max(opset, EXPORT_OPSET),
            dynamic_shapes=_dynamic_shapes(layers),
            input_names=[
                *names.STEP_INPUTS,
                *(names.past(i, kind) for i in range(layers) for kind in names.CACHE_KINDS),
            ],
            output_names=[names.LOGITS, *(names.present(i, kind) for i in range(layers) for kind in names.CACHE_KINDS)],
            custom_translation_table={torch.ops.socket_trt.attention.default: _translate},
            optimize=False,
            verbose=False,
        )
    assert program is not None
    graph_model: ir.Model = program.model
    _optimize_around_weights(graph_model)
    if opset == 17:
        lower_to_opset17(graph_model)
    _rename_dimensions(graph_model, layers)
    planes = graph_model.graph.initializers.pop("planes")
    planes.name = names.PLANES
    graph_model.graph.register_initializer(planes)
    return graph_model


def attention_nodes(model: ir.Model) -> list[ir.Node]:
    """The `SocketAttention` nodes of a graph, layer by layer."""
    return [node for node in model.graph if (node.domain, node.op_type) == (names.DOMAIN, names.OPERATOR)]


def save_graph(model: ir.Model, path: Path, external_data: str | None = None) -> None:
    """Write the graph with the operator's function body in it, so that any ONNX runtime can run it.

    external_data: a file beside `path` to copy the weights to; without it they stay where they are.
    """
    function = ir.from_proto(function_body(model.graph.opset_imports[""]))
    model.functions[function.identifier()] = function
    model.producer_name, model.producer_version = "socket-trt", __version__
    ir.save(model, path, external_data=external_data)


def _example(
    layers: int, kv_heads: int, size: int, socket: SocketConfig, dtype: torch.dtype
) -> tuple[Tensor | list[tuple[Tensor, Tensor, Tensor, Tensor]], ...]:
    """Arguments to trace with; every dynamic size is different and above one, so that none is taken for constant."""
    sequences, tokens, pages, row_pages = 3, 11, 13, 5

    def integers(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.int32)

    return (
        integers(tokens),
        integers(tokens),
        integers(sequences),
        integers(sequences, row_pages),
        integers(sequences),
        integers(sequences + 1),
        empty_caches(layers, pages, kv_heads, size, socket, dtype),
    )


def _dynamic_shapes(layers: int) -> tuple[object, ...]:
    dynamic = torch.export.Dim.DYNAMIC
    one = {0: dynamic}
    return (one, one, one, {0: dynamic, 1: dynamic}, one, one, [(one, one, one, one)] * layers)


def _optimize_around_weights(model: ir.Model) -> None:
    """Fold constants and drop dead nodes with the weights hidden as graph inputs, so that none is folded or read."""
    graph = model.graph
    hidden = {}
    for name in [name for name in graph.initializers if name.startswith(WEIGHT_PREFIX)]:
        value = graph.initializers.pop(name)
        if not name.endswith(("weight", "bias")):  # rotary frequencies and the like are constants
            graph.initializers[name] = value
            continue
        hidden[name] = value.const_value
        value.const_value = None
        graph.inputs.append(value)
    optimizer.optimize_ir(model)
    for value in [value for value in graph.inputs if value.name in hidden]:
        graph.inputs.remove(value)
        value.const_value = hidden[value.name]
        value.name = value.name.removeprefix(WEIGHT_PREFIX)
        graph.register_initializer(value)


def _rename_dimensions(model: ir.Model, layers: int) -> None:
    """Give every input and output the symbolic dimensions of `names`, in place of the exporter's numbering."""
    shapes: dict[str, dict[int, str]] = {
        names.INPUT_IDS: {0: names.DIM_TOKENS},
        names.POSITION_IDS: {0: names.DIM_TOKENS},
        names.LOGITS_INDICES: {0: names.DIM_SEQUENCES},
        names.PAGE_TABLE: {0: names.DIM_SEQUENCES, 1: names.DIM_PAGES_PER_SEQUENCE},
        names.PAST_LENGTH: {0: names.DIM_SEQUENCES},
        names.QUERY_START: {0: names.DIM_BOUNDARIES},
        names.LOGITS: {0: names.DIM_SEQUENCES},
    }
    for layer in range(layers):
        for kind in names.CACHE_KINDS:
            shapes[names.past(layer, kind)] = shapes[names.present(layer, kind)] = {0: names.DIM_PAGES}
    for value in [*model.graph.inputs, *model.graph.outputs]:
        dims: list[int | str] = [d if isinstance(d, int) else str(d) for d in value.shape]
        for axis, dim in shapes[value.name].items():
            dims[axis] = dim
        value.shape = ir.Shape(dims)
    for node in model.graph:
        for value in node.outputs:  # the exporter's own symbols inside the graph would clash with the new ones
            if not value.is_graph_output() and value.shape is not None and not value.shape.is_static():
                value.shape = ir.Shape([dim if isinstance(dim, int) else None for dim in value.shape])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Export without the exporter's progress lines and warnings: its failures are exceptions."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logger.setLevel(level)
