"""Calls in threads are waited for to their end, whatever happens to the caller."""

import asyncio
import threading

import pytest

from manyicl.serving.threads import run_whole


def test_a_result_and_an_error_are_the_callers() -> None:
    def fail() -> None:
        raise KeyError("mine")

    assert asyncio.run(run_whole(lambda: 5)) == 5
    assert asyncio.run(run_whole(int, "11", base=2)) == 3
    with pytest.raises(KeyError, match="mine"):
        asyncio.run(run_whole(fail))


@pytest.mark.parametrize("fails", [False, True])
def test_a_caller_who_is_cancelled_twice_waits_for_the_thread(fails: bool) -> None:
    began, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        began.set()
        assert go_on.wait(10)
        ended.set()
        if fails:
            raise KeyError

    async def scenario() -> None:
        calling = asyncio.create_task(run_whole(work))
        await asyncio.to_thread(began.wait, 10)
        for _ in range(2):
            calling.cancel()
            await asyncio.sleep(0.01)
            assert not calling.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await calling
        assert ended.is_set()

    asyncio.run(scenario())
