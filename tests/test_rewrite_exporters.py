"""Rewriting of models that the real exporters write: torch.onnx, and onnxruntime-genai's builder where it is installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch

from tests.foreign_models import HEAD_SIZE, VOCABULARY, genai_model
from tests.rewriting import PROMPTS, assert_rewritten, close, packed_logits, random_tokens, rewrite

# As in test_families.py: PyTorch's exporter is slow to trace.
pytestmark = pytest.mark.no_cover


class TorchExport(torch.nn.Module):
    """What a user writes around a Hugging Face model to export it with a cache."""

    def __init__(self, model: torch.nn.Module, masked: bool) -> None:
        super().__init__()
        self.model, self.masked = model, masked

    def forward(self, input_ids, attention_mask, position_ids, past):  # type: ignore[no-untyped-def]
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        given = {"attention_mask": attention_mask, "position_ids": position_ids} if self.masked else {}
        result = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, **given)
        return result.logits, [(layer.keys, layer.values) for layer in result.past_key_values.layers]


def torch_export(model: torch.nn.Module, path: Path, masked: bool) -> Path:
    batch, tokens, past = 2, 5, 7
    dynamic = torch.export.Dim.DYNAMIC
    both, cached = {0: dynamic, 1: dynamic}, {0: dynamic, 2: dynamic}
    caches = [(torch.randn(batch, 2, past, HEAD_SIZE), torch.randn(batch, 2, past, HEAD_SIZE)) for _ in range(2)]
    arguments = (
        torch.zeros(batch, tokens, dtype=torch.long),
        torch.ones(batch, tokens + past, dtype=torch.long) if masked else None,
        torch.arange(past, past + tokens).repeat(batch, 1) if masked else None,
        caches,
    )
    layers = [f"{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    program = torch.onnx.export(
        TorchExport(model, masked).eval(),
        arguments,
        dynamo=True,
        opset_version=23,
        dynamic_shapes=(both, both if masked else None, both if masked else None, [(cached, cached)] * 2),
        input_names=["input_ids", *(["attention_mask", "position_ids"] if masked else []),
                     *(f"past_key_values.{name}" for name in layers)],
        output_names=["logits", *(f"present.{name}" for name in layers)],
        verbose=False,
    )  # fmt: skip
    program.save(path, external_data=True)
    return path


def tiny_model(family: str) -> torch.nn.Module:
    import transformers

    common = {
        "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    if family == "Mistral":
        common |= {"sliding_window": 7}
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**common)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.mark.parametrize(
    ("family", "masked", "window"),
    [("Mistral", True, 7), ("Qwen2", False, -1)],
    ids=["Mistral", "Qwen2, no mask given"],
)
def test_torch_export(family: str, masked: bool, window: int, tmp_path: Path) -> None:
    """As torch writes it: repeat_kv, the window inside the mask's nodes, batch sizes read off the cache's shape; and
    where no mask and no positions are given, both counted in the graph.
    """
    model = tiny_model(family)
    source = torch_export(model, tmp_path / "model.onnx", masked)
    tokens = random_tokens()
    with torch.no_grad():
        expected = [
            model(torch.from_numpy(t)[None]).logits[0, n - 1 :].numpy() for t, n in zip(tokens, PROMPTS, strict=True)
        ]
    output, report = rewrite(source)
    assert [a.sliding_window for a in report.attentions] == [window, window]
    assert close(packed_logits(output, tokens), expected)


def signature(model: onnx.ModelProto) -> list[tuple[object, ...]]:
    """The attention-related nodes of a builder's model: operators, which inputs are there, attributes, output shapes."""
    found: list[tuple[object, ...]] = []
    for node in model.graph.node:
        if node.op_type in ("GroupQueryAttention", "ReduceSum", "SkipSimplifiedLayerNormalization"):
            attributes = sorted(a.name for a in node.attribute)
            inputs = [bool(i) for i in node.input]
            while inputs and not inputs[-1]:
                inputs.pop()
            found.append((node.domain, node.op_type, inputs, attributes, [bool(o) for o in node.output]))
    return found


def test_real_genai_builder(tmp_path: Path) -> None:
    """Where onnxruntime-genai is installed: `genai_model` has its form, and its own model is rewritten correctly."""
    builder = "onnxruntime_genai.models.builder"
    if importlib.util.find_spec(builder.partition(".")[0]) is None:
        pytest.skip("onnxruntime-genai is not installed")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    checkpoint, folder = tmp_path / "checkpoint", tmp_path / "built"
    tiny_model("Llama").save_pretrained(checkpoint)
    tokenizer = Tokenizer(models.BPE(vocab={chr(33 + i): i for i in range(VOCABULARY)}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="!", eos_token='"').save_pretrained(checkpoint)
    command = [sys.executable, "-m", builder, "-i", checkpoint, "-o", folder, "-p", "fp32", "-e", "cpu", "-c", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = onnx.load(folder / "model.onnx", load_external_data=False)
    assert signature(built) == signature(genai_model())
    assert_rewritten(folder / "model.onnx")
