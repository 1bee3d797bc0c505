"""What is asked and answered: OpenAI's completions, as far as one text at a time goes."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

STOPS, STOP_CHARACTERS = 4, 256  # strings a request, characters a string


class ApiError(Exception):
    """A request that is not served.

    Args:
        status: of HTTP.
        message: what is wrong and what to do.
        param: the field at fault.
        retry: seconds after which it may be tried again.
    """

    def __init__(self, status: int, message: str, param: str | None = None, retry: int | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.retry = status, message, param, retry

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        return {"error": {"message": self.message, "type": _kind(self.status), "param": self.param, "code": None}}


def _kind(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


class StreamOptions(BaseModel):
    """Of a streamed answer."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


Stop = Annotated[str, Field(min_length=1, max_length=STOP_CHARACTERS)]


class CompletionRequest(BaseModel):
    """The body of ``POST /v1/completions``. What clients send by default and what changes nothing is taken; what would
    change the answer and is not built is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str | list[int]
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=10)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=STOPS)] | None = None
    echo: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    best_of: Literal[1] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    logprobs: None = None
    suffix: None = None
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop


def parse_request(body: bytes) -> CompletionRequest:
    """Raises:
    ApiError: 400, the body is not JSON, or a field is wrong; the message names the first.
    """
    try:
        return CompletionRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ApiError(
            400, f"{where}: {first['msg']}" if where else first["msg"], str(first["loc"][0]) if where else None
        ) from None


class Answer:
    """The objects that make up the answer to one request.

    Args:
        model: the name that is given out.
    """

    def __init__(self, model: str) -> None:
        self._common = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, reason: str | None, usage: dict[str, int] | None = None) -> dict[str, Any]:
        """An answer, or a piece of one that is streamed."""
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
        return {**self._common, "choices": [choice]} | ({"usage": usage} if usage else {})

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last piece of a streamed answer, where it was asked for."""
        return {**self._common, "choices": [], "usage": usage}


def usage(prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    """Tokens read and made."""
    return {
        "prompt_tokens": prompt_tokens, "completion_tokens": new_tokens, "total_tokens": prompt_tokens + new_tokens,
    }  # fmt: skip
