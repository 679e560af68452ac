"""Run a foreign model and its rewritten form on the same tokens, and compare their logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from socket_trt import names
from socket_trt.config import SocketConfig
from socket_trt.errors import GraphError
from socket_trt.onnx.rewrite import RewriteReport, rewrite_file
from tests.foreign_models import HEAD_SIZE, KV_HEADS, VOCABULARY

SPARSE = SocketConfig(
    tables=16, planes=6, sink=2, window=3, budget_tokens=2, budget_permille=0, page_size=16, seed=3, min_length=0
)
EXACT = SPARSE.keeps_everything()
PROMPTS, DECODED = (19, 5, 33), 4  # tokens of each sequence, and one at a time after that
TOLERANCE = 1e-4

Array = np.ndarray
Run = Callable[[dict[str, Array]], list[Array]]


def ort(path: Path) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, feeds)


def random_tokens(vocabulary: int = VOCABULARY) -> list[Array]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, vocabulary, length + DECODED) for length in PROMPTS]


def packed_logits(path: Path, tokens: list[Array], run: Run | None = None) -> list[Array]:
    """Logits of a rewritten model, one [DECODED + 1, V] a sequence: a ragged prefill, a mixed step, then decode steps.

    The last sequence's prompt comes in two chunks, the second in a step in which the others already decode.
    """
    model = onnx.load(path, load_external_data=False)
    run = run or ort(path)
    caches = {}
    rng = np.random.default_rng(0)
    for value in model.graph.input:
        if value.name in names.STEP_INPUTS:
            continue
        shape = [40 if d.dim_param else d.dim_value for d in value.type.tensor_type.shape.dim]
        if value.type.tensor_type.elem_type == onnx.TensorProto.INT32:
            caches[value.name] = rng.integers(-(2**31), 2**31, shape).astype(np.int32)
        else:
            caches[value.name] = rng.standard_normal(shape).astype(np.float32) * 100  # nothing may depend on it
    pages = rng.permutation(np.arange(1, 40)).astype(np.int32)
    table = pages[: len(tokens) * 4].reshape(len(tokens), 4)
    counts = [*PROMPTS[:-1], PROMPTS[-1] // 2]
    past = np.zeros(len(tokens), np.int32)
    logits: list[list[Array]] = [[] for _ in tokens]
    while any(p < len(t) for p, t in zip(past, tokens, strict=True)):
        start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        position = np.concatenate([np.arange(p, p + n) for p, n in zip(past, counts, strict=True)])
        ids = np.concatenate([t[p : p + n] for t, p, n in zip(tokens, past, counts, strict=True)])
        feeds = {
            names.INPUT_IDS: ids.astype(np.int32),
            names.POSITION_IDS: position.astype(np.int32),
            names.LOGITS_INDICES: np.maximum(start[1:] - 1, 0),
            names.PAGE_TABLE: table,
            names.PAST_LENGTH: past,
            names.QUERY_START: start,
        }
        result, *after = run(feeds | caches)
        caches = dict(zip(caches, after, strict=True))
        assert result.dtype == np.float32
        past = past + np.array(counts, np.int32)
        for row, (length, prompt) in enumerate(zip(past, PROMPTS, strict=True)):
            if counts[row] and length >= prompt:
                logits[row].append(result[row])
        counts = [(PROMPTS[-1] - p if p < PROMPTS[-1] and row == len(tokens) - 1 else int(p < len(tokens[row])))
                  for row, p in enumerate(past)]  # fmt: skip
    return [np.stack(rows) for rows in logits]


def original_logits(path: Path, tokens: list[Array]) -> list[Array]:
    """The same from the original model, one sequence at a time, its cache growing by concatenation."""
    model = onnx.load(path, load_external_data=False)
    inputs = {value.name: value for value in model.graph.input}
    pasts = [name for name in inputs if name.startswith("past_key_values")]
    outputs = [value.name for value in model.graph.output]
    run, result = ort(path), []
    for sequence in tokens:
        cache = {name: np.zeros((1, KV_HEADS, 0, HEAD_SIZE), np.float32) for name in pasts}
        rows, past, prompt = [], 0, len(sequence) - DECODED
        for end in range(prompt, len(sequence) + 1):
            feeds = {
                "input_ids": sequence[None, past:end],
                "attention_mask": np.ones((1, end), np.int64),
                "position_ids": np.arange(past, end)[None],
            }
            found = dict(zip(outputs, run({k: v for k, v in feeds.items() if k in inputs} | cache), strict=True))
            cache = {name: found[name.replace("past_key_values", "present")] for name in pasts}
            rows.append(found["logits"][0, -1])
            past = end
        result.append(np.stack(rows))
    return result


def save(model: onnx.ModelProto, folder: Path, external: bool = False) -> Path:
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=external, location="model.onnx.data", size_threshold=256)
    return path


def rewrite(source: Path, config: SocketConfig = EXACT, **options: object) -> tuple[Path, RewriteReport]:
    output = source.with_name(f"rewritten-{config.budget_tokens}.onnx")
    return output, rewrite_file(source, output, config, **options)  # type: ignore[arg-type]


def close(actual: list[Array], expected: list[Array]) -> bool:
    return all(np.allclose(a, e, atol=TOLERANCE, rtol=TOLERANCE) for a, e in zip(actual, expected, strict=True))


def assert_rewritten(source: Path, **options: object) -> RewriteReport:
    """The rewritten model has the contract's inputs and outputs and, its budget keeping all, the original's logits."""
    output, report = rewrite(source, **options)
    graph = onnx.load(output, load_external_data=False).graph
    layers = range(report.replaced)
    caches = [name(i, k) for name in (names.past, names.present) for i in layers for k in names.CACHE_KINDS]
    assert [v.name for v in graph.input] == [*names.STEP_INPUTS, *caches[: len(caches) // 2]]
    assert [v.name for v in graph.output] == [names.LOGITS, *caches[len(caches) // 2 :]]
    assert sum(node.op_type == names.OPERATOR for node in graph.node) == report.replaced == 2
    tokens = random_tokens(graph.output[0].type.tensor_type.shape.dim[1].dim_value)
    expected = original_logits(source, tokens)
    assert close(packed_logits(output, tokens), expected)
    sparse, _ = rewrite(source, SPARSE, **options)
    assert not close(packed_logits(sparse, tokens), expected), "the sparse path was not taken"
    return report


def refuse(model: onnx.ModelProto, folder: Path, message: str, **options: object) -> None:
    """Refused with one line that holds `message`, and nothing is written."""
    source = save(model, folder)
    with pytest.raises(GraphError, match=message) as caught:
        rewrite(source, **options)
    assert "\n" not in str(caught.value)
    assert [p.name for p in folder.iterdir()] == [source.name]
