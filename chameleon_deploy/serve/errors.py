"""From an exception to an HTTP status and the body that OpenAI's clients expect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from chameleon_deploy.errors import (
    AdapterError,
    BundleChangedError,
    ChameleonError,
    CheckpointError,
    ClosedError,
    InputError,
    LengthError,
    ModeError,
    ProviderError,
    QueueFullError,
    RateLimitError,
    TensorError,
    TokenError,
)
from chameleon_deploy.serve.schemas import ErrorBody, ErrorDetail

# What the caller can change. Every other ChameleonError is a fault of this side.
_STATUS: Mapping[type[ChameleonError], int] = {
    AdapterError: 400,
    CheckpointError: 400,  # an adapter's PEFT directory
    InputError: 400,
    LengthError: 400,
    ModeError: 400,
    ProviderError: 400,  # of a request: prompt lookup on a device
    TensorError: 400,
    TokenError: 422,
    QueueFullError: 429,
    RateLimitError: 429,
    ClosedError: 503,
    BundleChangedError: 503,
}
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_RETRY_SECONDS = "1"
_MESSAGE = 500  # characters


@dataclass
class ApiError(Exception):
    """A fault that has an answer: an HTTP status and what the error body says.

    param  the field of the request that is at fault, where one is
    """

    status: int
    code: str
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> ErrorBody:
        type_ = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = self.message  # may hold what was sent
        if len(message) > _MESSAGE:
            message = f"{message[:_MESSAGE]}... ({len(message)} characters)"
        return ErrorBody(ErrorDetail(message, type_, self.param, self.code))


def api_error(error: Exception, param: str | None = None) -> ApiError:
    """The answer to any exception; one that nobody foresaw tells the caller nothing of its text."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ChameleonError):
        headers = {"Retry-After": str(error.retry_seconds)} if isinstance(error, RateLimitError) else {}
        return ApiError(_STATUS.get(type(error), 500), error.code, str(error), param, headers)
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "error")
        return ApiError(error.status_code, code, error.detail, headers=error.headers or {})
    return ApiError(500, "internal_error", "the server failed on this request: see its log")


def error_response(error: ApiError) -> Response:
    headers = dict(error.headers)
    if error.status in (429, 503):
        headers.setdefault("Retry-After", _RETRY_SECONDS)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(msgspec.json.encode(error.body), error.status, headers, media_type="application/json")
