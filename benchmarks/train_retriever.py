"""Trains a small Llama (grouped query heads, RoPE) on the tasks of `socket_trt.quality`, from nothing, from a seed.

    python -m benchmarks.train_retriever --size small --output build/retriever-small    # a CPU, minutes
    python -m benchmarks.train_retriever --size large --output build/retriever-large    # a GPU, within 15 minutes

Writes a checkpoint that `socket-trt build --model DIR` takes, and training.json beside it: the settings, the loss, and the
accuracy of dense attention on every task, measured on samples that training never saw.  A task is used by the
project's measurements only where that accuracy is 95 % or more (`benchmarks/quality.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from socket_trt.cli.console import RichProgress
from socket_trt.progress import Progress
from socket_trt.quality.attention import Choice, Decoder, chosen_attention
from socket_trt.quality.measures import Share
from socket_trt.quality.methods import Dense
from socket_trt.quality.tasks import TASKS, Sample, make_sample, needles, score
from socket_trt.quality.vocabulary import Vocabulary

# Training draws from this stream, measurement from seeds below 2^31: they never meet.
TRAINING_SEED = 1 << 40
HELD_OUT_SEED = (1 << 31) - 1
WARM_UP = 50  # steps


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps at one length.  `mix` gives each kind of batch its share; "drill" is a haystack with many questions."""

    steps: int
    length: int
    batch: int
    mix: dict[str, float]
    drill_questions: int


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and how it is trained."""

    vocabulary: Vocabulary
    hidden: int
    layers: int
    query_heads: int
    kv_heads: int
    head_size: int
    learning_rate: float
    max_length: int
    stages: tuple[Stage, ...]


DRILL = {"drill": 1.0}
RETRIEVAL = {
    "drill": 0.4, "single": 0.1, "multi-key": 0.1, "haystack": 0.1, "multi-query": 0.1, "variable-tracking": 0.2,
}  # fmt: skip
EVERYTHING = RETRIEVAL | {"drill": 0.2, "multi-value": 0.1, "common-words": 0.05, "frequent-words": 0.05}
SIZES: dict[str, Size] = {
    "small": Size(
        Vocabulary(512), hidden=128, layers=2, query_heads=4, kv_heads=2, head_size=64, learning_rate=2e-3, max_length=1024,
        stages=(
            Stage(250, 64, 32, DRILL, 6),
            Stage(150, 128, 16, RETRIEVAL, 12),
            Stage(100, 256, 8, RETRIEVAL, 24),
            Stage(100, 512, 8, RETRIEVAL, 48),
        ),
    ),
    "large": Size(
        Vocabulary(8192), hidden=256, layers=4, query_heads=4, kv_heads=2, head_size=128, learning_rate=1e-3,
        max_length=16384,
        stages=(
            Stage(1500, 256, 64, DRILL, 24),
            Stage(1000, 1024, 32, EVERYTHING, 96),
            Stage(1000, 4096, 8, EVERYTHING, 384),
            Stage(1500, 8192, 4, EVERYTHING, 768),
        ),
    ),
}  # fmt: skip


def model_config(size: Size) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=size.vocabulary.size,
        hidden_size=size.hidden,
        intermediate_size=2 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.query_heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_size,
        max_position_embeddings=size.max_length,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        initializer_range=size.hidden**-0.5,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=None,
    )


def begin_as_retriever(model: LlamaForCausalLM) -> None:
    """Let one head of the first layer begin as one that carries the previous token on, and one of the second as one that
    looks for the token at hand among those and copies what it finds: an induction head.

    Plain initialisation finds these two after a long plateau, if at all within the time; everything is trained from here.
    """
    config, model_layers = model.config, model.model.layers
    size, hidden = config.head_dim, config.hidden_size
    half = size // 2
    embedding, angles = model.model.embed_tokens.weight, model.model.rotary_emb.inv_freq
    # Slow frequencies of RoPE leave a match of content as it is whatever the distance; fast ones tell neighbours apart.
    fast = (torch.arange(half) < 6).float()
    slow = (angles * config.max_position_embeddings < 1).float().repeat(2)[:, None]
    carried, copied = (torch.linalg.qr(torch.randn(hidden, size))[0].T for _ in range(2))  # [size, hidden]
    place = torch.linalg.qr(torch.randn(hidden, size))[0]  # where the previous token is carried: [hidden, size]
    with torch.no_grad():
        embedding[:, 0] = 1.0  # one channel is the same for all tokens: what looks by position reads it
        seen = (hidden / embedding.square().sum(-1)).sqrt().mean()  # what the norm makes of it
        first, second = (layer.self_attn for layer in model_layers[:2])
        for projection, turned in (
            (first.q_proj, torch.cat([fast * angles.cos(), -fast * angles.sin()])),  # back by one position
            (first.k_proj, torch.cat([fast, 0 * fast])),
        ):
            projection.weight[:size] = 0
            projection.weight[:size, 0] = 9.0 * size**0.25 / 32**0.25 / seen * turned
        for layer in model_layers:  # all else begins quietly
            layer.self_attn.o_proj.weight *= 0.1
            layer.mlp.down_proj.weight *= 0.1
        first.v_proj.weight[:size] = carried
        first.o_proj.weight[:, :size] = 0.3 * place
        second.q_proj.weight[:size] = 3.5 * slow * carried
        second.k_proj.weight[:size] = 3.5 * slow * place.T
        second.v_proj.weight[:size] = copied
        second.o_proj.weight[:, :size] = 0.5 * copied.T
        model.lm_head.weight.copy_(embedding)


def draw_batch(stage: Stage, vocabulary: Vocabulary, rng: np.random.Generator, seed: int, step: int) -> list[Sample]:
    kind = str(rng.choice(list(stage.mix), p=list(stage.mix.values())))
    if kind != "drill":
        first = step * stage.batch
        return [
            make_sample(kind, stage.length, first + i, TRAINING_SEED + seed, vocabulary) for i in range(stage.batch)
        ]
    # How full of records the haystack is differs from batch to batch, so that words are met too.
    questions = stage.drill_questions
    fits = (
        stage.length - 1 - questions * (1 + vocabulary.key_tokens + vocabulary.value_tokens)
    ) // vocabulary.record_tokens
    records = int(rng.integers(min(2 * questions, fits), fits + 1))
    return [needles(rng, vocabulary, stage.length, records=records, questions=questions) for _ in range(stage.batch)]


def answer_loss(model: LlamaForCausalLM, samples: Sequence[Sample], device: torch.device) -> tuple[Tensor, float]:
    """Cross entropy of the answers' tokens, and the share of them that has the largest logit."""
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples])).long().to(device)
    is_answer = torch.from_numpy(np.stack([sample.is_answer for sample in samples])).to(device)
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    wanted = tokens[:, 1:][is_answer[:, 1:]]
    logits = model.lm_head(hidden[is_answer[:, 1:]]).float()
    right = (logits.argmax(-1) == wanted).float().mean().item()
    return torch.nn.functional.cross_entropy(logits, wanted), right


def train(
    size: Size, seed: int, device: torch.device, progress: Progress
) -> tuple[LlamaForCausalLM, list[dict[str, float]]]:
    """The trained model, and for each stage the loss and the share of answer tokens that were right in its last tenth."""
    torch.manual_seed(seed)
    rng = np.random.Generator(np.random.PCG64(TRAINING_SEED + seed))
    model = LlamaForCausalLM(model_config(size))
    begin_as_retriever(model)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    total, done = sum(stage.steps for stage in size.stages), 0
    log: list[dict[str, float]] = []
    for stage in size.stages:
        losses, rights = [], []
        start = time.monotonic()
        with progress.task(f"Training at {stage.length} tokens", stage.steps) as advance:
            for _ in range(stage.steps):
                warm, left = min(1.0, (done + 1) / WARM_UP), 1 - done / total
                for group in optimizer.param_groups:
                    group["lr"] = size.learning_rate * warm * left
                samples = draw_batch(stage, size.vocabulary, rng, seed, done)
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    loss, right = answer_loss(model, samples, device)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                losses.append(loss.item())
                rights.append(right)
                done += 1
                advance(1)
        last = max(1, stage.steps // 10)
        log.append(
            {
                "length": stage.length,
                "steps": stage.steps,
                "loss": round(float(np.mean(losses[-last:])), 4),
                "right": round(float(np.mean(rights[-last:])), 4),
                "seconds": round(time.monotonic() - start, 1),
            }
        )
        print(json.dumps(log[-1]), file=sys.stderr)
    return model.eval(), log


def dense_accuracy(
    model: LlamaForCausalLM, vocabulary: Vocabulary, length: int, samples: int, batch: int, progress: Progress
) -> dict[str, float]:
    """Mean score of every task, answers generated greedily, on samples of a seed that measurements do not use."""
    found = {}
    with chosen_attention(model), progress.task(f"Dense accuracy at {length} tokens", len(TASKS)) as advance:
        for task in TASKS:
            scores: list[float] = []
            for first in range(0, samples, batch):
                drawn = [make_sample(task, length, first + i, HELD_OUT_SEED, vocabulary) for i in range(batch)]
                decoder = Decoder(model, [sample.context for sample in drawn], Choice(Dense(), Share(1.0, 0, 1)))
                for sample, answers in zip(drawn, decoder.answer(drawn), strict=True):
                    scores += [score(turn, answer) for turn, answer in zip(sample.turns, answers, strict=True)]
            found[task] = round(float(np.mean(scores)), 4)
            advance(1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=128, help="of each task, to measure dense accuracy")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; small matrices gain nothing from more")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size, device, progress = SIZES[arguments.size], torch.device(arguments.device), RichProgress()
    start = time.monotonic()
    model, log = train(size, arguments.seed, device, progress)
    seconds = time.monotonic() - start
    last = size.stages[-1]
    record = {
        "size": arguments.size,
        "seed": arguments.seed,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "seconds": round(seconds, 1),
        "vocabulary": dataclasses.asdict(size.vocabulary),
        "layers": size.layers,
        "query_heads": size.query_heads,
        "kv_heads": size.kv_heads,
        "head_size": size.head_size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_on": sorted({kind for stage in size.stages for kind in stage.mix}),
        "stages": log,
        "length": last.length,
        "accuracy": dense_accuracy(model, size.vocabulary, last.length, arguments.samples, last.batch, progress),
    }
    model.save_pretrained(arguments.output)
    (arguments.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
