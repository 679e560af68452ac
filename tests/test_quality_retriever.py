"""The small trained model: it answers, through the engine and through transformers, and the comparison of methods shows it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks import quality
from socket_trt.config import SocketConfig
from socket_trt.engine.build import BuildOptions, build_engine
from socket_trt.engine.manifest import EngineDirectory
from socket_trt.models.checkpoint import resolve_model
from socket_trt.progress import Silent
from socket_trt.quality import methods
from socket_trt.quality.evaluate import EvalOptions, run_eval
from socket_trt.quality.vocabulary import Vocabulary
from socket_trt.validation.report import Gate
from socket_trt.validation.validate import validate_engine

CHECKPOINT = Path(quality.__file__).parent / "models/retriever-small"
TRAINING = json.loads((CHECKPOINT / "training.json").read_text())
ANSWERED = ("single", "multi-key", "haystack", "multi-query")
SPARSE = SocketConfig(min_length=0, sink=4, window=4, budget_tokens=0, budget_permille=100, page_size=16)


@pytest.mark.parametrize("socket", [SPARSE, SPARSE.attends_densely()], ids=["sparse", "dense"])
def test_an_engine_of_it_answers(socket: SocketConfig, tmp_path: Path) -> None:
    build_engine(resolve_model(str(CHECKPOINT)), tmp_path / "engine", BuildOptions(socket, max_seq_len=512), Silent())
    options = EvalOptions(ANSWERED, 512, 8, 1, Vocabulary(**TRAINING["vocabulary"]))
    report = run_eval(EngineDirectory.open(tmp_path / "engine"), options, Silent(), None)
    for task in ANSWERED:
        assert TRAINING["accuracy"][task] >= 0.95
        assert report.accuracy(task) >= (0.95 if socket.min_length else 0.85)


def test_its_engine_passes_every_gate(tmp_path: Path) -> None:
    """Though its attention is so sharp that transformers' own float32 is far from float64."""
    build_engine(resolve_model(str(CHECKPOINT)), tmp_path / "engine", BuildOptions(SPARSE, max_seq_len=512), Silent())
    report = validate_engine(EngineDirectory.open(tmp_path / "engine"), Silent())
    assert {gate.outcome for gate in report.gates} == {"passed"}
    (whole,) = (gate for gate in report.gates if gate.gate is Gate.whole_model)
    assert whole.bound.endswith("twice transformers' own distance from float64")
    assert 1e-4 < float(whole.bound.split()[0]) < 2e-2


def test_the_comparison_of_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    makers = (
        lambda seed: methods.Dense(),
        lambda seed: methods.ExactTopK(),
        lambda seed: methods.Socket(seed=seed),
        lambda seed: methods.SinkWindow(),
        lambda seed: methods.Random(seed=seed),
        lambda seed: methods.Quest(),  # not asked for
    )
    monkeypatch.setattr(quality, "COMPARED", makers)
    monkeypatch.setattr(quality, "SWEEP", {"tables": (2, 60)})
    arguments = argparse.Namespace(
        tasks=["haystack", "multi-value"], length=512, samples=4, batch=2, measured=2, plane_seeds=2, sink=4, window=4, seed=2,
        library_samples=3, time_limit=None, methods=[make(0).name for make in makers[:-1]],
    )  # fmt: skip
    model = LlamaForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    kept_reports: list[int] = []
    comparison = quality.Comparison(model, Vocabulary(**TRAINING["vocabulary"]), arguments)
    report = comparison.run(lambda: kept_reports.append(len(comparison.report["accuracy"])))
    # After dense attention, the operator, and each seed: there are four methods, two draw.
    assert kept_reports == [0, 0, 20, 30]
    assert set(report["dense"]) == {"haystack"}  # what dense attention itself cannot answer says nothing
    assert set(report["left_out"]) == {"multi-value"}

    def of(method: str, kept: str) -> list[float]:
        return quality.by_seed(report["accuracy"], "accuracy", task="haystack", method=method, kept=kept)

    for kept in quality.KEPT:
        assert of("exact top-k", kept) == [1.0]
        assert max(of("sink + window", kept)) <= 0.5  # the record may lie in the window
        assert len(of("SOCKET 60x8", kept)) == len(of("random", kept)) == 2
    assert min(of("SOCKET 60x8", "1/5")) >= 0.75
    masses = {
        method: quality.by_seed(report["measures"], "mass", method=method, kept="1/10")
        for method in ("exact top-k", "SOCKET 60x8", "random")
    }
    assert masses["exact top-k"][0] > max(masses["SOCKET 60x8"]) > max(masses["random"])
    few, many = (quality.by_seed(report["sweep"], "recall", parameter="tables", value=value) for value in (2, 60))
    assert max(few) < min(many)

    # Through the operator on a paged cache come the very answers of the reference semantics.
    assert {(row["kept"], row["selection"]) for row in report["library"]} == {
        (kept, selection) for kept in quality.LIBRARY_KEPT for selection in ("query_head", "kv_head")
    }
    assert all(row["same"] == 1 and row["accuracy"] == row["reference"] for row in report["library"])
    assert quality.agreement(report) == 1

    about = {"command": "this", "machine": "a CPU", "torch": torch.__version__, **vars(arguments)}
    whole = {"about": about, "training": TRAINING, **report}
    text = quality.markdown(whole)
    assert "| exact top-k | 100.0 | 100.0 | 100.0 | 100.0 | 100.0 |" in text
    assert "Left out" in text
    assert "the reference operator" in text
    quality.write(whole, tmp_path / "quality")
    quality.draw(whole, tmp_path / "quality")
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "quality.json").read_text()) == json.loads(json.dumps(whole))

    # A run that is out of time at once says so, and can still be written.
    arguments.time_limit = 0
    comparison = quality.Comparison(model, Vocabulary(**TRAINING["vocabulary"]), arguments)
    report = comparison.run(lambda: None)
    assert report["cut_short"]
    assert "cut short" in quality.markdown({"about": about, "training": TRAINING, **report})
