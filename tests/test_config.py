"""Parameters and their ranges."""

from __future__ import annotations

import pytest

from socket_trt.config import INT32_MAX, OperatorAttributes, Selection, SocketConfig, parse_budget
from socket_trt.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "tokens", "permille"),
    [
        ("0.05", 0, 50),
        ("0.001", 0, 1),
        (".5", 0, 500),
        ("1.0", 0, 1000),
        ("0.050", 0, 50),
        ("1024", 1024, 0),
        ("0", 0, 0),
        ("0.05,1024", 1024, 50),
        ("1024, 0.05", 1024, 50),
        (str(INT32_MAX), INT32_MAX, 0),
    ],
)
def test_budgets(text: str, tokens: int, permille: int) -> None:
    assert parse_budget(text) == {"budget_tokens": tokens, "budget_permille": permille}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.0005", "steps of 0.001"),
        ("0.0", "between 0.001 and 1.0"),
        ("1.5", "between 0.001 and 1.0"),
        (str(INT32_MAX + 1), "between 0 and"),
        ("-5", "give a fraction"),
        ("5%", "give a fraction"),
        ("", "give a fraction"),
        ("0.05,0.1", "at most one fraction"),
        ("10,20", "at most one fraction"),
    ],
)
def test_budgets_that_mean_nothing(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_budget(text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"planes": 17}, "planes: .* less than or equal to 16 .got 17"),
        ({"planes": 0}, "planes"),
        ({"tables": 129}, "tables"),
        ({"tables": 0}, "tables"),
        ({"temperature": 0.0}, "temperature"),
        ({"window": 0}, "window"),
        ({"sink": -1}, "sink"),
        ({"page_size": 48}, "48 is not a power of two"),
        ({"page_size": 8}, "page_size"),
        ({"page_size": 512}, "page_size"),
        ({"budget_permille": 1001}, "budget_permille"),
        ({"selection": "nobody"}, "'nobody' is none of query_head, kv_head"),
        ({"typo": 1}, "typo"),
    ],
)
def test_values_out_of_range_are_one_line(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        SocketConfig.create(**values)
    assert "\n" not in str(caught.value)


def test_what_follows_from_a_configuration() -> None:
    config = SocketConfig.create(planes=10, page_size=64, selection="kv_head")
    assert config.selection is Selection.kv_head
    assert (config.code_bits, config.code_words) == (16, 32)
    assert SocketConfig(planes=8, page_size=64).code_words == 16
    assert config.keeps_everything().budget(10**6) == INT32_MAX
    assert config.attends_densely().min_length == INT32_MAX
    attributes = config.attributes(0.125, sliding_window=4096, softcap=50.0)
    assert attributes.as_dict() == {
        "scale": 0.125,
        "temperature": 0.3,
        "sink": 128,
        "window": 128,
        "budget_tokens": 1024,
        "budget_permille": 50,
        "min_length": 32768,
        "selection": 1,
        "page_size": 64,
        "sliding_window": 4096,
        "softcap": 50.0,
    }
    assert attributes.replace(sink=1) == OperatorAttributes(**attributes.as_dict() | {"sink": 1})
    assert SocketConfig.model_validate_json(config.model_dump_json()) == config
