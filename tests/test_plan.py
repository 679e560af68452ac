"""What TensorRT's builder is told: profiles, types, flags of each version, timing cache, and its refusals."""

from __future__ import annotations

import ctypes
import json
import logging
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from socket_trt import environment, names
from socket_trt.cli.main import main
from socket_trt.engine.compile import (
    KERNEL_HEAD_SIZES,
    MAX_GROUP,
    NETWORK_FILE,
    check_plannable,
    compile_engine,
    compile_variant,
    load_network,
)
from socket_trt.engine.manifest import PLAN_FILE, EngineDirectory
from socket_trt.engine.plan import default_timing_cache, make_logger
from socket_trt.engine.profiles import MAX_ELEMENTS, check_max_step_tokens, engine_profiles, pool_pages
from socket_trt.engine.tensorrt import choose_backend, import_tensorrt, missing_parts, open_tensorrt
from socket_trt.errors import ConfigError, EngineError, MissingDependencyError
from socket_trt.progress import Silent
from socket_trt.runtime import cuda
from tests.engines import tiny_engine
from tests.fake_tensorrt import DataType, FakeTensorRT, LayerType
from tests.tensorrt_fixtures import OPTIONS, FakeMachine, FakePlugin

REPOSITORY = Path(__file__).resolve().parents[1]
VERSIONS = ["8.6.0", "10.16.1", "11.4.0"]


def manifest(**changes: object) -> object:
    return EngineDirectory.open(tiny_engine(**OPTIONS)).manifest.model_copy(update=changes)


def test_profiles_of_decode_and_prefill() -> None:
    one, several, prefill = engine_profiles(manifest(), 64, 100)
    shapes = {record.name: record for record in manifest().graph.inputs}
    assert one.shapes(shapes[names.INPUT_IDS]) == ((1,), (1,), (1,))
    assert several.shapes(shapes[names.QUERY_START]) == ((3,), (5,), (5,))
    assert several.shapes(shapes[names.PAGE_TABLE]) == ((2, 1), (4, 32), (4, 32))
    assert prefill.shapes(shapes[names.POSITION_IDS]) == ((1,), (64,), (64,))
    assert prefill.shapes(shapes[names.PAST_LENGTH]) == ((1,), (1,), (4,))
    key = names.past(0, "key")
    assert prefill.shapes(shapes[key]) == ((2, 2, 16, 64), (64, 2, 16, 64), (100, 2, 16, 64))
    assert [profile.name for profile in engine_profiles(manifest(max_batch_size=1), 64, 100)] == ["decode 1", "prefill"]


def test_the_pool_is_a_full_batch_of_full_sequences_as_far_as_a_tensor_reaches() -> None:
    assert pool_pages(manifest()) == 1 + 4 * 32
    page = 2 * 16 * 64
    assert pool_pages(manifest(max_batch_size=100, max_seq_len=1 << 20)) == MAX_ELEMENTS // page
    with pytest.raises(ConfigError, match="lower --max-seq-len"):
        pool_pages(manifest(max_seq_len=1 << 25))


def test_a_step_holds_every_row_and_a_chunk() -> None:
    check_max_step_tokens(6, 4)
    with pytest.raises(ConfigError, match="at least 6"):
        check_max_step_tokens(5, 4)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_the_builder_is_told(version: str, machine: FakeMachine) -> None:
    trt = machine.install(version)
    engine = machine.compiled()
    (builder,) = trt.built
    config, old = builder.config, version.startswith("8.")
    assert builder.network.flags == {"8": 1, "10": 2, "11": 0}[version.split(".")[0]]
    assert config.flags == (["fp16", "obey"] if old else [])
    assert config.tactic_sources == (0 if old else None)
    assert config.preview == ({"sharing": True} if old else {"aliased": True})
    assert len(config.profiles) == 3
    assert set(config.profiles[0]) == {record.name for record in engine.manifest.graph.inputs}
    held = [layer for layer in builder.network.layers if layer.precision is not None]
    assert bool(held) == old
    plan = engine.manifest.plan
    assert plan is not None
    assert (plan.tensorrt, plan.gpu, plan.compute_capability) == (version, "Fake GPU", "9.0")
    assert (plan.max_step_tokens, plan.max_pages) == (2048, 129)
    assert (engine.path / PLAN_FILE).is_file()
    assert (engine.path / NETWORK_FILE).is_file()


def test_layers_of_eight_six_are_held_to_the_graphs_types(machine: FakeMachine) -> None:
    trt = machine.install()
    engine = machine.compiled()
    graph = load_network(engine, 8)
    for layer in trt.built[0].network.layers:
        output = layer.get_output(0).name
        free = layer.type in (LayerType.CAST, LayerType.CONSTANT, LayerType.PLUGIN_V2)
        if layer.type == LayerType.IDENTITY:  # not of the graph
            continue
        wanted = DataType.FLOAT if output in graph.float32 else DataType.HALF if output in graph.float16 else None
        assert layer.precision == (None if free else wanted), layer.name
        assert layer.output_types == ({} if free or wanted is None else {0: wanted})


def test_elementwise_layers_of_eight_six_convert_between_floating_types_themselves(machine: FakeMachine) -> None:
    trt = machine.install()
    machine.compiled()
    layers = trt.built[0].network.layers
    casts = [layer for layer in layers if layer.type == LayerType.CAST]
    kinds = [{cast.get_input(0).dtype, cast.get_output(0).dtype} for cast in casts]
    floating = [cast for cast, kind in zip(casts, kinds, strict=True) if kind <= {DataType.FLOAT, DataType.HALF}]
    read = {
        cast.name: [
            layer.type
            for layer in layers
            for i in range(layer.num_inputs)
            if layer.get_input(i).name == cast.get_output(0).name
        ]
        for cast in casts
    }
    left_out = [cast for cast in floating if not read[cast.name]]
    assert len(left_out) >= 8  # two norms a layer, to float32 and back
    assert all(LayerType.ELEMENTWISE not in read[cast.name] for cast in floating)
    assert len([cast for cast in floating if read[cast.name]]) >= 2  # cosine and sine, which a shuffle reads
    assert all(read[cast.name] for cast in casts if cast not in floating)
    # A norm squares the hidden states and scales them: two readers of one copy in float32.
    copies = [layer for layer in layers if layer.type == LayerType.IDENTITY]
    assert len(copies) == 2 * 2 + 1
    for copy in copies:
        assert copy.output_types == {0: DataType.FLOAT}
        assert copy.get_input(0).dtype == DataType.HALF
        readers = {
            layer.name for layer in layers for i in range(layer.num_inputs) if layer.get_input(i) is copy.get_output(0)
        }
        assert len(readers) == 2


def test_products_read_weights_untransposed(machine: FakeMachine) -> None:
    trt = machine.install()
    machine.compiled()
    products = [layer for layer in trt.built[0].network.layers if layer.type is LayerType.MATRIX_MULTIPLY]
    assert len(products) == 9
    assert all(layer.op1 == "transpose" and layer.get_input(1).name.endswith(".weight") for layer in products)


def test_products_by_cublas(machine: FakeMachine, capsys: pytest.CaptureFixture[str]) -> None:
    """Where it is there; the dense variant takes what the plan took."""
    trt = machine.install(plugin=FakePlugin(cublas="12.9.1"))
    engine = machine.compiled()
    assert engine.manifest.plan.cublas == "12.9.1"
    assert products_of(trt) == (0, 9)  # the head; four products a layer
    linear = [layer for layer in trt.built[0].network.layers if layer.node.op_type == names.LINEAR]
    assert all(layer.precision is None and layer.get_input(1).name.endswith(".weight") for layer in linear)
    with pytest.raises(SystemExit) as exit_:
        main(["inspect", str(engine.path)])
    assert exit_.value.code == 0
    assert "products by cuBLAS 12.9.1" in " ".join(capsys.readouterr().out.split())
    compile_engine(engine, Silent(), cublas=False)
    engine = EngineDirectory.open(engine.path)
    assert engine.manifest.plan.cublas is None
    assert products_of(trt) == (9, 0)
    compile_variant(engine, open_tensorrt(), Silent(), {"min_length": 1})
    assert products_of(trt) == (9, 0)


def products_of(trt: FakeTensorRT) -> tuple[int, int]:
    """Products of the network that was built last: TensorRT's own, and cuBLAS's."""
    kinds = [layer.node.op_type for layer in trt.built[-1].network.layers]
    return kinds.count("MatMul"), kinds.count(names.LINEAR)


def test_cublas_where_there_is_none(machine: FakeMachine) -> None:
    trt = machine.install()
    engine = machine.compiled()
    assert engine.manifest.plan.cublas is None
    assert products_of(trt) == (9, 0)
    with pytest.raises(
        MissingDependencyError, match=r"there is no cuBLAS 12.*pip install nvidia-cublas-cu12, or .*--no-cublas"
    ):
        compile_engine(engine, Silent(), cublas=True)
    machine.install("10.16.1")
    with pytest.raises(ConfigError, match=r"--cublas: TensorRT 10\.16\.1 computes products itself"):
        compile_engine(engine, Silent(), cublas=True)


def test_the_timing_cache_is_kept_and_one_of_another_gpu_replaced(machine: FakeMachine) -> None:
    trt = machine.install()
    machine.compiled()
    path = default_timing_cache(trt, "Fake GPU")
    assert path.name == "timing-8.6.0-Fake-GPU.cache"
    assert path.read_bytes() == b"fake cache:"
    machine.compiled()
    assert path.read_bytes() == b"fake cache:fake cache:"
    path.write_bytes(b"of another GPU")
    machine.compiled()
    assert path.read_bytes() == b"fake cache:"


def test_a_cache_that_cannot_be_written_is_no_failure(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    machine.install()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        machine.compiled()
    assert "not written" in caplog.text


@pytest.mark.parametrize(
    ("refuse", "match"), [("parse", "node 7: Plugin not found"), ("build", "could not find any implementation")]
)
def test_refusals_come_with_tensorrts_words(refuse: str, match: str, machine: FakeMachine) -> None:
    trt = machine.install()
    engine = machine.compiled()
    before = (engine.path / "build.json").read_text()
    trt.refuse = refuse
    with pytest.raises(EngineError, match=match):
        compile_engine(engine, Silent())
    assert (engine.path / "build.json").read_text() == before


def test_progress_of_the_outermost_phase(machine: FakeMachine) -> None:
    shown: list[int] = []

    class Watching(Silent):
        def task(self, description: str, total: int | None = None):  # type: ignore[no-untyped-def]
            import contextlib

            return contextlib.nullcontext(shown.append)

    machine.install("10.16.1")
    compile_engine(machine.compiled(), Watching())
    assert [amount for amount in shown if amount] == [250, 250, 250, 250]


def test_the_logger_keeps_errors_and_leaves_out_what_nobody_reads(caplog: pytest.LogCaptureFixture) -> None:
    trt = SimpleNamespace(ILogger=type("ILogger", (), {"VERBOSE": "Severity.VERBOSE"}))
    logger = make_logger(trt)
    with caplog.at_level(logging.DEBUG):
        for severity in ("VERBOSE", "INFO", "WARNING", "ERROR"):
            logger.log(f"Severity.{severity}", f"of {severity}")
    assert [record.levelname for record in caplog.records] == ["DEBUG", "INFO", "INFO"]
    assert logger.explain() == "of ERROR"
    assert logger.explain() == "it gives no reason"


@pytest.mark.parametrize(
    ("changes", "major", "match"),
    [
        ({"dtype": "float32"}, 10, "--dtype float16"),
        ({"dtype": "bfloat16"}, 8, "8.6 does not know"),
        ({"dtype": "bfloat16"}, 10, None),
    ],
)
def test_dtypes(changes: dict[str, str], major: int, match: str | None) -> None:
    engine = EngineDirectory(Path("x"), manifest(**changes))
    if match is None:
        check_plannable(engine, major)
        return
    with pytest.raises(ConfigError, match=match):
        check_plannable(engine, major)


@pytest.mark.parametrize("sizes", [{"head_size": 80}, {"query_heads": 34, "kv_heads": 2}])
def test_sizes_that_the_plugin_has_no_kernels_for(sizes: dict[str, int]) -> None:
    model = manifest().model.model_copy(update=sizes)
    with pytest.raises(ConfigError, match="head sizes 64, 96, 128, 256 and 16 query heads a KV head"):
        check_plannable(EngineDirectory(Path("x"), manifest(model=model)), 10)


def test_the_sizes_are_those_of_the_native_library() -> None:
    header = (REPOSITORY / "plugins" / "include" / "socket_trt" / "kernels.h").read_text()
    *sizes, last = KERNEL_HEAD_SIZES
    assert f"/* D: {', '.join(map(str, sizes))} or {last} */" in header
    assert f"at most {MAX_GROUP} Hkv */" in header


def test_embedded_weights_stay_in_the_graph(machine: FakeMachine) -> None:
    engine = EngineDirectory.open(tiny_engine("float16", weights="embedded", backend="tensorrt"))
    graph = load_network(engine, 10)
    assert graph.weights == ()
    assert b"model.layers.0.mlp.up_proj.weight" in graph.serialize()
    assert {value.name for value in graph.model.graph.inputs} == {
        record.name for record in engine.manifest.graph.inputs
    }
    check_plannable(engine, 8)


def test_an_engine_of_onnx_runtime_is_not_compiled() -> None:
    with pytest.raises(ConfigError, match="--backend tensorrt"):
        compile_engine(EngineDirectory.open(tiny_engine()), Silent())


def test_a_directory_that_cannot_be_written_is_found_before_the_plan_is_built(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = machine.install()
    engine = machine.compiled()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != engine.path)  # as on a read-only mount
    with pytest.raises(EngineError, match="cannot be written; mount it writable"):
        compile_engine(engine, Silent())
    assert len(trt.built) == 1


def test_compile_and_inspect(machine: FakeMachine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.install()
    engine = machine.compiled()
    shutil.copyfile(engine.path / "build.json", engine.path / "before.json")
    for arguments in (["compile", str(engine.path), "--max-step-tokens", "128"], ["inspect", str(engine.path)]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert printed.count("steps of 128 tokens") == 2
    assert json.loads((engine.path / "build.json").read_text())["plan"]["max_step_tokens"] == 128


def test_build_makes_the_plan_in_the_same_go(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.install()
    monkeypatch.setattr("socket_trt.engine.tensorrt.missing_parts", list)
    output = tmp_path / "built"
    with pytest.raises(SystemExit) as exit_:
        main(["build", "--model", "tiny", "-o", str(output), "--max-seq-len", "256", "--max-step-tokens", "64"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert "TensorRT 8.6.0, Fake GPU (9.0)" in printed
    engine = EngineDirectory.open(output)
    assert engine.manifest.backend == "tensorrt"  # auto: everything is there
    assert engine.manifest.dtype == "float16"
    assert engine.manifest.plan is not None
    assert engine.manifest.plan.max_step_tokens == 64


def test_a_plan_that_fails_leaves_no_engine_behind(
    machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trt = machine.install()
    trt.refuse = "build"
    monkeypatch.setattr("socket_trt.engine.tensorrt.missing_parts", list)
    with pytest.raises(SystemExit) as exit_:
        main(["build", "--model", "tiny", "-o", str(tmp_path / "built"), "--max-seq-len", "256"])
    assert exit_.value.code == 2
    assert not (tmp_path / "built").exists()


def test_an_export_without_a_plan_needs_no_tensorrt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["build", "--model", "tiny", "-o", str(tmp_path / "e"), "--backend", "tensorrt", "--no-plan"]
    with pytest.raises(SystemExit) as exit_:
        main([*arguments, "--max-seq-len", "256"])
    assert exit_.value.code == 0
    assert "socket-trt compile" in capsys.readouterr().out
    assert EngineDirectory.open(tmp_path / "e").manifest.plan is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--dtype", "float32"], "give --dtype float16"), (["--max-step-tokens", "9"], "need at least 10")],
)
def test_options_that_tensorrt_engines_exclude(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["build", "--model", "tiny", "-o", str(tmp_path / "e"), "--backend", "tensorrt", "--no-plan"]
    with pytest.raises(SystemExit) as exit_:
        main([*command, *arguments])
    assert exit_.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_what_is_missing_is_said_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket_trt.environment.gpu", lambda: None)
    monkeypatch.setattr("socket_trt.environment.plugin_library", lambda: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert len(missing_parts()) == 4
    with pytest.raises(MissingDependencyError, match="--no-plan leaves"):
        choose_backend("tensorrt")
    assert choose_backend("tensorrt", with_plan=False) == "tensorrt"
    assert choose_backend("auto") == "onnxruntime"
    assert choose_backend("onnxruntime") == "onnxruntime"


@pytest.mark.parametrize("version", ["7.2.3", "8.5.3"])
def test_versions_that_are_too_old(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=version))
    with pytest.raises(MissingDependencyError, match="too old"):
        import_tensorrt()


def test_no_tensorrt_and_one_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match=r"no TensorRT|does not load"):
        import_tensorrt()
    monkeypatch.setattr("importlib.import_module", lambda name: ctypes.CDLL("libnvinfer.so.none"))
    with pytest.raises(MissingDependencyError, match="does not load"):
        import_tensorrt()


def test_no_driver() -> None:
    """On the real cuda-python: a machine without a driver says so in a line."""
    if environment.gpu() is not None:
        pytest.skip("this machine has an NVIDIA GPU")
    with pytest.raises(MissingDependencyError, match=r"no NVIDIA driver|no usable NVIDIA GPU"):
        cuda.Device()
