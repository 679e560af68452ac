"""The command line as a user meets it: exit status, stdout, stderr."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from socket_trt import __version__, environment
from socket_trt.cli.extras import needs
from socket_trt.cli.main import main
from socket_trt.cli.sizes import human_bytes
from socket_trt.engine.plugin import PLUGIN_VARIABLE
from socket_trt.errors import MissingDependencyError
from socket_trt.validation.report import ValidationReport
from tests.engines import tiny_engine
from tests.families import save_checkpoint

SMALL = ["--sink", "8", "--window", "8", "--budget", "0.1", "--page-size", "16", "--max-seq-len", "256"]


class Result(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as caught:
            main([str(a) for a in arguments])
        captured = capfd.readouterr()
        return Result(int(caught.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    shutil.copytree(tiny_engine(), tmp_path / "engine")
    return tmp_path / "engine"


def assert_one_line_error(result: Result, message: str) -> None:
    assert result.code == 2
    assert result.out == ""
    lines = [line for line in result.err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in result.err


def test_build_validate_inspect_generate(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "engine"
    built = run("build", "--model", "tiny", "--output", output, *SMALL)
    assert built.code == 0
    assert "2 SocketAttention nodes" in built.out
    assert "Exporting the graph" in built.err  # progress goes to stderr

    validated = run("validate", output)
    assert validated.code == 0
    assert validated.out.count("passed") == 5

    inspected = run("inspect", output)
    assert inspected.code == 0
    assert "tokens a GiB" in inspected.out
    assert "whole" in inspected.out

    generated = run("generate", output, "--prompt", "Hello", "--max-tokens", "5", "--json")
    result = json.loads(generated.out)
    assert result["prompt_tokens"] == 6  # a beginning-of-text token and five bytes
    assert len(result["token_ids"]) == 5
    assert result["finish_reason"] == "length"


def test_build_prints_the_manifest_as_json(run: Run, tmp_path: Path) -> None:
    built = run("build", "-m", "tiny", "-o", tmp_path / "engine", *SMALL, "--selection", "kv_head", "--json")
    manifest = json.loads(built.out)
    assert manifest == json.loads((tmp_path / "engine" / "build.json").read_text())
    assert manifest["socket"]["selection"] == 1
    assert (manifest["socket"]["budget_tokens"], manifest["socket"]["budget_permille"]) == (0, 100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "lama3-8b"], "nearest: llama3-8b"),
        (["--model", "tiny", "--planes", "17"], "planes: Input should be less than or equal to 16"),
        (["--model", "tiny", "--tables", "0"], "tables: Input should be greater than or equal to 1"),
        (["--model", "tiny", "--page-size", "48"], "48 is not a power of two"),
        (["--model", "tiny", "--budget", "1.5"], "a fraction lies between 0.001 and 1.0"),
        (["--model", "tiny", "--max-seq-len", "100000"], "tiny takes 1 to 8192 tokens"),
        (["--model", "tiny", "--dtype", "bfloat16"], "no bfloat16"),
        (["--model", "llama3-8b", "--checkpoint", "/nonexistent"], "config.json: missing"),
    ],
)
def test_build_errors_are_one_line_and_leave_nothing(run: Run, arguments: list, message: str, tmp_path: Path) -> None:
    assert_one_line_error(run("build", *arguments, "-o", tmp_path / "engine"), message)
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_with_the_request_is_found_before_the_model_is_downloaded(
    run: Run, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("socket_trt.models.checkpoint.download", lambda hub_id, weights: asked.append(hub_id))
    for arguments, message in (
        (["-o", engine], "exists; give --force"),
        (["-o", engine.parent, "--force"], "is no engine directory"),
        (["-o", engine.parent / "new", "--max-batch-size", "0"], "at least one sequence"),
    ):
        assert_one_line_error(run("build", "-m", "qwen3-8b", *arguments), message)
    assert not asked


def test_an_unsupported_architecture_and_a_missing_shard(run: Run, tmp_path: Path) -> None:
    other = tmp_path / "gpt2"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert_one_line_error(run("build", "-m", other, "-o", tmp_path / "e"), "architecture 'gpt2' is not supported")
    checkpoint = save_checkpoint("llama3", tmp_path / "checkpoint", max_shard_size="200KB")
    sorted(checkpoint.glob("*.safetensors"))[0].unlink()
    assert_one_line_error(
        run("build", "-m", checkpoint, "-o", tmp_path / "e"), "missing; download the checkpoint again"
    )
    assert not (tmp_path / "e").exists()


def test_an_unreachable_hub(tmp_path: Path) -> None:
    """The real client against an address where nothing listens."""
    environment_without_hub = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    result = subprocess.run(
        [sys.executable, "-m", "socket_trt.cli.main", "build", "-m", "qwen3-8b", "-o", str(tmp_path / "engine")],
        env=environment_without_hub,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 2
    assert "Qwen/Qwen3-8B: the hub cannot be reached" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "engine").exists()


def test_tensorrt_that_is_not_there(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "gpu", lambda: None)
    monkeypatch.setattr(environment, "package_version", lambda _: None)
    result = run("build", "-m", "tiny", "-o", tmp_path / "engine", "--backend", "tensorrt")
    assert_one_line_error(result, "--backend tensorrt lacks an NVIDIA GPU")
    assert "TensorRT's Python package" in result.err
    assert "--backend onnxruntime" in result.err


def test_validate_fails_with_status_one(run: Run, engine: Path) -> None:
    manifest = json.loads((engine / "build.json").read_text())
    manifest["socket"]["temperature"] = 1.5  # the reference is told another temperature than the graph has
    (engine / "build.json").write_text(json.dumps(manifest))
    result = run("validate", engine, "--json")
    assert result.code == 1
    report = json.loads(result.out)
    assert [gate["outcome"] for gate in report["gates"]][3] == "failed"
    assert "FAILED" in run("validate", engine).out
    assert "failed: " in run("inspect", engine).out


@pytest.mark.parametrize(
    ("min_length", "said"), [(0, ""), (100, ", dense up to 100 tokens"), (512, ", always dense: no sequence here")]
)
def test_inspect_says_where_attention_is_dense(run: Run, engine: Path, min_length: int, said: str) -> None:
    manifest = json.loads((engine / "build.json").read_text())
    manifest["socket"]["min_length"] = min_length
    (engine / "build.json").write_text(json.dumps(manifest))
    (line,) = [line for line in run("inspect", engine).out.splitlines() if line.startswith("attention")]
    assert ("dense" in line) == bool(said)
    assert said in line


def test_inspect_says_what_is_wrong(run: Run, engine: Path) -> None:
    fields = json.loads(run("inspect", engine, "--json").out)
    assert fields["state"] == "whole"
    assert "none; run" in fields["validation"]
    parameters = 260 * 128 * 2 + 2 * (128 * 256 * 2 + 128 * 128 * 2 + 3 * 128 * 256 + 2 * 128) + 128
    assert fields["memory"]["weights_bytes"] == 4 * parameters
    assert list(fields["capacity"]["tokens_by_batch"]) == ["1", "8", "64"]
    assert "4.0 GiB hold" in run("inspect", engine, "--memory", "4").out
    assert "not even the weights" in run("inspect", engine, "--memory", "0.001").out
    assert_one_line_error(run("inspect", engine, "--batch", "0"), "at least one sequence")
    assert_one_line_error(run("inspect", engine, "--batch", "x"), "give numbers separated by commas")
    (engine / "checkpoint" / "model.safetensors").unlink()
    assert "missing" in json.loads(run("inspect", engine, "--json").out)["state"]
    report = ValidationReport(
        engine_graph_sha256="other", model="", family="", dtype="", attention="", versions={}, sequence_lengths=[],
        seconds=0, gates=[],
    )  # fmt: skip
    (engine / "validation.json").write_text(report.model_dump_json())
    assert "of another graph" in run("inspect", engine).out
    (engine / "validation.json").write_text("{")
    assert "not a report of this release" in json.loads(run("inspect", engine, "--json").out)["validation"]
    assert_one_line_error(run("inspect", engine.parent), "has no build.json")


def test_generate_reads_prompts_from_everywhere(run: Run, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "The same prompt, however it comes. " * 6
    expected = run("generate", engine, "--prompt", text, "--max-tokens", "12").out
    file = engine.parent / "prompt.txt"
    file.write_text(text)
    assert run("generate", engine, "--prompt-file", file, "--max-tokens", "12").out == expected
    for arguments in (["-"], ["--prompt-file", "-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert run("generate", engine, *arguments, "--max-tokens", "12").out == expected
    streamed = run("generate", engine, "--prompt", text, "--max-tokens", "12", "--stream")
    assert streamed.out == expected
    assert "12 generated (length)" in streamed.err


def test_generate_samples_by_seed(run: Run, engine: Path) -> None:
    def tokens(*arguments: str) -> list[int]:
        text = run("generate", engine, "--prompt", "abc", "--max-tokens", "12", "--json", *arguments).out
        return json.loads(text)["token_ids"]

    hot = ["--temperature", "2.0", "--top-k", "50", "--top-p", "0.95"]
    assert tokens(*hot, "--seed", "1") == tokens(*hot, "--seed", "1")
    assert tokens(*hot, "--seed", "1") != tokens(*hot, "--seed", "2")
    assert tokens() == tokens("--seed", "5")  # greedy


def test_generate_refuses_what_it_cannot_do(run: Run, engine: Path) -> None:
    assert_one_line_error(run("generate", engine), "give one of --prompt")
    assert_one_line_error(run("generate", engine, "--prompt", "a", "--prompt-file", "b"), "give one of --prompt")
    assert_one_line_error(run("generate", engine, "word"), "unexpected argument 'word'")
    assert_one_line_error(run("generate", engine, "--prompt-file", engine / "none"), "No such file")
    (engine / "bytes").write_bytes(b"\xff\xfe")
    assert_one_line_error(run("generate", engine, "--prompt-file", engine / "bytes"), "not UTF-8")
    assert_one_line_error(run("generate", engine, "--prompt", "x" * 2000), "512")  # longer than the cache
    assert_one_line_error(run("generate", engine, "--prompt", "a", "--temperature", "-1"), "temperature")
    assert_one_line_error(run("generate", engine.parent / "no", "--prompt", "a"), "no such engine directory")


def test_doctor(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(PLUGIN_VARIABLE, raising=False)
    parts = {part["name"]: part for part in json.loads(run("doctor", "--json").out)["parts"]}
    assert set(parts) >= {"GPU", "driver", "TensorRT", "plugin library", "triton", "nvcc", "onnxruntime"}
    assert set(parts) >= {"cuda-bindings", "onnx"}  # what docs/tensorrt.md says that it tells of
    assert parts["onnxruntime"]["found"]
    text = run("doctor").out
    assert f"socket-trt {__version__}" in text
    if not parts["GPU"]["found"]:
        assert "would enable TensorRT engines" in text
    monkeypatch.setenv(PLUGIN_VARIABLE, str(tmp_path / "none.so"))
    assert environment.plugin_library() is None
    (tmp_path / "lib.so").write_text("")
    monkeypatch.setenv(PLUGIN_VARIABLE, str(tmp_path / "lib.so"))
    assert environment.plugin_library() == tmp_path / "lib.so"


def test_tensorrt_is_found_whichever_distribution_brought_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    information = tmp_path / "tensorrt_cu12-10.16.1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorrt-cu12\nVersion: 10.16.1\n")
    (information / "top_level.txt").write_text("tensorrt\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert environment.tensorrt_version() == "10.16.1"
    monkeypatch.setattr(sys, "path", [])
    assert environment.tensorrt_version() is None


def test_doctor_reads_what_tools_print(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The parsing, against tools that print what the real ones print."""
    for name, text in {
        "nvidia-smi": "NVIDIA H200, 143771 MiB",
        "nvcc": "nvcc: NVIDIA (R) Cuda compiler driver\nCuda compilation tools, release 13.0, V13.0.88",
    }.items():
        tool = tmp_path / name
        tool.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert environment.gpu() == "NVIDIA H200, 143771 MiB"
    assert environment.nvcc() == "13.0, V13.0.88"
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    assert environment.gpu() is None


def test_what_is_logged_goes_to_stderr(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = logging.getLogger("socket_trt").level, logging.getLogger("socket_trt").handlers
    told = logging.getLogger("socket_trt.tensorrt").debug
    monkeypatch.setattr(environment, "gpu", lambda: told("a message of the builder"))
    for options, shown in ((["--log", "debug"], True), ([], False)):
        result = run(*options, "doctor")
        assert result.code == 0
        assert "a message of the builder" not in result.out
        assert ("socket_trt.tensorrt: a message of the builder" in result.err) == shown
    assert before == (logging.getLogger("socket_trt").level, logging.getLogger("socket_trt").handlers)


def test_a_missing_package_names_the_extra_that_brings_it() -> None:
    for package, message in (
        ("a", "drawing needs the package 'a': .*socket-trt\\[x\\]"),
        ("b", "'b': .*socket-trt\\[y\\]"),
    ):
        with pytest.raises(MissingDependencyError, match=message), needs("x", "drawing", {"b": "y"}):
            raise ModuleNotFoundError(name=package)


def test_version_and_help(run: Run) -> None:
    assert run("--version").out.strip() == f"socket-trt {__version__}"
    assert "validate" in run("--help").out


def test_serving_needs_no_pytorch(engine: Path) -> None:
    """The path from an engine directory to text, in a process where what only builds need cannot be imported."""
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'onnx', 'onnxscript', 'onnx_ir', 'safetensors', 'polygraphy'):\n"
        "    sys.modules[name] = None\n"
        "from socket_trt.cli.main import main\n"
        f"main(['generate', {str(engine)!r}, '--prompt', 'Hello', '--max-tokens', '4', '--json'])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)["token_ids"]) == 4


@pytest.mark.parametrize(("command", "extra"), [("build", "export"), ("validate", "validate"), ("deploy", "serving")])
def test_a_missing_extra_is_named(engine: Path, command: str, extra: str, tmp_path: Path) -> None:
    arguments = {
        "build": ["build", "-m", "tiny", "-o", str(tmp_path / "new")],
        "validate": ["validate", str(engine)],
        "deploy": ["deploy", str(engine), "--model-repository", str(tmp_path / "models")],
    }[command]
    code = (
        "import sys\n"
        "sys.modules['onnx'] = sys.modules['torch'] = sys.modules['jinja2'] = None\n"
        "from socket_trt.cli.main import main\n"
        f"main({arguments!r})\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 2
    assert f"pip install 'socket-trt[{extra}]'" in result.stderr


def test_human_bytes() -> None:
    assert [human_bytes(n) for n in (0, 1023, 1536, 2**20, 3 * 2**30, 2**41)] == [
        *("0 B", "1023 B", "1.5 KiB", "1.0 MiB", "3.0 GiB", "2.0 TiB"),
    ]


def test_deploy(run: Run, engine: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    options = ["--engine-path", "/engines/chat", "--num-pages", "100", "--max-waiting", "7", "--max-seconds", "2.5"]
    result = run("deploy", engine, "--model-repository", models, "--name", "chat", *options, "--json")
    assert json.loads(result.out) == {
        "entry": str(models / "chat"),
        "gpus": [],
        "instances": 1,
        "engine": "/engines/chat",
        "num_pages": 100,
        "max_waiting": 7,
        "max_step_tokens": None,
        "max_seconds": 2.5,
        "random_weights": False,
    }
    assert 'string_value: "/engines/chat"' in (models / "chat" / "config.pbtxt").read_text()
    assert f"tritonserver --model-repository {models}" in run("deploy", engine, "--model-repository", models).out
    assert f'string_value: "{engine}"' in (models / "engine" / "config.pbtxt").read_text()
    assert_one_line_error(run("deploy", engine, "--model-repository", models), "exists; give --force")
    (engine / "tokenizer.json").unlink()
    assert "token ids only" in run("deploy", engine, "--model-repository", models, "--force").out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "0"], "runs on the CPU; leave --gpus out"),
        (["--gpus", "a"], "give numbers separated by commas"),
        (["--name", "a/b"], "a name has letters"),
        (["--name", ".hidden"], "a name has letters"),
        (["--max-seconds", "0"], "max_seconds"),
    ],
)
def test_deploy_refuses_what_cannot_be(
    run: Run, engine: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    assert_one_line_error(run("deploy", engine, "--model-repository", tmp_path / "models", *options), message)
    assert not (tmp_path / "models").exists()
