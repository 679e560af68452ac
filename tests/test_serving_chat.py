"""Chat templates against transformers, which defines what they mean."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from socket_trt.engine.manifest import EngineDirectory
from socket_trt.errors import EngineError, RequestError
from socket_trt.serving.chat import ChatTemplate
from tests.engines import tiny_engine

CONVERSATION = [
    {"role": "system", "content": "Be brief.  "},
    {"role": "user", "content": "1 < 2 & 'x'?"},
    {"role": "assistant", "content": "Yes,\n\nit is."},
    {"role": "user", "content": '日本 "quoted"'},
]

# What real templates do: trimming, loops with controls, namespaces, JSON, dates, generation marks, special tokens.
TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m['content'] | trim }}{{ eos_token }}{% endfor %}",
    "{% for m in messages %}\n    {% if loop.first %}{% continue %}{% endif %}\n  {{ m.role }}: {{ m.content }}\n"
    "    {% if loop.index > 2 %}{% break %}{% endif %}\n{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m | tojson }}{% endfor %}",
    "{{ messages | tojson(indent=2) }}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "{{ strftime_now('%Y') }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "{%- for m in messages -%}\n{{- m.content.split(' ')[0] -}}\n{%- endfor -%}{{ pad_token or 'none' }}{{ undefined }}",
]


@pytest.fixture
def engine(tmp_path: Path) -> EngineDirectory:
    shutil.copytree(tiny_engine(), tmp_path / "engine")
    return EngineDirectory.open(tmp_path / "engine")


def set_template(engine: EngineDirectory, template: Any) -> None:
    file = engine.path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["chat_template"] = template
    file.write_text(json.dumps(settings))


@pytest.mark.parametrize("template", [None, *TEMPLATES])
def test_a_template_means_what_transformers_makes_of_it(engine: EngineDirectory, template: str | None) -> None:
    if template is not None:
        set_template(engine, template)
    own = ChatTemplate.of(engine)
    assert own is not None
    expected = AutoTokenizer.from_pretrained(str(engine.path)).apply_chat_template(
        CONVERSATION, tokenize=False, add_generation_prompt=True
    )
    assert own.render(CONVERSATION) == expected


def test_a_template_in_its_own_file_comes_first(engine: EngineDirectory) -> None:
    (engine.path / "chat_template.jinja").write_text("from the file: {{ messages[0].content }}")
    template = ChatTemplate.of(engine)
    assert template is not None
    assert template.render([{"role": "user", "content": "x"}]) == "from the file: x"


def test_of_several_templates_the_default_is_taken(engine: EngineDirectory) -> None:
    set_template(engine, [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}])
    template = ChatTemplate.of(engine)
    assert template is not None
    assert template.render(CONVERSATION) == "yes"


def test_special_tokens_may_be_written_at_length(engine: EngineDirectory) -> None:
    file = engine.path / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {
        "chat_template": "{{ bos_token }}",
        "bos_token": {"content": "<s>", "lstrip": False},
    }
    file.write_text(json.dumps(settings))
    template = ChatTemplate.of(engine)
    assert template is not None
    assert template.render(CONVERSATION) == "<s>"


def test_engines_without_a_template(engine: EngineDirectory) -> None:
    (engine.path / "tokenizer_config.json").unlink()
    assert ChatTemplate.of(engine) is None


def test_a_damaged_configuration_and_a_damaged_template(engine: EngineDirectory) -> None:
    set_template(engine, "{% for %}")
    with pytest.raises(EngineError, match="the chat template cannot be read"):
        ChatTemplate.of(engine)
    (engine.path / "tokenizer_config.json").write_text("{")
    with pytest.raises(EngineError, match="no JSON"):
        ChatTemplate.of(engine)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('not like this') }}",
        "{{ messages[0].content.no.such }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 1 // 0 }}",
    ],
)
def test_templates_that_refuse_or_reach_out_of_the_sandbox(template: str) -> None:
    with pytest.raises(RequestError, match="chat template refuses these messages"):
        ChatTemplate(template, {}).render([{"role": "user", "content": "x"}])
