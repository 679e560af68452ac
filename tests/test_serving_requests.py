from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from socket_trt.errors import RequestError
from socket_trt.models.tiny import BEGIN_ID, CHAT_TEMPLATE, END_ID, byte_tokenizer
from socket_trt.runtime.sampling import SamplingParameters
from socket_trt.runtime.session import SessionLimits
from socket_trt.serving import protocol
from socket_trt.serving.chat import ChatTemplate
from socket_trt.serving.requests import RequestReader, TextRequest

LIMITS = SessionLimits(vocabulary_size=260, page_size=4, num_pages=33, max_batch_size=4, max_seq_len=64)
TEMPLATE = ChatTemplate(CHAT_TEMPLATE, {"bos_token": "<|begin_of_text|>"})
READER = RequestReader(byte_tokenizer(), LIMITS, TEMPLATE)
MESSAGES = [{"role": "user", "content": "Hi"}]

_NUMPY = {"STRING": np.object_, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_}


def tensors(**values: Any) -> dict[str, Any]:
    """Tensors as Triton hands them over; the prompt is "Hi" where none is given."""
    if not set(protocol.PROMPTS) & values.keys():
        values["text_input"] = "Hi"
    specs = {spec.name: spec for spec in protocol.INPUTS}
    arrays = {}
    for name, value in values.items():
        items = value if isinstance(value, (list, tuple)) else [value]
        items = [item.encode() if isinstance(item, str) else item for item in items]
        arrays[name] = np.array(items, _NUMPY[specs[name].type])
    return arrays


def test_defaults() -> None:
    assert READER.read(tensors()) == TextRequest((BEGIN_ID, *b"Hi"), SamplingParameters())


def test_everything_at_once() -> None:
    request = READER.read(
        tensors(
            text_input="Hi",
            max_tokens=5,
            temperature=0.5,
            top_k=3,
            top_p=0.25,
            seed=2**64 - 1,
            stop_words=["a", "日本"],
            stop_token_ids=[3, 4],
            ignore_eos=True,
            stream=True,
            exclude_input_in_output=False,
            return_token_ids=True,
            return_finish_reason=True,
            return_num_input_tokens=True,
            return_num_output_tokens=True,
        ),
        timeout=1.5,
    )
    assert request == TextRequest(
        prompt=(BEGIN_ID, *b"Hi"),
        prefix="Hi",
        parameters=SamplingParameters(5, 0.5, 3, 0.25, 2**64 - 1, ("a", "日本"), (3, 4), True),
        stream=True,
        return_token_ids=True,
        return_finish_reason=True,
        return_num_input_tokens=True,
        return_num_output_tokens=True,
        timeout=1.5,
    )


def test_every_input_is_read() -> None:
    """A tensor that config.pbtxt offers and nothing looks at would be ignored in silence."""

    class Watched(dict[str, Any]):
        read = frozenset[str]()

        def __getitem__(self, name: str) -> Any:
            self.read |= {name}
            return super().__getitem__(name)

    given = {spec.name: [1] if spec.is_list else 1 for spec in protocol.INPUTS if spec.name not in protocol.PROMPTS}
    watched = Watched(tensors(**given | {"stop_words": ["a"]}))
    READER.read(watched)
    assert watched.read == watched.keys()


def test_token_ids_stand_for_themselves() -> None:
    request = READER.read(tensors(input_ids=[1, 2, 3], exclude_input_in_output=False))
    assert request.prompt == (1, 2, 3)
    assert request.prefix == ""


def test_messages_go_through_the_template_and_get_no_second_beginning() -> None:
    request = READER.read(tensors(messages=json.dumps(MESSAGES), exclude_input_in_output=False))
    assert request.prefix == "<|begin_of_text|>[user] Hi\n[assistant] "
    assert request.prompt == (BEGIN_ID, *b"[user] Hi\n[assistant] ")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text_input": ""}, "text_input is empty"),
        ({"text_input": b"\xffabc"}, "text_input is no UTF-8 text: invalid start byte at byte 0"),
        ({"text_input": ["a", "b"]}, "text_input has 2 values: expected one"),
        ({"text_input": "a", "input_ids": [1]}, "give one of text_input, input_ids, messages; the request has"),
        ({"text_input": "x" * (64 * 17 + 1)}, "the prompt has 1089 characters"),
        ({"messages": "["}, "messages is no JSON"),
        ({"messages": "[" * 100_000}, "messages is no JSON"),
        ({"messages": "{}"}, "messages is not a list"),
        ({"messages": "[]"}, "messages is not a list"),
        ({"messages": '[{"content": "x"}]'}, "messages is not a list"),
        ({"messages": '[{"role": "x"}]'}, "refuses these messages: a message is from the system, a user"),
        ({"max_tokens": 0}, "max_tokens is 0: expected at least 1"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"stop_words": [""]}, "none of them empty"),
        ({"stop_words": [b"\xc3"]}, "stop_words is no UTF-8 text"),
        ({"stop_words": [f"w{i}" for i in range(10_000)]}, "stop_words has 10000 entries: expected 64 at most"),
        ({"stop_words": ["x" * 129]}, "stop_words: an entry has more than 128 characters"),
        ({"stop_token_ids": [-1]}, "stop_token_ids is"),
        ({"stop_token_ids": list(range(2000))}, "stop_token_ids has 2000 entries: expected 1024 at most"),
        ({"max_tokens": [1, 2]}, "max_tokens has 2 values"),
        ({"stream": [True, False]}, "stream has 2 values"),
    ],
)
def test_what_is_wrong_is_said(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        READER.read(tensors(**given))
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


def test_no_prompt_at_all() -> None:
    with pytest.raises(RequestError, match="give one of text_input, input_ids, messages; the request has none"):
        READER.read({})


@pytest.mark.parametrize("timeout", [0.0, -1.0, float("nan")])
def test_a_timeout_is_more_than_nothing(timeout: float) -> None:
    with pytest.raises(RequestError, match="expected more than 0"):
        READER.read(tensors(), timeout=timeout)


def test_a_model_without_a_template_says_so() -> None:
    with pytest.raises(RequestError, match="no chat template: give text_input instead"):
        RequestReader(byte_tokenizer(), LIMITS, None).read(tensors(messages=json.dumps(MESSAGES)))


def test_special_tokens_in_a_text_are_the_tokens() -> None:
    assert READER.read(tensors(text_input="<|end_of_text|>")).prompt == (BEGIN_ID, END_ID)


def test_an_engine_without_a_tokenizer_takes_token_ids() -> None:
    reader = RequestReader(None, LIMITS, TEMPLATE)
    assert reader.read(tensors(input_ids=[5, 6], return_token_ids=True)).prompt == (5, 6)
    for given in ({"text_input": "a"}, {"messages": json.dumps(MESSAGES)}):
        with pytest.raises(RequestError, match="this engine has no tokenizer: give input_ids"):
            reader.read(tensors(**given))
    with pytest.raises(RequestError, match="give stop_token_ids instead of stop_words"):
        reader.read(tensors(input_ids=[5], stop_words=["a"]))


@pytest.mark.parametrize("values", [{"input_ids": [5] * 64}, {"text_input": "x" * 63}])
def test_a_prompt_over_the_limit_is_refused_before_it_reaches_the_loop(values: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="the prompt has 64 tokens; this engine's limit is 64"):
        READER.read(tensors(**values))
