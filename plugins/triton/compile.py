"""Compile the Triton kernels ahead of time and write the C++ file that embeds them.

    python -m plugins.triton.compile --architectures 80 90 --output build/kernels

Needs no GPU.  Writes one binary for each kernel variant, dtype, head size and architecture, one PTX file each for
devices newer than all of them, and embedded_kernels.cpp with the table that launch.cpp searches.  Binaries whose
sources, compiler and options have not changed come from Triton's cache.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")  # a third of a binary

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from plugins.triton import KERNELS
from plugins.triton.common import Variant

DTYPES = {"fp16": 0, "bf16": 1}  # SocketTrtDtype
HEAD_SIZES = (64, 96, 128, 256)
PTX_ARCHITECTURE = 80  # its PTX uses nothing that a later GPU could lack

# Shared memory that a block can have, in bytes.
SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


@dataclasses.dataclass(frozen=True)
class Job:
    kernel: int  # in KERNELS
    variant: str
    dtype: str
    head_size: int
    architecture: int

    @property
    def name(self) -> str:
        return f"{self.variant}_{self.dtype}_d{self.head_size}_sm{self.architecture}"


@dataclasses.dataclass(frozen=True)
class Binary:
    """One entry of the launch table."""

    job: Job
    path: Path
    symbol: str
    threads: int
    shared_memory: int
    is_ptx: bool = False


def find_variant(job: Job) -> Variant:
    variants = KERNELS[job.kernel].variants(job.architecture, job.head_size)
    return next(v for v in variants if v.name == job.variant)


def compile_job(job: Job, output: Path) -> list[Binary]:
    """Compile with the first configuration that fits the architecture's shared memory."""
    kernel = KERNELS[job.kernel]
    names = kernel.function.arg_names
    target = GPUTarget("cuda", job.architecture, 32)
    for config in find_variant(job).configs:
        signature = {name: kernel.signature.get(name, "constexpr").replace("*T", f"*{job.dtype}") for name in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
        source = ASTSource(kernel.function, signature, config.constants, aligned)
        options = {"num_warps": config.warps, "num_stages": config.stages}
        try:
            compiled = triton.compile(source, target=target, options=options)
        except triton.runtime.errors.OutOfResources:
            continue
        if compiled.metadata.shared > SHARED_MEMORY[job.architecture]:
            continue
        path = output / f"{job.name}.cubin"
        path.write_bytes(compiled.asm["cubin"])
        made = Binary(job, path, compiled.metadata.name, config.warps * 32, compiled.metadata.shared)
        if job.architecture != PTX_ARCHITECTURE:
            return [made]
        ptx = path.with_suffix(".ptx")
        ptx.write_bytes(compiled.asm["ptx"].encode() + b"\0")
        return [made, dataclasses.replace(made, path=ptx, is_ptx=True)]
    raise RuntimeError(f"{job.name}: no configuration fits {SHARED_MEMORY[job.architecture]} bytes of shared memory")


def write_table(binaries: list[Binary], path: Path) -> None:
    """The C++ file: every binary as bytes (.incbin), and the table."""
    lines = ["// Written by plugins/triton/compile.py.", '#include "launch.h"', "", 'extern "C" {']
    for i, binary in enumerate(binaries):
        lines += [
            f'asm(".section .rodata, \\"a\\", @progbits\\n.balign 16\\nsocket_trt_kernel_{i}:\\n'
            f'.incbin \\"{binary.path}\\"\\n.previous");',
            f'extern const unsigned char socket_trt_kernel_{i}[] asm("socket_trt_kernel_{i}");',
        ]
    lines += ["}", "", "namespace socket_trt {", "const EmbeddedKernel kEmbeddedKernels[] = {"]
    for i, b in enumerate(binaries):
        architecture = 0 if b.is_ptx else b.job.architecture
        lines.append(
            f'    {{"{b.job.variant}", {architecture}, {DTYPES[b.job.dtype]}, {b.job.head_size}, "{b.symbol}", '
            f"{b.threads}, {b.shared_memory}, socket_trt_kernel_{i}}},"
        )
    lines += ["};", f"const int kEmbeddedKernelCount = {len(binaries)};", "}  // namespace socket_trt", ""]
    path.write_text("\n".join(lines))  # also where it reads the same: the binaries it includes may have changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, nargs="+", required=True, choices=sorted(SHARED_MEMORY))
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    output: Path = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    architectures = sorted({PTX_ARCHITECTURE, *arguments.architectures})
    jobs = [
        Job(index, variant.name, dtype, head_size, architecture)
        for architecture in architectures
        for index, kernel in enumerate(KERNELS)
        for head_size in HEAD_SIZES
        for variant in kernel.variants(architecture, head_size)
        for dtype in DTYPES
    ]
    with concurrent.futures.ProcessPoolExecutor() as pool:
        made = pool.map(compile_job, jobs, [output] * len(jobs))
        binaries = [binary for job in made for binary in job]
    write_table(binaries, output / "embedded_kernels.cpp")


if __name__ == "__main__":
    main()
