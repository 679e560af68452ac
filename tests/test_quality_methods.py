"""Methods and measures against brute force: loops over heads and tokens, in Python."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from socket_trt.config import INT32_MAX, OperatorAttributes, Selection, SocketConfig
from socket_trt.errors import ConfigError
from socket_trt.planes import draw_planes
from socket_trt.quality.measures import Attention, Share, measure, weights
from socket_trt.quality.methods import COMPARED, Dense, ExactTopK, HardLsh, Method, Quest, Random, SinkWindow, Socket
from socket_trt.reference import attended_set, key_codes
from tests.steps import SMALL

F64 = torch.float64
QUERY_HEADS, KV_HEADS, SIZE = 6, 2, 16
GROUP = QUERY_HEADS // KV_HEADS
SINK, WINDOW = 2, 3
ALL = [make(3) for make in COMPARED]


def share(kept: float) -> Share:
    return Share(kept, SINK, WINDOW)


def draw(length: int, seed: int = 0, **options: object) -> Attention:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    spread = torch.rand(KV_HEADS, length, 1, generator=generator, dtype=F64) * 2
    values = normal(KV_HEADS, length, SIZE) * spread
    return Attention(
        normal(QUERY_HEADS, SIZE) * 1.5, normal(KV_HEADS, length, SIZE), values, SIZE**-0.5, **options  # type: ignore[arg-type]
    )  # fmt: skip


def attended(method: Method, a: Attention, attributes: OperatorAttributes) -> list[set[int]]:
    """Tokens of each query head."""
    mask = method.attended(a.query, a.keys, a.values, attributes)
    assert mask.shape == (len(a.query), a.keys.shape[1])
    return [set(row.nonzero().squeeze(-1).tolist()) for row in mask]


def best(scores: list[float], length: int, kept: int) -> set[int]:
    """Sink, window, and the best of the others, `kept` in all; ties to the lower position."""
    fixed = {*range(SINK), *range(length - WINDOW, length)}
    others = sorted((t for t in range(length) if t not in fixed), key=lambda t: -scores[t])  # a stable sort
    return fixed | set(others[: kept - len(fixed)])


def dot(a: Tensor, b: Tensor) -> float:
    return math.fsum(float(x) * float(y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("method", ALL, ids=lambda method: method.name)
@pytest.mark.parametrize("length", [1, 5, 16, 17, 100])
@pytest.mark.parametrize("kept", [0.1, 0.5, 1.0])
def test_every_method_keeps_exactly_the_tokens_it_may(method: Method, length: int, kept: float) -> None:
    a = draw(length)
    total = math.ceil(length * kept)
    if total < SINK + WINDOW:
        with pytest.raises(ConfigError, match="fewer than sink and window"):
            share(kept)(length, a)
        return
    fixed = {*range(min(length, SINK)), *range(max(0, length - WINDOW), length)}
    for tokens in attended(method, a, share(kept)(length, a)):
        assert fixed <= tokens
        assert len(tokens) == (length if isinstance(method, Dense) else total)


def test_names_are_different_and_only_those_that_draw_depend_on_the_seed() -> None:
    assert len({method.name for method in ALL}) == len(ALL)
    a = draw(200)
    attributes = share(0.1)(200, a)
    for make in COMPARED:
        one, same, other = (attended(make(seed), a, attributes) for seed in (1, 1, 2))
        assert one == same
        assert (one != other) == make(1).draws


def test_dense_sees_what_the_sliding_window_lets_it() -> None:
    a = draw(50, sliding_window=20)
    assert attended(Dense(), a, share(0.2)(50, a)) == [set(range(30, 50))] * QUERY_HEADS


def test_the_oracle_takes_the_largest_scores() -> None:
    a = draw(60)
    found = attended(ExactTopK(), a, share(0.25)(60, a))
    for head in range(QUERY_HEADS):
        scores = [dot(a.query[head], key) for key in a.keys[head // GROUP]]
        assert found[head] == best(scores, 60, 15)


@pytest.mark.parametrize("selection", list(Selection))
def test_socket_is_the_reference(selection: Selection) -> None:
    """Against the attended set that the reference operator itself uses."""
    a = draw(200)
    config = SMALL.model_copy(update={"selection": selection})
    method = Socket(
        tables=SMALL.tables, planes=SMALL.planes, temperature=SMALL.temperature, selection=selection, seed=SMALL.seed
    )
    planes = torch.from_numpy(draw_planes(SMALL.tables, SMALL.planes, SIZE, SMALL.seed)).to(F64)
    codes = key_codes(a.keys, planes).transpose(1, 2)
    norms = a.values.norm(dim=-1)
    attributes = config.attributes(a.scale)
    expected = attended_set(a.query[:, None], codes, norms, planes, 199, attributes)[:, 0]
    assert torch.equal(method.attended(a.query, a.keys, a.values, attributes), expected)
    assert not expected.all()


def socket_scores(a: Attention, planes: Tensor, temperature: float, norms: bool) -> list[list[float]]:
    """The paper's formula, corner by corner: softmax over all 2^R corners of every table."""
    rank = planes.shape[1]
    corners = [[1 if corner >> (rank - 1 - r) & 1 else -1 for r in range(rank)] for corner in range(2**rank)]
    rows = []
    for head in range(len(a.query)):
        keys, values = a.keys[head // GROUP], a.values[head // GROUP]
        row = [0.0] * len(keys)
        for table in planes:
            u = [math.tanh(dot(plane, a.query[head])) / math.sqrt(SIZE) for plane in table]
            weight = [math.exp(sum(s * x for s, x in zip(c, u, strict=True)) / temperature) for c in corners]
            for t, key in enumerate(keys):
                code = [1 if dot(plane, key) >= 0 else -1 for plane in table]
                row[t] += weight[corners.index(code)] / sum(weight)
        rows.append([x * (math.sqrt(dot(v, v)) if norms else 1.0) for x, v in zip(row, values, strict=True)])
    return rows


@pytest.mark.parametrize("norms", [True, False])
def test_socket_scores_by_the_papers_formula(norms: bool) -> None:
    a = draw(40)
    method = Socket(tables=5, planes=3, temperature=0.25, value_norms=norms, seed=4)
    planes = torch.from_numpy(draw_planes(5, 3, SIZE, 4)).to(F64)
    expected = torch.tensor(socket_scores(a, planes, 0.25, norms), dtype=F64)
    found = method.scores(a.query, a.keys, a.values, share(0.5)(40, a))
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)


def test_hard_lsh_counts_the_tables_in_which_key_and_query_collide() -> None:
    a = draw(80)
    planes = torch.from_numpy(draw_planes(10, 3, SIZE, 5)).to(F64)
    attributes = share(0.3)(80, a)
    counts = []
    for head in range(QUERY_HEADS):
        counts.append([])
        for key in a.keys[head // GROUP]:
            same = [all((dot(w, key) >= 0) == (dot(w, a.query[head]) >= 0) for w in table) for table in planes]
            counts[-1].append(float(sum(same)))
    assert any(count > 0 for row in counts for count in row)
    found = attended(HardLsh(tables=10, planes=3, seed=5), a, attributes)
    assert found == [best(row, 80, 24) for row in counts]
    weighted = HardLsh(tables=10, planes=3, value_norms=True, seed=5).scores(a.query, a.keys, a.values, attributes)
    expected = torch.tensor(counts, dtype=F64) * a.values.norm(dim=-1).repeat_interleave(GROUP, 0)
    torch.testing.assert_close(weighted, expected)


@pytest.mark.parametrize("length", [64, 61, 49])
def test_quest_takes_pages_by_their_bound(length: int) -> None:
    a = draw(length)
    found = attended(Quest(page_size=8), a, share(0.4)(length, a))
    for head in range(QUERY_HEADS):
        scores = [0.0] * length
        for start in range(0, length, 8):
            page = a.keys[head // GROUP, start : start + 8]
            bound = sum(max(float(q) * float(k[d]) for k in page) for d, q in enumerate(a.query[head]))
            # In each dimension the largest product is at the page's least or greatest key.
            assert all(dot(a.query[head], key) <= bound + 1e-9 for key in page)
            for t in range(start, min(start + 8, length)):
                scores[t] = bound
        # Sums in another order would part a page's equal tokens from each other, not one page from another.
        assert found[head] == best([round(score, 9) for score in scores], length, math.ceil(0.4 * length))


def test_sink_and_window_take_the_latest() -> None:
    a = draw(50)
    assert attended(SinkWindow(), a, share(0.2)(50, a)) == [{0, 1, *range(42, 50)}] * QUERY_HEADS


def test_random_is_even_and_each_head_has_its_own() -> None:
    a = draw(100)
    attributes = share(0.2)(100, a)
    counts = [0] * 100
    for seed in range(100):
        found = attended(Random(seed=seed), a, attributes)
        assert found[0] != found[1]
        for t in found[0]:
            counts[t] += 1
    assert all(4 <= count <= 36 for count in counts[2:97])  # 15.8 expected, 3.6 standard deviation


# Random draws for all heads at once: stacked or alone, it takes other tokens of equal right.
@pytest.mark.parametrize("method", [m for m in ALL if not isinstance(m, Random)], ids=lambda method: method.name)
def test_sequences_stacked_in_the_heads_choose_as_each_alone(method: Method) -> None:
    one, two = draw(90, seed=1), draw(90, seed=2)
    attributes = share(0.2)(90, one)
    stacked = method.attended(
        torch.cat([one.query, two.query]),
        torch.cat([one.keys, two.keys]),
        torch.cat([one.values, two.values]),
        attributes,
    )
    alone = [method.attended(a.query, a.keys, a.values, attributes) for a in (one, two)]
    assert torch.equal(stacked, torch.cat(alone))


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"sliding_window": 30}])
def test_measures_by_hand(options: dict[str, float]) -> None:
    """`weights` and every measure, one token at a time."""
    a = draw(60, **options)
    attributes = share(0.25)(60, a)
    method = Socket(tables=4, planes=4, seed=1)
    found = attended(method, a, attributes)
    mass, recall, error = [], [], []
    for head in range(QUERY_HEADS):
        keys, values = a.keys[head // GROUP], a.values[head // GROUP]
        logits = [dot(a.query[head], key) * a.scale for key in keys]
        if a.softcap:
            logits = [a.softcap * math.tanh(x / a.softcap) for x in logits]
        seen = [t >= 60 - a.sliding_window if a.sliding_window > 0 else True for t in range(60)]
        exp = [math.exp(x) * s for x, s in zip(logits, seen, strict=True)]
        p = [x / sum(exp) for x in exp]
        torch.testing.assert_close(weights(a)[head], torch.tensor(p, dtype=F64))
        mass.append(sum(p[t] for t in found[head]))
        candidates = [t for t in range(60) if seen[t] and SINK <= t < 60 - WINDOW]
        top = set(sorted(candidates, key=lambda t: -p[t])[:10])
        assert len(top) == 10
        recall.append(len(top & found[head]) / 10)
        inside = sum(p[t] for t in found[head])
        whole = sum((p[t] * values[t] for t in range(60)), torch.zeros(SIZE, dtype=F64))
        sparse = sum((p[t] / inside * values[t] for t in found[head]), torch.zeros(SIZE, dtype=F64))
        error.append(float((sparse - whole).norm() / whole.norm()))
    kept = measure(a, method, attributes)
    assert kept.mass == pytest.approx(sum(mass) / QUERY_HEADS)
    assert kept.recall == pytest.approx(sum(recall) / QUERY_HEADS)
    assert kept.error == pytest.approx(sum(error) / QUERY_HEADS)
    assert 0 < kept.recall < 1


def test_dense_loses_nothing_and_no_method_keeps_more_mass_than_the_oracle() -> None:
    a = draw(300)
    attributes = share(0.1)(300, a)
    whole = measure(a, Dense(), attributes)
    assert (whole.mass, whole.recall, whole.error) == (pytest.approx(1), 1, pytest.approx(0, abs=1e-12))
    oracle = measure(a, ExactTopK(), attributes)
    assert oracle.recall == 1
    for method in ALL[2:]:
        assert measure(a, method, attributes).mass <= oracle.mass
    assert measure(a, Random(), attributes).mass < measure(a, Socket(value_norms=False), attributes).mass


def test_a_budget_of_nothing_recalls_all_there_is_to_recall() -> None:
    a = draw(100)
    assert measure(a, Random(), share(0.05)(100, a)).recall == 1


def test_bits_a_token_are_equal_where_methods_are_compared() -> None:
    bits = {method.name: method.bits_per_token(64) for method in ALL}
    hashing = [bits[m.name] for m in ALL if isinstance(m, (Socket, HardLsh))]
    assert sorted(set(hashing)) == [480, 600]
    assert hashing.count(600) == 1  # the published 60 x 10
    assert bits["Quest, pages of 16"] == 2 * 64 * 16 // 16
    assert bits["exact top-k"] == 0
    assert SocketConfig().tables * SocketConfig().planes == 480


def test_min_length_attends_densely() -> None:
    a = draw(100)
    attributes = share(0.1)(100, a).replace(min_length=INT32_MAX)
    assert attended(Random(), a, attributes) == [set(range(100))] * QUERY_HEADS
