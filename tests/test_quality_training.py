"""The script that trains a model on the tasks: where it begins, and that it learns."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks import train_retriever
from benchmarks.train_retriever import (
    DRILL,
    SIZES,
    Stage,
    Trainer,
    answer_loss,
    begin_as_retriever,
    dense_accuracy,
    draw_samples,
    model_config,
    stack,
)
from socket_trt.config import SocketConfig
from socket_trt.engine.build import BuildOptions, build_engine
from socket_trt.models.checkpoint import resolve_model
from socket_trt.progress import Silent
from socket_trt.quality.attention import Choice, Decoder, chosen_attention
from socket_trt.quality.measures import Share, weights
from socket_trt.quality.methods import Dense
from socket_trt.quality.tasks import TASKS, needles
from socket_trt.quality.vocabulary import ASK, Vocabulary

# As in test_families.py: training is slow to trace.
pytestmark = pytest.mark.no_cover

STAGE = Stage(40, 48, 16, DRILL, 4)
SMALL = dataclasses.replace(SIZES["small"], vocabulary=Vocabulary(128), stages=(STAGE,))
CPU = torch.device("cpu")


def test_the_first_head_begins_by_looking_at_the_previous_token() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(model_config(SMALL))
    begin_as_retriever(model)
    model.set_attn_implementation("eager")
    tokens = torch.randint(8, 128, (2, 300))
    with torch.no_grad():
        weights = model(tokens, output_attentions=True).attentions[0][:, 0]
    assert weights.diagonal(-1, 1, 2).mean() > 0.9


def test_the_second_layer_begins_by_finding_the_record_of_a_key() -> None:
    """In a haystack, and with the vocabulary and distances of the large model, before anything is trained."""
    torch.manual_seed(0)
    size = SIZES["large"]
    model = LlamaForCausalLM(model_config(size)).eval()
    begin_as_retriever(model)
    sample = needles(np.random.default_rng(1), size.vocabulary, 2048, records=None, questions=8)
    found: list[torch.Tensor] = []
    with chosen_attention(model):
        decoder = Decoder(model, [sample.context], Choice(Dense(), Share(1.0, 0, 1)))
        decoder.observe = lambda layer, attention: found.append(weights(attention)[0]) if layer == 1 else None
        decoder.feed(torch.from_numpy(sample.tokens[len(sample.context) :])[None].long())
    answers = np.flatnonzero(sample.is_answer[len(sample.context) :]) - 1
    for turn, row in zip(sample.turns, answers, strict=True):
        value = int(np.flatnonzero(sample.context == turn.question[1])[0]) + 1
        assert found[row][value] > 0.5


def test_training_learns_and_is_reproducible() -> None:
    trainer, again = Trainer(SMALL, 0, CPU), Trainer(SMALL, 0, CPU)
    for each in (trainer, again):
        each.run(STAGE)
    assert trainer.log[0]["right"] > 0.5  # chance is under 0.15
    assert trainer.log[0]["steps"] == STAGE.steps
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), again.model.parameters(), strict=True))
    accuracy = dense_accuracy(trainer.model, SMALL.vocabulary, 96, 16, 8, Silent())
    assert accuracy["single"] > 0.5


def test_a_time_limit_ends_a_stage_at_its_share() -> None:
    trainer = Trainer(SMALL, 0, CPU, time_limit=1e-3)
    trainer.run(STAGE)
    assert trainer.log[0]["steps"] == 1


def test_the_loss_is_that_of_the_answers_alone() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(model_config(SMALL))
    samples = draw_samples(
        dataclasses.replace(STAGE, mix={"multi-value": 1.0}, length=128, batch=2), SMALL.vocabulary, 0, 0
    )
    samples += draw_samples(
        dataclasses.replace(STAGE, mix={"variable-tracking": 1.0}, length=128, batch=2), SMALL.vocabulary, 0, 0
    )
    batch = stack(samples)
    with torch.no_grad():
        probabilities = model(batch.tokens).logits.softmax(-1)
        loss, right = answer_loss(model, batch)
    expected, hits = [], []
    for row, sample in enumerate(samples):
        (turn,) = sample.turns
        answer = turn.answer.tolist()
        for i, position in enumerate(np.flatnonzero(sample.is_answer)):
            # Values may come in any order, the links of a chain only in theirs.
            may = set(answer[i:]) if turn.question[0] == ASK else {answer[i]}
            expected.append(-np.log(sum(probabilities[row, position - 1, token].item() for token in may)))
            hits.append(probabilities[row, position - 1].argmax().item() in may)
    assert len(expected) == 2 * 4 + 2 * 3
    np.testing.assert_allclose(loss.item(), np.mean(expected), rtol=1e-5)
    np.testing.assert_allclose(right.item(), np.mean(hits))


def test_the_script_trains_the_large_model_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage, the checkpoint in bfloat16, and what it says: as on a GPU, with a thousandth of the steps."""
    monkeypatch.setattr("sys.argv", ["train", "--size", "large", "--output", str(tmp_path / "model"), "--scale", "0.001",
                                     "--length-scale", "0.2", "--samples", "2", "--device", "cpu"])  # fmt: skip
    train_retriever.main()
    record = json.loads((tmp_path / "model/training.json").read_text())
    assert [stage["length"] for stage in record["stages"]] == [51, 205, 819, 1638]
    assert set(record["accuracy"]) == set(TASKS)
    assert sum(file.stat().st_size for file in (tmp_path / "model").iterdir()) < 8 << 20
    model = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    build_engine(
        resolve_model(str(tmp_path / "model")),
        tmp_path / "engine",
        BuildOptions(SocketConfig(), max_seq_len=512),
        Silent(),
    )
