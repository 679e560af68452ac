"""Rewrite an ONNX file: weights in external files stay where they are, and nothing is written unless all went well."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from socket_trt.config import SocketConfig
from socket_trt.errors import GraphError
from socket_trt.onnx.rewrite.graph import MICROSOFT
from socket_trt.onnx.rewrite.rewriter import RewriteReport, rewrite_model


def rewrite_file(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: SocketConfig,
    *,
    sliding_window: int | None = None,
    copy_weights: bool = False,
    force: bool = False,
) -> RewriteReport:
    """Write `output`, the model of `source` with `SocketAttention` nodes; see `rewrite_model`.

    copy_weights  False: external tensors keep pointing into the source's files, by paths relative to `output`.
                  True: all weights go into `<output>.data` beside it.
    force         overwrite what is at `output`

    Raises GraphError where the source is missing or no ONNX model, the model cannot be rewritten, or the output cannot be
    written.  `output` is then as it was before.
    """
    source, output = Path(source), Path(output)
    if not source.is_file():
        raise GraphError(f"{source}: no such file; give the path of an ONNX model")
    if output.exists() and output.resolve() == source.resolve():
        raise GraphError(f"{output} is the model to rewrite; give another output")
    data = output.with_name(output.name + ".data")
    for path in (output, data) if copy_weights else (output,):
        if path.exists() and not force:
            raise GraphError(f"{path} exists; give --force to overwrite it")
    model = _load(source)
    external = _external_tensors(model)
    _check_data(external, source)
    if copy_weights and data.exists() and any(Path(t.path).resolve() == data.resolve() for t in external):
        raise GraphError(f"{data} holds the source's own weights; give another output")
    report = rewrite_model(model, config, sliding_window)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        # Everything is written beside the output first, so that a failure leaves nothing behind.
        with tempfile.TemporaryDirectory(prefix=".rewrite-", dir=output.parent) as scratch:
            _save(model, Path(scratch), output, copy_weights)
    except OSError as error:
        raise GraphError(f"{output} cannot be written: {error.strerror or error}") from None
    return report


def weights_outside(model: str | os.PathLike[str]) -> list[str]:
    """Weight files of a model that lie outside its directory: ONNX Runtime wants these folders named explicitly."""
    path = Path(model)
    folder = path.parent.resolve()
    files = {Path(tensor.path).resolve() for tensor in _external_tensors(_load(path))}
    return sorted(str(file) for file in files if not file.is_relative_to(folder))


def _load(path: Path) -> ir.Model:
    try:
        return ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise whatever a broken file makes them stumble over
        raise GraphError(
            f"{path}: not an ONNX model ({str(error).splitlines()[0] if str(error) else error!r})"
        ) from None


def _external_values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in (model.graph, *model.graph.subgraphs()):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value


def _external_tensors(model: ir.Model) -> list[ir.ExternalTensor]:
    return [value.const_value for value in _external_values(model)]


def _check_data(tensors: list[ir.ExternalTensor], source: Path) -> None:
    sizes: dict[str, int] = {}
    for tensor in tensors:
        path = str(tensor.path)
        if path not in sizes:
            if not os.path.isfile(path):
                raise GraphError(f"{source}: its weights are not at {path}; put the file there")
            sizes[path] = os.path.getsize(path)
        if (tensor.offset or 0) + tensor.nbytes > sizes[path]:
            raise GraphError(f"{path} is too short for tensor '{tensor.name}'; get the whole file")


def _save(model: ir.Model, scratch: Path, output: Path, copy_weights: bool) -> None:
    written, data_name = scratch / output.name, output.name + ".data"
    if copy_weights:
        ir.save(model, written, external_data=data_name)
        check_model(onnx.load(written, load_external_data=False))
        if (scratch / data_name).exists():
            os.replace(scratch / data_name, output.parent / data_name)
    else:
        _locate(model, output.parent)
        proto = ir.to_proto(model)
        check_model(proto)
        written.write_bytes(proto.SerializeToString())
    os.replace(written, output)


def _locate(model: ir.Model, folder: Path) -> None:
    """Name the weights' files relative to `folder`; symbolic links are followed, ONNX Runtime refuses them."""
    for value in _external_values(model):
        old = value.const_value
        location = os.path.relpath(Path(old.path).resolve(), folder.resolve())
        value.const_value = ir.ExternalTensor(
            location, old.offset, old.length, old.dtype, shape=old.shape, name=old.name, base_dir=folder
        )


def check_model(model: onnx.ModelProto) -> None:
    """onnx.checker on the graph, its external weights taken for inputs: the checker looks for their files elsewhere.

    ONNX Runtime registers a few operators of its own in the standard domain (SimplifiedLayerNormalization), which the
    checker does not know: they are checked as operators of another domain.  The model is as before afterwards, but for
    the order of its initializers.  Raises GraphError.
    """
    graph = model.graph
    strangers = [n for n in graph.node if n.domain == "" and not onnx.defs.has(n.op_type, "")]
    inputs, imports = len(graph.input), len(model.opset_import)
    external = [t for t in graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in external:
        graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        graph.initializer.remove(tensor)
    for node in strangers:
        node.domain = MICROSOFT
    if strangers and all(entry.domain != MICROSOFT for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(MICROSOFT, 1))
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise GraphError(f"the rewritten model is not valid ONNX: {str(error).splitlines()[0]}") from None
    finally:
        for node in strangers:
            node.domain = ""
        del graph.input[inputs:], model.opset_import[imports:]
        graph.initializer.extend(external)
