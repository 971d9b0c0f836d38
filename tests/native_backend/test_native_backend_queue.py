"""The native backend's queue: what waits shares passes; what is too much, too late or given up costs no pass."""

import asyncio
import contextlib
import random
import time
from collections import Counter

import pytest

from backend_fixtures import LABELS, settle, spec_of, text_of, write
from manyicl.errors import DeadlineError, OverloadedError
from manyicl.sampling import TokenStreams
from manyicl.serving import task_prefixes
from manyicl.serving.backends import GenerationOptions


def test_queries_that_wait_together_share_a_pass(serve, passes):
    async def scenario(backend):
        spec = spec_of()
        await backend.prepare(spec)
        passes.hold()
        first = asyncio.create_task(backend.score(spec, ["first"]))
        await passes.until_held()
        others = [asyncio.create_task(backend.score(spec, [f"number {number}"])) for number in range(10)]
        await settle()
        load = backend.load()
        assert (load.num_waiting, load.num_running) == (10, 1)
        passes.open.set()
        await asyncio.gather(first, *others)
        return backend.load()

    load = serve(scenario)
    assert dict(load.batch_sizes) == {1: 1, 10: 1}
    assert len(passes.tokens) == 3  # The prefix, the first query, the others.


def test_a_full_queue_refuses_at_once(serve, passes):
    async def scenario(backend):
        spec = spec_of()
        await backend.prepare(spec)
        passes.hold()
        running = asyncio.create_task(backend.score(spec, ["first"]))
        await passes.until_held()
        waiting = [asyncio.create_task(backend.score(spec, ["a", "b"])) for _ in range(2)]
        await settle()
        for refused in (backend.score(spec, ["c"]), write(backend, spec, "c")):
            with pytest.raises(OverloadedError, match="4 queries are waiting and 1 more were sent; the queue takes 4"):
                await refused
        with pytest.raises(OverloadedError, match="4 queries are waiting and 5 more were sent"):
            await backend.score(spec, ["c"] * 5)
        with pytest.raises(OverloadedError, match="4 queries are waiting and 1 more were sent"):
            backend.check_room(0)
        passes.open.set()
        await asyncio.gather(running, *waiting)
        backend.check_room(3)

    serve(scenario, max_queue=4)
    assert len(passes.tokens) == 3


def test_requests_that_were_read_take_places_before_their_queries_wait(serve, passes):
    async def scenario(backend):
        spec = spec_of()
        await backend.prepare(spec)
        backend.check_room(3)
        with pytest.raises(OverloadedError, match="0 queries are waiting and 1 more were sent; the queue takes 4"):
            backend.check_room(4)
        passes.hold()
        running = asyncio.create_task(backend.score(spec, ["first", "second"]))
        await passes.until_held()
        backend.check_room(5)  # Two of them are in the pass that is computed.
        with pytest.raises(OverloadedError):
            backend.check_room(6)
        passes.open.set()
        await running

    serve(scenario, max_queue=4)


def test_a_call_of_more_inputs_than_may_wait_is_answered_in_parts(serve):
    inputs = [f"input {number}" for number in range(9)]

    async def scenario(backend):
        return (await backend.score(spec_of(), inputs)).log_probabilities

    few, many = serve(scenario, max_queue=4), serve(scenario)
    assert len(few) == 9
    assert [pytest.approx(own, abs=1e-4) for own in many] == list(few)


def test_no_more_answers_are_written_at_once_than_may_wait(serve):
    async def scenario(backend):
        spec = spec_of()
        writing = [asyncio.create_task(write(backend, spec, "x", max_tokens=3)) for _ in range(2)]
        await settle()
        with pytest.raises(OverloadedError, match="2 answers are being written or waited for, the most allowed"):
            await write(backend, spec, "x", max_tokens=3)
        await asyncio.gather(*writing)
        assert len(await write(backend, spec, "x", max_tokens=3)) == 3

    serve(scenario, max_queue=2)


def test_answers_beyond_a_batch_wait_for_those_before(serve, passes):
    async def scenario(backend):
        spec = spec_of()
        await backend.prepare(spec)
        passes.tokens.clear()
        found = await asyncio.gather(*(write(backend, spec, "x", max_tokens=3) for _ in range(3)))
        assert [text_of(pieces) for pieces in found] == [text_of(found[0])] * 3

    serve(scenario, max_batch_queries=2)
    query = len("x\nAnswer:")
    assert passes.tokens == [2 * query, 2, 2, query, 1, 1]


def test_a_deadline_that_passes_in_the_queue_costs_nothing(serve, passes):
    async def scenario(backend):
        spec = spec_of()
        await backend.prepare(spec)
        passes.hold()
        running = asyncio.create_task(backend.score(spec, ["first"]))
        await passes.until_held()
        deadline = time.monotonic() + 0.05
        late = asyncio.create_task(backend.score(spec, ["late"], deadline=deadline))
        with pytest.raises(DeadlineError, match="the answer was not finished in the time it was given, after 0 tokens"):
            await anext(backend.generate(spec, "late", GenerationOptions(), deadline=deadline))
        with pytest.raises(DeadlineError):
            await late
        assert backend.load().num_waiting == 0
        passes.open.set()
        await running

    serve(scenario)
    assert len(passes.tokens) == 2  # The prefix and the first query.


def test_a_cancelled_query_is_not_computed(serve, passes):
    async def scenario(backend):
        spec = spec_of()
        await backend.prepare(spec)
        passes.hold()
        running = asyncio.create_task(backend.score(spec, ["first"]))
        await passes.until_held()
        gone = [asyncio.create_task(backend.score(spec, ["gone"])), asyncio.create_task(write(backend, spec, "gone"))]
        await settle()
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        passes.open.set()
        await running
        await asyncio.sleep(0.05)

    serve(scenario)
    assert len(passes.tokens) == 2


def test_an_answer_whose_reader_leaves_ends_at_its_next_token(serve, passes):
    async def scenario(backend):
        spec = spec_of()
        await backend.prepare(spec)
        pieces = backend.generate(spec, "x", GenerationOptions(max_tokens=1000))
        for _ in range(3):
            await anext(pieces)
        await pieces.aclose()
        before = len(passes.tokens)
        await backend.score(spec, ["y"])
        await backend.score(spec, ["y"])
        assert len(passes.tokens) <= before + 3  # The two queries, and a step that had begun.
        assert backend.load().num_running == 0

    serve(scenario)


def test_an_error_of_a_step_reaches_all_readers_and_later_answers_are_written(serve, monkeypatch):
    async def scenario(backend):
        spec = spec_of()
        await backend.prepare(spec)
        with monkeypatch.context() as patch:
            patch.setattr(TokenStreams, "step", lambda self: {}[0])
            found = await asyncio.gather(*(write(backend, spec, "x") for _ in range(2)), return_exceptions=True)
            assert [type(error) for error in found] == [KeyError, KeyError]
        assert len(await write(backend, spec, "x", max_tokens=2)) == 2
        assert backend.load().num_running == 0

    serve(scenario)


def test_stopping_finishes_what_has_begun_and_refuses_the_rest(serve, passes, monkeypatch):
    monkeypatch.setattr(task_prefixes, "SLICE_TOKENS", 50)

    async def scenario(backend):
        spec = spec_of()
        await backend.prepare(spec)
        written = asyncio.create_task(write(backend, spec, "x", max_tokens=5))
        while backend.load().num_running == 0:
            await asyncio.sleep(0)
        passes.hold()
        await passes.until_held()
        begun = asyncio.create_task(write(backend, spec, "y", max_tokens=5))
        refused = [asyncio.create_task(backend.score(spec, ["x"])), asyncio.create_task(backend.prepare(spec_of("b", 40)))]
        await asyncio.sleep(0.05)
        stopped = asyncio.create_task(backend.stop())
        await settle()
        passes.open.set()
        assert (await written)[-1].num_tokens == 5
        for task in (begun, *refused):
            with pytest.raises(OverloadedError, match="the service is stopping"):
                await task
        await stopped
        for late in (backend.score(spec, ["x"]), write(backend, spec, "x"), backend.prepare(spec)):
            with pytest.raises(OverloadedError, match="the service is stopping"):
                await late

    serve(scenario)


def test_after_a_storm_of_queries_nothing_is_left_waiting_and_every_answer_was_right(serve, engine):
    specs = [spec_of(letter, 4 + place, word=f"w{place}") for place, letter in enumerate("abcd")]
    inputs = [f"text {number}" for number in range(5)]
    prefixes = [engine.prefill(spec.examples) for spec in specs]
    scores = [engine.choose(prefix, inputs, [LABELS] * 5) for prefix in prefixes]
    texts = [engine.write(prefix, inputs, max_new_tokens=4) for prefix in prefixes]
    draw = random.Random(0)
    counts = Counter()

    async def ask(backend, number, place, text, deadline):
        if number % 3:
            scored = await backend.score(specs[place], [inputs[text]], deadline=deadline)
            assert list(scored.log_probabilities) == [pytest.approx(scores[place][text].tolist(), abs=1e-4)]
        else:
            options = GenerationOptions(max_tokens=4)
            async with contextlib.aclosing(backend.generate(specs[place], inputs[text], options, deadline=deadline)) as pieces:
                assert "".join([piece.text async for piece in pieces]) == texts[place][text]

    async def query(backend, number):
        """Ask until it is answered or its time is over: how often a full queue refuses it depends on the machine."""
        place, text = draw.randrange(4), draw.randrange(5)
        await asyncio.sleep(draw.random() * 1.5)
        deadline = time.monotonic() + draw.random() * 0.05 if number % 7 == 0 else None
        while True:
            try:
                await ask(backend, number, place, text, deadline)
            except OverloadedError:
                await asyncio.sleep(draw.random() * 0.2)
            except DeadlineError:
                counts["late"] += 1
                return
            else:
                counts["answered"] += 1
                return

    async def scenario(backend):
        tasks = [asyncio.create_task(query(backend, number)) for number in range(600)]
        for task in tasks[::11]:
            await asyncio.sleep(0.002)
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(error) for error in found if error is not None} <= {asyncio.CancelledError}
        counts["cancelled"] = sum(error is not None for error in found)
        await asyncio.sleep(0.05)
        load = backend.load()
        assert (load.num_waiting, load.num_running) == (0, 0)
        assert backend._num_answers == 0
        assert [writer._driver for task in backend._prefixes._tasks.values() for writer in task[0].writers.values()] == [None] * 4
        await backend.score(specs[0], ["x"])
        assert backend._batcher._queues == {}
        assert len(asyncio.all_tasks()) == 3  # This one, the one that awaits it, and the batcher's.

    serve(scenario, max_queue=40)
    assert counts["answered"] > 300
    assert counts["late"] > 0
    assert counts.total() == 600


def test_the_event_loop_stays_free_while_the_model_computes(serve, passes):
    async def scenario(backend):
        spec = spec_of()
        passes.hold()
        job = asyncio.create_task(backend.prepare(spec))
        await passes.until_held()
        assert backend.load().num_waiting == 0  # The loop answers while the model's thread is held.
        passes.open.set()
        await job

    serve(scenario)
