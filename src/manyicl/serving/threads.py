"""Calls that block, made in threads and waited for to their end, whatever happens to the caller.

asyncio.to_thread leaves the thread to itself when its caller is cancelled: what that writes would come after whatever the caller
does next, closing the database for instance.
"""

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


async def run_whole(function: Callable[Arguments, Result], *arguments: Arguments.args, **options: Arguments.kwargs) -> Result:
    """The result of a call made in a thread. A caller who is cancelled, even twice, goes on only when the thread has ended."""
    running = asyncio.ensure_future(asyncio.to_thread(function, *arguments, **options))
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait({running})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return running.result()
    if not running.cancelled():
        running.exception()  # Looked at, so that asyncio does not report it.
    raise cancelled
