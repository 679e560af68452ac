"""`socket-trt generate`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from socket_trt.cli.console import RichProgress, err, out
from socket_trt.engine.manifest import EngineDirectory
from socket_trt.errors import RequestError
from socket_trt.runtime.open import open_generator
from socket_trt.runtime.sampling import SamplingParameters


def generate(
    directory: Annotated[Path, typer.Argument(help="Engine directory.")],
    stdin: Annotated[str | None, typer.Argument(metavar="[-]", help="-: read the prompt from standard input.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="UTF-8 file with the prompt; - is standard input.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among this many likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="Stop before this text; may be given again.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Do not stop at the model's end token.")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print text, tokens, counts and timings as JSON.")] = False,
) -> None:
    """Generate text from an engine directory."""
    text = _prompt(stdin, prompt, prompt_file)
    parameters = SamplingParameters(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    engine = EngineDirectory.open(directory)
    with open_generator(engine, RichProgress()) as generator:
        if stream and not as_json:
            generation = generator.stream(text, parameters)
            for piece in generation:
                sys.stdout.write(piece)
                sys.stdout.flush()
            sys.stdout.write("\n")
            result = generation.result
        else:
            (result,) = generator.generate([text], parameters)
    if result.error is not None:
        raise result.error
    if as_json:
        out.print_json(data=dataclasses.asdict(result))
        return
    if not stream:
        sys.stdout.write(result.text + "\n")
    random = "; the weights are random, so the text means nothing" if engine.manifest.model.random_weights else ""
    err.print(
        f"[dim]{result.prompt_tokens} prompt tokens, {len(result.token_ids)} generated ({result.finish_reason.value}){random}[/]"
    )


def _prompt(stdin: str | None, prompt: str | None, prompt_file: Path | None) -> str:
    """The one prompt that was given.  Raises RequestError for none, for several, and for one that is no text."""
    if stdin not in (None, "-"):
        raise RequestError(
            f"unexpected argument '{stdin}': give the prompt with --prompt, --prompt-file, or - for stdin"
        )
    if sum(source is not None for source in (stdin, prompt, prompt_file)) != 1:
        raise RequestError("give one of --prompt TEXT, --prompt-file FILE, and - for standard input")
    if prompt is not None:
        return prompt
    try:
        if stdin == "-" or str(prompt_file) == "-":
            return sys.stdin.buffer.read().decode()
        assert prompt_file is not None
        return prompt_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RequestError(f"the prompt is not UTF-8 text: {error}") from None
    except OSError as error:
        raise RequestError(f"{prompt_file}: {error.strerror}") from None
