"""Tasks: what must hold of every sample, whatever its length, index and seed; and of the scorer."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from socket_trt.errors import ConfigError
from socket_trt.quality.tasks import TASKS, Sample, Turn, make_sample, score
from socket_trt.quality.vocabulary import ASK, BEGIN, RECORD, TRACE, Tokens, Vocabulary

NEEDLES = ["single", "multi-key", "haystack", "multi-value", "multi-query"]
LENGTHS = st.integers(96, 600)
VOCABULARIES = st.builds(Vocabulary, st.sampled_from([512, 640]), st.integers(1, 2), st.integers(1, 3))


def records(sample: Sample, vocabulary: Vocabulary, last: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(key, what the record says) of every record of the context; `last`: tokens of what it says."""
    context, width = sample.context.tolist(), vocabulary.key_tokens
    return [
        (tuple(context[i + 1 : i + 1 + width]), tuple(context[i + 1 + width : i + 1 + width + last]))
        for i, token in enumerate(context)
        if token == RECORD
    ]


@settings(deadline=None)
@given(st.sampled_from(list(TASKS)), LENGTHS, st.integers(0, 1000), st.integers(0, 2**62), VOCABULARIES)
def test_a_sample_is_a_function_of_its_arguments_and_has_the_wanted_length(
    task: str, length: int, index: int, seed: int, vocabulary: Vocabulary
) -> None:
    sample = make_sample(task, length, index, seed, vocabulary)
    assert sample.tokens.dtype == np.int32
    assert len(sample.tokens) == len(sample.is_answer) == length
    assert sample.tokens[0] == BEGIN
    assert 0 <= sample.tokens.min() <= sample.tokens.max() < vocabulary.size
    assert sample.tokens[sample.is_answer].tolist() == [t for turn in sample.turns for t in turn.answer.tolist()]
    again = make_sample(task, length, index, seed, vocabulary)
    assert np.array_equal(sample.tokens, again.tokens)
    other = make_sample(task, length, index + 1, seed, vocabulary)
    assert not np.array_equal(sample.tokens, other.tokens)
    # Same shape, so that they can be stacked.
    assert np.array_equal(sample.is_answer, other.is_answer)
    assert [turn.references.shape for turn in sample.turns] == [turn.references.shape for turn in other.turns]


@settings(deadline=None)
@given(st.sampled_from(NEEDLES), LENGTHS, st.integers(0, 1000), VOCABULARIES)
def test_the_context_answers_each_question_with_the_references_and_nothing_else(
    task: str, length: int, index: int, vocabulary: Vocabulary
) -> None:
    sample = make_sample(task, length, index, 0, vocabulary)
    said = records(sample, vocabulary, vocabulary.value_tokens)
    for turn in sample.turns:
        assert turn.question[0] == ASK
        key = tuple(turn.question[1:].tolist())
        assert [value for owner, value in said if owner == key] == [tuple(r) for r in turn.references.tolist()]
    keys = Counter(key for key, _ in said)
    count = {"single": 1, "multi-key": 8, "multi-value": 8, "multi-query": 8}.get(task, len(said))
    assert len(said) == count
    assert sorted(keys.values()) == ([1, 1, 1, 1, 4] if task == "multi-value" else [1] * count)
    assert len({tuple(turn.question.tolist()) for turn in sample.turns}) == len(sample.turns)
    elsewhere = np.delete(sample.context, [i + j for i, t in enumerate(sample.context) if t == RECORD
                                           for j in range(vocabulary.record_tokens)])  # fmt: skip
    assert all(token in vocabulary.words for token in elsewhere[1:].tolist())


@given(st.integers(96, 500), st.integers(0, 50))
@settings(deadline=None)
def test_a_haystack_is_nothing_but_records(length: int, index: int) -> None:
    vocabulary = Vocabulary(512)
    sample = make_sample("haystack", length, index, 0, vocabulary)
    assert sum(token in vocabulary.words for token in sample.context.tolist()) < vocabulary.record_tokens


@given(LENGTHS, st.integers(0, 1000), VOCABULARIES)
@settings(deadline=None)
def test_a_chain_is_followed_from_its_value(length: int, index: int, vocabulary: Vocabulary) -> None:
    sample = make_sample("variable-tracking", length, index, 0, vocabulary)
    (turn,) = sample.turns
    assert turn.question[0] == TRACE
    said = records(sample, vocabulary, vocabulary.key_tokens)
    assert len(said) == 9
    # One pass in the order of the text finds the whole chain: nothing is used before it is assigned.
    at, found = tuple(turn.question[1:].tolist()), []
    for source, target in said:
        if source == at:
            found.append(target)
            at = target
    assert found == [tuple(r) for r in turn.references.tolist()]
    assert len({name for record in said for name in record}) == 12


@given(LENGTHS, st.integers(0, 1000))
@settings(deadline=None)
def test_common_words_are_those_that_occur_most_often(length: int, index: int) -> None:
    sample = make_sample("common-words", length, index, 0, Vocabulary(512))
    counts = Counter(sample.context[1:].tolist())
    answer = set(sample.turns[0].answer.tolist())
    assert len(answer) == 5
    rarest = min(counts[word] for word in answer)
    assert rarest >= 8 * max([count for word, count in counts.items() if word not in answer], default=0)


@given(LENGTHS, st.integers(0, 1000))
@settings(deadline=None)
def test_frequent_words_are_ranked(length: int, index: int) -> None:
    sample = make_sample("frequent-words", length, index, 0, Vocabulary(512))
    ranked = Counter(sample.context[1:].tolist()).most_common(4)
    assert [word for word, _ in ranked[:3]] == sample.turns[0].answer.tolist()
    assert len({count for _, count in ranked}) == 4


def test_needles_lie_anywhere() -> None:
    """Over many samples a single record comes into every eighth of the context."""
    places = [int(np.argmax(make_sample("single", 128, i, 0, Vocabulary()).context == RECORD)) for i in range(200)]
    assert set(np.array(places) * 8 // 128) == set(range(8))


@pytest.mark.parametrize("task", TASKS)
def test_8k_and_128k_tokens(task: str) -> None:
    for length in (8192, 131072):
        assert len(make_sample(task, length, 0, 0, Vocabulary(4096, key_tokens=2)).tokens) == length


def turn(*references: list[int]) -> Turn:
    return Turn(np.array([ASK, 9], np.int32), np.array(references, np.int32))


def test_the_score_is_the_share_of_references_found_in_any_order() -> None:
    wanted = turn([1, 2], [3, 4])
    assert score(wanted, [1, 2, 3, 4]) == 1
    assert score(wanted, [3, 4, 1, 2]) == 1
    assert score(wanted, [1, 2, 4, 3]) == 0.5
    assert score(wanted, [2, 1, 4, 3]) == 0
    assert score(wanted, [0, 3, 4]) == 0.5
    assert score(wanted, []) == 0


@given(st.sampled_from(list(TASKS)), st.integers(0, 100))
@settings(deadline=None)
def test_only_a_right_answer_scores_one(task: str, index: int) -> None:
    for one in make_sample(task, 256, index, 0, Vocabulary(value_tokens=2)).turns:
        answer: Tokens = one.answer
        assert score(one, answer.tolist()) == 1
        changed = answer.copy()
        changed[-1] = BEGIN
        assert score(one, changed.tolist()) < 1


@pytest.mark.parametrize(
    ("task", "length", "vocabulary", "message"),
    [
        ("sigle", 128, Vocabulary(), "unknown task 'sigle'"),
        *((task, 6, Vocabulary(), "too few for this task") for task in TASKS),
        ("haystack", 4096, Vocabulary(), "different keys"),
    ],
)
def test_what_cannot_be_made_is_refused(task: str, length: int, vocabulary: Vocabulary, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_sample(task, length, 0, 0, vocabulary)


def test_the_length_that_a_refusal_names_is_enough() -> None:
    for task in (*NEEDLES, "variable-tracking"):
        with pytest.raises(ConfigError) as caught:
            make_sample(task, 4, 0, 0, Vocabulary())
        named = int(str(caught.value).split(": ")[1].split()[0])
        assert len(make_sample(task, named, 0, 0, Vocabulary()).tokens) == named
        with pytest.raises(ConfigError):
            make_sample(task, named - 1, 0, 0, Vocabulary())


@pytest.mark.parametrize("arguments", [(63,), (512, 0), (512, 5), (512, 1, 0), (512, 1, 17)])
def test_vocabularies_out_of_range_are_refused(arguments: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError):
        Vocabulary(*arguments)
