"""Codes, packing and bucket probabilities of the reference."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from socket_trt.planes import draw_planes
from socket_trt.reference import bucket_probabilities, key_codes, pack_codes, unpack_codes


def softmax_over_corners(query: torch.Tensor, planes: torch.Tensor, temperature: float) -> torch.Tensor:
    """The paper's definition, written out: softmax over all 2^R corners of s . tanh(W q) / (sqrt(D) tau)."""
    rank = planes.shape[1]
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=rank)), dtype=query.dtype)  # first plane slowest
    u = torch.tanh(torch.einsum("...d,lrd->...lr", query, planes)) / math.sqrt(query.shape[-1])
    return ((u @ corners.T) / temperature).softmax(-1)


@pytest.mark.parametrize("rank", [1, 4, 8, 10, 12])
@pytest.mark.parametrize("temperature", [0.05, 0.3, 2.0])
def test_factored_probability_is_the_softmax_over_corners(rank: int, temperature: float) -> None:
    planes = torch.from_numpy(draw_planes(5, rank, 16, seed=3)).double()
    query = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    factored = bucket_probabilities(query, planes, temperature)
    assert factored.shape == (3, 5, 2**rank)
    torch.testing.assert_close(factored, softmax_over_corners(query, planes, temperature), atol=1e-14, rtol=1e-12)
    torch.testing.assert_close(factored.sum(-1), torch.ones(3, 5, dtype=torch.float64))


def test_first_plane_is_the_most_significant_bit() -> None:
    planes = torch.eye(3, 4)[None]  # one table, plane r looks at component r
    keys = torch.tensor(
        [[1.0, -1.0, -1.0, 0.0], [-1.0, -1.0, 1.0, 0.0], [0.0, -1.0, 0.0, 0.0], [-1.0, -1.0, -1.0, 9.0]]
    )
    assert key_codes(keys, planes).squeeze(-1).tolist() == [0b100, 0b001, 0b101, 0b000]  # zero counts as positive


def test_a_key_equal_to_the_query_falls_into_the_likeliest_bucket() -> None:
    planes = torch.from_numpy(draw_planes(20, 8, 32, seed=1)).double()
    query = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = bucket_probabilities(query, planes, 0.3)
    assert torch.equal(table.argmax(-1), key_codes(query, planes))


@pytest.mark.parametrize(("bits", "page_size"), [(8, 4), (8, 128), (16, 16), (16, 256)])
def test_packing_is_little_endian_and_reversible(bits: int, page_size: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 2, 5, page_size), generator=torch.Generator().manual_seed(bits))
    words = pack_codes(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (3, 2, 5, page_size * bits // 32)
    assert torch.equal(unpack_codes(words, bits), codes)
    as_stored = words.numpy().view("<u1" if bits == 8 else "<u2")
    assert (as_stored == codes.numpy()).all()


def test_planes_depend_on_the_seed_alone() -> None:
    assert (draw_planes(4, 8, 16, 5) == draw_planes(4, 8, 16, 5)).all()
    assert (draw_planes(4, 8, 16, 5) != draw_planes(4, 8, 16, 6)).any()
    # Recorded engines must find the same planes again, on any machine and NumPy.
    expected = [-1.5658321, 0.0671223, 0.0532691]
    assert draw_planes(1, 1, 3, 2026)[0, 0].tolist() == pytest.approx(expected, abs=1e-6)
