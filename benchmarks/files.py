"""Names of the files that benchmarks write."""

from __future__ import annotations

import re


def gpu_slug(gpu: str) -> str:
    """The GPU's name without maker and memory: "NVIDIA H100 80GB HBM3" -> "h100"."""
    words = re.sub(r"\bNVIDIA\b|\b\d+GB\b|\bHBM\w*", " ", gpu).split()
    return "-".join(words).lower()
