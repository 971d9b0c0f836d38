"""The native backend: what it answers equals the bare engine's, whatever else is in flight, and costs no more than it must."""

import asyncio
import contextlib
import random
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest

from manyicl.encoding import Encoder
from manyicl.engines.native import NativeEngine
from manyicl.errors import BudgetError, DeadlineError, OverloadedError, StorageError, TaskError, UserInputError
from manyicl.sampling import TokenStreams
from manyicl.scoring import generate_answers
from manyicl.serving import task_prefixes
from manyicl.serving.backends import GenerationOptions, TaskSpec
from manyicl.serving.native_backend import NativeBackend, open_native_engine
from manyicl.tasks.task import Example
from model_fixtures import run_backend
from serving_fixtures import copy_of, count_comparisons

LABELS = ("odd", "even", "neither of them")


def examples(count, *, word="number", first=0):
    return tuple(Example(f"{word} {number}", LABELS[number % 2]) for number in range(first, first + count))


def spec_of(letter="a", count=6, *, labels=LABELS, instruction="", word="number"):
    return TaskSpec(letter * 32, examples(count, word=word), labels, instruction)


class Passes:
    """Forward passes of a model with its branches: tokens of each, and a gate that holds the first one back."""

    def __init__(self, model):
        self.tokens = []
        self.open = threading.Event()
        self.open.set()
        self.began = threading.Event()
        self.hook = model.get_decoder().register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, arguments, options):
        if options.get("branches") is not None:
            self.tokens.append(options["input_ids"].numel())
            self.began.set()
            assert self.open.wait(20)

    def hold(self):
        self.open.clear()
        self.began.clear()

    async def until_held(self):
        await asyncio.to_thread(self.began.wait, 20)


@pytest.fixture(scope="module")
def loaded(tiny_loaded):
    return tiny_loaded("llama")


@pytest.fixture
def engine(loaded):
    return NativeEngine(loaded, Encoder(loaded.tokenizer))


@pytest.fixture
def passes(loaded):
    passes = Passes(loaded.model)
    yield passes
    passes.open.set()
    passes.hook.remove()


@pytest.fixture
def serve(engine, tmp_path):
    """Run a coroutine function with a started backend: serve(scenario, engine=…, max_queue=…)."""

    def run(scenario, *, engine=engine, folder=tmp_path / "prefixes", **limits):
        return run_backend(engine, folder, scenario, **limits)

    return run


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


async def write(backend, spec, text, **options):
    async with contextlib.aclosing(backend.generate(spec, text, GenerationOptions(**options))) as pieces:
        return [piece async for piece in pieces]


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


def expected_scores(engine, spec, inputs, num_shots=None):
    prefix = engine.prefill(spec.examples[:num_shots], instruction=spec.instruction)
    return [pytest.approx(own.tolist(), abs=1e-4) for own in engine.choose(prefix, inputs, [spec.labels] * len(inputs))]


def test_scores_are_those_of_the_engine_whatever_else_is_in_flight(serve, engine):
    specs = [spec_of("a"), spec_of("b", 9, word="figure"), spec_of("c", 3, labels=("x", "y"), instruction="Say.")]
    inputs = [f"number {number}" + "!" * (number % 5) for number in range(24)]

    async def scenario(backend):
        return await asyncio.gather(
            backend.score(specs[0], inputs),
            *(backend.score(specs[number % 3], [text]) for number, text in enumerate(inputs)),
            *(write(backend, specs[number % 3], text, max_tokens=5) for number, text in enumerate(inputs[:6])),
            backend.prepare(spec_of("d", 40)),
        )

    whole, *rest = serve(scenario)
    assert list(whole.log_probabilities) == expected_scores(engine, specs[0], inputs)
    for number, (text, scored) in enumerate(zip(inputs, rest[:24], strict=True)):
        assert list(scored.log_probabilities) == expected_scores(engine, specs[number % 3], [text])
    for number, (text, pieces) in enumerate(zip(inputs[:6], rest[24:30], strict=True)):
        spec = specs[number % 3]
        prefix = engine.prefill(spec.examples, instruction=spec.instruction)
        assert [text_of(pieces)] == engine.write(prefix, [text], max_new_tokens=5)
    assert rest[30].num_used == 40


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


def test_what_was_used_and_computed_is_told(serve, engine):
    spec = spec_of(instruction="Numbers.")
    prefix = engine.prefill(spec.examples, instruction=spec.instruction)
    query = len(engine.encoder.encode_query("seven"))
    # Nodes of the trie: " odd", " even" and " neither of them" share their space.
    nodes = 1 + len("odd") + len("even") + len("neither of them")

    async def scenario(backend):
        prepared = await backend.prepare(spec)
        scored = await backend.score(spec, ["seven", "seven!"])
        return prepared, scored, await write(backend, spec, "seven", max_tokens=3), backend.load()

    prepared, scored, pieces, load = serve(scenario)
    assert (prepared.num_used, prepared.prefix_tokens, prepared.computed_tokens) == (6, prefix.num_tokens, prefix.num_tokens)
    assert prepared.left_out == ()
    assert 0 < prepared.seconds < 60
    assert scored.num_shots == (6, 6)
    assert scored.cached_tokens == (prefix.num_tokens, prefix.num_tokens)
    assert scored.computed_tokens == (query + nodes, query + 1 + nodes)
    assert [(piece.cached_tokens, piece.computed_tokens) for piece in pieces] == [(prefix.num_tokens, query)] * len(pieces)
    assert [piece.num_tokens for piece in pieces] == [1, 2, 3]
    assert load.cached_tokens == 3 * prefix.num_tokens
    assert load.computed_tokens == prefix.num_tokens + 3 * query + 1 + 2 * nodes + 3
    assert dict(load.opened) == {"computed": 1, "memory": 2}


def test_scoring_after_fewer_demonstrations_needs_no_further_prefix(serve, engine, passes):
    spec = spec_of()

    async def scenario(backend):
        await backend.prepare(spec)
        return [await backend.score(spec, ["x", "y"], num_shots=shots) for shots in (0, 2, 6, 100)]

    found = serve(scenario)
    assert len(passes.tokens) == 5
    for shots, scored in zip((0, 2, 6, 6), found, strict=True):
        assert scored.num_shots == (shots, shots)
        assert list(scored.log_probabilities) == expected_scores(engine, spec, ["x", "y"], shots)


def test_a_task_without_examples_is_the_plain_model(serve, engine, tmp_path):
    spec = TaskSpec("0" * 32, (), ("x", "y"))

    async def scenario(backend):
        prepared = await backend.prepare(spec)
        return prepared, await backend.score(spec, ["q"]), await write(backend, replace(spec, labels=()), "q", max_tokens=6)

    prepared, scored, pieces = serve(scenario)
    assert (prepared.num_used, prepared.prefix_tokens, prepared.computed_tokens) == (0, 0, 0)
    assert list(scored.log_probabilities) == expected_scores(engine, spec, ["q"])
    assert [text_of(pieces)] == engine.write(engine.prefill([]), ["q"], max_new_tokens=6)
    assert not (tmp_path / "prefixes").exists()


def test_an_answer_is_greedy_or_follows_its_seed_alone_and_in_company(serve):
    spec = spec_of(labels=())
    options = [{"temperature": 1.0, "seed": seed, "max_tokens": 12} for seed in (1, 2, -1)] + [{"max_tokens": 12}]

    async def scenario(backend):
        alone = [await write(backend, spec, "x", **own) for own in options]
        together = await asyncio.gather(*(write(backend, spec, "x", **own) for own in options * 2))
        drawn = [await write(backend, spec, "x", temperature=1.0, max_tokens=12) for _ in range(2)]
        return alone, together, drawn

    alone, together, drawn = serve(scenario)
    texts = [text_of(pieces) for pieces in alone]
    assert len(set(texts)) == 4
    assert [text_of(pieces) for pieces in together] == texts * 2
    assert text_of(drawn[0]) != text_of(drawn[1])


def test_an_answer_ends_at_its_end_at_a_stop_string_or_at_its_length(serve, engine, monkeypatch):
    spec = spec_of(labels=())
    (whole,) = engine.write(engine.prefill(spec.examples), ["x"], max_new_tokens=30)
    stop = whole[4:6]

    async def scenario(backend):
        return [
            await write(backend, spec, "x", max_tokens=30),
            await write(backend, spec, "x", max_tokens=30, stop=("not there", stop)),
            await write(backend, spec, "x", max_tokens=1),
        ]

    long, stopped, short = serve(scenario)
    assert text_of(long) == whole
    assert text_of(stopped) == whole[: whole.index(stop)].strip()
    assert [pieces[-1].finish_reason for pieces in (long, stopped, short)] == ["length", "stop", "length"]
    assert all(piece.finish_reason is None for pieces in (long, stopped, short) for piece in pieces[:-1])
    assert stopped[-1].num_tokens < long[-1].num_tokens == 30
    assert len(short) == 1


def test_the_terminator_ends_an_answer_and_is_no_token_of_it(serve, engine, monkeypatch):
    spec = spec_of(labels=())
    query, prefix = engine.encoder.encode_query("x"), engine.prefill(spec.examples)
    (ids,) = generate_answers(engine.loaded.model, prefix, [query], terminator_id=-1, max_new_tokens=10)
    place = next(place for place in range(3, 10) if ids[place] not in ids[:place])

    async def scenario(backend):
        await backend.prepare(spec)
        monkeypatch.setattr(engine.encoder, "terminator_id", ids[place])
        return await write(backend, spec, "x", top_logprobs=1)

    pieces = serve(scenario)
    assert (pieces[-1].finish_reason, pieces[-1].token, pieces[-1].num_tokens) == ("stop", None, place)
    assert len(pieces) == place + 1
    assert b"".join(piece.token.token_bytes for piece in pieces[:-1]).decode(errors="replace").strip() == text_of(pieces)


def test_log_probabilities_come_with_tokens_where_they_are_asked_for(serve):
    spec = spec_of(labels=())

    async def scenario(backend):
        return [await write(backend, spec, "x", max_tokens=4, top_logprobs=number) for number in (None, 0, 3)]

    none, own, three = serve(scenario)
    assert [(piece.token, piece.alternatives) for piece in none] == [(None, ())] * 4
    assert [piece.alternatives for piece in own] == [()] * 4
    for alone, told in zip(own, three, strict=True):
        assert alone.token is not None
        assert told.alternatives[0] == told.token
        assert len(told.alternatives) == 3
        assert alone.token.token_bytes == told.token.token_bytes
        assert len(alone.token.token_bytes) == 1
        assert told.token.log_probability < 0
        assert alone.token.log_probability == pytest.approx(told.token.log_probability, abs=1e-4)


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


def test_one_answer_that_ends_leaves_the_others_as_they_were(serve):
    async def scenario(backend):
        spec = spec_of()
        (whole,) = [await write(backend, spec, "x", max_tokens=20)]
        kept = asyncio.create_task(write(backend, spec, "x", max_tokens=20))
        gone = backend.generate(spec, "another query", GenerationOptions(max_tokens=20))
        for _ in range(4):
            await anext(gone)
        late = asyncio.create_task(write(backend, spec, "x", max_tokens=20))
        await gone.aclose()
        assert text_of(await kept) == text_of(await late) == text_of(whole)

    serve(scenario)


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


def test_a_long_query_sees_fewer_demonstrations_and_is_never_cut(serve, loaded):
    engine = NativeEngine(loaded, Encoder(loaded.tokenizer), context_tokens=200)
    spec = spec_of(count=20)

    async def scenario(backend):
        prepared = await backend.prepare(spec)
        scored = await backend.score(spec, ["x", "y" * 100])
        pieces = await write(backend, spec, "y" * 100)
        for call in (backend.score(spec, ["x", "y" * 190]), write(backend, spec, "y" * 190)):
            with pytest.raises(
                BudgetError, match=r"the input takes 198 tokens and its answer up to 17, more than the context of"
            ):
                await call
        with pytest.raises(BudgetError, match="input 1: the input takes"):
            await backend.score(spec, ["x", "y" * 190])
        return prepared, scored, pieces

    prepared, scored, pieces = serve(scenario, engine=engine)
    assert scored.num_shots[0] == prepared.num_used
    assert scored.num_shots[1] < prepared.num_used
    assert list(scored.log_probabilities[1:]) == expected_scores(engine, spec, ["y" * 100], scored.num_shots[1])
    assert pieces[-1].cached_tokens == scored.cached_tokens[1]
    assert pieces[-1].finish_reason == "length"
    assert pieces[-1].cached_tokens + pieces[-1].computed_tokens + pieces[-1].num_tokens == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0. Give at least 1."),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_logprobs": 21}, "top_logprobs is 21. Give 0 to 20."),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserInputError, match=message):
        GenerationOptions(**options)


def test_what_cannot_be_scored_is_an_error_of_the_caller(serve):
    async def scenario(backend):
        with pytest.raises(UserInputError, match="the task has no labels to score"):
            await backend.score(spec_of(labels=()), ["x"])
        with pytest.raises(TaskError, match="labels 'x' and 'x' have the same 3 token ids"):
            await backend.prepare(spec_of(labels=("x", "x")))
        assert (await backend.score(spec_of(), [])).log_probabilities == ()

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

    async def query(backend, number):
        place, text = draw.randrange(4), draw.randrange(5)
        await asyncio.sleep(draw.random() * 1.5)
        deadline = time.monotonic() + draw.random() * 0.05 if number % 7 == 0 else None
        try:
            if number % 3:
                scored = await backend.score(specs[place], [inputs[text]], deadline=deadline)
                assert list(scored.log_probabilities) == [pytest.approx(scores[place][text].tolist(), abs=1e-4)]
            else:
                options = GenerationOptions(max_tokens=4)
                async with contextlib.aclosing(
                    backend.generate(specs[place], inputs[text], options, deadline=deadline)
                ) as pieces:
                    assert "".join([piece.text async for piece in pieces]) == texts[place][text]
        except (OverloadedError, DeadlineError) as error:
            counts[type(error)] += 1
        else:
            counts["answered"] += 1

    async def scenario(backend):
        tasks = [asyncio.create_task(query(backend, number)) for number in range(600)]
        for task in tasks[::11]:
            await asyncio.sleep(0.002)
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(error) for error in found if error is not None} <= {asyncio.CancelledError}
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
    assert counts[DeadlineError] > 0


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


def test_a_model_is_opened_by_name_in_its_own_format(tiny_model_folder, tmp_path):
    async def scenario():
        backend = NativeBackend(
            partial(open_native_engine, str(tiny_model_folder("llama")), dtype="float32", context_tokens=500), tmp_path
        )
        await backend.start()
        try:
            assert (backend.name, backend.context_tokens) == (str(tiny_model_folder("llama")), 500)
            assert (await backend.score(spec_of(), ["x"])).num_shots == (6,)
        finally:
            await backend.stop()

    asyncio.run(scenario())
