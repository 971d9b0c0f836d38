"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}, whatever went wrong.

Nothing of a request stands in the log, and nothing of this service's inside stands in an answer.
"""

import errno
import logging
import math
import re
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError, OperationalError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from manyicl.errors import DeadlineError, ManyICLError, OverloadedError, StorageError, UserInputError
from manyicl.serving.backends import ShortMemoryError

logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "invalid_request_error", 429: "rate_limit_error"}


class ApiError(ManyICLError):
    """A request that is refused.

    Args:
        status: HTTP status.
        code: A word for programs; None where OpenAI has none.
        param: The field that is wrong.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})


class BodyTooLargeError(HTTPException):
    """A body that goes on beyond its limit; an HTTPException, as FastAPI turns others into 400 while it reads a body."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(413, f"The request's body is longer than {max_bytes} bytes. Send less at once.")


def not_found(kind: str, name: str) -> ApiError:
    """The answer to a name that this tenant has nothing under, whoever else may have."""
    if kind == "model":
        message = f"The model '{name}' does not exist or you do not have access to it."
        return ApiError(404, message, code="model_not_found", param="model")
    return ApiError(404, f"No such {kind}: {name}", code="not_found", param="id")


def find_errno(error: BaseException) -> int | None:
    """The number of the system's error behind another, where there is one."""
    cause = error.__cause__ or error
    if isinstance(cause, OSError):
        return cause.errno
    found = re.search(r"os error (\d+)", str(cause))  # As safetensors says it.
    return int(found[1]) if found else None


def has_no_space(error: StorageError) -> bool:
    """Whether a disk or a limit is full; otherwise a folder cannot be written, which does not pass by itself."""
    number = find_errno(error)
    return number is None or number in _FULL


def error_response(error: Exception) -> JSONResponse:
    """The answer to an error; one that was not foreseen is logged without its message, which may hold a user's text."""
    known = _translate(error)
    if known is None:
        frames = "".join(traceback.format_tb(error.__traceback__)[-12:])
        logger.error("%s in a request", type(error).__name__, extra={"traceback": frames, "errno": find_errno(error)})
        known = ApiError(500, "The service failed at this request. It was logged; try again later.", code="internal_error")
    kind = _TYPES.get(known.status, "invalid_request_error" if known.status < 500 else "server_error")
    content = {"error": {"message": str(known), "type": kind, "param": known.param, "code": known.code}}
    # OpenAI's clients would send the same request again, which is refused again, or computed again for as long.
    retry = {"x-should-retry": "false"} if known.status in (409, 504) else {}
    return JSONResponse(content, known.status, known.headers | retry)


def install_handlers(app: FastAPI) -> None:
    """Have an application answer every error in this shape."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        response = error_response(error)
        if response.status_code == 405:  # Of several routes with one path, the router names the methods of the first.
            route = getattr(request.scope.get("route"), "path", None)
            response.headers["Allow"] = ", ".join(method.upper() for method in app.openapi()["paths"].get(route, ()))
        return response

    for kind in (ManyICLError, HTTPException, RequestValidationError, DataError, OperationalError, UnicodeEncodeError, OSError):
        app.add_exception_handler(kind, answer)


def _translate(error: Exception) -> ApiError | None:
    """An error with its status; None for one that nobody foresaw."""
    match error:
        case ApiError():
            return error
        case ClientDisconnect():  # Nobody reads it; the log does.
            return ApiError(499, "The client has left.")
        case OverloadedError():
            wait = max(1, math.ceil(error.retry_after_seconds))
            return ApiError(429, str(error), code="overloaded", headers={"Retry-After": str(wait)})
        case DeadlineError():
            return ApiError(504, str(error), code="deadline_exceeded")
        case StorageError():
            return _full(error) if has_no_space(error) else None
        case UserInputError():
            return ApiError(400, str(error), code="invalid_value")
        case ShortMemoryError():
            logger.error("%s in a request", type(error).__name__)
            message = "The service has too little memory for this at the moment. Send fewer examples, or try again later."
            return ApiError(503, message, code="out_of_memory")
        case ManyICLError():
            logger.error("%s in a request", type(error).__name__)
            return ApiError(503, "The model does not answer at the moment. Try again later.", code="model_unavailable")
        case RequestValidationError():
            return _explain_validation(error.errors())
        case HTTPException():
            return _explain_http(error)
        case DataError() | UnicodeEncodeError():  # A NUL or half a character where a name is looked up.
            return ApiError(400, "A name or text holds a character that cannot be stored.", code="invalid_value")
        case OperationalError() if "full" in str(error.orig).lower():
            return _full(error)
        case OSError() if error.errno in _FULL:
            return _full(error)
    return None


def _full(error: Exception) -> ApiError:
    logger.error("%s in a request: no space is left", type(error).__name__, extra={"errno": find_errno(error)})
    return ApiError(
        507, "The service has no space left to keep this. Nothing of it was kept; try again later.", code="storage_full"
    )


def _explain_http(error: HTTPException) -> ApiError:
    messages = {
        400: "We could not parse the body of your request.",
        404: "No such address. See /openapi.json.",
        405: "This address does not take this method.",
    }
    codes = {400: "invalid_body", 404: "unknown_url", 405: "method_not_allowed", 413: "body_too_large"}
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message, code=codes.get(error.status_code), headers=error.headers)


def _explain_validation(problems: Sequence[Any]) -> ApiError:
    """The first problem of a request that its schema does not allow, without the value that was sent."""
    problem = problems[0]
    place = [str(part) for part in problem["loc"] if part not in ("body", "query", "path", "header")]
    param = ".".join(place)[:200].encode("utf-8", "replace").decode() or None
    about = f" for '{param}'" if param else ""
    if problem["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {param}", code="unknown_parameter", param=param)
    if problem["type"] == "json_invalid":
        return ApiError(400, "We could not parse the body of your request.", code="invalid_body")
    if problem["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{param or 'body'}'.", code="missing_required_parameter", param=param)
    return ApiError(400, f"Invalid value{about}: {problem['msg']}.", code="invalid_value", param=param)
