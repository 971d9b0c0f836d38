"""Whose turn it is to use the model: queries that wait for the same prefix share a pass, and prefixes take turns.

    task A   score  q q q q q        turn 1   A: q q q q      (as many as one pass takes)
             write  step             turn 2   B: q
    task B   score  q                turn 3   A: step
    task C   slice of a prefill      turn 4   C: slice
                                     turn 5   A: q …

In: work under the key of its task. Out: its results, awaited. Tasks are served in turn, and within a task its groups; a group is
work that one pass can do together. One thread computes, since the model is not re-entrant and uses all processors anyway; the
event loop only hands out. A full queue refuses at once; what is cancelled or too late before its turn is never computed. A call
of many items brings them in parts, so that it leaves room for others.
"""

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from manyicl.errors import DeadlineError, OverloadedError

RETRY_WHEN_STOPPING_SECONDS = 5.0
FIRST_GUESS_SECONDS = 0.05
SMOOTHING = 0.2
# One call takes one place in so many of the queue at most, but always those of one turn.
PLACES_PER_CALL = 8
# Callers who have their answers send their next queries one by one: those of the last turn are awaited for a moment, so that they
# share the next turn too. A pass over half of them costs more than half.
LINGER_SHARE = 0.1
MOST_LINGER_SECONDS = 0.02

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False)
class Group(Generic[Item, Result]):
    """Work that one pass can do together.

    Attributes:
        key: The task that it is for.
        compute: Results of items, in order; runs on the worker's thread.
        weigh: What an item adds to a pass, in tokens for instance.
        max_weight: The most that a pass may weigh; a single item may exceed it. None for no limit.
    """

    key: str
    compute: Callable[[list[Item]], Sequence[Result]]
    weigh: Callable[[Item], int] = lambda item: 1
    max_weight: int | None = None


@dataclass(eq=False)
class _Waiting:
    """An item in the queue; `is_counted` is false for steps of work that has been admitted."""

    item: Any
    future: "asyncio.Future[Any]"
    deadline: float | None
    is_counted: bool
    is_taken: bool = False


@dataclass
class _Turn:
    group: Group[Any, Any]
    members: list[_Waiting] = field(default_factory=list)


def stopping() -> OverloadedError:
    """What is said to work that comes when the service stops."""
    return OverloadedError("the service is stopping. Ask again in a moment.", retry_after_seconds=RETRY_WHEN_STOPPING_SECONDS)


class Batcher:
    """Takes turns with the model. Made, used and stopped on one event loop.

    Args:
        max_queue: Items that may wait.
        max_batch: Items of a group that share a turn at most.
    """

    def __init__(self, *, max_queue: int, max_batch: int) -> None:
        self.max_queue = max_queue
        self.max_batch = max_batch
        self.num_waiting = 0
        self.num_running = 0
        self.batch_sizes: Counter[int] = Counter()
        self._max_part = min(max_queue, max(max_batch, max_queue // PLACES_PER_CALL))
        self._queues: dict[str, dict[Group[Any, Any], deque[_Waiting]]] = {}
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="manyicl-model")
        self._has_work = asyncio.Event()
        self._is_closed = self._is_ended = False
        self._seconds_per_item = FIRST_GUESS_SECONDS
        self._server: asyncio.Task[None] | None = None

    @property
    def retry_after_seconds(self) -> float:
        """When what waits now will probably have been served."""
        return self._seconds_per_item * max(1, self.num_waiting)

    def check_room(self, num_items: int) -> None:
        """Refuse items of which the first part finds no room.

        Raises:
            OverloadedError: there will be, later; or the batcher has been closed.
        """
        if self._is_closed:
            raise stopping()
        if self.num_waiting + min(num_items, self._max_part) > self.max_queue:
            raise self.overloaded(num_items)

    def overloaded(self, num_items: int) -> OverloadedError:
        """What is said to items for which there is no room."""
        wait = self.retry_after_seconds
        return OverloadedError(
            f"{self.num_waiting} queries are waiting and {num_items} more were sent; the queue takes {self.max_queue}. "
            f"Try again in {wait:.1f} s.",
            retry_after_seconds=wait,
        )

    @contextlib.contextmanager
    def admit(self, num_items: int) -> Iterator[None]:
        """Let the first part of items count as waiting while they are made ready.

        Raises:
            OverloadedError: see `check_room`.
        """
        self.check_room(num_items)
        num_items = min(num_items, self._max_part)
        self.num_waiting += num_items
        try:
            yield
        finally:
            self.num_waiting -= num_items

    async def submit(self, work: Sequence[tuple[Group[Item, Result], Item]], *, deadline: float | None = None) -> list[Result]:
        """Results of items, each of which shares its turn with others of its group; a part after the other where they are many.

        Args:
            deadline: A time of `time.monotonic()`.

        Raises:
            OverloadedError: the queue is full, or the batcher has been closed.
            DeadlineError: the deadline has passed; what was still waiting is not computed.
        """
        self.check_room(len(work))
        results: list[Result] = []
        for first in range(0, len(work), self._max_part):
            if self._is_closed:
                raise stopping()
            results += await self._wait(work[first : first + self._max_part], deadline, is_counted=True)
        return results

    async def compute(self, key: str, function: Callable[[], Result]) -> Result:
        """The result of one step of work that has been admitted already: it is never refused, and takes a turn of its own."""
        group: Group[None, Result] = Group(key, lambda items: [function()])
        return (await self._wait([(group, None)], None, is_counted=False))[0]

    def close(self) -> None:
        """Refuse what waits and what comes; steps of admitted work go on."""
        self._is_closed = True
        self._refuse_waiting(only_counted=True)

    async def stop(self) -> None:
        """Close, wait for the turn that is being computed, and end the thread; steps that wait for a turn are refused too."""
        self._is_closed = self._is_ended = True
        self._has_work.set()
        if self._server is not None:
            await self._server
        self._refuse_waiting(only_counted=False)
        await asyncio.to_thread(self._executor.shutdown)

    def _refuse_waiting(self, *, only_counted: bool) -> None:
        waiting = [each for queues in self._queues.values() for queue in queues.values() for each in queue]
        for each in waiting:
            if not each.future.done() and (each.is_counted or not only_counted):
                each.future.set_exception(stopping())

    async def _wait(
        self, work: Sequence[tuple[Group[Item, Result], Item]], deadline: float | None, *, is_counted: bool
    ) -> list[Result]:
        if self._is_ended:
            raise stopping()
        loop = asyncio.get_running_loop()
        own = [_Waiting(item, loop.create_future(), deadline, is_counted) for _, item in work]
        for (group, _), waiting in zip(work, own, strict=True):
            self._queues.setdefault(group.key, {}).setdefault(group, deque()).append(waiting)
        self.num_waiting += len(own) * is_counted
        if self._server is None:
            self._server = loop.create_task(self._serve())
        self._has_work.set()
        try:
            async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                return [await waiting.future for waiting in own]
        except TimeoutError as error:
            raise DeadlineError(f"{len(own)} queries were not answered in the time they were given.") from error
        finally:
            for waiting in own:
                self._leave_queue(waiting)
                if not waiting.future.cancel() and not waiting.future.cancelled():
                    waiting.future.exception()  # Looked at, so that asyncio does not report those behind the first one.

    def _leave_queue(self, waiting: _Waiting) -> None:
        if not waiting.is_taken:
            waiting.is_taken = True
            self.num_waiting -= waiting.is_counted

    async def _serve(self) -> None:
        """Compute one turn after the other."""
        loop = asyncio.get_running_loop()
        while not self._is_ended:
            turn = self._take()
            if turn is None:
                self._has_work.clear()
                await self._has_work.wait()
                continue
            start = time.monotonic()
            self.num_running = sum(waiting.is_counted for waiting in turn.members)
            items = [waiting.item for waiting in turn.members]
            running = loop.run_in_executor(self._executor, turn.group.compute, items)
            await asyncio.wait({running})
            seconds = time.monotonic() - start
            num_counted = self.num_running
            self._deliver(turn, running, seconds)
            await self._linger(turn.group, num_counted, seconds)

    async def _linger(self, group: Group[Any, Any], num_expected: int, seconds: float) -> None:
        """Wait until as many queries as the last turn had are there again, a moment at most, and only while nobody else waits."""
        end = time.monotonic() + min(LINGER_SHARE * seconds, MOST_LINGER_SECONDS)
        while self.num_waiting < num_expected and not self._is_ended:
            left = end - time.monotonic()
            if left <= 0 or any(other is not group for queues in self._queues.values() for other in queues):
                return
            self._has_work.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._has_work.wait()

    def _deliver(self, turn: _Turn, computed: "asyncio.Future[Sequence[Any]]", seconds: float) -> None:
        num_counted, self.num_running = self.num_running, 0
        if num_counted:
            self.batch_sizes[num_counted] += 1
            self._seconds_per_item += SMOOTHING * (seconds / num_counted - self._seconds_per_item)
        error = computed.exception()
        results = [None] * len(turn.members) if error else computed.result()
        for waiting, result in zip(turn.members, results, strict=True):
            if waiting.future.done():
                continue
            if error is None:
                waiting.future.set_result(result)
            else:
                waiting.future.set_exception(error)

    def _take(self) -> _Turn | None:
        """The next turn: of the next task, its next group, what still wants to be computed, as much as one pass takes."""
        while self._queues:
            key = next(iter(self._queues))
            queues = self._queues.pop(key)
            group = next(iter(queues))
            queue = queues.pop(group)
            turn = _Turn(group, self._take_members(group, queue))
            if queue:
                queues[group] = queue
            if queues:
                self._queues[key] = queues
            if turn.members:
                return turn
        return None

    def _take_members(self, group: Group[Any, Any], queue: deque[_Waiting]) -> list[_Waiting]:
        now = time.monotonic()
        members: list[_Waiting] = []
        weight = 0
        while queue and len(members) < self.max_batch:
            waiting = queue[0]
            is_late = waiting.deadline is not None and waiting.deadline <= now
            if waiting.is_taken or waiting.future.done() or is_late:
                queue.popleft()  # One that is late hears of it by its own clock, at once.
                self._leave_queue(waiting)
                continue
            weight += group.weigh(waiting.item)
            if members and group.max_weight is not None and weight > group.max_weight:
                break
            queue.popleft()
            self._leave_queue(waiting)
            members.append(waiting)
        return members
