"""What the plugins around attention compute, as functions of standard operators, for ONNX Runtime."""

from __future__ import annotations

import onnx
import onnx.parser

_HEADER = '<domain: "socket", opset_import: ["" : 17]>\n'

_LINEAR = """Linear <plugin_version, plugin_namespace> (activations, weight) => (output) {
  columns = Transpose <perm = [1, 0]> (weight)
  output = MatMul (activations, columns)
}"""

_NORMED = """
  x = Cast <to = 1> (INPUT)
  squares = Mul (x, x)
  mean = ReduceMean <axes = [-1]> (squares)
  least = Constant <value_float: float = @epsilon> ()
  radicand = Add (mean, least)
  root = Sqrt (radicand)
  scaled = Div (x, root)
  rounded = Cast <to = 10> (scaled)
  straight = Mul (weight, rounded)
  one = Constant <value_float = 1.0> ()
  weight_32 = Cast <to = 1> (weight)
  by = Add (weight_32, one)
  weighted = Mul (scaled, by)
  with_one = Cast <to = 10> (weighted)
  flag = Constant <value_int: int = @plus_one> ()
  condition = Cast <to = 9> (flag)
  normed = Where (condition, with_one, straight)"""

_RMS_NORM = f"""RMSNorm <epsilon, plus_one, plugin_version, plugin_namespace> (input, weight) => (normed) {{
  {_NORMED.replace("INPUT", "input")}
}}"""

_ADD_RMS_NORM = f"""AddRMSNorm <epsilon, plus_one, plugin_version, plugin_namespace> (residual, branch, weight)
  => (sum, normed) {{
  sum = Add (residual, branch)
  {_NORMED.replace("INPUT", "sum")}
}}"""

_ROTATED = """
  HEAD_3 = Reshape (HEAD_2, HEAD_shape)
  HEAD_x = Transpose <perm = [0, 2, 1, 3]> (HEAD_3)
  HEAD_first, HEAD_second = Split <axis = -1> (HEAD_x)
  HEAD_negated = Neg (HEAD_second)
  HEAD_turned = Concat <axis = -1> (HEAD_negated, HEAD_first)
  HEAD_straight = Mul (HEAD_x, cosines)
  HEAD_crossed = Mul (HEAD_turned, sines)
  HEAD = Add (HEAD_straight, HEAD_crossed)"""

_SPLIT_ROTARY = f"""SplitRotary <query_heads, kv_heads, plugin_version, plugin_namespace> (joint, cosines, sines)
  => (query, key, value) {{
  query_heads_int = Constant <value_int: int = @query_heads> ()
  kv_heads_int = Constant <value_int: int = @kv_heads> ()
  first_axis = Constant <value_ints = [0]> ()
  query_heads_all = Unsqueeze (query_heads_int, first_axis)
  kv_heads_all = Unsqueeze (kv_heads_int, first_axis)
  head_size = Shape <start = 1, end = 2> (cosines)
  query_columns = Mul (query_heads_all, head_size)
  kv_columns = Mul (kv_heads_all, head_size)
  columns = Concat <axis = 0> (query_columns, kv_columns, kv_columns)
  query_2, key_2, value_2 = Split <axis = -1> (joint, columns)
  one_and_tokens = Constant <value_ints = [1, -1]> ()
  query_shape = Concat <axis = 0> (one_and_tokens, query_heads_all, head_size)
  key_shape = Concat <axis = 0> (one_and_tokens, kv_heads_all, head_size)
  {_ROTATED.replace("HEAD", "query")}
  {_ROTATED.replace("HEAD", "key")}
  value_3 = Reshape (value_2, key_shape)
  value = Transpose <perm = [0, 2, 1, 3]> (value_3)
}}"""

_SWIGLU = """SwiGLU <plugin_version, plugin_namespace> (joint) => (output) {
  gate, up = Split <axis = -1> (joint)
  sigmoid = Sigmoid (gate)
  silu = Mul (gate, sigmoid)
  output = Mul (silu, up)
}"""


_BODIES = (_LINEAR, _RMS_NORM, _ADD_RMS_NORM, _SPLIT_ROTARY, _SWIGLU)


def layer_bodies() -> list[onnx.FunctionProto]:
    return [onnx.parser.parse_function(_HEADER + body) for body in _BODIES]
