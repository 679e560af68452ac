"""Names of the files that benchmarks write."""

from __future__ import annotations

import re


def gpu_slug(gpu: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "h100": the GPU's name without maker and memory."""
    words = re.sub(r"\bNVIDIA\b|\b\d+GB\b|\bHBM\w*", " ", gpu).split()
    return "-".join(words).lower()
