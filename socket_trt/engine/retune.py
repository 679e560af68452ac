"""Other parameters of SOCKET for an engine directory that is there: its graph is rewritten, nothing is exported again.

All parameters are in the graph: L and R as the shape of the hyperplanes and of the code caches, the others as attributes of
its `SocketAttention` nodes.  ONNX Runtime reads the graph whenever a session opens; TensorRT's plan has to be compiled again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from socket_trt import names
from socket_trt.config import AttentionKind, SocketConfig
from socket_trt.engine.manifest import PLAN_FILE, EngineDirectory, Manifest, TensorRecord
from socket_trt.errors import ConfigError, GraphError
from socket_trt.planes import draw_planes
from socket_trt.weights import sha256_of

# What an engine is built for and `retune` leaves alone.
FIXED = ("page_size",)


def changes(old: SocketConfig, new: SocketConfig) -> dict[str, tuple[object, object]]:
    """Parameters that differ: old value and new."""
    before, after = old.model_dump(mode="json"), new.model_dump(mode="json")
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def changes_layout(old: SocketConfig, new: SocketConfig) -> bool:
    """Whether a cache filled under one is of no use under the other."""
    return (old.tables, old.planes, old.seed) != (new.tables, new.planes, new.seed)


def check_retunable(engine: EngineDirectory) -> None:
    """Raise ConfigError for a dense engine, EngineError for one whose graph is not what the build left."""
    if engine.manifest.attention is not AttentionKind.socket:
        raise ConfigError(f"{engine.path}: built with --attention dense: there is nothing to tune")
    engine.check_graph()


def retune(engine: EngineDirectory, socket: SocketConfig) -> Manifest:
    """Write the graph and the manifest with `socket`; a plan of the old graph is removed.

    Raises ConfigError for a change of what the engine was built for, GraphError where the graph is not of the form that
    `socket-trt build` writes.
    """
    check_retunable(engine)
    manifest = engine.manifest
    different = changes(manifest.socket, socket)
    for name in FIXED:
        if name in different:
            raise ConfigError(f"{engine.path}: {name} is fixed when an engine is built; build it again")
    if not different:
        return manifest
    model = onnx.load(str(engine.graph), load_external_data=False)
    _set_attributes(model, socket, manifest.model.layers, engine.graph)
    _set_planes(model, socket, manifest.model.head_size, engine.graph)
    codes = {name(layer, "code") for layer in range(manifest.model.layers) for name in (names.past, names.present)}
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        if value.name in codes:
            dims = value.type.tensor_type.shape.dim
            dims[2].dim_value, dims[3].dim_value = socket.tables, socket.code_words
    partial = engine.path / f".{engine.graph.name}.partial"
    partial.write_bytes(model.SerializeToString())
    manifest = manifest.model_copy(
        update={
            "socket": socket,
            "plan": None,
            "graph": manifest.graph.model_copy(
                update={
                    "sha256": sha256_of(partial),
                    "inputs": [_with_codes(tensor, codes, socket) for tensor in manifest.graph.inputs],
                    "outputs": [_with_codes(tensor, codes, socket) for tensor in manifest.graph.outputs],
                }
            ),
        }
    )
    partial.replace(engine.graph)
    engine.write(manifest)
    (engine.path / PLAN_FILE).unlink(missing_ok=True)
    return manifest


def _set_attributes(model: onnx.ModelProto, socket: SocketConfig, layers: int, path: Path) -> None:
    nodes = [node for node in model.graph.node if (node.domain, node.op_type) == (names.DOMAIN, names.OPERATOR)]
    if len(nodes) != layers:
        raise GraphError(f"{path}: {len(nodes)} {names.OPERATOR} nodes for {layers} layers; build the engine again")
    for node in nodes:
        own = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        wanted = socket.attributes(own["scale"], own.get("sliding_window", -1), own.get("softcap", 0.0)).as_dict()
        changed = {name: value for name, value in wanted.items() if name in own and own[name] != value}
        for attribute in [a for a in node.attribute if a.name in changed]:
            node.attribute.remove(attribute)
        node.attribute.extend(helper.make_attribute(name, value) for name, value in changed.items())


def _set_planes(model: onnx.ModelProto, socket: SocketConfig, head_size: int, path: Path) -> None:
    """The hyperplanes in the type that the graph has them in."""
    old = next((tensor for tensor in model.graph.initializer if tensor.name == names.PLANES), None)
    if old is None:
        raise GraphError(f"{path}: has no initializer {names.PLANES}; build the engine again")
    drawn = draw_planes(socket.tables, socket.planes, head_size, socket.seed)
    dtype = helper.tensor_dtype_to_np_dtype(old.data_type)
    old.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(drawn.astype(dtype)), names.PLANES))


def _with_codes(tensor: TensorRecord, codes: set[str], socket: SocketConfig) -> TensorRecord:
    if tensor.name not in codes:
        return tensor
    return tensor.model_copy(update={"shape": [*tensor.shape[:2], socket.tables, socket.code_words]})
