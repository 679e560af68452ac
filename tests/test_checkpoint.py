"""Where models come from, and what is said when they do not."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from socket_trt.errors import CheckpointError, ModelError
from socket_trt.models.checkpoint import load_config, preset_config, resolve_model, stop_token_ids
from socket_trt.models.families import FAMILIES, check_supported, head_size
from socket_trt.models.presets import PRESETS, find_preset
from socket_trt.models.tiny import BEGIN_ID, byte_tokenizer
from tests.families import save_checkpoint


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_configurations_of_supported_families(name: str) -> None:
    config = preset_config(PRESETS[name].config)
    assert check_supported(config, name) in FAMILIES.values()
    assert head_size(config) in (64, 96, 128, 256)
    assert resolve_model(name, random_weights=True).checkpoint is None


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama2-7b", 6.74e9),
        ("llama3-8b", 8.03e9),
        ("llama3.2-1b", 1.24e9),
        ("llama3.2-3b", 3.21e9),
        ("qwen2.5-7b", 7.62e9),
        ("qwen3-8b", 8.19e9),
        ("mistral-7b", 7.24e9),
        ("phi3-mini-4k", 3.82e9),
        ("gemma2-2b", 2.61e9),
    ],
)
def test_presets_have_the_published_number_of_parameters(name: str, parameters: float) -> None:
    from socket_trt.onnx.export import parameter_shapes

    count = 0
    for shape in parameter_shapes(preset_config(PRESETS[name].config)).values():
        size = 1
        for dim in shape:
            size *= dim
        count += size
    assert count == pytest.approx(parameters, rel=5e-3)


def test_an_unknown_model_lists_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"unknown model 'llama-3-8b'.*nearest: .*llama3-8b"):
        resolve_model("llama-3-8b")
    with pytest.raises(ModelError, match="nearest: "):
        find_preset("zzz")


def test_a_local_directory(tmp_path: Path) -> None:
    save_checkpoint("qwen3", tmp_path / "model")
    source = resolve_model(str(tmp_path / "model"))
    assert source.family == "Qwen3"
    assert source.checkpoint == tmp_path / "model"
    assert stop_token_ids(source.config, source.checkpoint) == [257]
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    assert stop_token_ids(source.config, source.checkpoint) == [1, 2]
    assert stop_token_ids(SimpleNamespace(eos_token_id=None), None) == []  # type: ignore[arg-type]


def test_directories_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json: missing"):
        resolve_model(str(tmp_path))
    config = tmp_path / "config.json"
    config.write_text("{")
    with pytest.raises(CheckpointError, match="not a model configuration"):
        load_config(tmp_path)
    config.write_text(json.dumps({"model_type": "no-such-thing"}))
    with pytest.raises(ModelError, match="'no-such-thing' is not known"):
        load_config(tmp_path)
    config.write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ModelError, match=r"'gpt2' is not supported; supported are Llama \(llama\), "):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"num_attention_heads": 5, "hidden_size": 320, "num_key_value_heads": 2}, "do not divide"),
    ],
)
def test_configurations_that_export_cannot_cover(fields: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | fields))
    with pytest.raises(ModelError, match=message):
        resolve_model(str(tmp_path))


def test_a_checkpoint_of_another_model_than_the_preset(tmp_path: Path) -> None:
    save_checkpoint("llama3", tmp_path)
    with pytest.raises(ModelError, match="not llama3-8b: num_hidden_layers is 2, llama3-8b has 32"):
        resolve_model("llama3-8b", checkpoint=tmp_path)
    with pytest.raises(ModelError, match="exclude each other"):
        resolve_model("llama3-8b", checkpoint=tmp_path, random_weights=True)


def _response() -> object:
    return SimpleNamespace(headers={}, status_code=404, request=None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError("gated", response=_response()), "gated; accept its licence"),  # type: ignore[arg-type]
        (RepositoryNotFoundError("none", response=_response()), "no such model on the hub"),  # type: ignore[arg-type]
        (LocalEntryNotFoundError("offline"), "hub cannot be reached"),
        (ConnectionError("refused\nby the network"), r"hub cannot be reached \(refused\)"),
    ],
)
def test_a_hub_that_gives_nothing(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve_model("llama3-8b")
    assert "--checkpoint DIR" in str(caught.value)
    assert "meta-llama/Meta-Llama-3-8B" in str(caught.value)


def test_a_hub_id_is_asked_for_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint("llama3", tmp_path)
    asked = []

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append((hub_id, "*.safetensors" in allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("someone/some-model").checkpoint == tmp_path
    assert resolve_model("someone/some-model", random_weights=True).checkpoint is None
    assert asked == [("someone/some-model", True), ("someone/some-model", False)]


def test_the_byte_tokenizer() -> None:
    tokenizer = byte_tokenizer()
    text = "Grüße, 世界! \n\t\x00 🎉"
    ids = tokenizer.encode(text).ids
    assert ids == [BEGIN_ID, *text.encode()]  # token i is byte i
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode([byte]) for byte in b"az09"] == ["a", "z", "0", "9"]
