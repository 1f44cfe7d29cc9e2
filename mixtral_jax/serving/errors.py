"""Errors as OpenAI's API writes them: never a stack."""

from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}  # by status, of those below 500


class ApiError(HTTPException):
    """What is answered in place of what was asked for."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(status)
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """Writes it as the API does."""
        kind = "server_error" if self.status_code >= 500 else TYPES.get(self.status_code, "invalid_request_error")
        param = self.param and _whole(self.param)
        return {"error": {"message": _whole(self.detail), "type": kind, "param": param, "code": self.code}}


def _whole(text: str) -> str:
    """Spells out halves of characters, which a request's JSON may hold and no answer can."""
    return text.encode(errors="backslashreplace").decode()


def respond(error: HTTPException) -> JSONResponse:
    """Makes a response of an error."""
    told = error if isinstance(error, ApiError) else ApiError(error.status_code, str(error.detail))
    return JSONResponse(told.body(), error.status_code, error.headers)


def _names(error: dict[str, Any]) -> list[str | int]:
    """Where a mistake is, without the types that pydantic names of several that a value may have."""
    return [part for part in error["loc"][1:] if isinstance(part, int) or not (part == "str" or "[" in part)]


def _nearest(errors: Sequence[Any]) -> dict[str, Any]:
    """The first mistake; where a value may have several types, that of the type which it comes nearest to."""
    found: dict[str, Any] = errors[0]
    if (names := _names(found)) == list(found["loc"][1:]):
        return found
    group = [error for error in errors if _names(error)[: len(names)] == names]
    best: dict[str, Any] = max(group, key=lambda error: (len(_names(error)), not error["type"].endswith("_type")))
    if best["type"].endswith("_type") and _names(best) == names:
        return {**best, "msg": ", or ".join(dict.fromkeys(error["msg"] for error in group))}
    return best


def refusal(error: RequestValidationError) -> ApiError:
    """Says in one sentence what is wrong with a request."""
    first = _nearest(error.errors())
    path = ".".join(str(part) for part in _names(first))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "unsupported":
        name = f"{path}.{first['ctx']['name']}".lstrip(".")
        return ApiError(400, message, param=name, code="unsupported_parameter")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['ctx']['error']}")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown parameter: {path}", param=path, code="unknown_parameter")
    if not path:
        return ApiError(400, "the body must be a JSON object, with Content-Type: application/json")
    return ApiError(400, f"{path}: {message}", param=path)
