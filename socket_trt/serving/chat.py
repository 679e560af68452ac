"""Chat templates: the checkpoint's own, rendered as transformers renders them, in a sandbox."""

from __future__ import annotations

import datetime
import json
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from socket_trt.engine.manifest import EngineDirectory
from socket_trt.errors import EngineError, RequestError

CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """Turns messages into the text of a prompt, special tokens included."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        """`source`: Jinja; `special_tokens`: by the names that templates use (`bos_token`, ...).

        Raises EngineError where the source is no template.
        """
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        self._special_tokens = special_tokens
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise EngineError(f"the chat template cannot be read: {error}; copy the checkpoint's again") from None

    @classmethod
    def of(cls, engine: EngineDirectory) -> ChatTemplate | None:
        """The engine's template, chat_template.jinja before the one in tokenizer_config.json; None where it has none."""
        file = engine.path / CONFIG_FILE
        try:
            settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        except ValueError as error:
            raise EngineError(f"{file}: no JSON ({error}); copy the checkpoint's there again") from None
        own = engine.path / TEMPLATE_FILE
        source = own.read_text(encoding="utf-8") if own.is_file() else settings.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = next((named["template"] for named in source if named["name"] == "default"), None)
        if source is None:
            return None
        tokens = {name: settings[name] for name in _SPECIAL_TOKENS if settings.get(name)}
        return cls(source, {name: t["content"] if isinstance(t, dict) else t for name, t in tokens.items()})

    def render(self, messages: Any) -> str:
        """The prompt of a conversation, up to where the assistant's answer begins.

        messages  a list of {"role": str, "content": ...}, not empty

        Raises RequestError where they are not, or are refused by the template.
        """
        fits = isinstance(messages, list) and messages
        if not fits or not all(isinstance(message, dict) and "role" in message for message in messages):
            raise RequestError('messages is not a list of {"role": ..., "content": ...} with at least one entry')
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._special_tokens)
        except Exception as error:  # a template can raise anything on content of another type than it expects
            raise RequestError(f"the model's chat template refuses these messages: {error}") from None


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, with which templates mark what an assistant said; rendering it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own escapes what HTML would not take; prompts are no HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
