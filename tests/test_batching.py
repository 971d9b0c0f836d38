"""Turns: what shares one, whose is next, and what is never computed."""

import asyncio
import threading
import time

import pytest

from manyicl.errors import DeadlineError, OverloadedError
from manyicl.serving import batching
from manyicl.serving.batching import Batcher, Group


class Gate:
    """Records what is computed, in order; the first turn waits until it is opened, so that others queue up behind it."""

    def __init__(self):
        self.turns = []
        self.opened = threading.Event()
        self.began = threading.Event()
        self.threads = set()

    def group(self, key, **options):
        def compute(items):
            self.threads.add(threading.current_thread().name)
            self.turns.append((key, list(items)))
            self.began.set()
            assert self.opened.wait(10)
            return [f"{key}{item}" for item in items]

        return Group(key, compute, **options)


def submit(batcher, group, items, **options):
    return batcher.submit([(group, item) for item in items], **options)


async def behind_a_turn(gate, batcher):
    """A task that holds the model until the gate is opened."""
    task = asyncio.create_task(submit(batcher, gate.group("first"), [0]))
    await asyncio.to_thread(gate.began.wait, 10)
    return task


def run(scenario):
    """Run a coroutine function with a gate; the gate is open afterwards, so that no thread is left."""
    gate = Gate()

    async def whole():
        try:
            await asyncio.wait_for(scenario(gate), 20)
        finally:
            gate.opened.set()

    asyncio.run(whole())
    return gate


async def settle():
    """Let every task that can run do so."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_queries_of_one_group_share_a_turn_and_get_their_own_results():
    async def scenario(gate):
        batcher = Batcher(max_queue=10, max_batch=4)
        first = await behind_a_turn(gate, batcher)
        group = gate.group("a")
        tasks = [asyncio.create_task(submit(batcher, group, items)) for items in ([1], [2, 3], [4, 5])]
        await settle()
        assert (batcher.num_waiting, batcher.num_running) == (5, 1)
        gate.opened.set()
        assert await asyncio.gather(*tasks, first) == [["a1"], ["a2", "a3"], ["a4", "a5"], ["first0"]]
        assert (batcher.num_waiting, batcher.num_running) == (0, 0)
        assert dict(batcher.batch_sizes) == {1: 2, 4: 1}
        await batcher.stop()

    gate = run(scenario)
    assert gate.turns == [("first", [0]), ("a", [1, 2, 3, 4]), ("a", [5])]
    assert len(gate.threads) == 1


def test_tasks_take_turns_whatever_waits_for_each():
    async def scenario(gate):
        batcher = Batcher(max_queue=100, max_batch=2)
        first = await behind_a_turn(gate, batcher)
        groups = {key: gate.group(key) for key in "abc"}
        tasks = [asyncio.create_task(submit(batcher, groups["a"], list(range(7))))]
        await settle()
        tasks += [asyncio.create_task(submit(batcher, groups[key], [0, 1, 2])) for key in "bc"]
        await settle()
        gate.opened.set()
        await asyncio.gather(*tasks, first)
        await batcher.stop()

    gate = run(scenario)
    assert gate.turns[1:] == [
        ("a", [0, 1]),
        ("b", [0, 1]),
        ("c", [0, 1]),
        ("a", [2, 3]),
        ("b", [2]),
        ("c", [2]),
        ("a", [4, 5]),
        ("a", [6]),
    ]


def test_two_groups_of_a_task_have_one_turn_together():
    async def scenario(gate):
        batcher = Batcher(max_queue=100, max_batch=2)
        first = await behind_a_turn(gate, batcher)
        scores, others, step = gate.group("a"), gate.group("b"), gate.group("a")
        tasks = [
            asyncio.create_task(submit(batcher, group, items))
            for group, items in ((scores, [1, 2, 3, 4]), (step, ["step"]), (others, [1, 2, 3]))
        ]
        await settle()
        gate.opened.set()
        await asyncio.gather(*tasks, first)
        await batcher.stop()

    gate = run(scenario)
    assert gate.turns[1:] == [("a", [1, 2]), ("b", [1, 2]), ("a", ["step"]), ("b", [3]), ("a", [3, 4])]


def test_a_turn_weighs_no_more_than_a_pass_takes():
    async def scenario(gate):
        batcher = Batcher(max_queue=100, max_batch=10)
        first = await behind_a_turn(gate, batcher)
        group = gate.group("a", weigh=lambda item: item, max_weight=10)
        task = asyncio.create_task(submit(batcher, group, [4, 6, 1, 25, 9, 2]))
        await settle()
        gate.opened.set()
        await asyncio.gather(task, first)
        await batcher.stop()

    assert run(scenario).turns[1:] == [("a", [4, 6]), ("a", [1]), ("a", [25]), ("a", [9]), ("a", [2])]


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back():
    async def scenario(gate):
        batcher = Batcher(max_queue=3, max_batch=2)
        first = await behind_a_turn(gate, batcher)
        group = gate.group("a")
        task = asyncio.create_task(submit(batcher, group, [1, 2]))
        await settle()
        with pytest.raises(OverloadedError, match="2 queries are waiting and 2 more were sent; the queue takes 3") as raised:
            await submit(batcher, group, [3, 4])
        assert raised.value.retry_after_seconds == pytest.approx(0.1)  # Nothing measured yet: two queries, 50 ms each.
        with pytest.raises(OverloadedError, match="2 queries are waiting and 4 more were sent"):
            await submit(batcher, group, [1, 2, 3, 4])
        last = asyncio.create_task(submit(batcher, group, [3]))
        gate.opened.set()
        assert await asyncio.gather(first, task, last) == [["first0"], ["a1", "a2"], ["a3"]]
        await batcher.stop()

    assert run(scenario).turns == [("first", [0]), ("a", [1, 2]), ("a", [3])]


@pytest.mark.parametrize(("max_queue", "max_batch", "part"), [(64, 2, 8), (64, 16, 16), (5, 2, 2), (3, 16, 3)])
def test_a_call_of_many_items_leaves_room_for_others(max_queue, max_batch, part):
    async def scenario(gate):
        batcher = Batcher(max_queue=max_queue, max_batch=max_batch)
        first = await behind_a_turn(gate, batcher)
        items = list(range(100))
        many = asyncio.create_task(submit(batcher, gate.group("a"), items))
        await settle()
        assert batcher.num_waiting == part
        with batcher.admit(max_queue - part):
            assert batcher.num_waiting == min(max_queue, 2 * part)
        gate.opened.set()
        assert await asyncio.gather(first, many) == [["first0"], [f"a{item}" for item in items]]
        assert batcher.num_waiting == 0
        await batcher.stop()

    turns = run(scenario).turns[1:]
    assert [item for _, items in turns for item in items] == list(range(100))
    assert max(len(items) for _, items in turns) == min(part, max_batch)


def test_a_call_in_parts_ends_when_the_service_stops():
    async def scenario(gate):
        batcher = Batcher(max_queue=8, max_batch=2)
        group = gate.group("a")
        many = asyncio.create_task(submit(batcher, group, list(range(10))))
        await asyncio.to_thread(gate.began.wait, 10)
        batcher.close()
        gate.opened.set()
        with pytest.raises(OverloadedError, match="the service is stopping"):
            await many
        await batcher.stop()

    assert run(scenario).turns == [("a", [0, 1])]


def test_the_rate_is_measured():
    async def scenario(gate):
        gate.opened.set()
        batcher = Batcher(max_queue=100, max_batch=10)
        for _ in range(60):
            await submit(batcher, gate.group("a"), range(10))
        assert batcher.retry_after_seconds < 0.1
        await batcher.stop()

    run(scenario)


def test_a_deadline_that_passes_in_the_queue_is_an_error_and_costs_nothing():
    async def scenario(gate):
        batcher = Batcher(max_queue=10, max_batch=10)
        first = await behind_a_turn(gate, batcher)
        group = gate.group("a")
        late = asyncio.create_task(submit(batcher, group, [1, 2], deadline=time.monotonic() + 0.05))
        patient = asyncio.create_task(submit(batcher, group, [3], deadline=time.monotonic() + 10))
        with pytest.raises(DeadlineError, match="2 queries were not answered in the time they were given"):
            await late
        assert batcher.num_waiting == 1
        with pytest.raises(DeadlineError):
            await submit(batcher, group, [4], deadline=time.monotonic() - 1)
        gate.opened.set()
        assert await asyncio.gather(first, patient) == [["first0"], ["a3"]]
        await batcher.stop()

    assert run(scenario).turns == [("first", [0]), ("a", [3])]


def test_what_is_late_when_its_turn_comes_is_not_computed():
    # The event loop is kept from running the query's own clock, as a long callback would.
    async def scenario(gate):
        batcher = Batcher(max_queue=10, max_batch=10)
        first = await behind_a_turn(gate, batcher)
        late = asyncio.create_task(submit(batcher, gate.group("a"), [1], deadline=time.monotonic() + 0.05))
        await settle()
        time.sleep(0.1)
        assert batcher._take() is None
        with pytest.raises(DeadlineError):
            await late
        gate.opened.set()
        await first
        await batcher.stop()

    assert run(scenario).turns == [("first", [0])]


def test_a_deadline_that_passes_while_a_query_is_computed_is_an_error_too():
    async def scenario(gate):
        batcher = Batcher(max_queue=10, max_batch=10)
        with pytest.raises(DeadlineError):
            await submit(batcher, gate.group("a"), [1], deadline=time.monotonic() + 0.05)
        gate.opened.set()
        assert await submit(batcher, gate.group("a"), [2]) == ["a2"]
        await batcher.stop()

    assert run(scenario).turns == [("a", [1]), ("a", [2])]


def test_a_cancelled_query_is_not_computed():
    async def scenario(gate):
        batcher = Batcher(max_queue=10, max_batch=10)
        first = await behind_a_turn(gate, batcher)
        group = gate.group("a")
        gone, stays = (asyncio.create_task(submit(batcher, group, [item])) for item in (1, 2))
        only = asyncio.create_task(submit(batcher, gate.group("b"), [1]))
        await settle()
        gone.cancel()
        only.cancel()
        await settle()
        assert batcher.num_waiting == 1
        gate.opened.set()
        assert await asyncio.gather(first, stays) == [["first0"], ["a2"]]
        await batcher.stop()

    assert run(scenario).turns == [("first", [0]), ("a", [2])]


def test_an_error_reaches_those_whose_turn_it_was_and_no_others(caplog):
    async def scenario(gate):
        gate.opened.set()
        batcher = Batcher(max_queue=10, max_batch=10)

        def fail(items):
            raise ValueError(f"{len(items)} items")

        with pytest.raises(ValueError, match="3 items"):
            await submit(batcher, Group("a", fail), [1, 2, 3])
        assert await submit(batcher, gate.group("a"), [1]) == ["a1"]
        await batcher.stop()

    run(scenario)
    assert caplog.records == []  # asyncio reports errors that nobody has looked at.


def test_a_step_of_admitted_work_is_never_refused_and_is_no_query():
    async def scenario(gate):
        batcher = Batcher(max_queue=1, max_batch=10)
        first = await behind_a_turn(gate, batcher)
        waiting = asyncio.create_task(submit(batcher, gate.group("a"), [1]))
        steps = [asyncio.create_task(batcher.compute("b", lambda: threading.current_thread().name)) for _ in range(3)]
        await settle()
        assert batcher.num_waiting == 1
        gate.opened.set()
        names = await asyncio.gather(*steps)
        assert set(names) == gate.threads
        await asyncio.gather(first, waiting)
        assert dict(batcher.batch_sizes) == {1: 2}
        await batcher.stop()

    run(scenario)


def test_callers_who_come_back_soon_share_the_next_turn_too(monkeypatch):
    monkeypatch.setattr(batching, "LINGER_SHARE", 1e9)
    monkeypatch.setattr(batching, "MOST_LINGER_SECONDS", 10)

    async def scenario(gate):
        batcher = Batcher(max_queue=10, max_batch=10)
        first = await behind_a_turn(gate, batcher)
        group = gate.group("a")

        async def call(place):
            for number in range(3):
                await submit(batcher, group, [f"{place}{number}"])
                await asyncio.sleep(0.01 * place)

        calls = [asyncio.create_task(call(place)) for place in range(3)]
        await settle()
        gate.opened.set()
        await asyncio.gather(*calls, first)
        await batcher.stop()

    assert run(scenario).turns[1:] == [("a", ["00", "10", "20"]), ("a", ["01", "11", "21"]), ("a", ["02", "12", "22"])]


@pytest.mark.parametrize("other", ["task", "step", "time", "lone"])
def test_nobody_is_awaited_while_others_wait_nor_for_long_nor_by_a_lone_caller(other, monkeypatch):
    monkeypatch.setattr(batching, "LINGER_SHARE", 1e9)
    monkeypatch.setattr(batching, "MOST_LINGER_SECONDS", 0.1 if other == "time" else 30)

    async def scenario(gate):
        gate.opened.set()
        batcher = Batcher(max_queue=10, max_batch=10)
        group = gate.group("a")
        await submit(batcher, group, [1] if other == "lone" else [1, 2])
        start = time.monotonic()
        work = [submit(batcher, group, [3])]
        work += [submit(batcher, gate.group("b"), [1])] if other == "task" else []
        work += [batcher.compute("a", lambda: "step")] if other == "step" else []
        found = await asyncio.gather(*work)
        assert found[0] == ["a3"]
        assert (time.monotonic() - start >= 0.1) == (other == "time")
        await batcher.stop()

    run(scenario)


def test_stopping_does_not_wait_for_callers_to_come_back(monkeypatch):
    monkeypatch.setattr(batching, "LINGER_SHARE", 1e9)
    monkeypatch.setattr(batching, "MOST_LINGER_SECONDS", 60)

    async def scenario(gate):
        gate.opened.set()
        batcher = Batcher(max_queue=10, max_batch=10)
        await submit(batcher, gate.group("a"), [1, 2])
        await batcher.stop()

    run(scenario)


def test_stopping_finishes_the_turn_and_refuses_the_rest():
    async def scenario(gate):
        batcher = Batcher(max_queue=10, max_batch=10)
        first = await behind_a_turn(gate, batcher)
        waiting = [asyncio.create_task(submit(batcher, gate.group("a"), [1, 2])) for _ in range(2)]
        step = asyncio.create_task(batcher.compute("a", lambda: 0))
        await settle()
        stopped = asyncio.create_task(batcher.stop())
        await settle()
        assert not stopped.done()
        gate.opened.set()
        await stopped
        assert await first == ["first0"]
        for refused in (*waiting, step):
            with pytest.raises(OverloadedError, match="the service is stopping") as raised:
                await refused
            assert raised.value.retry_after_seconds == 5.0
        for late in (submit(batcher, gate.group("a"), [1]), batcher.compute("a", lambda: 0)):
            with pytest.raises(OverloadedError, match="the service is stopping"):
                await late

    assert run(scenario).turns == [("first", [0])]


def test_closing_lets_admitted_work_go_on():
    async def scenario(gate):
        batcher = Batcher(max_queue=10, max_batch=10)
        first = await behind_a_turn(gate, batcher)
        refused = asyncio.create_task(submit(batcher, gate.group("a"), [1]))
        await settle()
        batcher.close()
        gate.opened.set()
        with pytest.raises(OverloadedError):
            await refused
        with pytest.raises(OverloadedError):
            await submit(batcher, gate.group("a"), [1])
        assert await batcher.compute("a", lambda: "step") == "step"
        assert await first == ["first0"]
        await batcher.stop()

    assert run(scenario).turns == [("first", [0])]


def test_a_batcher_that_was_never_used_stops():
    async def scenario(gate):
        batcher = Batcher(max_queue=10, max_batch=10)
        await batcher.stop()
        await batcher.stop()

    run(scenario)
