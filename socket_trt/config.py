"""Parameters of SOCKET: what a user chooses (`SocketConfig`) and what one operator is told (`OperatorAttributes`).

The four implementations of the operator read the same attribute names, and `attended_budget` is the one place that
says in Python how many tokens a decode query may choose.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from socket_trt.errors import ConfigError

INT32_MAX = 2**31 - 1

MAX_TABLES = 128
MAX_PLANES = 16
MIN_PAGE_SIZE = 16
MAX_PAGE_SIZE = 256


class Selection(enum.IntEnum):
    """Who selects: every query head for itself (the paper), or the query heads of a KV head together."""

    query_head = 0
    kv_head = 1


class AttentionKind(str, enum.Enum):
    """What an engine's attention does with a decode query."""

    socket = "socket"
    dense = "dense"


def code_bits(planes: int) -> int:
    """Bits that a code of `planes` planes takes in the code cache: 8 up to 8 planes, else 16."""
    return 8 if planes <= 8 else 16


def attended_budget(length: int, budget_tokens: int, budget_permille: int) -> int:
    """M, the number of tokens a decode query at `length` may choose besides the sink and the window.

    max(budget_tokens, ceil(length * budget_permille / 1000)) in integers, so that no two implementations round apart.
    """
    return max(budget_tokens, (length * budget_permille + 999) // 1000)


@dataclasses.dataclass(frozen=True)
class OperatorAttributes:
    """Attributes of one `SocketAttention` node, in the schema's order.

    scale            factor on query . key before the softmax
    temperature      tau of the bucket probabilities
    sink, window     tokens always attended at the start and at the end (the current token is in the window)
    budget_tokens, budget_permille   M = max(budget_tokens, ceil(length * budget_permille / 1000))
    min_length       sequences no longer than this are attended densely
    selection        `Selection` as an integer
    page_size        tokens a page of the cache holds
    sliding_window   only the last `sliding_window` tokens can be attended; -1: all
    softcap          scores become softcap * tanh(score / softcap); 0: off
    """

    scale: float
    temperature: float
    sink: int
    window: int
    budget_tokens: int
    budget_permille: int
    min_length: int
    selection: int
    page_size: int
    sliding_window: int = -1
    softcap: float = 0.0

    def replace(self, **changes: Any) -> OperatorAttributes:
        return dataclasses.replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class SocketConfig(BaseModel):
    """The method's parameters, the same for every layer of a model (docs/method.md explains them)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tables: int = Field(60, ge=1, le=MAX_TABLES, description="L, hash tables")
    planes: int = Field(8, ge=1, le=MAX_PLANES, description="R, hyperplanes a table")
    temperature: float = Field(0.3, gt=0.0, description="tau of the bucket probabilities")
    sink: int = Field(128, ge=0, le=INT32_MAX, description="first tokens, always attended")
    window: int = Field(128, ge=1, le=INT32_MAX, description="last tokens, always attended, the current one included")
    budget_tokens: int = Field(1024, ge=0, le=INT32_MAX, description="least number of chosen tokens")
    budget_permille: int = Field(50, ge=0, le=1000, description="chosen tokens per 1000 tokens of length")
    # Measured at batch 1: on an H200 slower than dense at 16K tokens, faster at 32K (benchmarks/results).
    min_length: int = Field(32768, ge=0, le=INT32_MAX, description="sequences no longer than this are attended densely")
    selection: Selection = Selection.query_head
    page_size: int = Field(128, ge=MIN_PAGE_SIZE, le=MAX_PAGE_SIZE, description="tokens a page of the cache")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="seed of the hyperplanes")

    @field_validator("page_size")
    @classmethod
    def _power_of_two(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError(f"{value} is not a power of two")
        return value

    @field_validator("selection", mode="before")
    @classmethod
    def _selection_by_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            try:
                return Selection[value]
            except KeyError:
                raise ValueError(f"'{value}' is none of {', '.join(s.name for s in Selection)}") from None
        return value

    @classmethod
    def create(cls, **values: Any) -> SocketConfig:
        """`SocketConfig(**values)` with a `ConfigError` of one line where a value is out of its range."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise config_error(error) from None

    @property
    def code_bits(self) -> int:
        return code_bits(self.planes)

    @property
    def code_words(self) -> int:
        """int32 words that one table's codes of one page take."""
        return self.page_size * self.code_bits // 32

    def budget(self, length: int) -> int:
        return attended_budget(length, self.budget_tokens, self.budget_permille)

    def keeps_everything(self) -> SocketConfig:
        """The same configuration with a budget no sequence exceeds: the sparse path, computing dense attention."""
        return self.model_copy(update={"budget_tokens": INT32_MAX})

    def attends_densely(self) -> SocketConfig:
        """The same configuration with every sequence on the dense path: the baseline engine."""
        return self.model_copy(update={"min_length": INT32_MAX})

    def attributes(self, scale: float, sliding_window: int = -1, softcap: float = 0.0) -> OperatorAttributes:
        """Attributes of the operator of one layer."""
        return OperatorAttributes(
            scale=scale,
            temperature=self.temperature,
            sink=self.sink,
            window=self.window,
            budget_tokens=self.budget_tokens,
            budget_permille=self.budget_permille,
            min_length=self.min_length,
            selection=int(self.selection),
            page_size=self.page_size,
            sliding_window=sliding_window,
            softcap=softcap,
        )


def parse_budget(text: str) -> dict[str, int]:
    """`--budget` as fields of `SocketConfig`.

    "0.05" keeps 5 % of the tokens, "1024" keeps 1024 tokens, and "0.05,1024" whichever is more.

    Raises ConfigError for anything else, for fractions that are no multiple of 0.001, and for values out of range.
    """
    fields = {"budget_tokens": 0, "budget_permille": 0}
    seen: set[str] = set()
    for part in text.split(","):
        part = part.strip()
        if re.fullmatch(r"\d+", part):
            name, value = "budget_tokens", int(part)
            if not 0 <= value <= INT32_MAX:
                raise ConfigError(f"--budget {part}: a number of tokens lies between 0 and {INT32_MAX}")
        elif re.fullmatch(r"\d*\.\d+", part):
            name = "budget_permille"
            if len(part.split(".")[1].rstrip("0")) > 3:
                raise ConfigError(f"--budget {part}: a fraction goes in steps of 0.001")
            value = round(float(part) * 1000)
            if not 1 <= value <= 1000:
                raise ConfigError(f"--budget {part}: a fraction lies between 0.001 and 1.0")
        else:
            raise ConfigError(
                f"--budget {text}: give a fraction such as 0.05, a number of tokens such as 1024, or both: 0.05,1024"
            )
        if name in seen:
            raise ConfigError(f"--budget {text}: give at most one fraction and one number of tokens")
        seen.add(name)
        fields[name] = value
    return fields


def config_error(error: ValidationError) -> ConfigError:
    """What pydantic found wrong, on one line."""
    problems = [f"{'.'.join(map(str, p['loc']))}: {p['msg']} (got {p['input']!r})" for p in error.errors()]
    return ConfigError("; ".join(problems))


def parse_numbers(option: str, text: str) -> list[int]:
    """Integers from 0 on, separated by commas, as a list.  Raises ConfigError, which names `option`, for anything else."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise ConfigError(f"{option} {text}: give numbers separated by commas, such as 0,1")
    return [int(part) for part in text.split(",")]
