"""The benchmark on a fake TensorRT: what it runs and reports, and that its caches are what the operator would have written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from socket_trt.benchmark import BenchOptions, BenchReport, DecodeResult, decode_batch, run_benchmark
from socket_trt.cases import Case, parse_cases
from socket_trt.cli.main import main
from socket_trt.engine.manifest import EngineDirectory
from socket_trt.errors import ConfigError, EngineError
from socket_trt.planes import draw_planes
from socket_trt.progress import Silent
from socket_trt.reference import key_codes, pack_codes
from socket_trt.runtime.random_cache import draw_pages, fill_caches
from socket_trt.runtime.tensorrt_session import TensorRTSession
from tests.engines import tiny_engine
from tests.tensorrt_fixtures import OPTIONS, FakeMachine, FakePlugin


@pytest.mark.parametrize("planes", [6, 10])
def test_random_pages_hold_the_codes_and_norms_of_their_keys_and_values(planes: int) -> None:
    manifest = EngineDirectory.open(tiny_engine(**OPTIONS, planes=planes)).manifest
    socket, size = manifest.socket, manifest.model.head_size
    pages = draw_pages(manifest, tokens=64)
    assert pages.count == 4
    keys = torch.from_numpy(pages.content["key"].view(np.float16).astype(np.float32)).reshape(4, socket.page_size, size)
    values = pages.content["value"].view(np.float16).astype(np.float32).reshape(4, socket.page_size, size)
    w = torch.from_numpy(draw_planes(socket.tables, socket.planes, size, socket.seed))
    words = pack_codes(key_codes(keys, w).transpose(1, 2), socket.code_bits).numpy()
    found = pages.content["code"].view(np.int32).reshape(4, socket.tables, -1)
    bits_apart = np.unpackbits((words ^ found).view(np.uint8)).sum()
    assert bits_apart <= 4  # a key was rounded after it was hashed: a projection beside zero may have changed its sign
    norms = pages.content["norm"].view(np.float16).reshape(4, socket.page_size)
    np.testing.assert_allclose(norms, np.linalg.norm(values, axis=-1), rtol=2e-3)


def test_every_layer_has_whole_pages_from_another_one_on(machine: FakeMachine) -> None:
    machine.install()
    engine = machine.compiled()
    session = TensorRTSession(engine, num_pages=9, random_weights=True)
    pages = draw_pages(engine.manifest, tokens=80)
    fill_caches(session.caches, pages, session.stream)
    order = {}
    for (layer, kind), cache in session.caches.items():
        drawn = pages.content[kind].reshape(pages.count, -1)
        found = read(cache.address, cache.size).reshape(-1, drawn.shape[1])
        order[layer, kind] = [next(i for i, page in enumerate(drawn) if np.array_equal(page, unit)) for unit in found]
        assert len(order[layer, kind]) == 9 * engine.manifest.model.kv_heads
    for layer in range(engine.manifest.model.layers):
        assert order[layer, "key"] == order[layer, "value"] == order[layer, "code"] == order[layer, "norm"]
    assert order[0, "key"] != order[1, "key"]
    session.close()


def read(address: int, size: int) -> np.ndarray:
    import ctypes

    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)


def test_report_of_both_attentions(machine: FakeMachine, caplog: pytest.LogCaptureFixture) -> None:
    trt = machine.install()
    caplog.set_level("INFO", "socket_trt.benchmark")
    engine = machine.compiled()
    report = run_benchmark(
        engine, BenchOptions([Case(1, 200), Case(3, 100)], steps=2, prefill=96, random_weights=True), Silent()
    )
    assert [(r.attention, r.batch, r.context) for r in report.decode] == [
        ("dense", 1, 200), ("dense", 3, 100), ("socket", 1, 200), ("socket", 3, 100),
    ]  # fmt: skip
    assert all(result.step_ms > 0 and result.gpu_ms == 1.0 for result in report.decode)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"{kind}, {case}" for kind in ("dense", "socket") for case in (Case(1, 200), Case(3, 100))
    ]
    assert [entry["attention"] for entry in report.prefill] == ["dense", "socket"]
    assert set(report.build_seconds) == {"dense", "socket"}
    assert len(trt.built) == 2
    dense = trt.built[1].network.model
    assert {a.i for node in dense.graph.node for a in node.attribute if a.name == "min_length"} == {2**31 - 1}
    assert not trt.driver.allocations
    fields = json.loads(json.dumps(report.as_dict()))
    assert fields["decode"][0]["tokens_per_second"] > 0
    assert BenchReport.from_dict(fields) == report
    assert report.cublas is None


def test_speedup_is_against_the_dense_engine_in_the_same_case() -> None:
    results = [DecodeResult("dense", 1, 8, 4.0, 4.0), DecodeResult("dense", 2, 8, 6.0, 6.0)]
    results += [DecodeResult("socket", 2, 8, 3.0, 3.0), DecodeResult("socket", 4, 8, 3.0, 3.0)]
    report = BenchReport("", "", "", "", "", {}, {}, {}, results, [], {})
    assert [report.speedup(result) for result in results] == [None, None, 2.0, None]
    assert results[2].tokens_per_second == pytest.approx(2000 / 3)


def test_a_batch_decodes_the_last_token_of_every_sequence(machine: FakeMachine) -> None:
    machine.install()
    session = TensorRTSession(machine.compiled(), random_weights=True)
    batch = decode_batch(session, Case(3, 33), seed=0)
    assert batch.past_length.tolist() == [32, 32, 32]
    used = batch.page_table[batch.page_table > 0]
    assert len(used) == len(set(used.tolist())) == 9
    session.close()


@pytest.mark.parametrize(
    ("text", "cases"), [("1x128K", [Case(1, 131072)]), ("2x10, 4x1k", [Case(2, 10), Case(4, 1024)])]
)
def test_cases(text: str, cases: list[Case]) -> None:
    assert parse_cases("--cases", text) == cases


@pytest.mark.parametrize("text", ["", "1", "x4", "1x", "0x4", "1x0", "ax4", "1x4M", "1x4,"])
def test_bad_cases(text: str) -> None:
    with pytest.raises(ConfigError, match="--cases"):
        parse_cases("--cases", text)


def test_cases_beyond_the_engine(machine: FakeMachine) -> None:
    machine.install()
    engine = machine.compiled()
    for options in (BenchOptions([Case(5, 8)]), BenchOptions([Case(1, 513)]), BenchOptions([Case(1, 8)], prefill=513)):
        with pytest.raises(ConfigError, match="this engine takes"):
            run_benchmark(engine, options, Silent())
    bare = EngineDirectory(engine.path, engine.manifest.model_copy(update={"plan": None}))
    with pytest.raises(EngineError, match="socket-trt compile"):
        run_benchmark(bare, BenchOptions([Case(1, 8)]), Silent())


def test_command(machine: FakeMachine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine.install()
    engine = machine.compiled()
    with pytest.raises(SystemExit) as exit_:
        main(["bench", str(engine.path), "--cases", "1x64", "--steps", "1", "--random-weights",
              "--output", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")])  # fmt: skip
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert "tokens/s" in printed
    assert "dense" in printed
    assert json.loads((tmp_path / "r.json").read_text())["tensorrt"] == "8.6.0"
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("option", "file"),
    [("--output", "none/r.json"), ("--output", "."), ("--plot", "none/r.png"), ("--plot", "r.table")],
)
def test_files_that_cannot_be_written_are_found_before_anything_is_timed(
    option: str, file: str, machine: FakeMachine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trt = machine.install()
    engine = machine.compiled()
    before = len(trt.built)
    with pytest.raises(SystemExit) as exit_:
        main(["bench", str(engine.path), "--cases", "1x64", "--random-weights", option, str(tmp_path / file)])
    assert exit_.value.code == 2
    assert f"error: {option} {tmp_path / file}" in capsys.readouterr().err
    assert len(trt.built) == before


def test_reports_are_put_together(machine: FakeMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import decode

    machine.install(name="NVIDIA Fake", plugin=FakePlugin(cublas="12.9.1"))
    report = run_benchmark(machine.compiled(), BenchOptions([Case(1, 64)], steps=1, random_weights=True), Silent())
    (tmp_path / "a.json").write_text(json.dumps(report.as_dict()))
    monkeypatch.setattr(
        "sys.argv", ["decode", "--reports", str(tmp_path / "a.json"), "--output", str(tmp_path / "out")]
    )
    decode.main()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "decode-fake.json", "decode-fake.md", "decode-fake.png",
    ]  # fmt: skip
    assert (
        "| tiny, 2 layers, float16, R = 8, products by cuBLAS 12.9.1 | 1 | 64 | socket |"
        in (tmp_path / "out" / "decode-fake.md").read_text()
    )
