"""The PyTorch custom operator: the reference behind it, and what PyTorch demands of an operator."""

from __future__ import annotations

import torch

import socket_trt.ops  # noqa: F401  (registers the operator)
from tests.steps import RAGGED, SMALL, random_step


def test_the_operator_is_the_reference() -> None:
    step = random_step(RAGGED, SMALL, padding=2)
    found = torch.ops.socket_trt.attention(*step.inputs, *step.attributes.as_dict().values())
    for a, b in zip(found, step.reference(), strict=True):
        assert torch.equal(a, b)


def test_pytorchs_own_checks() -> None:
    """Schema, fake tensors and tracing, by torch.library.opcheck."""
    step = random_step([(20, 3), (40, 1)], SMALL)
    arguments = (*step.inputs, *step.attributes.as_dict().values())
    torch.library.opcheck(torch.ops.socket_trt.attention.default, arguments)
