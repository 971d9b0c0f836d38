"""The service as an ASGI application, and as a process: its parts put together, started, drained and stopped.

client ──► Observed ──► Guarded ──► routes ──► Store (threads), Backend
           id, log,     keys,       OpenAI's
           failures     limits      and ours
"""

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import cache, partial
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from fastapi.openapi.utils import get_openapi
from sqlalchemy.exc import SQLAlchemyError

from manyicl.errors import UserInputError
from manyicl.serving import completion_routes, example_checks, openai_routes, page_routes, task_routes
from manyicl.serving.backends import Backend
from manyicl.serving.errors import ApiError, install_handlers
from manyicl.serving.guard import Guarded
from manyicl.serving.jobs import JobRunner
from manyicl.serving.keys import KeyRing
from manyicl.serving.observing import Metrics, Observed, log_as_json
from manyicl.serving.schemas import ErrorAnswer, Health
from manyicl.serving.service import Service, ServiceNow, in_thread
from manyicl.serving.settings import Settings
from manyicl.serving.store import Store

logger = logging.getLogger(__name__)

_REFUSALS = {
    400: "The request is wrong; the message says how.",
    401: "No key, or an unknown one.",
    403: "Not from here, or a limit is reached.",
    404: "You have nothing of that name.",
    405: "The address does not take this method.",
    409: "The name is taken, or the task was changed meanwhile.",
    413: "The body is too long.",
    415: "The body is compressed or of another kind.",
    429: "Too much is waiting; Retry-After says when to try again.",
    500: "The service failed.",
    503: "The model or the database does not answer, or memory is short.",
    504: "It took longer than was allowed.",
    507: "The service's disk is full.",
}
_TEXT = "text/plain; version=0.0.4; charset=utf-8"
_KEEP_ALIVE_SECONDS = 75


def create_app(settings: Settings, backend: Backend) -> FastAPI:
    """The application; its store is opened and its backend started by its lifespan.

    Raises:
        UserInputError: it would be open to everyone, or its keys cannot be read.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with run_service(settings, backend) as app.state.service:
            yield

    return _build_app(settings, lifespan)


def _build_app(settings: Settings, lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None) -> FastAPI:
    """The application, without its parts."""
    settings.check()
    keys = KeyRing(settings.api_keys) if settings.api_keys is not None else None
    refusals: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorAnswer, "description": description} for status, description in _REFUSALS.items()
    }
    app = FastAPI(title="manyicl", lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False, responses=refusals)
    app.state.service = None
    install_handlers(app)
    for routes in (openai_routes, completion_routes, task_routes, example_checks, page_routes):
        app.include_router(routes.router)
    _add_operation(app)

    def check_room(num_requests: int) -> None:
        app.state.service.backend.check_room(num_requests)

    app.add_middleware(Guarded, keys=keys, limits=settings.limits, check_room=check_room)
    app.add_middleware(Observed, metrics=lambda: app.state.service and app.state.service.metrics)
    # As FastAPI's documentation has it; made when it is first asked for, as that takes a third of a second.
    app.openapi = cache(partial(_describe, app, has_keys=keys is not None))  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def run_service(settings: Settings, backend: Backend) -> AsyncIterator[Service]:
    """A started service: store open, model loaded, unfinished jobs going on; drained and closed after.

    Each part is stopped, also where stopping another fails.
    """
    async with AsyncExitStack() as stack:
        store = await in_thread(Store, settings)
        stack.push_async_callback(in_thread, store.close)
        await backend.start()
        stack.push_async_callback(backend.stop)
        runner = JobRunner(store, backend)
        runner.start()
        stack.push_async_callback(runner.stop)
        yield Service(settings, store, backend, runner, Metrics(store.count_jobs))


def _add_operation(app: FastAPI) -> None:
    """Addresses for operators."""

    @app.get("/healthz", tags=["operation"])
    async def live() -> Health:
        """Whether the process answers."""
        return Health(status="ok")

    @app.get("/readyz", tags=["operation"])
    async def ready(service: ServiceNow) -> Health:
        """Whether requests are served: the model is loaded, what runs it has not ended, and the database answers."""
        if not service.backend.is_alive:
            raise ApiError(503, "What runs the model has ended. Restart the service.", code="not_ready")
        try:
            await in_thread(service.store.ping)
        except SQLAlchemyError as error:
            raise ApiError(503, "The database does not answer.", code="not_ready") from error
        return Health(status="ok")

    @app.get(
        "/metrics",
        tags=["operation"],
        response_class=Response,
        responses={200: {"content": {_TEXT: {"schema": {"type": "string"}}}}},
    )
    async def metrics(service: ServiceNow) -> Response:
        """Numbers for Prometheus."""
        load = service.backend.load()  # Here, as it changes on this event loop.
        return Response(await in_thread(service.metrics.show, load), headers={"Content-Type": _TEXT})


def _describe(app: FastAPI, *, has_keys: bool) -> dict[str, Any]:
    """The OpenAPI document, true here: a request that its schema does not allow gets 400 and not FastAPI's 422."""
    document = get_openapi(
        title=app.title, version=app.version, routes=app.routes, description="Examples in, a model in seconds."
    )
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if has_keys and path.startswith("/v1/"):
                operation["security"] = [{"key": []}]
    for name in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(name, None)
    if has_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document


def run_server(settings: Settings, backend: Backend, *, log_level: int = logging.INFO) -> None:
    """Serve until the process is told to stop (SIGTERM, SIGINT); requests in flight are answered first.

    Raises:
        UserInputError: settings, keys, data folder, database, model or port cannot be used.
    """
    app = _build_app(settings, None)
    log_as_json(log_level)
    asyncio.run(_serve(app, settings, backend))


async def _serve(app: FastAPI, settings: Settings, backend: Backend) -> None:
    with _bind(settings) as listener:
        async with run_service(settings, backend) as app.state.service:
            config = uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(settings.limits.drain_seconds),
            )
            # uvicorn raises the signal that stopped it again, under the handlers from before: the rest of the stop comes after.
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: None)
            await _Server(config).serve(sockets=[listener])
            logger.info("stopping")


class _Server(uvicorn.Server):
    """Says where it listens once it does."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        for listener in sockets or ():
            logger.info("ready on http://%s:%d", *listener.getsockname()[:2])


def _bind(settings: Settings) -> socket.socket:
    """The address, taken before the model is loaded, so that a port in use is told at once."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # The protocol is named, as asyncio turns Nagle's delay of 40 ms off only where it is.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserInputError(
            f"{settings.host}:{settings.port} cannot be listened on ({error}). Give another --host or --port."
        ) from error
    return listener
