"""The script that trains a model on the tasks: where it begins, and that it learns."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from transformers import LlamaForCausalLM

from benchmarks.train_retriever import (
    DRILL,
    SIZES,
    Stage,
    answer_loss,
    begin_as_retriever,
    dense_accuracy,
    draw_batch,
    model_config,
    train,
)
from socket_trt.progress import Silent
from socket_trt.quality.vocabulary import Vocabulary

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


def test_training_learns_and_is_reproducible() -> None:
    model, log = train(SMALL, 0, CPU, Silent())
    assert log[0]["right"] > 0.5  # chance is under 0.15
    again, _ = train(SMALL, 0, CPU, Silent())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    accuracy = dense_accuracy(model, SMALL.vocabulary, 96, 16, 8, Silent())
    assert accuracy["single"] > 0.5


def test_the_loss_is_that_of_the_answers_alone() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(model_config(SMALL))
    samples = draw_batch(STAGE, SMALL.vocabulary, np.random.default_rng(0), 0, 0)
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples])).long()
    with torch.no_grad():
        logits = model(tokens).logits.log_softmax(-1)
        loss, right = answer_loss(model, samples, CPU)
    expected, hits = [], []
    for row, sample in enumerate(samples):
        for position in np.flatnonzero(sample.is_answer):
            expected.append(-logits[row, position - 1, tokens[row, position]].item())
            hits.append(logits[row, position - 1].argmax().item() == tokens[row, position].item())
    assert len(expected) == STAGE.batch * STAGE.drill_questions
    np.testing.assert_allclose(loss.item(), np.mean(expected), rtol=1e-5)
    np.testing.assert_allclose(right, np.mean(hits))
