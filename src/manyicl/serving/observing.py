"""What operators see: Prometheus metrics and one JSON line a request. Neither holds any text of users, nor a key.

{"time": "2026-01-31T12:00:00.123Z", "level": "info", "event": "request", "method": "POST", "route": "/v1/classify",
 "status": 200, "seconds": 0.0123, "tenant": "acme", "request": "req-5f…"}
"""

import json
import logging
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from manyicl.serving.backends import BackendLoad
from manyicl.serving.errors import error_response

logger = logging.getLogger(__name__)

_FIELDS = ("method", "route", "status", "seconds", "tenant", "request", "job", "errno", "traceback")
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class JsonFormatter(logging.Formatter):
    """A log record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The line; of an exception its kind, as its message may hold a user's text."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line: dict[str, Any] = {"time": moment, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= {name: value for name in _FIELDS if (value := getattr(record, name, None)) is not None}
        if record.exc_info and record.exc_info[0]:
            line["exception"] = record.exc_info[0].__name__
        return json.dumps(line)


def log_as_json(level: int) -> None:
    """Have this process log as lines of JSON on standard error, from a level on, uvicorn's messages included."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("httpx", "httpx2", "alembic", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.WARNING)


class Metrics:
    """The service's numbers, in Prometheus' text format.

    Args:
        count_jobs: Jobs by status.
    """

    def __init__(self, count_jobs: Callable[[], dict[str, int]]) -> None:
        self._registry = CollectorRegistry()
        names = ["method", "route", "status"]
        self._requests = Counter("manyicl_requests", "Requests answered.", names, registry=self._registry)
        self._seconds = Histogram(
            "manyicl_request_seconds", "Time to answer a request.", ["route"], buckets=_SECONDS, registry=self._registry
        )
        self._registry.register(_JobCollector(count_jobs))

    def note_request(self, *, method: str, route: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(method, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def show(self, load: BackendLoad) -> bytes:
        """All numbers as text; the backend's were taken on its event loop, where they change."""
        own = CollectorRegistry()
        own.register(_BackendCollector(load))
        return generate_latest(self._registry) + generate_latest(own)


class _BackendCollector(Collector):
    def __init__(self, load: BackendLoad) -> None:
        self._load = load

    def collect(self) -> Iterator[Metric]:
        load = self._load
        yield GaugeMetricFamily("manyicl_queries_waiting", "Queries in the queue.", load.num_waiting)
        yield GaugeMetricFamily("manyicl_queries_running", "Queries being computed.", load.num_running)
        batches = CounterMetricFamily(
            "manyicl_batches", "Passes of the model, by the queries that they served.", labels=["queries"]
        )
        for size, count in sorted(load.batch_sizes.items()):
            batches.add_metric([str(size)], count)
        yield batches
        opened = CounterMetricFamily("manyicl_prefixes_opened", "Where a task's prefix was found.", labels=["source"])
        for source, count in sorted(load.opened.items()):
            opened.add_metric([source], count)
        yield opened
        yield CounterMetricFamily("manyicl_cached_tokens", "Tokens used without computing them.", load.cached_tokens)
        yield CounterMetricFamily("manyicl_computed_tokens", "Tokens computed.", load.computed_tokens)


class _JobCollector(Collector):
    def __init__(self, count_jobs: Callable[[], dict[str, int]]) -> None:
        self._count_jobs = count_jobs

    def collect(self) -> Iterator[Metric]:
        jobs = GaugeMetricFamily("manyicl_jobs", "Fine-tuning jobs by status.", labels=["status"])
        for status, count in sorted(self._count_jobs().items()):
            jobs.add_metric([status], count)
        yield jobs


class Observed:
    """An application whose requests are counted, logged and given an id, and whose failures are answered.

    Args:
        metrics: None until the application has started.
    """

    def __init__(self, app: ASGIApp, *, metrics: Callable[[], Metrics | None]) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        request_id = f"req-{secrets.token_hex(12)}"

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:  # The last place: it is answered and logged without its text, and the service goes on.
            response = error_response(error)
            if not status:
                await response(scope, receive, send_with_id)
        finally:
            self._note(scope, status=status or 499, seconds=time.perf_counter() - started, request_id=request_id)

    def _note(self, scope: Scope, *, status: int, seconds: float, request_id: str) -> None:
        """Log and count; the route's template stands for the address, which may hold names."""
        state = scope.get("state", {})
        route = getattr(scope.get("route"), "path", state.get("route", "none"))
        method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "PATCH") else "other"
        metrics = self._metrics()
        if metrics is not None:
            metrics.note_request(method=method, route=route, status=status, seconds=seconds)
        found = {"method": method, "route": route, "status": status, "seconds": round(seconds, 6), "request": request_id}
        tenant = state.get("tenant")
        logger.info("request", extra=found | ({"tenant": tenant} if tenant else {}))
