"""Rewriting of foreign ONNX models: the rewritten model against the original one, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from socket_trt import names
from socket_trt.config import OperatorAttributes
from socket_trt.errors import GraphError
from socket_trt.onnx.rewrite import rewrite_file, weights_outside
from socket_trt.reference import socket_attention
from tests.foreign_models import (
    HEAD_SIZE,
    GenaiForm,
    OnnxForm,
    additive_window_mask,
    alibi_mask,
    chunked_mask,
    genai_model,
    learned_mask,
    mask_of_hidden_states,
    onnx_model,
    square_mask,
)
from tests.rewriting import (
    EXACT,
    PROMPTS,
    SPARSE,
    Array,
    assert_rewritten,
    close,
    original_logits,
    packed_logits,
    random_tokens,
    refuse,
    rewrite,
    save,
)

ROOT = Path(__file__).parent.parent

GENAI_FORMS = {
    "packed": GenaiForm(),
    "separate": GenaiForm(packed=False),
    "rotary outside": GenaiForm(packed=False, rotary_inside=False),
    "interleaved, softcap": GenaiForm(interleaved=True, softcap=1.5),
    "half rotated": GenaiForm(rotated=16),
    "half rotated, interleaved": GenaiForm(rotated=16, interleaved=True),
    "window": GenaiForm(window=7, extra=(("sliding_window_cache", 1),), cache_dim=HEAD_SIZE),
    "pruned int4 head": GenaiForm(prune=True, int4=True),
}


@pytest.mark.parametrize("form", GENAI_FORMS.values(), ids=GENAI_FORMS)
def test_group_query_attention(form: GenaiForm, tmp_path: Path) -> None:
    model = genai_model(form)
    if ("sliding_window_cache", 1) in form.extra:  # the cache of the original would be cut to the window
        plain = genai_model(GenaiForm(**{**form.__dict__, "extra": ()}))
        expected = original_logits(save(plain, tmp_path), random_tokens())
        output, report = rewrite(save(model, tmp_path))
        assert close(packed_logits(output, random_tokens()), expected)
    else:
        report = assert_rewritten(save(model, tmp_path))
    assert report.logits_before_lm_head
    assert [a.sliding_window for a in report.attentions] == [form.window, form.window]
    assert [a.softcap for a in report.attentions] == [form.softcap, form.softcap]


ONNX_FORMS = {
    "heads first": (OnnxForm(), -1),
    "repeat_kv": (OnnxForm(repeat="expand", softcap=2.0), -1),
    "repeat by Gather": (OnnxForm(repeat="gather"), -1),
    "repeat by Tile": (OnnxForm(repeat="tile behind heads"), -1),
    "3-D, own past": (OnnxForm(heads_first=False, past_inside=True), -1),
    "4-D, own past": (OnnxForm(past_inside=True), -1),
    "window in an additive mask": (OnnxForm(mask=additive_window_mask(7)), 7),
    "positions counted": (OnnxForm(position_input=False), -1),
}


@pytest.mark.parametrize(("form", "window"), ONNX_FORMS.values(), ids=ONNX_FORMS)
def test_onnx_attention(form: OnnxForm, window: int, tmp_path: Path) -> None:
    report = assert_rewritten(save(onnx_model(form), tmp_path))
    assert [a.sliding_window for a in report.attentions] == [window, window]
    assert [a.softcap for a in report.attentions] == [form.softcap, form.softcap]


class ReferenceAttention(OpRun):
    """`SocketAttention` as the PyTorch reference computes it, for onnx's reference evaluator."""

    op_domain = names.DOMAIN

    def _run(
        self, *inputs: Array, plugin_version: str = "", plugin_namespace: str = "", **attributes: object
    ) -> tuple[Array, ...]:
        fields = {k: v for k, v in attributes.items() if k in OperatorAttributes.__dataclass_fields__}
        outputs = socket_attention(*(torch.from_numpy(np.array(x)) for x in inputs), OperatorAttributes(**fields))  # type: ignore[arg-type]
        return tuple(x.numpy() for x in outputs)


ReferenceAttention.__name__ = names.OPERATOR


def test_sparse_agrees_with_reference(tmp_path: Path) -> None:
    """The function body that the file carries selects what the PyTorch reference selects."""
    output, _ = rewrite(save(onnx_model(OnnxForm(repeat="expand")), tmp_path), SPARSE)
    model = onnx.load(output)
    del model.functions[:]
    evaluator = ReferenceEvaluator(model, new_ops=[ReferenceAttention])
    tokens = random_tokens()
    assert close(packed_logits(output, tokens), packed_logits(output, tokens, lambda feeds: evaluator.run(None, feeds)))


def test_half_precision(tmp_path: Path) -> None:
    """A float16 model keeps its type in caches and hyperplanes; its logits become float32."""
    model = genai_model()
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    output, _ = rewrite(save(model, tmp_path))
    types = {i.name: i.type for i in onnxruntime.InferenceSession(output).get_inputs()}
    assert types["past_key_values.1.norm"] == types["past_key_values.0.key"] == "tensor(float16)"
    assert types["past_key_values.0.code"] == "tensor(int32)"
    assert onnx.load(output).graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (GenaiForm(extra=(("smooth_softmax", 1),)), "smooth_softmax=1 is not supported"),
        (GenaiForm(extra=(("k_quant_type", "PER_TENSOR"),)), "k_quant_type='PER_TENSOR'"),
        (GenaiForm(extra=(("qk_norm_epsilon", 1e-6),)), "qk_norm_epsilon"),
        (GenaiForm(trailing=("", "", "norm.0")), "head_sink is not supported"),
        (GenaiForm(trailing=("", "cos_cache")), "attention_bias is not supported"),
        (GenaiForm(trailing=("/model/attn_mask_reformat/ReduceSum",)), "its positions come from"),
    ],
)
def test_refuses_variants_of_group_query_attention(form: GenaiForm, message: str, tmp_path: Path) -> None:
    refuse(genai_model(form), tmp_path, r"'//model/layers\.0/attn/GroupQueryAttention' .*" + message)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (OnnxForm(mask=chunked_mask(8)), "neither causal nor a sliding window"),
        (OnnxForm(mask=chunked_mask(100)), "neither causal nor a sliding window"),
        (OnnxForm(mask=alibi_mask), "adds a bias"),
        (OnnxForm(mask=learned_mask), "depends on the weight 'relative_bias'; give the sliding window explicitly"),
        (OnnxForm(mask=square_mask), "cut out of a square of all tokens; give the sliding window explicitly"),
        (OnnxForm(repeat="tile heads"), "not known to be repeat_kv"),
        (OnnxForm(repeat="tile"), "not known to be repeat_kv"),
        (OnnxForm(causal=True), "is_causal=1 over a cache concatenated outside"),
        (OnnxForm(mask=lambda w: ""), "neither a mask nor is_causal=1"),
    ],
)
def test_refuses_masks_and_repeats_it_cannot_prove(form: OnnxForm, message: str, tmp_path: Path) -> None:
    refuse(onnx_model(form), tmp_path, r"node '/layer0/attention' \(Attention\).*" + message)


def head_variant(kind: str) -> onnx.ModelProto:
    """An opset-23 model whose logits are made differently."""
    model = onnx_model()
    make, last = onnx.helper.make_node, model.graph.node[-1]
    if kind in ("capped", "clipped"):
        last.output[0] = "raw"
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0.7), "cap"))
    if kind == "capped":
        parts = [("Div", ["raw", "cap"], "divided"), ("Tanh", ["divided"], "tanh"), ("Mul", ["tanh", "cap"], "logits")]
        model.graph.node.extend(make(op, inputs, [output]) for op, inputs, output in parts)
    elif kind == "clipped":
        model.graph.node.append(make("Clip", ["raw", "", "cap"], ["logits"]))
    elif kind in ("sliced", "sliced before the norm"):
        for name, number in (("minus_one", -1), ("end", 2**31), ("axis", 1)):
            model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([number]), name))
        node = last if kind == "sliced" else model.graph.node[-2]
        cut = make("Slice", [node.input[0], "minus_one", "end", "axis"], ["last"], name="/last")
        node.input[0] = "last"
        model.graph.node.insert(list(model.graph.node).index(node), cut)
        if kind == "sliced":
            model.graph.output[-1].type.tensor_type.shape.dim[1].Clear()
            model.graph.output[-1].type.tensor_type.shape.dim[1].dim_value = 1
    return model


@pytest.mark.parametrize(("kind", "early"), [("capped", True), ("clipped", False), ("sliced", True)])
def test_rows_of_logits(kind: str, early: bool, tmp_path: Path) -> None:
    """Rows are chosen before the last projection, past elementwise operations, else after; a choice of the last token
    that the model makes itself is undone.
    """
    assert assert_rewritten(save(head_variant(kind), tmp_path)).logits_before_lm_head == early


def test_refuses_tokens_dropped_before_the_norm(tmp_path: Path) -> None:
    refuse(head_variant("sliced before the norm"), tmp_path, r"'/last' \(Slice\) keeps some tokens only")
    model = head_variant("clipped")
    model.graph.output[-1].type.tensor_type.shape.dim[1].dim_value = 1
    refuse(model, tmp_path, "keeps a fixed number of tokens")


def test_model_without_cache(tmp_path: Path) -> None:
    """A model exported without a cache, causal by itself, gets one: its prefill's logits are those of every step."""
    source = save(onnx_model(OnnxForm(cached=False)), tmp_path)
    output, report = rewrite(source)
    tokens = random_tokens()
    run = onnxruntime.InferenceSession(source).run
    whole = [run(None, {"input_ids": t[None], "attention_mask": np.ones((1, len(t)), np.int64)})[0] for t in tokens]
    assert report.replaced == 2
    assert close(packed_logits(output, tokens), [w[0, n - 1 :] for w, n in zip(whole, PROMPTS, strict=True)])


def attention_of(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type in ("Attention", "GroupQueryAttention"))


def set_attribute(model: onnx.ModelProto, name: str, value: object) -> None:
    node = attention_of(model)
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])


def quantise_cache(model: onnx.ModelProto) -> None:
    for value in model.graph.input:
        if value.name.startswith("past"):
            value.type.tensor_type.elem_type = onnx.TensorProto.INT8


def compute_tables(model: onnx.ModelProto) -> None:
    """The rope table as the output of a node, as where it is chosen by the length."""
    model.graph.node.insert(0, onnx.helper.make_node("Neg", ["cos_cache"], ["chosen"], name="/choose"))
    attention_of(model).input[7] = "chosen"


def use_scores(model: onnx.ModelProto) -> None:
    node = attention_of(model)
    node.output.extend([""] * (3 - len(node.output)) + ["scores"])
    model.graph.output.append(onnx.helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, None))


def compute_past(model: onnx.ModelProto) -> None:
    node = attention_of(model)
    place = list(node.input).index("past_key_values.0.key")
    node.input[place] = "older"
    model.graph.node.insert(0, onnx.helper.make_node("Neg", ["past_key_values.0.key"], ["older"]))


def forget_shapes(model: onnx.ModelProto) -> None:
    del model.graph.value_info[:]


def set_head_size(model: onnx.ModelProto) -> None:
    """The second layer's heads are of another size than the first's."""
    for value in model.graph.input:
        if value.name.startswith("past_key_values.1"):
            value.type.tensor_type.shape.dim[3].Clear()
            value.type.tensor_type.shape.dim[3].dim_value = 8


@pytest.mark.parametrize(
    ("model", "change", "message"),
    [
        (
            genai_model,
            lambda m: set_attribute(m, "kv_num_heads", 3),
            "num_heads 4 does not divide among kv_num_heads 3",
        ),
        (genai_model, quantise_cache, "quantised caches are not supported"),
        (genai_model, compute_tables, "'chosen' is computed by Neg"),
        (genai_model, use_scores, "its output_qk is used"),
        (genai_model, compute_past, "are not graph inputs"),
        (genai_model, forget_shapes, "its head size is not known; run ONNX shape inference"),
        (genai_model, set_head_size, "has head size 8 .* the first attention 32"),
        (onnx_model, lambda m: set_attribute(m, "left_window_size", 4), "left_window_size is not supported"),
        (onnx_model, use_scores, "its qk_matmul_output is used"),
        (onnx_model, forget_shapes, "the rank of its query is not known; run ONNX shape inference"),
        (lambda: onnx_model(OnnxForm(past_inside=True)), compute_past, "are not graph inputs of their own"),
    ],
)
def test_refuses_attentions_it_does_not_understand(
    model: Callable[[], onnx.ModelProto], change: Callable[[onnx.ModelProto], None], message: str, tmp_path: Path
) -> None:
    changed = model()
    change(changed)
    refuse(changed, tmp_path, "nothing was: .*" + message if "first attention" not in message else message)


def test_mask_from_the_shape_of_an_activation(tmp_path: Path) -> None:
    """A size read off the hidden states is known by its symbol; no weight is read for it."""
    assert_rewritten(save(onnx_model(OnnxForm(mask=mask_of_hidden_states)), tmp_path))


def test_explicit_sliding_window(tmp_path: Path) -> None:
    """The caller's word counts where a mask cannot be read, and only there."""
    refuse(
        onnx_model(OnnxForm(mask=additive_window_mask(7))),
        tmp_path,
        "has a sliding window of 7, but no",
        sliding_window=-1,
    )
    refuse(genai_model(), tmp_path, "has no sliding window, but a sliding window of 9 was given", sliding_window=9)
    refuse(onnx_model(), tmp_path, "sliding window 0: give a number", sliding_window=0)
    source = save(onnx_model(OnnxForm(mask=learned_mask)), tmp_path)
    tokens = random_tokens()
    exact, report = rewrite(source, sliding_window=-1)
    assert [a.sliding_window for a in report.attentions] == [-1, -1]
    assert close(packed_logits(exact, tokens), original_logits(source, tokens))
    _, report = rewrite(source, sliding_window=9, force=True)
    assert [a.sliding_window for a in report.attentions] == [9, 9]


def test_first_unmatched_node_is_named(tmp_path: Path) -> None:
    """One attention of another kind among those that match, and nothing is written."""
    model = genai_model()
    second = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"][1]
    second.op_type = "MultiHeadAttention"
    refuse(
        model,
        tmp_path,
        r"'//model/layers\.1/attn/GroupQueryAttention' \(com\.microsoft::MultiHeadAttention\).*no pattern",
    )


def test_decomposed_attention_is_named(tmp_path: Path) -> None:
    model = onnx_model()
    node = next(n for n in model.graph.node if n.op_type == "Attention")
    index = list(model.graph.node).index(node)
    query, key, value = node.input[:3]
    parts = [
        onnx.helper.make_node("MatMul", [query, key], ["scores"]),
        onnx.helper.make_node("Softmax", ["scores"], ["weights"], name="/decomposed"),
        onnx.helper.make_node("MatMul", ["weights", value], node.output),
    ]
    model.graph.node.remove(node)
    for offset, part in enumerate(parts):
        model.graph.node.insert(index + offset, part)
    refuse(model, tmp_path, r"'/decomposed' \(Softmax\).*MatMul-Softmax-MatMul")


def test_refuses_what_would_be_left_of_the_padded_batch(tmp_path: Path) -> None:
    """Counted in the graph, but not from the first token: the squares of the positions are no positions."""
    model = onnx_model(OnnxForm(position_input=False))
    counted = next(node for node in model.graph.node if node.op_type == "Sub" and "CumSum" in node.input[0])
    counted.op_type = "Mul"
    counted.input[1] = counted.input[0]
    refuse(model, tmp_path, "still depends on the padded batch.*position_ids as an input")


def test_refuses_fixed_sizes(tmp_path: Path) -> None:
    model = genai_model()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    refuse(model, tmp_path, "'input_ids' is of fixed size .*dynamic shapes")


def test_refuses_inputs_and_outputs_it_does_not_know(tmp_path: Path) -> None:
    for folder, message in (("a", "past of no attention"), ("b", "'pixels' is not known"), ("c", "one output besides")):
        (tmp_path / folder).mkdir()
        model = genai_model()
        value = onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, ["n", 3])
        if folder == "a":
            value.CopyFrom(model.graph.input[-1])
            value.name = "past_key_values.2.key"
        if folder == "c":
            model.graph.output.append(onnx.helper.make_tensor_value_info("/embed_tokens/Gather", 1, None))
        else:
            model.graph.input.append(value)
        refuse(model, tmp_path / folder, message)


def test_refuses_opsets_and_models_without_attention(tmp_path: Path) -> None:
    model = genai_model()
    model.opset_import[0].version = 16
    refuse(model, tmp_path, "opset 16; export it with an opset from 17 to 23")
    model.opset_import[0].version = 24
    refuse(model, tmp_path, "opset 24")
    model.opset_import[0].version = 22
    kept = [node for node in model.graph.node if "GroupQuery" not in node.op_type]
    del model.graph.node[:]
    model.graph.node.extend(kept[:7])
    refuse(model, tmp_path, "the model has no attention")


def test_refuses_to_rewrite_twice(tmp_path: Path) -> None:
    output, _ = rewrite(save(genai_model(), tmp_path))
    with pytest.raises(GraphError, match="socket::SocketAttention"):
        rewrite_file(output, tmp_path / "again.onnx", EXACT)


def test_weights_stay_in_their_file(tmp_path: Path) -> None:
    """External weights are neither copied nor changed; from another folder the paths lead back."""
    source = save(genai_model(), tmp_path, external=True)
    before = (tmp_path / "model.onnx.data").read_bytes()
    output, _ = rewrite(source)
    assert weights_outside(output) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data", output.name]
    assert output.stat().st_size < len(before) / 2
    tokens = random_tokens()
    expected = original_logits(source, tokens)
    assert close(packed_logits(output, tokens), expected)

    far = tmp_path / "other" / "far.onnx"
    rewrite_file(source, far, EXACT)
    assert weights_outside(far) == [str(tmp_path / "model.onnx.data")]
    assert [p.name for p in far.parent.iterdir()] == ["far.onnx"]
    onnx.load(far, load_external_data=False)
    (tmp_path / "copy").mkdir()
    copied = tmp_path / "copy" / "copied.onnx"
    rewrite_file(source, copied, EXACT, copy_weights=True)
    assert sorted(p.name for p in copied.parent.iterdir()) == ["copied.onnx", "copied.onnx.data"]
    assert close(packed_logits(copied, tokens), expected)
    assert (tmp_path / "model.onnx.data").read_bytes() == before


def test_missing_and_truncated_weights(tmp_path: Path) -> None:
    source = save(genai_model(), tmp_path, external=True)
    data = tmp_path / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(GraphError, match="too short for tensor"):
        rewrite(source)
    data.unlink()
    with pytest.raises(GraphError, match="its weights are not at"):
        rewrite(source)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_files(tmp_path: Path) -> None:
    source = save(genai_model(), tmp_path)
    output, _ = rewrite(source)
    output.write_bytes(b"precious")
    with pytest.raises(GraphError, match="exists; give --force"):
        rewrite(source)
    assert output.read_bytes() == b"precious"
    rewrite(source, force=True)
    onnx.checker.check_model(strangers_aside(onnx.load(output)))
    with pytest.raises(GraphError, match="no such file"):
        rewrite(tmp_path / "absent.onnx")
    with pytest.raises(GraphError, match="give another output"):
        rewrite_file(source, source, EXACT, force=True)
    (tmp_path / "broken.onnx").write_bytes(b"\x08not a model")
    with pytest.raises(GraphError, match="not an ONNX model"):
        rewrite_file(tmp_path / "broken.onnx", tmp_path / "o.onnx", EXACT)
    with pytest.raises(GraphError, match="cannot be written"):
        rewrite_file(source, source / "inside" / "o.onnx", EXACT)


def strangers_aside(model: onnx.ModelProto) -> onnx.ModelProto:
    """The builder's SimplifiedLayerNormalization stands in ONNX's domain, where onnx does not know it."""
    for node in model.graph.node:
        if node.op_type == "SimplifiedLayerNormalization":
            node.domain = "com.microsoft"
    return model


def test_script(tmp_path: Path) -> None:
    """export/rewrite_onnx.py as a user runs it."""
    source = save(genai_model(GenaiForm(window=7)), tmp_path)
    output = tmp_path / "script.onnx"
    small = ["--tables", "16", "--planes", "6", "--sink", "2", "--window", "3", "--page-size", "16", "--seed", "3"]
    command = [sys.executable, str(ROOT / "export" / "rewrite_onnx.py"), str(source), str(output), *small]
    done = subprocess.run(
        [*command, "--budget", "2147483647"], capture_output=True, text=True, cwd=ROOT, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert "2 attentions replaced, opset 22" in done.stdout
    assert "sliding window 7" in done.stdout
    tokens = random_tokens()
    assert close(packed_logits(output, tokens), original_logits(source, tokens))
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert again.returncode == 2
    assert again.stderr == f"error: {output} exists; give --force to overwrite it\n"


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}
