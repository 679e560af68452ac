"""What the native operator is held to: its caches, its selections and its output, against the reference in float64."""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from socket_trt.config import Selection, SocketConfig, attended_budget, code_bits
from socket_trt.native import SelectionView, load_library, native_attention, params_of
from socket_trt.planes import draw_planes
from socket_trt.reference import attend, collision_scores, decode_set, gather_sequence, socket_attention, unpack_codes
from socket_trt.reference.operator import Sequence, append
from socket_trt.reference.selection import visible
from tests.steps import Row, Step

# Scores are sums of L look-ups of 8-bit (up to 8 planes) or float16 entries, kept as 11 significant bits: two tokens
# whose exact scores differ by less than this fraction may be chosen in either order.
SCORE_MARGIN = 0.02


@dataclasses.dataclass
class Errors:
    """The worst of one step, or of many."""

    output: float = 0.0  # ||native - exact|| / ||exact||
    same_dtype: float = 0.0  # the same of PyTorch in the tensors' dtype
    ratio: float = 0.0  # of the two
    code_flips: float = 0.0  # share of bits that differ, away from zero
    missed: float = 0.0  # share of the exact choice that was not chosen
    margin: float = 0.0  # how far below the exact threshold a chosen token's score lies, as a share of it
    checks: int = 0

    def join(self, other: Errors) -> None:
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            setattr(self, field.name, mine + theirs if field.name == "checks" else max(mine, theirs))


def on_gpu(step: Step) -> Step:
    tensors = {f.name: getattr(step, f.name).cuda() for f in dataclasses.fields(step) if f.name != "attributes"}
    return step.replace(**tensors)


def long_step(
    rows: list[Row],
    config: SocketConfig,
    *,
    query_heads: int,
    kv_heads: int,
    head_size: int,
    dtype: torch.dtype,
    seed: int,
    sliding_window: int = -1,
) -> Step:
    """`random_step` for long sequences: made on the GPU, and filled without attending."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    past, counts = [p for p, _ in rows], [n for _, n in rows]
    used = [-(-(p + n) // config.page_size) for p, n in rows]
    order = torch.randperm(sum(used), generator=generator, device="cuda").to(torch.int32) + 1
    page_table = torch.zeros(len(rows), max(used) + 1, dtype=torch.int32, device="cuda")
    for row, pages in enumerate(order.split(used)):
        page_table[row, : pages.numel()] = pages
    pages = sum(used) + 1
    planes = torch.from_numpy(draw_planes(config.tables, config.planes, head_size, config.seed)).to("cuda", dtype)
    words = (pages, kv_heads, config.tables, config.code_words)
    spread = torch.rand(1, kv_heads, sum(past), 1, generator=generator, device="cuda").to(dtype) * 2
    caches = append(
        normal(1, kv_heads, sum(past), head_size),
        normal(1, kv_heads, sum(past), head_size) * spread,
        normal(pages, kv_heads, config.page_size, head_size),
        normal(pages, kv_heads, config.page_size, head_size),
        torch.zeros(words, dtype=torch.int32, device="cuda"),
        normal(pages, kv_heads, config.page_size).abs(),
        page_table,
        [0] * len(rows),
        [0, *itertools.accumulate(past)],
        planes.float(),
    )
    tokens = sum(counts)
    return Step(
        normal(1, query_heads, tokens, head_size) * 1.5,
        normal(1, kv_heads, tokens, head_size),
        normal(1, kv_heads, tokens, head_size),
        *caches,
        page_table,
        torch.tensor(past, dtype=torch.int32, device="cuda"),
        torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device="cuda"),
        planes,
        config.attributes(head_size**-0.5, sliding_window),
    )


@dataclasses.dataclass
class Call:
    """One call of the native operator, with the workspace it left."""

    output: Tensor
    caches: tuple[Tensor, Tensor, Tensor, Tensor]
    slots: dict[int, list[Tensor]]  # by item: cache slots each selecting head attended to
    items_are_tokens: bool


def run(step: Step, in_place: bool = False, calls: tuple[int, ...] = (0,)) -> Call:
    """Run with a poisoned output and workspace; in several calls, each of some stages, where `calls` says so."""
    library = load_library()
    params = params_of(step.query, step.key_cache, step.page_table, step.planes, step.attributes)
    workspace = torch.full((library.workspace_bytes(params),), 0xA5, dtype=torch.uint8, device="cuda")
    output = torch.full_like(step.query, float("nan"))
    for stages in calls:
        results = native_attention(
            *step.inputs, step.attributes, in_place=in_place, output=output, workspace=workspace, stages=stages
        )
    torch.cuda.synchronize()
    slots = slots_in(workspace, library.selection_view(params))
    return Call(output, results[1:], slots, step.query.shape[2] <= step.page_table.shape[0])


def slots_in(workspace: Tensor, view: SelectionView) -> dict[int, list[Tensor]]:
    """`Call.slots` from the bytes of the workspace that a call has left."""
    slots = {}
    if view.heads:
        shape = (view.items, view.heads)
        counts = workspace[view.counts_offset :][: 4 * view.items * view.heads].view(torch.int32).view(*shape)
        lists = workspace[view.slots_offset :][: 4 * view.items * view.heads * view.list_stride].view(torch.int32)
        lists = lists.view(*shape, view.list_stride)
        for item in range(view.items):
            slots[item] = [lists[item, head, : max(0, int(counts[item, head]))] for head in range(view.heads)]
    return slots


def positions_of(slots: Tensor, pages: Tensor, page_size: int) -> Tensor:
    """Positions in the sequence of cache slots; -1 for one that the sequence does not own."""
    page, place = slots // page_size, slots % page_size
    match = page[:, None] == pages[None, :]
    index = torch.where(match.any(1), match.int().argmax(1), -1)
    return torch.where(index >= 0, index * page_size + place, -1)


def relative(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def check_caches(step: Step, call: Call) -> Errors:
    """Keys and values exact, norms within rounding, code bits but for projections near zero; the rest untouched."""
    errors = Errors(checks=1)
    exact = socket_attention(*step.inputs, step.attributes, torch.float64)
    key_cache, value_cache, code_cache, norm_cache = call.caches
    assert torch.equal(key_cache.view(torch.int16), exact.key_cache.view(torch.int16)), "key cache differs"
    assert torch.equal(value_cache.view(torch.int16), exact.value_cache.view(torch.int16)), "value cache differs"
    torch.testing.assert_close(norm_cache, exact.norm_cache, rtol=2**-7, atol=1e-6)
    bits = code_bits(step.planes.shape[1])
    differing = unpack_codes(code_cache, bits) ^ unpack_codes(exact.code_cache, bits)
    flips = sum(int(((differing >> b) & 1).sum()) for b in range(step.planes.shape[1]))
    written = max(1, step.key.shape[1] * step.key.shape[2] * step.planes.shape[0] * step.planes.shape[1])
    errors.code_flips = flips / written
    assert errors.code_flips < 1e-3, f"{flips} of {written} code bits differ"
    assert int((differing >> step.planes.shape[1]).sum()) == 0, "bits above the planes differ"
    return errors


def check(step: Step, call: Call | None = None) -> Errors:
    """Run the step and compare everything; returns the errors, raises AssertionError where one is too large."""
    call = call or run(step)
    errors = check_caches(step, call)
    attributes, planes = step.attributes, step.planes
    past, start = step.past_length.tolist(), step.query_start.tolist()
    wide = planes.double()
    assert not torch.isnan(call.output[:, :, : start[-1]]).any(), "output not written, or NaN"
    assert (call.output[:, :, start[-1] :] == 0).all(), "padding is not zero"
    exact_outputs, same_outputs, outputs = [], [], []
    for row, (first, last) in enumerate(itertools.pairwise(start)):
        count = last - first
        if count == 0:
            continue
        length = past[row] + count
        sequence = gather_sequence(*call.caches, step.page_table[row], length, code_bits(planes.shape[1]))
        query = step.query[0, :, first:last]
        if count > 1 or length <= attributes.min_length:
            mask = visible(past[row], count, attributes.sliding_window, query.device).expand(query.shape[0], -1, -1)
        else:
            item = first if call.items_are_tokens else row
            mask = check_selection(step, call.slots[item], row, query, sequence, wide, length, errors)
        arguments = (attributes.scale, attributes.softcap)
        exact_outputs.append(attend(query.double(), sequence.keys.double(), sequence.values.double(), mask, *arguments))
        same_outputs.append(attend(query, sequence.keys, sequence.values, mask, *arguments))
        outputs.append(call.output[0, :, first:last])
    if exact_outputs:
        exact = torch.cat([x.flatten() for x in exact_outputs])
        errors.output = relative(torch.cat([x.flatten() for x in outputs]), exact)
        errors.same_dtype = relative(torch.cat([x.flatten() for x in same_outputs]), exact)
        errors.ratio = errors.output / errors.same_dtype if errors.same_dtype else 0.0  # one token: both are exact
        assert errors.output <= 2 * errors.same_dtype, f"error {errors.output:.2e}, PyTorch's {errors.same_dtype:.2e}"
        for actual, exact_row in zip(outputs, exact_outputs, strict=True):
            worst = float((actual.double() - exact_row).abs().max() / exact_row.abs().max())
            assert worst < 0.05, f"a row's worst element is off by {worst:.3f}"
    return errors


def check_selection(
    step: Step,
    slots: list[Tensor],
    row: int,
    query: Tensor,
    sequence: Sequence,
    planes: Tensor,
    length: int,
    errors: Errors,
) -> Tensor:
    """The attended set as a mask [Hq, 1, T]: exactly as many tokens as the rule says, none worse than the margin."""
    attributes = step.attributes
    group = query.shape[0] // sequence.keys.shape[0]
    scores = collision_scores(
        query[:, 0].double(),
        sequence.codes,
        sequence.norms.double(),
        planes,
        attributes.temperature,
        attributes.selection,
    )
    expected = decode_set(scores, attributes)
    position = torch.arange(length, device=query.device)
    seen = visible(length - 1, 1, attributes.sliding_window, query.device)[0]
    fixed = seen & ((position < attributes.sink) | (position >= length - attributes.window))
    mask = torch.zeros_like(expected)
    budget = attended_budget(length, attributes.budget_tokens, attributes.budget_permille)
    for head in range(query.shape[0]):
        selecting = head // group if attributes.selection == Selection.kv_head else head
        chosen = positions_of(slots[selecting], step.page_table[row], attributes.page_size)
        assert int(chosen.min()) >= 0, "a slot outside the sequence"
        mask[head, chosen] = True
        assert int(mask[head].sum()) == chosen.numel(), "a token listed twice"
        assert chosen.numel() == int(expected[head].sum()), f"{chosen.numel()} tokens, not {int(expected[head].sum())}"
        assert bool(mask[head][fixed].all()), "a token of sink or window is missing"
        wrong = mask[head] & ~expected[head]
        if bool(wrong.any()):
            threshold = float(scores[head][expected[head] & ~fixed].min())
            errors.missed = max(errors.missed, int(wrong.sum()) / budget)
            errors.margin = max(errors.margin, 1 - float(scores[head][wrong].min()) / threshold)
            assert errors.margin < SCORE_MARGIN, f"a chosen token's score is {errors.margin:.3f} below the threshold"
    return mask[:, None]
