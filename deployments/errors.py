"""Which HTTP status each error of ours has, and the one shape in which a client sees it."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray.serve.exceptions import RayServeException
from starlette.exceptions import HTTPException

from deployments.admission import TooMany
from deployments.director import NoSuchVideo, Unreadable
from deployments.making import NotPossible, ReplicaLost, TextLost
from deployments.request_ids import HEADER, request_id
from deployments.safety import ContentBlocked, SafetyUnavailable
from deployments.schemas import error_object
from deployments.store import StoreFull, StoreUnavailable, Superseded
from helios_core.errors import HeliosError, InvalidInput

RETRY = {"Retry-After": "5"}  # seconds
FINAL = {"x-should-retry": "false"}  # OpenAI's client asks again after a 409 unless told that it will not help

logger = logging.getLogger(__name__)


class RequestError(HeliosError):
    """A request that is refused with a status of its own. `param`: the field at fault, if there is one."""

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(status, code, message, param, headers)
        self.status, self.code, self.message, self.param, self.headers = status, code, message, param, headers

    def __str__(self) -> str:
        return self.message


class CutOff(Exception):
    """A response ended early. Raised inside its body, so that the client sees an incomplete one: it has no status."""


def status_of(error: HeliosError) -> int:
    """Anything that is not the client's doing is a 500, and is ours to mend."""
    match error:
        case RequestError():
            return error.status
        case InvalidInput() | ContentBlocked():
            return 422
        case NoSuchVideo():
            return 404
        case TooMany():
            return 429
        case Unreadable() | NotPossible():
            return 409
        case StoreFull():
            return 507
        case StoreUnavailable() | Superseded() | TextLost() | SafetyUnavailable():
            return 503
    return 500


def install_error_handlers(app: FastAPI) -> None:
    """Every error of `app` leaves as an error envelope, without inner detail."""

    @app.exception_handler(HeliosError)
    async def own(request: Request, error: HeliosError) -> JSONResponse:
        status = status_of(error)
        if status == 500:
            return unexpected(request, error)
        param = error.field if isinstance(error, InvalidInput) else getattr(error, "param", None)
        about = {"status": status, "code": error.code, "param": param, "request_id": request_id(request)}
        if error.public is not None:
            about["reason"] = str(error)
        logger.info("refused", extra=about)
        body = error_object(error.told, status, param, error.code)
        headers = {409: FINAL, 503: RETRY, 507: RETRY}.get(status, getattr(error, "headers", None))
        if isinstance(error, TooMany):
            headers = {"Retry-After": str(error.retry_after)}
        return JSONResponse(body, status, headers)

    @app.exception_handler(ReplicaLost)
    @app.exception_handler(RayServeException)
    async def unavailable(request: Request, error: Exception) -> JSONResponse:
        logger.warning("a replica was not there: %s", error, extra={"request_id": request_id(request)})
        message = "a part of the service is not there at the moment; try again"
        return JSONResponse(error_object(message, 503, None, "unavailable"), 503, RETRY)

    @app.exception_handler(HTTPException)
    async def routing(_: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
        body = error_object(str(error.detail), error.status_code, None, code)
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        if isinstance(error, CutOff):  # no bug, and this answer is not sent: another one has begun
            about = {"path": request.url.path, "reason": str(error), "request_id": request_id(request)}
            logger.info("cut off", extra=about)
            return JSONResponse(None)
        return unexpected(request, error)


def unexpected(request: Request, error: Exception) -> JSONResponse:
    logger.error("request failed", exc_info=error, extra={"request_id": request_id(request)})
    body = error_object("the service failed; this is logged", 500, None, "internal_error")
    return JSONResponse(body, 500, {HEADER: request_id(request)})  # a bug's answer is made outside of all middleware
