"""Accuracy of a session on a suite of texts: contexts prefilled, questions decoded, answers generated greedily and scored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from socket_trt.engine.manifest import EngineDirectory
from socket_trt.errors import ConfigError
from socket_trt.progress import Progress
from socket_trt.quality.evaluate import EvalReport, SampleResult, about_engine, generated, resumed
from socket_trt.quality.suites import TextItem
from socket_trt.runtime.open import load_tokenizer, max_step_tokens
from socket_trt.runtime.sampling import SamplingParameters
from socket_trt.runtime.scheduler import FinishReason, Scheduler
from socket_trt.runtime.session import Session


def run_text_eval(
    engine: EngineDirectory, suite: str, items: Sequence[TextItem], chat: bool, progress: Progress, output: Path | None
) -> EvalReport:
    """Evaluate an engine on `items`; `output`: see `evaluate.run_eval`.

    chat  give what the suite gives chat models in the engine's chat template

    Raises ConfigError where a text does not fit into the engine, and for `chat` without a template.
    """
    tokenizer = load_tokenizer(engine)
    prepared = {(item.task, item.index): prepare(item, tokenizer, engine, chat) for item in items}
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item.task}\0{item.index}\0{item.prompt}\0{item.max_tokens}\0".encode())
    about = {**about_engine(engine), "suite": suite, "chat": chat, "data": digest.hexdigest()}
    by_key = {(item.task, item.index): item for item in items}

    def answer(session: Session, missing: Sequence[tuple[str, int]]) -> Iterable[SampleResult]:
        scheduler = Scheduler(session, engine.manifest.model.stop_token_ids, max_step_tokens=max_step_tokens(engine))
        asked: dict[int, tuple[TextItem, list[int]]] = {}

        def submit(key: tuple[str, int]) -> None:
            tokens, decoded = prepared[key]
            parameters = SamplingParameters(max_tokens=by_key[key].max_tokens)
            asked[scheduler.submit(tokens, parameters, decoded=decoded)] = by_key[key], []

        with progress.task(f"Answering {len(missing)} samples of {suite}", len(missing)) as advance:
            for event, token in generated(scheduler, session.limits.max_batch_size, missing, submit):
                item, said = asked[event.request_id]
                if event.finish_reason is not FinishReason.stop_token:
                    said.append(token)
                if event.finish_reason is not None:
                    del asked[event.request_id]
                    text = tokenizer.decode(said)
                    yield SampleResult(item.task, item.index, item.score(text), [said], text)
                    advance(1)

    return resumed(engine, about, list(prepared), answer, progress, output)


def prepare(item: TextItem, tokenizer: Tokenizer, engine: EngineDirectory, chat: bool) -> tuple[list[int], int]:
    """Tokens of an item, and how many of the last ones are decoded: those of the question, and what follows it.

    Raises ConfigError where the engine has no room for it and the suite does not shorten.
    """
    text, question, own = item.prompt, item.question, True
    if chat and item.chat:
        text, question, own = *_in_chat(item, engine), False
    encoding = tokenizer.encode(text, add_special_tokens=own)
    tokens: list[int] = list(encoding.ids)
    decoded = sum(begin >= question and end > begin for begin, end in encoding.offsets)
    room = engine.manifest.max_seq_len - item.max_tokens
    if len(tokens) > room:
        if not item.shorten or room < 2:
            raise ConfigError(
                f"sample {item.index} of {item.task} has {len(tokens)} tokens and {item.max_tokens} of answer; this engine "
                f"holds {engine.manifest.max_seq_len}: build it with a larger --max-seq-len, or give shorter samples"
            )
        tokens = [*tokens[: room // 2], *tokens[len(tokens) - (room - room // 2) :]]
    return tokens, max(1, min(decoded, len(tokens) - 2)) if len(tokens) > 2 else 0


def _in_chat(item: TextItem, engine: EngineDirectory) -> tuple[str, int]:
    """The rendered text, and where the question begins in it."""
    from socket_trt.cli.extras import needs

    with needs("serving", "--chat"):
        from socket_trt.serving.chat import ChatTemplate
    template = ChatTemplate.of(engine)
    if template is None:
        raise ConfigError(f"{engine.path}: --chat: its checkpoint had no chat template")
    text = template.render([{"role": "user", "content": item.prompt}])
    question = item.prompt[item.question :].strip()
    return text, text.rfind(question) if question else len(text)
