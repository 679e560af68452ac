"""Small language models in the forms in which other people's exporters write them, with random weights.

`ModelWriter` holds a decoder's common parts; `genai_model` gives it the attention of onnxruntime-genai's model builder,
`onnx_model` the opset-23 `Attention`.  Both take padded batches and a cache that grows by concatenation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LAYERS, VOCABULARY, HIDDEN, INNER = 2, 61, 64, 96
QUERY_HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 32
MAX_POSITIONS = 128
QUERY_WIDTH, KV_WIDTH = QUERY_HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE
MICROSOFT = "com.microsoft"


class ModelWriter:
    """Nodes, initializers and ends of a graph under construction; values are their names."""

    def __init__(self, opset: int, seed: int = 0) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.infos: list[onnx.ValueInfoProto] = []
        self._rng = np.random.default_rng(seed)

    def input(self, name: str, kind: int, shape: list[int | str]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, shape: list[int | str]) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def node(
        self, op: str, *inputs: str, to: str = "", domain: str = "", outputs: tuple[str, ...] = (), **attributes: object
    ) -> str:
        names = outputs or (to or f"{op}_{len(self.nodes)}",)
        if "to_type" in attributes:
            attributes["to"] = attributes.pop("to_type")  # Cast's attribute, whose name this method's argument takes
        self.nodes.append(helper.make_node(op, inputs, names, name=f"/{names[0]}", domain=domain, **attributes))
        return names[0]

    def weight(self, name: str, *shape: int, mean: float = 0.0) -> str:
        scale = shape[0] ** -0.5 if len(shape) > 1 else 0.1
        return self.constant(name, (mean + self._rng.standard_normal(shape) * scale).astype(np.float32))

    def constant(self, name: str, array: np.ndarray) -> str:
        if all(t.name != name for t in self.initializers):
            self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def ints(self, *values: int) -> str:
        return self.constant(f"ints_{values}", np.array(values, np.int64))

    def scalar(self, value: int) -> str:
        return self.constant(f"int_{value}", np.array(value, np.int64))

    def shaped(self, value: str, *shape: int | str) -> str:
        """State a value's shape, as exporters do for those that a rewriter needs."""
        self.infos.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, shape))
        return value

    def linear(self, x: str, name: str, rows: int, columns: int) -> str:
        product = self.node("MatMul", x, self.weight(f"{name}.weight", rows, columns), to=f"{name}/MatMul")
        return self.shaped(product, "batch_size", "sequence_length", columns)

    def rope_tables(self, rotated: int = HEAD_SIZE) -> tuple[str, str]:
        angles = np.arange(MAX_POSITIONS)[:, None] * 100.0 ** (-np.arange(rotated // 2) / (rotated // 2))
        return (
            self.constant("cos_cache", np.cos(angles).astype(np.float32)),
            self.constant("sin_cache", np.sin(angles).astype(np.float32)),
        )

    def past(self, layer: int) -> list[str]:
        shape: list[int | str] = ["batch_size", KV_HEADS, "past_sequence_length", HEAD_SIZE]
        return [self.input(f"past_key_values.{layer}.{kind}", TensorProto.FLOAT, shape) for kind in ("key", "value")]

    def presents(self, layer: int) -> tuple[str, str]:
        shape: list[int | str] = ["batch_size", KV_HEADS, "total_sequence_length", HEAD_SIZE]
        names = (f"present.{layer}.key", f"present.{layer}.value")
        for name in names:
            self.output(name, shape)
        return names

    def mlp(self, x: str, name: str) -> str:
        gate, up = self.linear(x, f"{name}/gate", HIDDEN, INNER), self.linear(x, f"{name}/up", HIDDEN, INNER)
        silu = self.node("Mul", gate, self.node("Sigmoid", gate))
        return self.linear(self.node("Mul", silu, up), f"{name}/down", INNER, HIDDEN)

    def model(self, ir_version: int = 10) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes, "main", self.inputs, self.outputs, self.initializers, value_info=self.infos
        )
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=ir_version)


@dataclasses.dataclass(frozen=True)
class GenaiForm:
    """Variants of what the builder writes."""

    packed: bool = True  # one qkv projection
    rotary_inside: bool = True  # else com.microsoft::RotaryEmbedding before the node, and position_ids an input
    interleaved: bool = False
    window: int = -1
    softcap: float = 0.0
    prune: bool = False  # logits of the last token only
    int4: bool = False  # lm_head as MatMulNBits
    rotated: int = HEAD_SIZE  # entries of a head that the rotary embedding turns
    cache_dim: str | int = "kv_cache_dim"
    extra: tuple[tuple[str, object], ...] = ()  # further attributes of the attention
    trailing: tuple[str, ...] = ("", "", "")  # position_ids, attention_bias, head_sink


def genai_model(form: GenaiForm = GenaiForm()) -> onnx.ModelProto:
    """A model as `python -m onnxruntime_genai.models.builder -p fp32 -e cpu` writes it.

    Checked against the builder of onnxruntime-genai 0.18.0 on a tiny random Llama: the attention's operator, inputs present
    and absent, attributes and outputs, and the norms, are the builder's (`test_real_genai_builder` compares them wherever
    the package is installed).  What it builds of Qwen2, Qwen3, Mistral and Gemma2, with a pruned head and in int4, was
    rewritten too and gave the original logits.
    """
    w = ModelWriter(opset=22)
    batch: list[int | str] = ["batch_size", "sequence_length"]
    w.input("input_ids", TensorProto.INT64, batch)
    w.input("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"])
    if not form.rotary_inside:
        w.input("position_ids", TensorProto.INT64, batch)
    prefix = "/model/attn_mask_reformat"
    counts = w.node("ReduceSum", "attention_mask", w.ints(1), to=f"{prefix}/ReduceSum", keepdims=0)
    lengths = w.node("Cast", w.node("Sub", counts, w.ints(1), to=f"{prefix}/Sub"), to_type=TensorProto.INT32)
    sizes = w.node("Shape", "attention_mask", to=f"{prefix}/Shape")
    total = w.node("Cast", w.node("Gather", sizes, w.scalar(1), axis=0), to_type=TensorProto.INT32)

    cos, sin = w.rope_tables(form.rotated)
    residual = w.node("Gather", w.weight("embed_tokens", VOCABULARY, HIDDEN), "input_ids", to="/embed_tokens/Gather")
    x = w.node(
        "SimplifiedLayerNormalization",
        residual,
        w.weight("norm.0", HIDDEN, mean=1.0),
        axis=-1,
        epsilon=1e-6,
        stash_type=1,
    )
    for layer in range(LAYERS):
        name = f"/model/layers.{layer}"
        width = QUERY_WIDTH + 2 * KV_WIDTH
        if form.packed:
            qkv = [w.linear(x, f"{name}/qkv_proj", HIDDEN, width), "", ""]
        else:
            widths = (QUERY_WIDTH, KV_WIDTH, KV_WIDTH)
            qkv = [w.linear(x, f"{name}/{p}_proj", HIDDEN, n) for p, n in zip("qkv", widths, strict=True)]
        if not form.rotary_inside:
            qkv[:2] = [
                w.shaped(
                    w.node("RotaryEmbedding", v, "position_ids", cos, sin, domain=MICROSOFT, num_heads=heads, to=f"{v}/rotary"),
                    *batch, heads * HEAD_SIZE,
                )
                for v, heads in zip(qkv[:2], (QUERY_HEADS, KV_HEADS), strict=True)
            ]  # fmt: skip
        past, presents = w.past(layer), w.presents(layer)
        tables = (cos, sin) if form.rotary_inside else ("", "")
        attended = w.node(
            "GroupQueryAttention", *qkv, *past, lengths, total, *tables, *form.trailing,
            domain=MICROSOFT, outputs=(f"{name}/attn/GroupQueryAttention", *presents),
            num_heads=QUERY_HEADS, kv_num_heads=KV_HEADS, scale=0.23, local_window_size=form.window,
            softcap=form.softcap, do_rotary=int(form.rotary_inside), rotary_interleaved=int(form.interleaved),
            **dict(form.extra),
        )  # fmt: skip
        out = w.linear(attended, f"{name}/o_proj", QUERY_WIDTH, HIDDEN)
        x, residual = _skip_norm(w, residual, out, f"{name}/post")
        out = w.mlp(x, f"{name}/mlp")
        x, residual = _skip_norm(w, residual, out, f"{name}/next", last=layer == LAYERS - 1)
    if form.prune:
        x = w.node("Unsqueeze", w.node("Gather", x, w.scalar(-1), axis=1, to="/lm_head/prune/Gather"), w.ints(1))
    if form.int4:
        packed = w._rng.integers(0, 256, (VOCABULARY, HIDDEN // 32, 16), dtype=np.uint8)
        scales = np.full((VOCABULARY, HIDDEN // 32), 0.02, np.float32)
        quantised = (w.constant("lm_head.q", packed), w.constant("lm_head.scales", scales))
        w.node(
            "MatMulNBits", x, *quantised, domain=MICROSOFT, to="logits", K=HIDDEN, N=VOCABULARY, bits=4, block_size=32
        )
    else:
        w.node("MatMul", x, w.weight("lm_head.weight", HIDDEN, VOCABULARY), to="logits")
    w.output("logits", ["batch_size", 1 if form.prune else "sequence_length", VOCABULARY])
    for value in [*w.inputs, *w.outputs]:
        if value.name.startswith(("past_key_values", "present")):
            dim = value.type.tensor_type.shape.dim[3]
            dim.Clear()
            if isinstance(form.cache_dim, str):
                dim.dim_param = form.cache_dim
            else:
                dim.dim_value = form.cache_dim
    return w.model()


def _skip_norm(w: ModelWriter, residual: str, x: str, name: str, last: bool = False) -> tuple[str, str]:
    """The norm of residual + x, and that sum, which nothing wants of the last one."""
    outputs = (f"{name}/output_0",) if last else (f"{name}/output_0", "", "", f"{name}/output_3")
    weight = w.weight(f"{name}.weight", HIDDEN, mean=1.0)
    w.node("SkipSimplifiedLayerNormalization", residual, x, weight, domain=MICROSOFT, outputs=outputs, epsilon=1e-6)
    return outputs[0], outputs[-1]


MaskWriter = Callable[[ModelWriter], str]


def _positions_of_keys(w: ModelWriter, tokens: str = "") -> tuple[str, str]:
    """int64 [S, 1] positions of the queries and [1, T] of the keys, from the inputs' sizes."""
    length = w.node("Gather", w.node("Shape", "attention_mask"), w.scalar(1))
    tokens = tokens or w.node("Gather", w.node("Shape", "input_ids"), w.scalar(1))
    keys = w.node("Range", w.scalar(0), length, w.scalar(1))
    queries = w.node("Range", w.node("Sub", length, tokens), length, w.scalar(1))
    return w.node("Unsqueeze", queries, w.ints(1)), w.node("Unsqueeze", keys, w.ints(0))


def _with_padding(w: ModelWriter, admitted: str) -> str:
    padding = w.node("Unsqueeze", w.node("Cast", "attention_mask", to_type=TensorProto.BOOL), w.ints(1, 2))
    return w.node("And", admitted, padding)


def causal_mask(w: ModelWriter) -> str:
    queries, keys = _positions_of_keys(w)
    return _with_padding(w, w.node("LessOrEqual", keys, queries))


def additive_window_mask(window: int) -> MaskWriter:
    """0 and -65504, the window written into it as a constant of float type."""

    def write(w: ModelWriter) -> str:
        queries, keys = _positions_of_keys(w)
        distance = w.node("Sub", queries, keys)
        near = w.node(
            "And", w.node("Less", distance, w.scalar(window)), w.node("GreaterOrEqual", distance, w.scalar(0))
        )
        shown, hidden = (w.constant(f"f{v}", np.array(v, np.float32)) for v in (0.0, -65504.0))
        return w.node("Where", _with_padding(w, near), shown, hidden)

    return write


def chunked_mask(size: int) -> MaskWriter:
    """Causal within chunks of `size` tokens: no sliding window."""

    def write(w: ModelWriter) -> str:
        queries, keys = _positions_of_keys(w)
        same = w.node("Equal", w.node("Div", queries, w.scalar(size)), w.node("Div", keys, w.scalar(size)))
        return _with_padding(w, w.node("And", same, w.node("LessOrEqual", keys, queries)))

    return write


def mask_of_hidden_states(w: ModelWriter) -> str:
    """Causal; the number of queries is read off an activation that comes out of a large weight."""
    hidden = w.node("Gather", w.weight("wide", VOCABULARY, 2048), "input_ids")
    w.shaped(hidden, "batch_size", "sequence_length", 2048)
    queries, keys = _positions_of_keys(w, w.node("Gather", w.node("Shape", hidden), w.scalar(1)))
    return _with_padding(w, w.node("LessOrEqual", keys, queries))


def square_mask(w: ModelWriter) -> str:
    """Causal, as the last rows of a triangle of all tokens by all tokens."""
    length = w.node("Shape", "attention_mask", start=1, end=2)
    tokens = w.node("Shape", "input_ids", start=1, end=2)
    ones = w.node("Expand", w.constant("one", np.array(1, np.int64)), w.node("Concat", length, length, axis=0))
    rows = w.node("Slice", w.node("Trilu", ones, upper=0), w.node("Neg", tokens), w.ints(2**31), w.ints(0))
    return _with_padding(w, w.node("Cast", rows, to_type=TensorProto.BOOL))


def alibi_mask(w: ModelWriter) -> str:
    queries, keys = _positions_of_keys(w)
    distance = w.node("Cast", w.node("Sub", keys, queries), to_type=TensorProto.FLOAT)
    hidden = w.constant("hidden", np.array(-65504.0, np.float32))
    biased = w.node("Where", w.node("LessOrEqual", keys, queries), distance, hidden)
    return w.node("Unsqueeze", biased, w.ints(0, 1))


def learned_mask(w: ModelWriter) -> str:
    """Causal, but added to a table that is a weight: what it holds is nobody's guess."""
    queries, keys = _positions_of_keys(w)
    causal = w.node("Unsqueeze", w.node("LessOrEqual", keys, queries), w.ints(0, 1))
    table = w.constant("relative_bias", np.zeros(1 << 17, np.float32))
    shown = w.node("Gather", table, w.scalar(0))
    return w.node("Where", causal, shown, w.constant("hidden", np.array(-65504.0, np.float32)))


@dataclasses.dataclass(frozen=True)
class OnnxForm:
    """Variants of opset-23 `Attention`."""

    heads_first: bool = True  # [B, H, S, D], else [B, S, H * D]
    past_inside: bool = False  # the node's own past_key and past_value, is_causal=1
    repeat: str = ""  # how K and V get the query's heads, if they do: see `_repeat`
    mask: MaskWriter = causal_mask
    softcap: float = 0.0
    position_input: bool = True  # else positions are counted in the graph
    causal: bool = False
    cached: bool = True  # else is_causal=1 on the step's tokens alone, counted in the graph


def onnx_model(form: OnnxForm = OnnxForm(), opset: int = 23) -> onnx.ModelProto:
    """A decoder around ai.onnx `Attention` with rotary embedding by ai.onnx `RotaryEmbedding`."""
    w = ModelWriter(opset)
    batch: list[int | str] = ["batch_size", "sequence_length"]
    w.input("input_ids", TensorProto.INT64, batch)
    w.input("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"])
    if not form.cached:
        # Nothing says how much came before: positions count from zero.
        tokens = w.node("Gather", w.node("Shape", "input_ids"), w.scalar(1))
        counted = w.node("Unsqueeze", w.node("Range", w.scalar(0), tokens, w.scalar(1)), w.ints(0))
        positions = w.node("Expand", counted, w.node("Shape", "input_ids"))
    elif form.position_input:
        positions = w.input("position_ids", TensorProto.INT64, batch)
    else:
        counted = w.node("Sub", w.node("CumSum", "attention_mask", w.scalar(1)), w.scalar(1))
        tokens = w.node("Shape", "input_ids", start=1, end=2)
        end = w.ints(2**31)
        positions = w.node("Slice", counted, w.node("Neg", tokens), end, w.ints(1))
    mask = "" if form.past_inside or not form.cached else form.mask(w)
    cos, sin = w.rope_tables()
    x = w.node("Gather", w.weight("embed_tokens", VOCABULARY, HIDDEN), "input_ids")
    for layer in range(LAYERS):
        name = f"layer{layer}"
        h = w.node("RMSNormalization", x, w.weight(f"{name}.norm", HIDDEN, mean=1.0))
        attended = _onnx_attention(w, form, h, name, layer, mask, positions, (cos, sin))
        x = w.node("Add", x, w.linear(attended, f"{name}/o", QUERY_WIDTH, HIDDEN))
        h = w.node("RMSNormalization", x, w.weight(f"{name}.norm2", HIDDEN, mean=1.0))
        x = w.node("Add", x, w.mlp(h, f"{name}/mlp"))
    x = w.node("RMSNormalization", x, w.weight("norm", HIDDEN, mean=1.0))
    w.node("MatMul", x, w.weight("lm_head", HIDDEN, VOCABULARY), to="logits")
    w.output("logits", [*batch, VOCABULARY])
    return w.model(ir_version=11)


def _onnx_attention(
    w: ModelWriter, form: OnnxForm, h: str, name: str, layer: int, mask: str, positions: str, tables: tuple[str, str]
) -> str:
    widths = {"q": (QUERY_HEADS, QUERY_WIDTH), "k": (KV_HEADS, KV_WIDTH), "v": (KV_HEADS, KV_WIDTH)}
    heads: dict[str, str] = {}
    for part, (count, width) in widths.items():
        value = w.linear(h, f"{name}/{part}", HIDDEN, width)
        if part != "v":
            value = w.node("RotaryEmbedding", value, *tables, positions, num_heads=count)
        if form.heads_first:
            value = w.node("Reshape", value, w.ints(0, 0, count, HEAD_SIZE))
            value = w.node("Transpose", value, perm=[0, 2, 1, 3])
            w.shaped(value, "batch_size", count, "sequence_length", HEAD_SIZE)
        else:
            w.shaped(value, "batch_size", "sequence_length", width)
        heads[part] = value
    past, presents = (w.past(layer), w.presents(layer)) if form.cached else ([], ())
    options: dict[str, object] = {"scale": 0.23, "softcap": form.softcap}
    if not form.heads_first:
        options |= {"q_num_heads": QUERY_HEADS, "kv_num_heads": KV_HEADS}
    if form.past_inside:
        inputs, outputs, options["is_causal"] = (*heads.values(), "", *past), (f"{name}/attention", *presents), 1
    elif not form.cached:
        inputs, outputs, options["is_causal"] = tuple(heads.values()), (f"{name}/attention",), 1
    else:
        cached = [
            w.node("Concat", p, heads[part], to=present, axis=2)
            for p, part, present in zip(past, "kv", presents, strict=True)
        ]
        inputs = (heads["q"], *(_repeat(w, v, form.repeat) for v in cached), mask)
        outputs = (f"{name}/attention",)
        if form.causal:
            options["is_causal"] = 1
    attended = w.node("Attention", *inputs, outputs=outputs, **options)
    if not form.heads_first:
        return attended
    return w.node("Reshape", w.node("Transpose", attended, perm=[0, 2, 1, 3]), w.ints(0, 0, QUERY_WIDTH))


def _repeat(w: ModelWriter, value: str, how: str) -> str:
    """By "expand", "gather" or "tile behind heads" (repeat_kv), "tile" or "tile heads" (not repeat_kv), or not at all."""
    copies = QUERY_HEADS // KV_HEADS
    if how == "gather":
        value = w.node("Gather", value, w.ints(*np.repeat(np.arange(KV_HEADS), copies).tolist()), axis=1)
    elif how == "tile":  # [0, 1, 0, 1]: not what grouped queries want
        value = w.node("Tile", value, w.ints(1, copies, 1, 1))
    elif how in ("expand", "tile behind heads", "tile heads"):
        wide = w.shaped(w.node("Unsqueeze", value, w.ints(2)), "batch_size", KV_HEADS, 1, "total", HEAD_SIZE)
        if how == "expand":
            value = w.node("Expand", wide, w.ints(1, 1, copies, 1, 1))
        else:
            axes = (1, 1, copies, 1, 1) if how == "tile behind heads" else (1, copies, 1, 1, 1)
            value = w.node("Tile", wide, w.ints(*axes))
        value = w.node("Reshape", value, w.ints(0, QUERY_HEADS, -1, HEAD_SIZE))
    else:
        return value
    return w.shaped(value, "batch_size", QUERY_HEADS, "total", HEAD_SIZE)
