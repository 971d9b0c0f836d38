"""The parts of a running service, and what routes ask of them: whose request it is, which task it names, and its deadline."""

import asyncio
import hmac
import secrets
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Annotated, Any, ParamSpec, TypeVar, cast

from fastapi import Depends, Header, Request

from manyicl.errors import DeadlineError
from manyicl.serving.backends import Backend, TaskSpec
from manyicl.serving.database import TaskRow
from manyicl.serving.errors import ApiError, not_found
from manyicl.serving.jobs import JobRunner
from manyicl.serving.observing import Metrics
from manyicl.serving.settings import BASE_MODEL, Limits, Settings
from manyicl.serving.store import Owned, Store

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

_CHECKS_AT_ONCE = 2
_UPLOADS_AT_ONCE = 4


@dataclass
class Service:
    """What a started application works with.

    Attributes:
        changes: One lock a task, by key, held while it is changed.
        checks: Places for checks of examples, which take a thread each; the others are refused.
        uploads: Places for uploads that are in memory as a whole; the others wait, on disk.
        secret: What the keys of the plain model are made of.
    """

    settings: Settings
    store: Store
    backend: Backend
    runner: JobRunner
    metrics: Metrics
    started_at: int = field(default_factory=lambda: int(time.time()))
    changes: defaultdict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
    checks: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_CHECKS_AT_ONCE))
    uploads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_UPLOADS_AT_ONCE))
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    @property
    def limits(self) -> Limits:
        """What requests may ask for."""
        return self.settings.limits

    def base_spec(self, tenant: str) -> TaskSpec:
        """The plain model under a key of the tenant's own, so that no tenant's prompts are cached for another."""
        return TaskSpec(hmac.digest(self.secret, tenant.encode(), "sha256").hex()[:32], ())


async def in_thread(function: Callable[Arguments, Result], *arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
    """The result of a call that blocks on the disk, made in a thread."""
    return await asyncio.to_thread(function, *arguments, **options)


async def find_service(request: Request) -> Service:
    """The service of a request."""
    return cast(Service, request.app.state.service)


ServiceNow = Annotated[Service, Depends(find_service)]


async def find_owned(request: Request, service: ServiceNow) -> Owned:
    """What the tenant of a request owns; the guard has found whose it is."""
    return service.store.of(request.state.tenant)


OwnedNow = Annotated[Owned, Depends(find_owned)]


async def find_deadline(
    service: ServiceNow,
    x_timeout_seconds: Annotated[
        float,
        Header(gt=0, allow_inf_nan=False, description="The longest that the answer is waited for; past it the answer is 504."),
    ] = 86_400.0,
) -> float:
    """The time of `time.monotonic()` past which the answer is of no use."""
    return time.monotonic() + min(service.limits.request_seconds, x_timeout_seconds)


Deadline = Annotated[float, Depends(find_deadline)]


@dataclass(frozen=True)
class Served:
    """A model that a request named; `row` is None for the plain one."""

    name: str
    spec: TaskSpec
    row: TaskRow | None


async def find_served(service: Service, owned: Owned, name: str) -> Served:
    """The model of a name.

    Raises:
        ApiError: this tenant has none of that name.
    """
    if name == BASE_MODEL:
        return Served(name, service.base_spec(owned.tenant), None)

    def read() -> Served:
        row = owned.task(name)
        return Served(name, service.store.read_spec(row), row)

    return await in_thread(read)


async def find_task(service: Service, owned: Owned, name: str) -> Served:
    """A task, which has a row; the plain model is none."""
    if name == BASE_MODEL:
        raise not_found("model", name)
    return await find_served(service, owned, name)


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client leaves.

    Raises:
        ApiError: the client has left; nobody reads it.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_wait_until_left(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ApiError(499, "The client has left.")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def until(deadline: float, work: Awaitable[Result]) -> Result:
    """The result of `work`, which is cancelled at the deadline.

    Raises:
        DeadlineError: it took too long.
    """
    try:
        return await asyncio.wait_for(work, deadline - time.monotonic())
    except TimeoutError as error:
        raise DeadlineError(
            "the answer took longer than was allowed. Allow more with X-Timeout-Seconds, or ask for less."
        ) from error


async def _wait_until_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
