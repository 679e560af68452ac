"""Fits the cost model of `socket_trt.cost` to a run of `benchmarks/attention.py`.

    python -m benchmarks.fit_cost_model benchmarks/results/attention-h100.json socket_trt/cost_models/h100.json

Least squares of the relative error.  Prints the error of every row, and the largest.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from socket_trt.config import Selection, SocketConfig
from socket_trt.cost import CostModel, Shape, dense_bytes, socket_bytes

SHAPE = Shape(query_heads=32, kv_heads=8, head_size=128)  # of benchmarks/attention.py
TABLES, SINK, WINDOW = 60, 128, 128

Row = dict[str, Any]


def row_config(row: Row) -> SocketConfig:
    """The configuration that a row was measured with; `kept_tokens` counts sink and window."""
    return SocketConfig(
        tables=TABLES,
        planes=row["planes"],
        sink=SINK,
        window=WINDOW,
        budget_tokens=row["kept_tokens"] - SINK - WINDOW,
        budget_permille=0,
        selection=Selection[row["selection"]],
        min_length=0,
    )


def fit(measured: dict[str, Any], source: str) -> CostModel:
    rows: Sequence[Row] = measured["rows"]
    read = [socket_bytes(SHAPE, row_config(row), row["batch"], row["length"]) for row in rows]
    fixed, code, attended = _relative([(1.0, *map(float, pair)) for pair in read], [row["socket_us"] for row in rows])
    whole = [(1.0, float(dense_bytes(SHAPE, row["batch"], row["length"]))) for row in rows]
    dense_fixed, dense = _relative(whole, [row["dense_us"] for row in rows])
    return CostModel(
        gpu=measured["gpu"],
        source=source,
        socket_fixed_us=round(fixed, 3),
        code_bytes_per_us=round(1 / code),
        attended_bytes_per_us=round(1 / attended),
        dense_fixed_us=round(dense_fixed, 3),
        dense_bytes_per_us=round(1 / dense),
    )


def errors(model: CostModel, measured: dict[str, Any]) -> list[tuple[Row, float, float]]:
    """Of each row: predicted over measured, less one, of SOCKET and of dense attention."""
    return [
        (
            row,
            model.socket_us(SHAPE, row_config(row), row["batch"], row["length"]) / row["socket_us"] - 1,
            model.dense_us(SHAPE, row["batch"], row["length"]) / row["dense_us"] - 1,
        )
        for row in measured["rows"]
    ]


def _relative(features: Sequence[Sequence[float]], times: Sequence[float]) -> list[float]:
    """Coefficients that bring features . coefficients nearest to the times, relative to each."""
    scaled = np.array(features) / np.array(times)[:, None]
    unit = np.abs(scaled).max(0)
    found = np.linalg.lstsq(scaled / unit, np.ones(len(times)), rcond=None)[0] / unit
    if (found <= 0).any():
        raise SystemExit(f"these measurements do not fit the model: its constants would be {found.tolist()}")
    return [float(x) for x in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measured", type=Path, help="written by benchmarks/attention.py")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    measured = json.loads(arguments.measured.read_text())
    model = fit(measured, arguments.measured.as_posix())
    for row, socket, dense in errors(model, measured):
        print(f"batch {row['batch']}, {row['length']} tokens, R = {row['planes']}, {row['selection']}: "
              f"SOCKET {socket:+.1%}, dense {dense:+.1%}")  # fmt: skip
    arguments.output.write_text(json.dumps(dataclasses.asdict(model), indent=2) + "\n")
    print(arguments.output.read_text())


if __name__ == "__main__":
    main()
