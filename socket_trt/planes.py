"""The random hyperplanes, drawn once from a seed and shared by all heads and layers (paper, section 3)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def draw_planes(tables: int, planes: int, head_size: int, seed: int) -> npt.NDArray[np.float32]:
    """w[l, r] ~ N(0, I_D): float32 [tables, planes, head_size], the same for the same arguments everywhere."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return generator.standard_normal((tables, planes, head_size), dtype=np.float32)
