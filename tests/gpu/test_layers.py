"""The kernels for what lies around attention, against float64, alone and one behind another in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from socket_trt.native import call_layer as call
from socket_trt.native import prepare_layers

_SHAPES = [(6144, 4096), (4096, 14336), (1000, 328), (3, 8), (8, 2048), (129, 2056), (20, 896)]


def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).half()


def poisoned(*shape: int) -> torch.Tensor:
    return torch.full(shape, torch.nan, device="cuda", dtype=torch.float16)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, plus_one: bool = False) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + epsilon).sqrt() * (weight.double() + plus_one)


def rotate(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


@pytest.fixture(autouse=True)
def prepared() -> None:
    torch.manual_seed(0)
    prepare_layers()


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(("rows", "columns"), _SHAPES)
def test_product(tokens: int, rows: int, columns: int) -> None:
    x, weight, output = random(tokens, columns), random(rows, columns), poisoned(tokens, rows)
    assert call("SocketTrtProduct", x, weight, output, tokens, rows, columns) == 0
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(output.double(), expected, rtol=1e-3, atol=1e-3 * columns**0.5)


def test_a_product_writes_nothing_else() -> None:
    output = poisoned(3 * 1000)
    assert call("SocketTrtProduct", random(1, 64), random(1000, 64), output[1000:2000], 1, 1000, 64) == 0
    assert output[:1000].isnan().all()
    assert output[2000:].isnan().all()
    assert not output[1000:2000].isnan().any()


@pytest.mark.parametrize("plus_one", [0, 1])
@pytest.mark.parametrize("tokens", [1, 2, 37])
@pytest.mark.parametrize("columns", [8, 256, 264, 4096, 8200, 16384])
def test_norm(tokens: int, columns: int, plus_one: int) -> None:
    residual, branch, weight = random(tokens, columns, scale=3), random(tokens, columns), random(columns)
    total, normed, alone = poisoned(tokens, columns), poisoned(tokens, columns), poisoned(tokens, columns)
    status = call("SocketTrtAddRmsNorm", residual, branch, weight, total, normed, tokens, columns, 1e-5, plus_one)
    assert status == 0
    assert torch.equal(total, residual + branch)
    expected = rms_norm(total, weight, 1e-5, bool(plus_one))
    torch.testing.assert_close(normed.double(), expected, rtol=2e-3, atol=1e-4)
    assert call("SocketTrtRmsNorm", total, weight, alone, tokens, columns, 1e-5, plus_one) == 0
    assert torch.equal(alone, normed)


@pytest.mark.parametrize("tokens", [1, 2, 37])
@pytest.mark.parametrize(("query_heads", "kv_heads", "size"), [(32, 8, 128), (4, 4, 64), (7, 1, 16), (3, 2, 96)])
def test_rotary(tokens: int, query_heads: int, kv_heads: int, size: int) -> None:
    heads = query_heads + 2 * kv_heads
    joint = random(tokens, heads * size)
    angle = torch.rand(tokens, size // 2, device="cuda") * 6.28
    cosines, sines = (torch.cat((f(angle), f(angle)), -1).half() for f in (torch.cos, torch.sin))
    outputs = [poisoned(count, tokens, size) for count in (query_heads, kv_heads, kv_heads)]
    status = call("SocketTrtSplitRotary", joint, cosines, sines, *outputs, tokens, query_heads, kv_heads, size)
    assert status == 0
    parts = joint.view(tokens, heads, size).transpose(0, 1).split([query_heads, kv_heads, kv_heads])
    for found, x in zip(outputs[:2], parts[:2], strict=True):
        wide = x.double()
        expected = wide * cosines.double() + rotate(wide) * sines.double()
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)
    assert torch.equal(outputs[2], parts[2])


@pytest.mark.parametrize("tokens", [1, 2, 37])
@pytest.mark.parametrize("columns", [8, 320, 14336])
def test_gate(tokens: int, columns: int) -> None:
    joint, output = random(tokens, 2 * columns, scale=4), poisoned(tokens, columns)
    joint[0, 0], joint[0, 1] = -60000, 60000
    joint[0, columns + 1] = 1
    assert call("SocketTrtSwiGlu", joint, output, tokens, columns) == 0
    gate, up = joint.double().chunk(2, -1)
    torch.testing.assert_close(output.double(), gate * torch.sigmoid(gate) * up, rtol=3e-3, atol=1e-4)


@pytest.mark.parametrize(
    "refused",
    [
        lambda x: call("SocketTrtProduct", x, x, x, 3, 8, 8),
        lambda x: call("SocketTrtProduct", x, x, x, 0, 8, 8),
        lambda x: call("SocketTrtProduct", x, x, x, 1, 8, 12),
        lambda x: call("SocketTrtAddRmsNorm", x, x, x, x, x, 1, 12, 1e-5, 0),
        lambda x: call("SocketTrtAddRmsNorm", x, x, x, x, x, 1, 16392, 1e-5, 0),
        lambda x: call("SocketTrtRmsNorm", x, x, x, 0, 16, 1e-5, 0),
        lambda x: call("SocketTrtSplitRotary", x, x, x, x, x, x, 1, 1, 1, 24),
        lambda x: call("SocketTrtSplitRotary", x, x, x, x, x, x, 1, 1, 0, 16),
        lambda x: call("SocketTrtSwiGlu", x, x, 1, 12),
    ],
)
def test_sizes_that_no_kernel_takes(refused: Callable[[torch.Tensor], int]) -> None:
    assert refused(random(1 << 16)) == 1  # cudaErrorInvalidValue


@pytest.mark.parametrize("tokens", [1, 2])
def test_overlapping_kernels_of_a_graph(tokens: int) -> None:
    """Four decoder layers without attention, replayed with other inputs: what follows waits for what comes before."""
    hidden, inner, heads, kv_heads, size, layers = 1024, 3072, 8, 2, 128, 4
    wide = (heads + 2 * kv_heads) * size
    shapes = {"norm": (hidden,), "qkv": (wide, hidden), "o": (hidden, heads * size), "norm_2": (hidden,)}
    shapes |= {"gate_up": (2 * inner, hidden), "down": (hidden, inner)}
    weights = [
        {n: random(*s, scale=s[-1] ** -0.5 if len(s) > 1 else 1) for n, s in shapes.items()} for _ in range(layers)
    ]
    x, branch = random(tokens, hidden), random(tokens, hidden)
    angle = torch.rand(tokens, size // 2, device="cuda") * 6.28
    cosines, sines = (torch.cat((f(angle), f(angle)), -1).half() for f in (torch.cos, torch.sin))
    buffers = {
        "sum": poisoned(tokens, hidden), "sum_2": poisoned(tokens, hidden), "normed": poisoned(tokens, hidden),
        "joint": poisoned(tokens, 2 * inner), "query": poisoned(heads, tokens, size), "key": poisoned(kv_heads, tokens, size),
        "value": poisoned(kv_heads, tokens, size), "inner": poisoned(tokens, inner), "branch": poisoned(tokens, hidden),
    }  # fmt: skip

    def enqueue() -> None:
        b, residual, added = buffers, x, branch
        for w in weights:
            calls = [
                call("SocketTrtAddRmsNorm", residual, added, w["norm"], b["sum"], b["normed"], tokens, hidden, 1e-5, 0),
                call("SocketTrtProduct", b["normed"], w["qkv"], b["joint"], tokens, wide, hidden),
                call(
                    "SocketTrtSplitRotary", b["joint"], cosines, sines, b["query"], b["key"], b["value"],
                    tokens, heads, kv_heads, size,
                ),
                call("SocketTrtProduct", b["query"], w["o"], b["branch"], tokens, hidden, heads * size),
                call(
                    "SocketTrtAddRmsNorm", b["sum"], b["branch"], w["norm_2"], b["sum_2"], b["normed"], tokens, hidden,
                    1e-5, 0,
                ),
                call("SocketTrtProduct", b["normed"], w["gate_up"], b["joint"], tokens, 2 * inner, hidden),
                call("SocketTrtSwiGlu", b["joint"], b["inner"], tokens, inner),
                call("SocketTrtProduct", b["inner"], w["down"], b["branch"], tokens, hidden, inner),
            ]  # fmt: skip
            assert calls == [0] * len(calls)
            residual, added = b["sum_2"], b["branch"]

    def expected() -> torch.Tensor:
        residual, added = x, branch
        for w in weights:
            total = residual + added
            joint = rms_norm(total, w["norm"], 1e-5).half() @ w["qkv"].T
            query = joint[:, : heads * size].view(tokens, heads, size).transpose(0, 1)
            query = query * cosines + rotate(query) * sines
            added = query.reshape(tokens, heads * size) @ w["o"].T  # as the kernels see it: heads first
            residual = total + added
            gate, up = (rms_norm(residual, w["norm_2"], 1e-5).half() @ w["gate_up"].T).chunk(2, -1)
            added = (torch.nn.functional.silu(gate) * up) @ w["down"].T
        return added

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        enqueue()
    for _ in range(20):
        x.copy_(random(tokens, hidden))
        branch.copy_(random(tokens, hidden))
        for buffer in buffers.values():
            buffer.fill_(torch.nan)
        graph.replay()
        torch.testing.assert_close(buffers["branch"].float(), expected().float(), rtol=3e-2, atol=3e-2)
