"""The reference operator: what must hold of any implementation, shown on the specification."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from socket_trt.config import INT32_MAX, Selection, SocketConfig, attended_budget, code_bits
from socket_trt.reference import attended_set, decode_set, gather_sequence, key_codes, unpack_codes
from tests.steps import RAGGED, SMALL, Step, random_step

F64 = torch.float64


def dense_attention(step: Step) -> Tensor:
    """Attention over each row's whole history by PyTorch's own function, from the caches after the step."""
    _, *caches = step.reference(F64)
    a = step.attributes
    output = torch.zeros_like(step.query)
    start, past = step.query_start.tolist(), step.past_length.tolist()
    for row in range(len(past)):
        first, last = start[row], start[row + 1]
        length = past[row] + last - first
        if first == last:
            continue
        cached = gather_sequence(*caches, step.page_table[row], length, code_bits(step.planes.shape[1]))
        group = step.query.shape[1] // step.key.shape[1]
        position = torch.arange(past[row], length)[:, None]
        distance = position - torch.arange(length)
        mask = (distance >= 0) & ((distance < a.sliding_window) | (a.sliding_window < 0))
        keys, values = (x.repeat_interleave(group, 0) for x in (cached.keys, cached.values))
        query = step.query[0, :, first:last]
        if a.softcap:
            scores = a.softcap * torch.tanh(query @ keys.transpose(1, 2) * a.scale / a.softcap)
            attended = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ values
        else:
            attended = torch.nn.functional.scaled_dot_product_attention(query, keys, values, mask, scale=a.scale)
        output[0, :, first:last] = attended
    return output


def row_sets(step: Step, row: int) -> Tensor:
    """Tokens that decode row `row` attends to: bool [Hq, T]."""
    _, *caches = step.reference(F64)
    past, start = int(step.past_length[row]), int(step.query_start[row])
    cached = gather_sequence(*caches, step.page_table[row], past + 1, code_bits(step.planes.shape[1]))
    query = step.query[0, :, start : start + 1].to(F64)
    return attended_set(query, cached.codes, cached.norms.to(F64), step.planes.to(F64), past, step.attributes)[:, 0]


@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 20}, {"softcap": 2.0}, {"sliding_window": 7, "softcap": 1.0}]
)
@pytest.mark.parametrize("selection", list(Selection))
def test_a_full_budget_is_dense_attention(options: dict, selection: Selection) -> None:
    config = SMALL.model_copy(update={"selection": selection}).keeps_everything()
    step = random_step(RAGGED, config, dtype=F64, seed=1, **options)
    torch.testing.assert_close(step.reference(F64).output, dense_attention(step), atol=1e-12, rtol=1e-12)


def test_min_length_takes_the_dense_path() -> None:
    step = random_step(RAGGED, SMALL.attends_densely(), dtype=F64, seed=2)
    torch.testing.assert_close(step.reference(F64).output, dense_attention(step), atol=1e-12, rtol=1e-12)


def test_a_small_budget_is_not_dense_attention() -> None:
    """The tests above would prove nothing if the sparse path were never taken."""
    step = random_step([(100, 1)], SMALL, dtype=F64)
    assert (step.reference(F64).output - dense_attention(step)).abs().max() > 1e-2


@pytest.mark.parametrize("length", [*range(1, 18), 33, 64, 100, 101])
@pytest.mark.parametrize("sliding_window", [-1, 12])
def test_the_attended_set_has_exactly_the_tokens_it_should(length: int, sliding_window: int) -> None:
    step = random_step([(length - 1, 1)], SMALL, seed=length, sliding_window=sliding_window)
    found = row_sets(step, 0)
    seen = set(range(length)) if sliding_window < 0 else set(range(max(0, length - sliding_window), length))
    fixed = seen & (set(range(SMALL.sink)) | set(range(length - SMALL.window, length)))
    budget = attended_budget(length, SMALL.budget_tokens, SMALL.budget_permille)
    expected = len(fixed) + min(budget, len(seen - fixed))
    for head in found:
        tokens = set(head.nonzero().squeeze(-1).tolist())
        assert fixed <= tokens <= seen
        assert len(tokens) == expected  # no token counted twice, none too many


def test_the_best_scores_are_chosen() -> None:
    scores = torch.rand(3, 200, generator=torch.Generator().manual_seed(0))
    attributes = SMALL.attributes(1.0).replace(budget_tokens=11, budget_permille=0)
    found = decode_set(scores, attributes)
    for head in range(3):
        middle = range(SMALL.sink, 200 - SMALL.window)
        best = sorted(middle, key=lambda t: -scores[head, t])[:11]
        chosen = [t for t in middle if found[head, t]]
        assert chosen == sorted(best)


def test_ties_go_to_the_lower_position() -> None:
    scores = torch.ones(2, 50)
    scores[0, 30] = 2.0
    attributes = SMALL.attributes(1.0).replace(budget_tokens=4, budget_permille=0)
    found = decode_set(scores, attributes)
    assert found[0, 4:45].nonzero().squeeze(-1).add(4).tolist() == [4, 5, 6, 30]
    assert found[1, 4:45].nonzero().squeeze(-1).add(4).tolist() == [4, 5, 6, 7]


def test_budget_in_integers() -> None:
    assert attended_budget(1000, 0, 50) == 50
    assert attended_budget(1001, 0, 50) == 51
    assert attended_budget(1000, 64, 50) == 64
    assert attended_budget(2**31 - 1, 0, 1000) == 2**31 - 1
    assert SocketConfig().budget(131072) == 6554


def test_kv_head_selection_is_shared_by_the_group() -> None:
    config = SMALL.model_copy(update={"selection": Selection.kv_head})
    step = random_step([(150, 1)], config, query_heads=6, kv_heads=2)
    found = row_sets(step, 0)
    assert (found[0] == found[1]).all()
    assert (found[0] == found[2]).all()
    assert (found[3] == found[5]).all()
    assert (found[0] != found[3]).any()
    alone = row_sets(step.with_attributes(selection=int(Selection.query_head)), 0)
    assert (alone[0] != alone[1]).any()


def test_pages_and_rows_in_any_order() -> None:
    """Where a sequence's pages lie, and which row it has, changes nothing but where things lie."""
    step = random_step(RAGGED, SMALL, dtype=F64, seed=5)
    expected = step.reference(F64)
    pages = step.key_cache.shape[0]
    order = torch.cat(
        [torch.zeros(1, dtype=torch.long), 1 + torch.randperm(pages - 1, generator=torch.Generator().manual_seed(1))]
    )
    moved = step.replace(
        **{
            name: getattr(step, name)[order.argsort()]
            for name in ("key_cache", "value_cache", "code_cache", "norm_cache")
        },
        page_table=order[step.page_table.long()].to(torch.int32),
    )
    found = moved.reference(F64)
    assert torch.equal(found.output, expected.output)
    assert torch.equal(found.key_cache[order], expected.key_cache)
    assert torch.equal(found.code_cache[order], expected.code_cache)

    rows = torch.randperm(len(RAGGED), generator=torch.Generator().manual_seed(2)).tolist()
    start = step.query_start.tolist()
    tokens = torch.cat([torch.arange(start[row], start[row + 1]) for row in rows])
    counts = torch.tensor([0, *(start[row + 1] - start[row] for row in rows)])
    shuffled = step.replace(
        query=step.query[:, :, tokens],
        key=step.key[:, :, tokens],
        value=step.value[:, :, tokens],
        page_table=step.page_table[rows],
        past_length=step.past_length[rows],
        query_start=counts.cumsum(0).to(torch.int32),
    )
    found = shuffled.reference(F64)
    assert torch.equal(found.output, expected.output[:, :, tokens])
    assert torch.equal(found.code_cache, expected.code_cache)


def test_rows_do_not_see_each_other() -> None:
    step = random_step(RAGGED, SMALL, dtype=F64, seed=6)
    whole = step.reference(F64).output
    for row, (first, last) in enumerate(zip(step.query_start.tolist(), step.query_start.tolist()[1:], strict=False)):
        alone = step.replace(
            query=step.query[:, :, first:last],
            key=step.key[:, :, first:last],
            value=step.value[:, :, first:last],
            page_table=step.page_table[row : row + 1],
            past_length=step.past_length[row : row + 1],
            query_start=torch.tensor([0, last - first], dtype=torch.int32),
        )
        assert torch.equal(alone.reference(F64).output, whole[:, :, first:last])


def test_chunks_of_a_prompt_fill_the_cache_like_the_whole() -> None:
    whole = random_step([(0, 60)], SMALL, dtype=F64, seed=8)
    expected = whole.reference(F64)
    caches = {name: getattr(whole, name) for name in ("key_cache", "value_cache", "code_cache", "norm_cache")}
    outputs = []
    for first, last in ((0, 20), (20, 37), (37, 60)):
        step = whole.replace(
            query=whole.query[:, :, first:last],
            key=whole.key[:, :, first:last],
            value=whole.value[:, :, first:last],
            past_length=torch.tensor([first], dtype=torch.int32),
            query_start=torch.tensor([0, last - first], dtype=torch.int32),
            **caches,
        )
        found = step.reference(F64)
        outputs.append(found.output)
        caches = {name: getattr(found, name) for name in caches}
    torch.testing.assert_close(torch.cat(outputs, 2), expected.output)
    assert torch.equal(caches["code_cache"], expected.code_cache)


def test_rows_of_one_sequence_in_a_step_are_decode_queries_one_after_another() -> None:
    """How preempted sequences are replayed, and drafts verified: k rows, one token each, the same pages."""
    one_by_one = random_step([(90, 1)], SMALL, dtype=F64, seed=9)
    k = 3
    draft = random_step([(90, k)], SMALL, dtype=F64, seed=9)
    together = draft.replace(
        page_table=draft.page_table.expand(k, -1),
        past_length=torch.arange(90, 90 + k, dtype=torch.int32),
        query_start=torch.arange(k + 1, dtype=torch.int32),
    ).reference(F64)
    caches = {name: getattr(draft, name) for name in ("key_cache", "value_cache", "code_cache", "norm_cache")}
    for i in range(k):
        found = one_by_one.replace(
            query=draft.query[:, :, i : i + 1],
            key=draft.key[:, :, i : i + 1],
            value=draft.value[:, :, i : i + 1],
            page_table=draft.page_table,
            past_length=torch.tensor([90 + i], dtype=torch.int32),
            **caches,
        ).reference(F64)
        caches = {name: getattr(found, name) for name in caches}
        torch.testing.assert_close(found.output, together.output[:, :, i : i + 1])
    assert torch.equal(caches["code_cache"], together.code_cache)


def test_the_step_is_appended_where_the_page_table_says() -> None:
    step = random_step([(30, 5), (16, 1)], SMALL, seed=10)
    after = step.reference()
    page, slot = int(step.page_table[0, 2]), 2  # token 34 of row 0: page 2, slot 2
    assert torch.equal(after.key_cache[page, :, slot], step.key[0, :, 4])
    assert torch.equal(after.value_cache[page, :, slot], step.value[0, :, 4])
    torch.testing.assert_close(after.norm_cache[page, :, slot], step.value[0, :, 4].norm(dim=-1))
    codes = unpack_codes(after.code_cache, SMALL.code_bits)[page, :, :, slot]
    assert torch.equal(codes, key_codes(step.key[0, :, 4], step.planes))
    written = (after.key_cache != step.key_cache).flatten(2).any(-1).any(-1).nonzero().squeeze(-1).tolist()
    assert set(written) == {int(step.page_table[0, 1]), page, int(step.page_table[1, 1])}


def test_padding_tokens_leave_no_trace() -> None:
    padded = random_step(RAGGED, SMALL, padding=4, seed=11)
    tokens = int(padded.query_start[-1])
    bare = padded.replace(
        query=padded.query[:, :, :tokens], key=padded.key[:, :, :tokens], value=padded.value[:, :, :tokens]
    )
    found, expected = padded.reference(), bare.reference()
    assert torch.equal(found.output[:, :, :tokens], expected.output)
    assert not found.output[:, :, tokens:].any()
    assert torch.equal(found.key_cache, expected.key_cache)


def test_min_length_counts_the_current_token() -> None:
    step = random_step([(99, 1)], SMALL)
    assert row_sets(step.with_attributes(min_length=100), 0).all()
    assert not row_sets(step.with_attributes(min_length=99), 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_table": torch.tensor([[99, 1, 2, 3]], dtype=torch.int32)}, "outside the pool"),
        ({"page_table": torch.tensor([[-1, 1, 2, 3]], dtype=torch.int32)}, "outside the pool"),
        ({"past_length": torch.tensor([63], dtype=torch.int32)}, "page table holds"),
        ({"query_start": torch.tensor([0, 3], dtype=torch.int32)}, "must rise from 0 to at most 2"),
        ({"query_start": torch.tensor([1, 2], dtype=torch.int32)}, "must rise from 0"),
        ({"query_start": torch.tensor([0, 1, 2], dtype=torch.int32)}, r"query_start is \[3\], expected \[2\]"),
        ({"code_cache": torch.zeros(6, 2, 12, 8, dtype=torch.int32)}, "code_cache is"),
        ({"key": torch.zeros(1, 3, 2, 32)}, r"key is \[1, 3, 2, 32\], expected \[1, 2, 2, 32\]"),
        ({"key": torch.zeros(1, 2, 3, 32)}, "key is"),
        ({"value": torch.zeros(1, 2, 1, 32)}, "value is"),
        ({"value_cache": torch.zeros(6, 2, 16, 1)}, "value_cache is"),
        ({"norm_cache": torch.zeros(6, 1, 16)}, "norm_cache is"),
        ({"planes": torch.zeros(12, 6, 16)}, "planes is"),
        ({"query": torch.zeros(1, 3, 2, 32)}, "3 query heads do not divide among 2 KV heads"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    step = random_step([(40, 2)], SMALL)
    with pytest.raises(ValueError, match=message):
        step.replace(**change).reference()


def test_a_page_size_other_than_the_caches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"key_cache is \[6, 2, 16, 32\], expected \[6, 2, 32, 32\]"):
        random_step([(40, 2)], SMALL).with_attributes(page_size=32).reference()


def test_budget_beyond_every_length_is_no_overflow() -> None:
    step = random_step([(40, 1)], SMALL).with_attributes(budget_tokens=INT32_MAX)
    assert row_sets(step, 0).all()
