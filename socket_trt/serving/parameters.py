"""What `deploy` writes into a model's config.pbtxt as parameters and the model reads there."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from socket_trt.config import config_error
from socket_trt.serving.loop import LoopOptions


class ModelParameters(BaseModel):
    """How one engine is served; parameters of Triton's model configuration are strings."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # the python backend has parameters of its own

    engine: str = Field(description="the engine directory, as the server sees it")
    num_pages: int | None = Field(None, ge=2, description="pages of the cache, the null page included")
    max_waiting: int | None = Field(None, ge=1, description="requests that may wait for pages")
    max_step_tokens: int | None = Field(
        None, ge=3, description="tokens a step may have; by default as many as it should"
    )
    max_seconds: float | None = Field(None, gt=0, description="that a request may take")
    random_weights: bool = Field(False, description="run without the checkpoint, for speed alone")

    @classmethod
    def create(cls, **values: Any) -> ModelParameters:
        """`ModelParameters(**values)` with a ConfigError of one line where a value is out of its range."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise config_error(error) from None

    def to_config(self) -> dict[str, str]:
        return {name: str(value) for name, value in self.model_dump(exclude_none=True).items()}

    def loop_options(self, max_step_tokens: int) -> LoopOptions:
        """`max_step_tokens`: the engine's own."""
        return LoopOptions(self.max_waiting, self.max_step_tokens or max_step_tokens, self.max_seconds)
