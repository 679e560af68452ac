"""Triton kernels of the native library.  A new kernel is a module here and a line in `KERNELS`."""

from .common import Kernel
from .decode_attention import KERNEL as DECODE_ATTENTION
from .prefill_attention import KERNEL as PREFILL_ATTENTION

KERNELS: tuple[Kernel, ...] = (
    DECODE_ATTENTION,
    PREFILL_ATTENTION,
)
