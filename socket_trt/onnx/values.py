"""What passes over a graph ask and tell of its values."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir


def constant_integers(value: ir.Value | None) -> list[int] | None:
    """The numbers of a constant, in one list; None for what is no constant."""
    constant = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if constant is None else [int(x) for x in constant.numpy().reshape(-1)]


def describe(node: ir.Node, like: ir.Value, shape: Sequence[object] | None) -> None:
    """Name the output after its node, and give it the type of `like`."""
    output = node.outputs[0]
    output.name, output.type, output.shape = node.name, like.type, None if shape is None else ir.Shape(shape)
