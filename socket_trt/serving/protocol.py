"""What clients and server exchange: the tensors of a request and of a response, by the names Triton's LLM users know."""

from __future__ import annotations

import dataclasses
from typing import Literal

TensorType = Literal["STRING", "INT32", "UINT64", "FP32", "BOOL"]


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """`type` as config.pbtxt names it; a tensor is one value, or a list of any length."""

    name: str
    type: TensorType
    is_list: bool = False

    @property
    def dims(self) -> list[int]:
        return [-1 if self.is_list else 1]


# The prompt: exactly one of these.
TEXT_INPUT = "text_input"  # text, to which the tokenizer adds its special tokens
INPUT_IDS = "input_ids"  # token ids
MESSAGES = "messages"  # JSON: a list of {"role": ..., "content": ...}, for the model's own chat template
PROMPTS = (TEXT_INPUT, INPUT_IDS, MESSAGES)

STREAM = "stream"
EXCLUDE_INPUT = "exclude_input_in_output"
RETURN_TOKEN_IDS = "return_token_ids"
RETURN_FINISH_REASON = "return_finish_reason"
RETURN_NUM_INPUT_TOKENS = "return_num_input_tokens"
RETURN_NUM_OUTPUT_TOKENS = "return_num_output_tokens"

# By the names of `SamplingParameters`.
SAMPLING = {
    "max_tokens": TensorSpec("max_tokens", "INT32"),
    "temperature": TensorSpec("temperature", "FP32"),
    "top_k": TensorSpec("top_k", "INT32"),
    "top_p": TensorSpec("top_p", "FP32"),
    "seed": TensorSpec("seed", "UINT64"),
    "stop": TensorSpec("stop_words", "STRING", is_list=True),
    "stop_token_ids": TensorSpec("stop_token_ids", "INT32", is_list=True),
    "ignore_eos": TensorSpec("ignore_eos", "BOOL"),
}

# All inputs are optional for Triton, which then leaves it to the model to say what is missing.
INPUTS = (
    TensorSpec(TEXT_INPUT, "STRING"),
    TensorSpec(INPUT_IDS, "INT32", is_list=True),
    TensorSpec(MESSAGES, "STRING"),
    TensorSpec(STREAM, "BOOL"),
    *SAMPLING.values(),
    TensorSpec(EXCLUDE_INPUT, "BOOL"),
    TensorSpec(RETURN_TOKEN_IDS, "BOOL"),
    TensorSpec(RETURN_FINISH_REASON, "BOOL"),
    TensorSpec(RETURN_NUM_INPUT_TOKENS, "BOOL"),
    TensorSpec(RETURN_NUM_OUTPUT_TOKENS, "BOOL"),
)

TEXT_OUTPUT = "text_output"
OUTPUT_IDS = "output_ids"
FINISH_REASON = "finish_reason"
NUM_INPUT_TOKENS = "num_input_tokens"
NUM_OUTPUT_TOKENS = "num_output_tokens"

OUTPUTS = (
    TensorSpec(TEXT_OUTPUT, "STRING"),
    TensorSpec(OUTPUT_IDS, "INT32", is_list=True),
    TensorSpec(FINISH_REASON, "STRING"),
    TensorSpec(NUM_INPUT_TOKENS, "INT32"),
    TensorSpec(NUM_OUTPUT_TOKENS, "INT32"),
)

# The parameter of a request, in microseconds, that the clients of Triton call `timeout`.
TIMEOUT = "timeout"
