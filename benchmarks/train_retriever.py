"""Trains a small Llama (grouped query heads, RoPE) on the tasks of `socket_trt.quality`, from nothing, from a seed.

    python -m benchmarks.train_retriever --size small --output build/retriever-small    # a CPU, minutes
    python -m benchmarks.train_retriever --size large --output build/retriever-large    # one H100, within 8 minutes

Writes a checkpoint that `socket-trt build --model DIR` takes, and training.json beside it: the settings, the loss, and the
accuracy of dense attention on every task, measured on samples that training never saw.  A task is used by the
project's measurements only where that accuracy is 95 % or more (`benchmarks/quality.py`).

The checkpoint is written every minute and after every stage, so that a run that is cut short leaves a model.  A run that
no time limit cut short is reproducible from its seed, as far as the device's own sums are.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from socket_trt.cli.console import RichProgress
from socket_trt.progress import Progress
from socket_trt.quality.attention import Choice, Decoder, chosen_attention
from socket_trt.quality.measures import Share
from socket_trt.quality.methods import Dense
from socket_trt.quality.tasks import TASKS, Sample, Turn, make_sample, needles, score
from socket_trt.quality.vocabulary import TRACE, Vocabulary

# Training draws from this stream, measurement from seeds below 2^31: they never meet.
TRAINING_SEED = 1 << 40
HELD_OUT_SEED = (1 << 31) - 1
WARM_UP = 50  # steps
SAVE_EVERY = 60.0  # seconds
SAY_EVERY = 100  # steps
GLIMPSE = 32  # samples a task that are answered after each stage


@dataclasses.dataclass(frozen=True)
class Stage:
    """Steps at one length.  `mix` gives each kind of batch its share; "drill" is a haystack with many questions.

    share  of the time limit that may be spent until the end of this stage, where there is a limit
    """

    steps: int
    length: int
    batch: int
    mix: dict[str, float]
    drill_questions: int
    share: float = 1.0


@dataclasses.dataclass(frozen=True)
class Size:
    """A model and how it is trained.  dtype: of the checkpoint; training itself keeps float32."""

    vocabulary: Vocabulary
    hidden: int
    intermediate: int
    layers: int
    query_heads: int
    kv_heads: int
    head_size: int
    learning_rate: float
    max_length: int
    rope_theta: float
    tied: bool
    dtype: torch.dtype
    stages: tuple[Stage, ...]


DRILL = {"drill": 1.0}
RETRIEVAL = {
    "drill": 0.4, "single": 0.1, "multi-key": 0.1, "haystack": 0.1, "multi-query": 0.1, "variable-tracking": 0.2,
}  # fmt: skip
EVERYTHING = {
    "drill": 0.3, "single": 0.1, "multi-key": 0.05, "haystack": 0.1, "multi-query": 0.05, "variable-tracking": 0.2,
    "multi-value": 0.1, "common-words": 0.05, "frequent-words": 0.05,
}  # fmt: skip
SIZES: dict[str, Size] = {
    "small": Size(
        Vocabulary(512), hidden=128, intermediate=256, layers=2, query_heads=4, kv_heads=2, head_size=64,
        learning_rate=2e-3, max_length=1024, rope_theta=5e5, tied=False, dtype=torch.float32,
        stages=(
            Stage(150, 64, 32, DRILL, 6),
            Stage(200, 128, 16, RETRIEVAL, 12),
            Stage(200, 256, 8, RETRIEVAL, 24),
            Stage(150, 512, 8, RETRIEVAL, 48),
        ),
    ),
    # As many keys as a haystack of 8192 tokens has records; RoPE slow enough in half its dimensions to match keys by
    # content over that distance; tied embeddings and bfloat16, so that the checkpoint stays under 8 MiB.
    "large": Size(
        Vocabulary(7168), hidden=256, intermediate=256, layers=4, query_heads=8, kv_heads=2, head_size=64,
        learning_rate=1e-3, max_length=16384, rope_theta=1e7, tied=True, dtype=torch.bfloat16,
        stages=(
            Stage(1500, 256, 256, DRILL, 24, share=0.15),
            Stage(2000, 1024, 64, EVERYTHING, 96, share=0.4),
            Stage(1500, 4096, 16, EVERYTHING, 384, share=0.65),
            Stage(2000, 8192, 8, EVERYTHING, 768, share=1.0),
        ),
    ),
}  # fmt: skip


def model_config(size: Size) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=size.vocabulary.size,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.query_heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_size,
        max_position_embeddings=size.max_length,
        rope_parameters={"rope_type": "default", "rope_theta": size.rope_theta},
        rms_norm_eps=1e-5,
        initializer_range=size.hidden**-0.5,
        tie_word_embeddings=size.tied,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=None,
    )


def _directions(span: Tensor, count: int) -> Tensor:
    """Orthogonal directions within the span of columns, as many as there can be, else zero: [count, rows of `span`]."""
    inner = torch.linalg.qr(torch.randn(span.shape[1], min(count, span.shape[1])))[0]
    return torch.nn.functional.pad((span @ inner).T, (0, 0, 0, count - inner.shape[1]))


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
    # Channel 0 is the same for all tokens: what looks by position reads it.  The previous token is carried in directions
    # of their own, in which no embedding lies: `place` [hidden, size].
    basis = torch.nn.functional.pad(torch.linalg.qr(torch.randn(hidden - 1, hidden - 1))[0], (0, 0, 1, 0))
    place, free = basis[:, :size], basis[:, size:]
    carried, copied = (_directions(free, size) for _ in range(2))
    with torch.no_grad():
        embedding -= embedding @ place @ place.T
        embedding[:, 0] = 1.0
        seen = (hidden / embedding.square().sum(-1)).sqrt().mean()  # what the norm makes of it
        first, second = (layer.self_attn for layer in model_layers[:2])
        for projection, turned in (
            (first.q_proj, torch.cat([fast * angles.cos(), -fast * angles.sin()])),  # back by one position
            (first.k_proj, torch.cat([fast, 0 * fast])),
        ):
            projection.weight[:size] = 0
            projection.weight[:size, 0] = 9.0 * size**0.25 / 32**0.25 / seen * turned
        for layer in model_layers:  # all else begins quietly
            layer.self_attn.o_proj.weight *= 0.02
            layer.mlp.down_proj.weight *= 0.02
        first.v_proj.weight[:size] = carried
        first.o_proj.weight[:, :size] = 0.5 * place
        second.q_proj.weight[:size] = 5.0 * slow * carried
        second.k_proj.weight[:size] = 5.0 * slow * place.T
        second.v_proj.weight[:size] = copied
        second.o_proj.weight[:, :size] = 0.5 * copied.T
        model.lm_head.weight.copy_(embedding)


class Batch(NamedTuple):
    """tokens int64 [B, T]; place int64 [answers, 2], row and column of every answer token; wanted int64 [answers, K], the
    tokens that are right there, -1 where there are fewer than K.
    """

    tokens: Tensor
    place: Tensor
    wanted: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def draw_samples(stage: Stage, vocabulary: Vocabulary, seed: int, step: int) -> list[Sample]:
    """The samples of a training step: they follow from the seed, the stage's length and the step."""
    rng = np.random.Generator(np.random.PCG64([TRAINING_SEED + seed, stage.length, step]))
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


def right_tokens(turn: Turn) -> list[list[int]]:
    """What may be said at each token of a turn's answer, after those before it.

    Any reference that was not given yet, as the score has it, where references are single tokens; the links of a chain are
    found one from another, so they keep their order.
    """
    answer: list[int] = turn.answer.tolist()
    if turn.references.shape[1] > 1 or turn.question[0] == TRACE:
        return [[token] for token in answer]
    return [answer[i:] for i in range(len(answer))]


def stack(samples: Sequence[Sample]) -> Batch:
    tokens = np.stack([sample.tokens for sample in samples])
    place = np.argwhere(np.stack([sample.is_answer for sample in samples]))
    right = [options for sample in samples for turn in sample.turns for options in right_tokens(turn)]
    wanted = np.full((len(right), max(map(len, right))), -1)
    for row, options in enumerate(right):
        wanted[row, : len(options)] = options
    return Batch(torch.from_numpy(tokens).long(), torch.from_numpy(place), torch.from_numpy(wanted))


class StepBatches(Dataset[Batch]):
    """The batches of a stage by step, for worker processes."""

    def __init__(self, stage: Stage, vocabulary: Vocabulary, seed: int, first: int) -> None:
        self._stage, self._vocabulary, self._seed, self._first = stage, vocabulary, seed, first

    def __len__(self) -> int:
        return self._stage.steps

    def __getitem__(self, index: int) -> Batch:
        if index >= len(self):
            raise IndexError(index)
        return stack(draw_samples(self._stage, self._vocabulary, self._seed, self._first + index))


def batches(stage: Stage, vocabulary: Vocabulary, seed: int, first: int, device: torch.device) -> Iterator[Batch]:
    """A stage's batches on the device; for a GPU, drawn ahead by processes of their own."""
    workers = max(1, min(12, (os.cpu_count() or 2) - 2)) if device.type == "cuda" else 0
    loader = DataLoader(
        StepBatches(stage, vocabulary, seed, first),
        batch_size=None,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=8 if workers else None,
    )
    for batch in loader:
        yield batch.to(device)


def answer_loss(model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """-log of the probability that the answers' tokens are right, and the share whose largest logit is; both 0-d."""
    hidden = model.model(input_ids=batch.tokens[:, :-1], use_cache=False).last_hidden_state
    row, column = batch.place.unbind(1)
    logits = model.lm_head(hidden[row, column - 1]).float()
    chosen = logits.gather(1, batch.wanted.clamp(min=0)).masked_fill(batch.wanted < 0, float("-inf"))
    right = (logits.argmax(1, keepdim=True) == batch.wanted).any(1).float().mean()
    return (logits.logsumexp(1) - chosen.logsumexp(1)).mean(), right


class Trainer:
    """Trains stage by stage; `time_limit` in seconds ends each stage after its share of it, and the decay with it."""

    def __init__(self, size: Size, seed: int, device: torch.device, time_limit: float | None = None) -> None:
        torch.manual_seed(seed)
        self.size, self.seed, self.device, self.time_limit = size, seed, device, time_limit
        self.model = LlamaForCausalLM(model_config(size))
        begin_as_retriever(self.model)
        self.model.to(device)
        self.log: list[dict[str, Any]] = []
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=size.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=0.0,
            fused=device.type == "cuda",
        )
        self._done = 0
        self._begin = self._saved = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begin

    def run(self, stage: Stage, output: Path | None = None) -> None:
        """Train one stage, writing the checkpoint to `output` every minute."""
        total = sum(each.steps for each in self.size.stages)
        start, steps = self.seconds, 0
        recent: list[tuple[Tensor, Tensor]] = []
        self.model.train()
        for batch in batches(stage, self.size.vocabulary, self.seed, self._done, self.device):
            progress = (self._done + 1) / total
            if self.time_limit is not None:
                progress = max(progress, self.seconds / self.time_limit)
            rate = self.size.learning_rate * min(1.0, (self._done + 1) / WARM_UP) * max(0.0, 1 - progress)
            for group in self._optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                loss, right = answer_loss(self.model, batch)
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self._optimizer.step()
            recent = [*recent[-(SAY_EVERY - 1) :], (loss.detach(), right)]
            steps += 1
            self._done += 1
            if steps % SAY_EVERY == 0:
                loss_mean, right_mean = _means(recent)
                print(
                    f"{self.seconds:6.1f} s: {stage.length} tokens, step {steps} of {stage.steps}: loss {loss_mean:.4f}, "
                    f"right {right_mean:.1%}",
                    file=sys.stderr,
                    flush=True,
                )
            if output is not None and time.monotonic() - self._saved > SAVE_EVERY:
                save(self.model, self.size.dtype, output)
                self._saved = time.monotonic()
            if self.time_limit is not None and self.seconds > stage.share * self.time_limit:
                break
        loss_mean, right_mean = _means(recent[-max(1, stage.steps // 10) :])
        self.log.append(
            {
                "length": stage.length,
                "steps": steps,
                "loss": round(loss_mean, 4),
                "right": round(right_mean, 4),
                "seconds": round(self.seconds - start, 1),
            }
        )
        self.model.eval()


def _means(recent: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    losses, rights = (torch.stack(part).mean().item() for part in zip(*recent, strict=True))
    return losses, rights


def save(model: LlamaForCausalLM, dtype: torch.dtype, output: Path) -> None:
    """Write the checkpoint in `dtype`; the model keeps its own."""
    copy.deepcopy(model).to(dtype).save_pretrained(output)


@contextlib.contextmanager
def rounded(model: LlamaForCausalLM, dtype: torch.dtype) -> Iterator[None]:
    """While open, the weights are those of the checkpoint in `dtype`, still computed with in float32."""
    exact = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        model.load_state_dict({name: tensor.to(dtype).to(tensor.dtype) for name, tensor in exact.items()})
        yield
    finally:
        model.load_state_dict(exact)


def dense_accuracy(
    model: LlamaForCausalLM, vocabulary: Vocabulary, length: int, samples: int, batch: int, progress: Progress
) -> dict[str, float]:
    """Mean score of every task, answers generated greedily, on samples of a seed that measurements do not use."""
    found = {}
    with chosen_attention(model), progress.task(f"Dense accuracy at {length} tokens", len(TASKS)) as advance:
        for task in TASKS:
            scores: list[float] = []
            for first in range(0, samples, batch):
                indices = range(first, min(first + batch, samples))
                drawn = [make_sample(task, length, index, HELD_OUT_SEED, vocabulary) for index in indices]
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
    parser.add_argument("--time-limit", type=float, help="seconds of training at most; each stage has a share of them")
    parser.add_argument("--scale", type=float, default=1.0, help="of each stage's steps and batch: below 1, a trial")
    parser.add_argument(
        "--length-scale", type=float, default=1.0, help="of each stage's length and questions, likewise"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU; small matrices gain nothing from more")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_float32_matmul_precision("high")
    size = trial(SIZES[arguments.size], arguments.scale, arguments.length_scale)
    device = torch.device(arguments.device)
    trainer = Trainer(size, arguments.seed, device, arguments.time_limit)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    print(f"{parameters} parameters on {device}", file=sys.stderr, flush=True)
    record: dict[str, Any] = {
        "size": arguments.size,
        "seed": arguments.seed,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"{arguments.threads} CPU threads",
        "torch": torch.__version__,
        "vocabulary": dataclasses.asdict(size.vocabulary),
        "layers": size.layers,
        "query_heads": size.query_heads,
        "kv_heads": size.kv_heads,
        "head_size": size.head_size,
        "parameters": parameters,
        "trained_on": sorted({kind for stage in size.stages for kind in stage.mix}),
        "stages": trainer.log,
    }

    def measure(stage: Stage, samples: int) -> None:
        """Write the checkpoint, and beside it what dense attention answers with it."""
        save(trainer.model, size.dtype, arguments.output)
        with rounded(trainer.model, size.dtype):
            right = dense_accuracy(trainer.model, size.vocabulary, stage.length, samples, stage.batch, RichProgress())
        record.update(seconds=round(trainer.seconds, 1), length=stage.length, accuracy=right)
        trainer.log[-1]["accuracy"] = right
        (arguments.output / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        print(json.dumps(trainer.log[-1]), file=sys.stderr, flush=True)

    for stage in size.stages:
        trainer.run(stage, arguments.output)
        measure(stage, min(GLIMPSE, arguments.samples))
    measure(size.stages[-1], arguments.samples)
    print(json.dumps(record, indent=2))


def trial(size: Size, scale: float, length_scale: float) -> Size:
    """The same with fewer steps, smaller batches and shorter texts."""
    stages = tuple(
        dataclasses.replace(
            stage,
            steps=max(1, round(stage.steps * scale)),
            batch=max(1, round(stage.batch * min(1.0, scale))),
            length=round(stage.length * length_scale),
            drill_questions=max(1, round(stage.drill_questions * length_scale)),
        )
        for stage in size.stages
    )
    return dataclasses.replace(size, stages=stages)


if __name__ == "__main__":
    main()
