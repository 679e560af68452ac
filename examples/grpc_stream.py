"""Stream text from a model that `socket-trt deploy` wrote, over gRPC: pip install "tritonclient[grpc]"

    python examples/grpc_stream.py --model tiny "Once upon a time"
    python examples/grpc_stream.py --model llama3-8b --chat --temperature 0.7 --timeout 30 "What is a hash code?"

`generate` is what to copy: one request, one stream; leaving its loop cancels the request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import tritonclient.grpc.aio as grpc
from grpc.aio import AioRpcError

# Triton's type and NumPy's, of every tensor that a request may have; all of them are optional, the prompt excepted.
TENSORS: dict[str, tuple[str, type]] = {
    "text_input": ("BYTES", np.object_),  # the prompt: this, or
    "input_ids": ("INT32", np.int32),  # token ids, or
    "messages": ("BYTES", np.object_),  # JSON, for the model's chat template
    "max_tokens": ("INT32", np.int32),
    "stream": ("BOOL", np.bool_),
    "temperature": ("FP32", np.float32),
    "top_k": ("INT32", np.int32),
    "top_p": ("FP32", np.float32),
    "seed": ("UINT64", np.uint64),
    "stop_words": ("BYTES", np.object_),
    "stop_token_ids": ("INT32", np.int32),
    "ignore_eos": ("BOOL", np.bool_),
    "exclude_input_in_output": ("BOOL", np.bool_),
    "return_token_ids": ("BOOL", np.bool_),
    "return_finish_reason": ("BOOL", np.bool_),
    "return_num_input_tokens": ("BOOL", np.bool_),
    "return_num_output_tokens": ("BOOL", np.bool_),
}


def tensor(name: str, value: Any) -> grpc.InferInput:
    triton_type, numpy_type = TENSORS[name]
    values = value if isinstance(value, (list, tuple)) else [value]
    encoded = [item.encode() if isinstance(item, str) else item for item in values]
    result = grpc.InferInput(name, [len(encoded)], triton_type)
    result.set_data_from_numpy(np.array(encoded, numpy_type))
    return result


async def generate(
    client: grpc.InferenceServerClient, model: str, timeout: float | None = None, **values: Any
) -> AsyncIterator[dict[str, Any]]:
    """The parts of an answer as they come: each a dictionary of the outputs that it has.

    timeout  seconds after which the server gives up
    values   tensors by name; lists for stop_words, stop_token_ids and input_ids

    Raises InferenceServerException with the server's message where it refuses the request or fails, or with gRPC's
    where the server cannot be reached.
    """

    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {
            "model_name": model,
            "inputs": [tensor(name, value) for name, value in values.items()],
            "timeout": None if timeout is None else int(timeout * 1e6),
        }

    responses = client.stream_infer(requests())
    failure, ended = None, False
    try:
        async for result, error in responses:
            if error is not None:
                failure = error  # the last that comes
            else:
                yield {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}
        ended = True
    except AioRpcError as error:
        ended = True
        raise grpc.InferenceServerException(error.details(), str(error.code())) from None
    finally:
        if not ended:  # a stream that has ended is not cancelled: server 2.51 would then wait for it when it stops
            responses.cancel()
    if failure is not None:
        raise failure


async def main() -> None:
    parser = argparse.ArgumentParser(description="Stream text from a model in Triton Inference Server.")
    parser.add_argument("prompt")
    parser.add_argument("--url", default="localhost:8001")
    parser.add_argument("--model", required=True)
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message, for the chat template")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--timeout", type=float, help="seconds")
    arguments = parser.parse_args()

    values: dict[str, Any] = {"max_tokens": arguments.max_tokens, "temperature": arguments.temperature}
    if arguments.seed is not None:
        values["seed"] = arguments.seed
    if arguments.chat:
        values["messages"] = json.dumps([{"role": "user", "content": arguments.prompt}])
    else:
        values["text_input"] = arguments.prompt
    async with grpc.InferenceServerClient(arguments.url) as client:
        wanted = {"stream": True, "return_finish_reason": True, "return_num_output_tokens": True}
        async for part in generate(client, arguments.model, arguments.timeout, **values, **wanted):
            sys.stdout.write(part["text_output"][0].decode())
            sys.stdout.flush()
            if "finish_reason" in part:
                reason, tokens = part["finish_reason"][0].decode(), part["num_output_tokens"][0]
                print(f"\n[{tokens} tokens, {reason}]", file=sys.stderr)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except grpc.InferenceServerException as error:
        sys.exit(f"error: {error.message()}")
