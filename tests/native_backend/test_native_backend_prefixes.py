"""The native backend's prefixes: computed once and in slices, extended, kept on disk, and removed with their task."""

import asyncio
import time
from dataclasses import replace

import pytest

from backend_fixtures import examples, expected_scores, settle, spec_of
from manyicl.encoding import Encoder
from manyicl.engines.native import NativeEngine
from manyicl.errors import BudgetError, DeadlineError, StorageError
from manyicl.serving import task_prefixes
from manyicl.serving.backends import TaskSpec
from manyicl.tasks.task import Example
from serving_fixtures import copy_of, count_comparisons


def test_a_prefill_lets_queries_of_other_tasks_go_before_it_ends(serve, passes, monkeypatch):
    monkeypatch.setattr(task_prefixes, "SLICE_TOKENS", 50)
    order = []

    async def scenario(backend):
        quick, slow = spec_of("a"), spec_of("b", 40)
        await backend.prepare(quick)
        passes.hold()
        task = asyncio.create_task(backend.prepare(slow, progress=lambda done, of: order.append((done, of))))
        await passes.until_held()
        queries = [asyncio.create_task(backend.score(quick, ["x"])) for _ in range(2)]
        for query in queries:
            query.add_done_callback(lambda _: order.append("scored"))
        await settle()
        passes.open.set()
        prepared = await task
        await asyncio.gather(*queries)
        return prepared

    prepared = serve(scenario)
    assert order[:3] == [(order[0][0], prepared.prefix_tokens), "scored", "scored"]
    assert order[-1] == (prepared.prefix_tokens, prepared.prefix_tokens)
    assert len(order) > 10


def test_preparing_in_slices_gives_the_prefix_of_the_engine(serve, engine, monkeypatch):
    monkeypatch.setattr(task_prefixes, "SLICE_TOKENS", 50)
    spec = spec_of("a", 20, instruction="Numbers.")

    async def scenario(backend):
        await backend.prepare(spec)
        return backend._prefixes.find(spec).prefix

    prefix = serve(scenario)
    expected = engine.prefill(spec.examples, instruction=spec.instruction)
    assert (prefix.token_ids, prefix.stops) == (expected.token_ids, expected.stops)
    for own, other in zip(prefix.states, expected.states, strict=True):
        assert own[0].numpy() == pytest.approx(other[0].numpy(), abs=1e-4)
        assert own[1].numpy() == pytest.approx(other[1].numpy(), abs=1e-4)
    assert prefix.buffer.capacity == prefix.num_tokens


def test_preparing_again_computes_nothing(serve, passes):
    async def scenario(backend):
        spec = spec_of()
        first, again = await asyncio.gather(backend.prepare(spec), backend.prepare(spec_of()))
        assert [first.computed_tokens, again.computed_tokens] == [first.prefix_tokens, 0]
        assert (await backend.prepare(spec)).computed_tokens == 0

    serve(scenario)
    assert len(passes.tokens) == 1


def test_an_open_task_is_found_without_comparing_its_examples_each_time(serve, monkeypatch):
    compared = count_comparisons(monkeypatch)
    spec = spec_of()

    async def scenario(backend):
        await backend.prepare(copy_of(spec))
        before = len(compared)
        for _ in range(3):
            await backend.score(spec, ["x"])
        equal = len(compared)
        assert backend._prefixes.find(replace(spec, examples=(*copy_of(spec).examples, Example("new", "odd")))) is None
        return equal - before, len(compared) - equal

    assert serve(scenario) == (6, 0)


def test_a_restart_opens_prefixes_from_disk(serve, engine, passes):
    spec = spec_of(instruction="Numbers.")

    async def first(backend):
        await backend.prepare(spec)
        return await backend.score(spec, ["x"])

    async def second(backend):
        prepared = await backend.prepare(spec)
        return prepared, await backend.score(spec, ["x"]), backend.load()

    scored = serve(first)
    passes.tokens.clear()
    prepared, again, load = serve(second)
    assert prepared.computed_tokens == 0
    assert again == scored
    assert len(passes.tokens) == 1
    assert dict(load.opened) == {"disk": 1, "memory": 1}


def test_a_prefix_that_is_gone_is_computed_again(serve, tmp_path, passes):
    spec = spec_of()
    sizes = []

    async def measure(backend):
        await backend.prepare(spec)
        sizes.append(backend._prefixes._store.num_bytes)

    serve(measure)
    passes.tokens.clear()

    async def scenario(backend):
        first = await backend.prepare(spec)
        await backend.prepare(spec_of("b"))
        return first, await backend.score(spec, ["x"]), backend._prefixes._store.keys()

    # There is room for one prefix on disk, and in memory.
    first, scored, keys = serve(scenario, max_stored_bytes=int(1.5 * sizes[0]), max_open_bytes=1)
    assert first.computed_tokens == 0
    assert passes.tokens[:2] == [first.prefix_tokens] * 2  # The other task, and the first one again.
    assert len(passes.tokens) == 3
    assert scored.cached_tokens == (first.prefix_tokens,)
    assert len(keys) == 1


def test_a_query_is_answered_though_its_prefix_cannot_be_kept(serve, caplog):
    async def scenario(backend):
        spec = spec_of()
        assert (await backend.score(spec, ["x"])).num_shots == (6,)
        with pytest.raises(StorageError, match="more than the 100 B of the whole store"):
            await backend.prepare(spec)

    serve(scenario, max_stored_bytes=100)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "tokens is not kept" in caplog.text


def test_extending_computes_only_what_is_new(serve, engine, passes):
    old, new = spec_of(count=6), spec_of(count=9)

    async def scenario(backend):
        first = await backend.prepare(old)
        passes.tokens.clear()
        extended = await backend.extend(new, 6)
        return first, extended, await backend.score(new, ["x"]), await backend.score(old, ["x"])

    first, extended, scored, scored_old = serve(scenario)
    assert (extended.num_used, extended.computed_tokens) == (9, extended.prefix_tokens - first.prefix_tokens)
    assert passes.tokens[0] == extended.computed_tokens
    assert len(passes.tokens) == 3
    assert list(scored.log_probabilities) == expected_scores(engine, new, ["x"])
    assert list(scored_old.log_probabilities) == expected_scores(engine, old, ["x"])


def test_extending_after_a_restart_opens_the_old_prefix(serve, passes):
    old, new = spec_of(count=6), spec_of(count=9)
    first = serve(lambda backend: backend.prepare(old))
    passes.tokens.clear()
    extended = serve(lambda backend: backend.extend(new, 6))
    assert extended.computed_tokens == extended.prefix_tokens - first.prefix_tokens == sum(passes.tokens)
    # The service may have died before it noted the new examples: both are there.
    passes.tokens.clear()
    assert serve(lambda backend: backend.prepare(old)).computed_tokens == 0
    assert serve(lambda backend: backend.prepare(new)).computed_tokens == 0
    # With the next extension, the one that nobody can go back to is removed.
    last = serve(lambda backend: backend.extend(spec_of(count=10), 9))
    assert passes.tokens == [last.prefix_tokens - extended.prefix_tokens]
    assert serve(lambda backend: backend.prepare(old)).computed_tokens == first.prefix_tokens


def test_a_shorter_spec_is_served_from_the_longer_ones_prefix(serve, passes):
    async def scenario(backend):
        await backend.prepare(spec_of(count=9))
        passes.tokens.clear()
        assert (await backend.prepare(spec_of(count=6))).computed_tokens == 0
        return await backend.score(spec_of(count=6), ["x"])

    assert serve(scenario).num_shots == (6,)
    assert len(passes.tokens) == 1


def test_other_examples_under_the_same_key_share_no_more_than_their_front(serve, engine):
    first = spec_of(count=6)
    other = replace(first, examples=(*first.examples[:2], *examples(4, word="other")))

    async def scenario(backend):
        await backend.prepare(first)
        return await backend.prepare(other), await backend.score(other, ["x"])

    prepared, scored = serve(scenario)
    front = engine.prefill(first.examples[:2])
    assert prepared.computed_tokens == prepared.prefix_tokens - front.num_tokens
    assert list(scored.log_probabilities) == expected_scores(engine, other, ["x"])


def test_a_forgotten_task_leaves_nothing_and_the_others_stay(serve, tmp_path, passes):
    async def scenario(backend):
        for letter in "ab":
            await backend.prepare(spec_of(letter))
        await backend.extend(spec_of("a", 8), 6)
        store = backend._prefixes._store
        assert len(store.keys()) == 3
        await backend.forget("a" * 32)
        await backend.forget("c" * 32)
        assert len(store.keys()) == 1
        passes.tokens.clear()
        assert (await backend.prepare(spec_of("b"))).computed_tokens == 0
        again = await backend.prepare(spec_of("a"))
        assert again.computed_tokens == again.prefix_tokens

    serve(scenario)
    # A backend that has never opened the task finds it on disk, too.
    serve(lambda backend: backend.forget("a" * 32))
    assert serve(lambda backend: backend.prepare(spec_of("b"))).computed_tokens == 0
    assert serve(lambda backend: backend.prepare(spec_of("a"))).computed_tokens > 0


def test_a_task_does_not_tell_that_another_has_the_same_examples(serve, passes):
    async def scenario(backend):
        first, second = [await backend.prepare(spec_of(letter)) for letter in "ab"]
        assert first.computed_tokens == second.computed_tokens == first.prefix_tokens

    serve(scenario)
    assert len(passes.tokens) == 2


def test_cancelling_stops_a_prefill_and_what_was_computed_is_used_later(serve, tmp_path, passes, monkeypatch):
    monkeypatch.setattr(task_prefixes, "SLICE_TOKENS", 50)

    async def scenario(backend):
        spec = spec_of(count=40)
        done = []
        job = asyncio.create_task(backend.prepare(spec, progress=lambda tokens, _: done.append(tokens)))
        while len(done) < 3:
            await asyncio.sleep(0)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        await asyncio.sleep(0.05)
        assert len(passes.tokens) <= 5
        assert not (tmp_path / "prefixes").exists()
        with pytest.raises(DeadlineError, match="the task's examples were not computed in the time"):
            await backend.score(spec, ["x"], deadline=time.monotonic())
        prepared = await backend.prepare(spec)
        assert prepared.computed_tokens < prepared.prefix_tokens - done[1]

    serve(scenario)


def test_examples_that_do_not_fit_are_left_out_with_a_reason(serve, loaded):
    engine = NativeEngine(loaded, Encoder(loaded.tokenizer), context_tokens=200)
    long = Example("long " * 50, "odd")
    spec = replace(spec_of(), examples=(*examples(2), long, *examples(20, first=2)), labels=())

    async def scenario(backend):
        prepared = await backend.prepare(spec)
        extended = await backend.extend(replace(spec, examples=(*spec.examples, Example("a", "odd"))), 23)
        with pytest.raises(BudgetError, match=r"none of 1 examples fits the context of 200 tokens; of the first, its \d+ tokens"):
            await backend.prepare(TaskSpec("c" * 32, (long,)))
        return prepared, extended

    prepared, extended = serve(scenario, engine=engine)
    # The examples take 23 and 24 tokens in turn; 16 are kept for a query and 6 for its answer.
    assert (prepared.num_used, prepared.prefix_tokens) == (7, 164)
    positions = [position for position, _ in prepared.left_out]
    assert positions == [2, *range(8, 23)]
    reasons = dict(prepared.left_out)
    assert reasons[2] == "its 265 tokens do not fit the 200 of the context beside a query and its answer"
    assert reasons[8] == "its 24 tokens are more than the 14 left of the context's 200"
    assert reasons[9] == "the context of 200 tokens is full: 7 examples before it take 164"
    assert (extended.num_used, extended.computed_tokens) == (7, 0)
    assert extended.left_out[:-1] == prepared.left_out
    assert extended.left_out[-1][0] == 23
