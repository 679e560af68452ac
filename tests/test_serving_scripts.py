"""The load generator and the soak, at a small size, on the real server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import serving, soak
from tests.engines import tiny_engine
from tests.tritonserver import needs_tritonserver

pytestmark = needs_tritonserver


def test_the_load_generator(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = tiny_engine(attention="dense")
    options = ["--requests", "20", "--rate", "20,inf", "--prompt-tokens", "20-200", "--output-tokens", "10-20"]
    engines = ["--engine", f"socket={tiny_engine()}", "--engine", f"dense={dense}"]
    serving.main([*engines, *options, "--output", str(tmp_path / "result")])
    result = json.loads((tmp_path / "result.json").read_text())
    rows = result["rows"]
    assert [(row["engine"], row["rate"]) for row in rows] == [
        ("socket", 20.0),
        ("socket", "inf"),
        ("dense", 20.0),
        ("dense", "inf"),
    ]
    for row in rows:
        assert row["requests"] == 20
        assert 200 <= row["output_tokens"] <= 400
        assert row["tokens_per_second"] == pytest.approx(row["output_tokens"] / row["seconds"], rel=0.01)
        first = row["time_to_first_token"]
        assert 0 < first["p50"] <= first["p90"] <= first["p99"] <= row["request_seconds"]["p99"]
        assert 0 < row["time_per_output_token"]["p50"] < 1
    # The same requests on either engine; only one leaves tokens out.
    assert [row["output_tokens"] for row in rows[:2]] == [row["output_tokens"] for row in rows[2:]]
    assert all(row["kept_fraction"] < 0.7 for row in rows[:2])
    assert all(row["kept_fraction"] == 1 for row in rows[2:])
    # Arrivals spread over a second cannot be answered in less; all at once can.
    assert rows[0]["seconds"] > 0.5
    text = (tmp_path / "result.md").read_text()
    assert text.count("| socket |") == text.count("| dense |") == 2
    assert "python -m benchmarks.serving --engine socket=" in text
    assert "all at once" in capsys.readouterr().out


def test_a_short_soak(tmp_path: Path) -> None:
    """Too short to see memory grow; long enough for every kind of request many times over."""
    options = ["--minutes", "0.3", "--num-pages", "33", "--allowed-growth", "0.25"]
    assert soak.main(["--engine", str(tiny_engine()), *options, "--output", str(tmp_path / "soak")]) == 0
    result = json.loads((tmp_path / "soak.json").read_text())
    assert result["wrong"] == []
    assert set(result["requests"]) == {
        "good one",
        "cancelled",
        "timed out",
        "bad",
        "bad over http",
        "gone over http",
    }
    assert min(result["requests"].values()) >= 5
    assert result["counters"]["generated_tokens_total"] > 1000
    assert result["counters"]["failed_steps_total"] == 0


def test_growing_memory_is_found() -> None:
    """Of 100 samples the first 40 may settle; then medians of thirds are compared."""
    memory = [(float(i), {"server": 1000 + i, "stubs": max(100, 140 - i)}) for i in range(100)]
    before, after, grown = soak.growth(memory, "server")
    assert (before, after) == (1050, 1090)
    assert grown == pytest.approx(1090 / 1050 - 1)
    assert grown > soak.ALLOWED_GROWTH
    assert soak.growth(memory, "stubs") == (100, 100, 0)
