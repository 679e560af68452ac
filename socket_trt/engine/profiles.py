"""Optimisation profiles of an engine: the ranges of every dynamic size, for decode steps and for prefill steps."""

from __future__ import annotations

import dataclasses

from socket_trt import names
from socket_trt.engine.manifest import Manifest, TensorRecord
from socket_trt.errors import ConfigError

# TensorRT 8.6 counts a tensor's elements in int32.
MAX_ELEMENTS = 2**31 - 1
DEFAULT_MAX_STEP_TOKENS = 2048

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Range:
    """Least and greatest value of a size, and the one the builder tunes for."""

    minimum: int
    optimum: int
    maximum: int


@dataclasses.dataclass(frozen=True)
class Profile:
    """One optimisation profile.  A decode profile's steps have one token a row: tokens and sequences are equal."""

    name: str
    tokens: Range
    sequences: Range
    pages_per_sequence: Range
    pages: Range

    def shapes(self, record: TensorRecord) -> tuple[Shape, Shape, Shape]:
        """Least, best and greatest shape of a graph's input."""
        sizes = {
            names.DIM_TOKENS: self.tokens,
            names.DIM_SEQUENCES: self.sequences,
            names.DIM_BOUNDARIES: Range(*(size + 1 for size in dataclasses.astuple(self.sequences))),
            names.DIM_PAGES_PER_SEQUENCE: self.pages_per_sequence,
            names.DIM_PAGES: self.pages,
        }
        ranges = [Range(dim, dim, dim) if isinstance(dim, int) else sizes[dim] for dim in record.shape]
        least, best, greatest = zip(*(dataclasses.astuple(size) for size in ranges), strict=True)
        return least, best, greatest


def engine_profiles(manifest: Manifest, max_step_tokens: int, max_pages: int) -> list[Profile]:
    """Decode for one sequence, decode for several (where the engine takes several), then prefill, in this order."""
    limits = manifest.limits()
    batch = limits.max_batch_size
    width = limits.pages_per_sequence
    common = {
        "pages_per_sequence": Range(1, width, width),
        # Only the plugin sees the pool, and its speed does not depend on it: the builder need not allocate it whole.
        "pages": Range(2, min(max_pages, 64), max_pages),
    }
    one = Range(1, 1, 1)
    profiles = [Profile("decode 1", one, one, **common)]
    if batch > 1:
        rows = Range(2, batch, batch)
        profiles.append(Profile(f"decode 2 to {batch}", rows, rows, **common))
    tokens = Range(1, max_step_tokens, max_step_tokens)
    profiles.append(Profile("prefill", tokens, Range(1, 1, batch), **common))
    return profiles


def check_max_step_tokens(max_step_tokens: int, max_batch_size: int) -> None:
    """Raise ConfigError where a step could not hold a token of every row and a chunk of a prompt besides."""
    if max_step_tokens < max_batch_size + 2:
        raise ConfigError(
            f"--max-step-tokens {max_step_tokens}: {max_batch_size} sequences need at least {max_batch_size + 2}"
        )


def pool_pages(manifest: Manifest) -> int:
    """Pages of the largest pool an engine takes: a full batch of full sequences, as far as a tensor may have elements.

    Raises ConfigError where not even one full sequence fits.
    """
    wanted = manifest.limits().num_pages
    page = manifest.model.kv_heads * manifest.socket.page_size * manifest.model.head_size
    most = min(wanted, MAX_ELEMENTS // page)
    if most < 1 + manifest.limits().pages_per_sequence:
        raise ConfigError(
            f"a sequence of {manifest.max_seq_len} tokens has more than 2^31 elements a layer, more than TensorRT takes: "
            "lower --max-seq-len"
        )
    return most
