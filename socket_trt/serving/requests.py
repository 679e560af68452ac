"""From the tensors of a request to what the generator is asked for, or one clear error."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from socket_trt.errors import RequestError
from socket_trt.runtime.sampling import SamplingParameters
from socket_trt.runtime.scheduler import check_length
from socket_trt.runtime.session import SessionLimits
from socket_trt.serving import protocol
from socket_trt.serving.chat import ChatTemplate

# Every token of every live request is compared with all of these.
MAX_STOP_WORDS = 64
MAX_STOP_WORD_LENGTH = 128  # characters
MAX_STOP_TOKEN_IDS = 1024

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class TextRequest:
    """A request that was read and found well-formed.

    prompt         token ids
    prefix         text to answer before the generated text: the prompt's, where it was wanted and was text
    parameters     of sampling
    stream         text as it comes, instead of all at the end
    return_*       which outputs are wanted besides the text
    timeout        seconds from its arrival; None: any time
    """

    prompt: tuple[int, ...]
    parameters: SamplingParameters
    prefix: str = ""
    stream: bool = False
    return_token_ids: bool = False
    return_finish_reason: bool = False
    return_num_input_tokens: bool = False
    return_num_output_tokens: bool = False
    timeout: float | None = None


class RequestReader:
    """Reads requests for one engine.  Called from any thread."""

    def __init__(self, tokenizer: Tokenizer | None, limits: SessionLimits, template: ChatTemplate | None) -> None:
        """`tokenizer` None: requests give token ids; `template` None: they give no messages."""
        self._tokenizer = tokenizer
        self._template = template
        self._limits = limits
        # No text longer than this can fit, so that a huge one is refused before it takes minutes to tokenise.
        vocabulary = tokenizer.get_vocab() if tokenizer is not None else {}
        self._max_characters = limits.max_seq_len * max(map(len, vocabulary), default=1)

    def read(self, tensors: Mapping[str, Array], timeout: float | None = None) -> TextRequest:
        """Read a request.

        tensors  by the names of `protocol.INPUTS`; BYTES as object arrays of bytes
        timeout  seconds, if the request has one

        Raises RequestError for whatever is wrong with it, but for what only the scheduler can say.
        """
        given = [name for name in protocol.PROMPTS if name in tensors]
        if len(given) != 1:
            raise RequestError(f"give one of {', '.join(protocol.PROMPTS)}; the request has {given or 'none'}")
        if timeout is not None and not timeout > 0:
            raise RequestError(f"{protocol.TIMEOUT} is {timeout:g} s: expected more than 0")
        parameters = _sampling_parameters(tensors)
        if parameters.stop and self._tokenizer is None:
            raise RequestError("this engine has no tokenizer: give stop_token_ids instead of stop_words")
        prompt, prefix = self._prompt(given[0], tensors[given[0]])
        return TextRequest(
            prompt=prompt,
            prefix="" if _flag(tensors, protocol.EXCLUDE_INPUT, True) else prefix,
            parameters=parameters,
            stream=_flag(tensors, protocol.STREAM),
            return_token_ids=_flag(tensors, protocol.RETURN_TOKEN_IDS),
            return_finish_reason=_flag(tensors, protocol.RETURN_FINISH_REASON),
            return_num_input_tokens=_flag(tensors, protocol.RETURN_NUM_INPUT_TOKENS),
            return_num_output_tokens=_flag(tensors, protocol.RETURN_NUM_OUTPUT_TOKENS),
            timeout=timeout,
        )

    def _prompt(self, name: str, tensor: Array) -> tuple[tuple[int, ...], str]:
        """Token ids and text of the prompt; "" for one of token ids."""
        if name == protocol.INPUT_IDS:
            check_length(tensor.size, self._limits)  # before millions of them are anybody else's work
            return tuple(tensor.reshape(-1).tolist()), ""  # who gives token ids has them
        if self._tokenizer is None:
            raise RequestError(
                f"this engine has no tokenizer: give {protocol.INPUT_IDS}, {protocol.RETURN_TOKEN_IDS} true"
            )
        text = _text(name, _single(name, tensor))
        if name == protocol.MESSAGES:
            text = self._render(text)
        elif not text:
            raise RequestError(f"{name} is empty")
        if len(text) > self._max_characters:
            raise RequestError(f"the prompt has {len(text)} characters: more than this engine's tokens could hold")
        # As a batch of one: the tokenizer then leaves the interpreter to other threads.  A template writes the special
        # tokens itself.
        encoding = self._tokenizer.encode_batch_fast([text], add_special_tokens=name == protocol.TEXT_INPUT)[0]
        check_length(len(encoding), self._limits)
        return tuple(encoding.ids), text

    def _render(self, text: str) -> str:
        if self._template is None:
            raise RequestError(f"this model has no chat template: give {protocol.TEXT_INPUT} instead")
        try:
            messages = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{protocol.MESSAGES} is no JSON: {error}") from None
        return self._template.render(messages)


def _sampling_parameters(tensors: Mapping[str, Array]) -> SamplingParameters:
    values: dict[str, Any] = {}
    for field, spec in protocol.SAMPLING.items():
        if spec.name in tensors:
            values[field] = tensors[spec.name].reshape(-1).tolist() if spec.is_list else _number(tensors, spec.name)
    if "stop" in values:
        name = protocol.SAMPLING["stop"].name
        if len(values["stop"]) > MAX_STOP_WORDS:
            raise RequestError(f"{name} has {len(values['stop'])} entries: expected {MAX_STOP_WORDS} at most")
        values["stop"] = [_text(name, value) for value in values["stop"]]
        if max(map(len, values["stop"]), default=0) > MAX_STOP_WORD_LENGTH:
            raise RequestError(f"{name}: an entry has more than {MAX_STOP_WORD_LENGTH} characters")
    if len(values.get("stop_token_ids", ())) > MAX_STOP_TOKEN_IDS:
        raise RequestError(
            f"stop_token_ids has {len(values['stop_token_ids'])} entries: expected {MAX_STOP_TOKEN_IDS} at most"
        )
    return SamplingParameters(**values)


def _single(name: str, tensor: Array) -> Any:
    if tensor.size != 1:
        raise RequestError(f"{name} has {tensor.size} values: expected one")
    return tensor.reshape(-1)[0]


def _number(tensors: Mapping[str, Array], name: str) -> Any:
    return np.asarray(_single(name, tensors[name])).item()


def _flag(tensors: Mapping[str, Array], name: str, default: bool = False) -> bool:
    return bool(_single(name, tensors[name])) if name in tensors else default


def _text(name: str, value: Any) -> str:
    try:
        return value.decode() if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is no UTF-8 text: {error.reason} at byte {error.start}") from None
