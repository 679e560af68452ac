"""Random steps for the operator: ragged batches over a shuffled page pool, with garbage wherever nothing may be read."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from socket_trt.config import OperatorAttributes, SocketConfig
from socket_trt.planes import draw_planes
from socket_trt.reference import OperatorOutputs, socket_attention

Row = tuple[int, int]  # (past length, tokens in the step)


@dataclasses.dataclass
class Step:
    """One call of the operator: its inputs in order, and its attributes."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_cache: Tensor
    value_cache: Tensor
    code_cache: Tensor
    norm_cache: Tensor
    page_table: Tensor
    past_length: Tensor
    query_start: Tensor
    planes: Tensor
    attributes: OperatorAttributes

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f.name) for f in dataclasses.fields(self)[:-1])

    def reference(self, compute_dtype: torch.dtype = torch.float32) -> OperatorOutputs:
        return socket_attention(*self.inputs, self.attributes, compute_dtype)

    def replace(self, **changes: object) -> Step:
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def with_attributes(self, **changes: object) -> Step:
        return self.replace(attributes=self.attributes.replace(**changes))


def random_step(
    rows: list[Row],
    config: SocketConfig,
    *,
    query_heads: int = 4,
    kv_heads: int = 2,
    head_size: int = 32,
    dtype: torch.dtype = torch.float32,
    padding: int = 0,
    seed: int = 0,
    sliding_window: int = -1,
    softcap: float = 0.0,
) -> Step:
    """A step whose rows have the given past lengths and token counts, with `padding` tokens behind the last row.

    Caches are filled by the reference itself (as prefill would), then everything no row may read is overwritten with
    garbage: other pages, slots past a row's end, page-table entries past its last page, padding tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    rng = np.random.default_rng(seed)
    page_size = config.page_size
    used = [-(-(past + tokens) // page_size) for past, tokens in rows]
    pages = sum(used) + 3
    pool = torch.from_numpy(rng.permutation(np.arange(1, pages))).to(torch.int32)
    width = max([*used, 1]) + 1
    page_table = torch.zeros(len(rows), width, dtype=torch.int32)
    taken = 0
    for row, count in enumerate(used):
        page_table[row, :count] = pool[taken : taken + count]
        taken += count

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    planes = torch.from_numpy(draw_planes(config.tables, config.planes, head_size, config.seed)).to(dtype)
    caches = (
        normal(pages, kv_heads, page_size, head_size) * 100,
        normal(pages, kv_heads, page_size, head_size) * 100,
        torch.randint(
            -(2**31),
            2**31 - 1,
            (pages, kv_heads, config.tables, config.code_words),
            dtype=torch.int32,
            generator=generator,
        ),
        normal(pages, kv_heads, page_size).abs() * 100,
    )
    attributes = config.attributes(head_size**-0.5, sliding_window, softcap)

    def tokens_of(count: int) -> tuple[Tensor, Tensor, Tensor]:
        spread = torch.rand(1, kv_heads, count, 1, generator=generator).to(dtype) * 2  # uneven value norms
        return (
            normal(1, query_heads, count, head_size) * 1.5,
            normal(1, kv_heads, count, head_size),
            normal(1, kv_heads, count, head_size) * spread,
        )

    past = [p for p, _ in rows]
    step = Step(
        *tokens_of(sum(past)),
        *caches,
        page_table,
        torch.zeros(len(rows), dtype=torch.int32),
        torch.tensor([0, *np.cumsum(past)], dtype=torch.int32),
        planes,
        attributes,
    )
    _, *caches_after = step.reference() if sum(past) else (None, *caches)
    counts = [n for _, n in rows]
    query, key, value = tokens_of(sum(counts) + padding)
    if padding:
        query[:, :, -padding:] = float("nan")
    return Step(
        query,
        key,
        value,
        *caches_after,
        page_table,
        torch.tensor(past, dtype=torch.int32),
        torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32),
        planes,
        attributes,
    )


SMALL = SocketConfig(
    tables=12,
    planes=6,
    temperature=0.3,
    sink=4,
    window=5,
    budget_tokens=3,
    budget_permille=50,
    page_size=16,
    seed=7,
    min_length=0,
)

# Prefill, chunked prefill, decode on and around page boundaries and thresholds, an empty row, length one.
RAGGED: list[Row] = [(0, 33), (40, 1), (15, 1), (16, 1), (0, 1), (31, 17), (7, 0), (100, 1), (11, 1), (12, 1), (64, 2)]
