"""Another server behind the same protocol, here a small one with the tiny model: scores and answers are those of our engine."""

import asyncio
import contextlib
import json
import shutil
import threading
import time
from dataclasses import replace

import pytest

from manyicl.encoding import Encoder
from manyicl.engines.native import NativeEngine
from manyicl.errors import BudgetError, DeadlineError, ManyICLError, ModelError, OverloadedError, UserInputError
from manyicl.label_trie import build_trie
from manyicl.serving import openai_backend
from manyicl.serving.backends import BackendLimits, GenerationOptions, TaskSpec
from manyicl.serving.openai_backend import OpenAIBackend, open_encoder
from manyicl.serving.remote_server import MAX_CHOSEN_TOKENS, RemoteServer, plan_requests
from manyicl.tasks.task import Example

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from openai_fixtures import FakeServer
from serving_fixtures import copy_of, count_comparisons

LABELS = ("odd", "even", "neither of them", "e")
SPEC = TaskSpec("a" * 32, tuple(Example(f"number {number}", LABELS[number % 2]) for number in range(6)), LABELS)


@pytest.fixture(scope="module")
def loaded(tiny_loaded):
    return tiny_loaded("llama")


@pytest.fixture(scope="module")
def engine(loaded):
    return NativeEngine(loaded, Encoder(loaded.tokenizer), context_tokens=400)


@pytest.fixture
def serve(loaded):
    """Run a coroutine function with a started backend and the fake server behind it: serve("vllm", scenario)."""
    import uvicorn

    def run(kind, scenario, *, key="secret", context_tokens=400, model="tiny", **limits):
        fake = FakeServer(loaded, kind)
        server = uvicorn.Server(uvicorn.Config(fake.app, port=0, log_level="error", ws="none", lifespan="off"))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]

            async def whole():
                backend = OpenAIBackend(
                    f"http://127.0.0.1:{port}/v1/",
                    model,
                    lambda: Encoder(loaded.tokenizer),
                    context_tokens=context_tokens,
                    api_key=key,
                    limits=BackendLimits(**limits),
                )
                try:
                    await backend.start()
                    fake.requests.clear()
                    return await asyncio.wait_for(scenario(backend, fake), 60)
                finally:
                    fake.hold.set()
                    await asyncio.wait_for(backend.stop(), 20)

            return asyncio.run(whole())
        finally:
            fake.hold.set()
            server.should_exit = True
            thread.join()

    return run


async def write(backend, spec, text, **options):
    async with contextlib.aclosing(backend.generate(spec, text, GenerationOptions(**options))) as pieces:
        return [piece async for piece in pieces]


def text_of(pieces):
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize("kind", ["vllm", "echo"])
def test_scores_are_those_of_the_engine(kind, serve, engine):
    inputs = ["seven", "number 8", "something longer"]
    prefix = engine.prefill(SPEC.examples)

    async def scenario(backend, fake):
        return await backend.score(SPEC, inputs), await backend.score(SPEC, inputs[:1], num_shots=2), fake.requests

    whole, fewer, requests = serve(kind, scenario)
    expected = [pytest.approx(own.tolist(), abs=1e-4) for own in engine.choose(prefix, inputs, [LABELS] * 3)]
    assert list(whole.log_probabilities) == expected
    assert whole.num_shots == (6, 6, 6)
    assert whole.cached_tokens == (prefix.num_tokens if kind == "vllm" else 0,) * 3
    assert list(fewer.log_probabilities) == [
        pytest.approx(own.tolist(), abs=1e-4) for own in engine.choose(prefix.trim(2), inputs[:1], [LABELS])
    ]
    assert fewer.num_shots == (2,)
    # One request an input where tokens can be chosen; else one for each label.
    assert len(requests) == (4 if kind == "vllm" else 4 * len(LABELS))
    assert {request.get("cache_salt") for request in requests} == ({SPEC.key} if kind == "vllm" else {None})


def test_what_the_server_computed_is_told_where_it_says_so(serve, engine):
    prefix = engine.prefill(SPEC.examples)
    query = len(engine.encoder.encode_query("seven"))
    nodes = len(build_trie(engine.encoder.encode_labels(LABELS)).tokens)

    async def scenario(backend, fake):
        return [await backend.prepare(SPEC), await backend.prepare(SPEC), await backend.score(SPEC, ["seven"]), backend.load()]

    first, again, scored, load = serve("vllm", scenario)
    assert (first.num_used, first.prefix_tokens, first.computed_tokens) == (6, prefix.num_tokens, prefix.num_tokens)
    assert again.computed_tokens == prefix.num_tokens % 10  # What lies behind the last whole block of its cache.
    assert scored.computed_tokens == (query + nodes,)
    assert load.computed_tokens == first.computed_tokens + again.computed_tokens + scored.computed_tokens[0]
    assert load.cached_tokens == prefix.num_tokens

    # A server that cannot be told to keep tasks apart tells of other tasks' tokens too; what it says of them is not passed on.
    assert [prepared.computed_tokens for prepared in serve("shared", scenario)[:2]] == [prefix.num_tokens] * 2

    first, again, scored, load = serve("echo", scenario)
    assert first.computed_tokens == again.computed_tokens == prefix.num_tokens
    labels = engine.encoder.encode_labels(LABELS)
    assert scored.computed_tokens == (4 * (prefix.num_tokens + query) + sum(map(len, labels)),)
    assert load.cached_tokens == 0


@pytest.mark.parametrize("kind", ["vllm", "shared", "echo", "bare", "text"])
def test_answers_are_those_of_the_engine(kind, serve, engine):
    (expected,) = engine.write(engine.prefill(SPEC.examples), ["x"], max_new_tokens=20)

    async def scenario(backend, fake):
        stop = expected[5:7]
        return (
            await write(backend, SPEC, "x", max_tokens=20),
            await write(backend, SPEC, "x", max_tokens=20, stop=(stop,)),
            fake.requests,
        )

    pieces, stopped, requests = serve(kind, scenario)
    assert text_of(pieces) == expected
    assert text_of(stopped) == expected[:5].strip()
    assert [pieces[-1].finish_reason, stopped[-1].finish_reason] == ["length", "stop"]
    assert all(piece.finish_reason is None for piece in pieces[:-1])
    assert all(isinstance(request["prompt"], str) == (kind == "text") for request in requests)
    if kind != "vllm":
        sizes = engine.prefill(SPEC.examples).num_tokens, len(engine.encoder.encode_query("x"))
        assert (pieces[-1].cached_tokens, pieces[-1].computed_tokens) == sizes
    else:
        assert pieces[-1].num_tokens == 20
        assert requests[0]["stop_token_ids"] == [256]


def test_a_terminator_ends_an_answer_and_is_not_counted(serve, loaded, monkeypatch):
    # The fake's model is made to end its answer after three tokens.
    original = FakeServer.values

    def ending(self, prompt):
        values = original(self, prompt).clone()
        if len(prompt) >= length + 3:
            values[-1, 256] = 100.0
        return values

    length = len(Encoder(loaded.tokenizer).encode_query("x"))
    monkeypatch.setattr(FakeServer, "values", ending)
    spec = TaskSpec("0" * 32, ())

    async def scenario(backend, fake):
        return await write(backend, spec, "x", max_tokens=20, top_logprobs=1)

    pieces = serve("vllm", scenario)
    assert pieces[-1].finish_reason == "stop"
    assert pieces[-1].num_tokens == 3
    assert [piece.token is None for piece in pieces] == [False, False, False, True]


def test_log_probabilities_come_with_their_tokens(serve, loaded):
    async def scenario(backend, fake):
        return [await write(backend, SPEC, "x", max_tokens=3, top_logprobs=number) for number in (None, 0, 2)]

    none, own, two = serve("vllm", scenario)
    assert [piece.token for piece in none] == [None] * 4
    assert [piece.alternatives for piece in own] == [()] * 4
    for piece, alone in zip(two[:3], own, strict=False):
        assert piece.alternatives[0] == piece.token == alone.token
        assert len(piece.alternatives) == 2
        assert piece.token.log_probability > piece.alternatives[1].log_probability
        assert len(piece.token.token_bytes) == 1


def test_a_server_of_text_tells_tokens_as_text(serve):
    async def scenario(backend, fake):
        return await write(backend, SPEC, "x", max_tokens=3, top_logprobs=1)

    pieces = serve("text", scenario)
    told = [piece.token for piece in pieces if piece.token is not None]
    assert len(told) == 3
    assert all(token.token_bytes == token.text.encode() for token in told)


@pytest.mark.parametrize("kind", ["bare", "text"])
def test_a_server_that_tells_no_log_probabilities_scores_no_labels(kind, serve):
    async def scenario(backend, fake):
        with pytest.raises(UserInputError, match=r"^the model's server tells .*, so that labels cannot be scored on it"):
            await backend.score(SPEC, ["x"])
        with pytest.raises(UserInputError, match="the task has no labels to score"):
            await backend.score(replace(SPEC, labels=()), ["x"])

    serve(kind, scenario)


def test_the_context_is_the_servers_or_what_was_asked_for(serve):
    async def context(backend, fake):
        return backend.context_tokens

    assert serve("vllm", context, context_tokens=None) == 400
    assert serve("vllm", context, context_tokens=300) == 300
    with pytest.raises(BudgetError, match="a context of 500 tokens was asked of 'tiny', which takes 400"):
        serve("vllm", context, context_tokens=500)
    with pytest.raises(ModelError, match="does not say how many tokens 'tiny' takes"):
        serve("echo", context, context_tokens=None)
    with pytest.raises(ModelError, match="has no model 'big'; it names other, tiny"):
        serve("vllm", context, model="big")
    with pytest.raises(ManyICLError, match="answered with status 401"):
        serve("vllm", context, key=None)


def test_examples_left_out_and_long_queries_are_as_with_our_own_model(serve, loaded):
    spec = replace(SPEC, examples=SPEC.examples * 5)

    async def scenario(backend, fake):
        prepared = await backend.prepare(spec)
        scored = await backend.score(spec, ["x", "y" * 200])
        with pytest.raises(BudgetError, match="input 1: the input takes 398 tokens"):
            await backend.score(spec, ["x", "y" * 390])
        return prepared, scored, await backend.extend(replace(spec, examples=(*spec.examples, SPEC.examples[0])), 30)

    prepared, scored, extended = serve("vllm", scenario)
    assert prepared.num_used == scored.num_shots[0] == extended.num_used < 30
    assert [position for position, _ in prepared.left_out] == list(range(prepared.num_used, 30))
    assert scored.num_shots[1] < prepared.num_used
    assert extended.computed_tokens < 10


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (429, OverloadedError, "has too much to do"),
        (503, OverloadedError, "has too much to do"),
        (400, UserInputError, r"refused the request \(status 400\)"),
        (500, ManyICLError, "answered with status 500"),
    ],
)
def test_what_the_server_refuses_is_said_without_its_words(status, error, message, serve):
    async def scenario(backend, fake):
        fake.fail = status
        for call in (backend.score(SPEC, ["x"]), write(backend, SPEC, "x"), backend.prepare(SPEC)):
            with pytest.raises(error, match=message) as raised:
                await call
            assert "secret text" not in str(raised.value)
            assert ("127.0.0.1" in str(raised.value)) == (status == 500)  # Which reaches no tenant.
            if error is OverloadedError:
                assert raised.value.retry_after_seconds == 7.0
        assert backend.load().num_running == 0

    serve("vllm", scenario)


def test_an_answer_that_breaks_off_is_an_error_and_no_answer(serve):
    async def scenario(backend, fake):
        fake.break_off = True
        pieces = backend.generate(SPEC, "x", GenerationOptions(max_tokens=5))
        assert (await anext(pieces)).finish_reason is None
        with pytest.raises(ManyICLError, match="broke off in the middle of an answer"):
            await anext(pieces)

    serve("vllm", scenario)


def test_a_server_that_is_gone_is_an_error():
    async def scenario():
        backend = OpenAIBackend("http://127.0.0.1:9/v1", "tiny", lambda: None, context_tokens=10)
        with pytest.raises(ManyICLError, match=r"the server at http://127.0.0.1:9/v1 cannot be reached .*\(ConnectError\)"):
            await backend.start()
        await backend.stop()

    asyncio.run(scenario())


def test_a_password_in_the_address_is_used_and_not_told():
    async def scenario():
        server = RemoteServer("http://me:hidden@127.0.0.1:9/v1/", "tiny")
        with pytest.raises(ManyICLError, match=r"the server at http://127\.0\.0\.1:9/v1 cannot be reached"):
            await server.complete({})
        assert server._client.base_url.password == "hidden"
        await server.close()

    asyncio.run(scenario())


def test_prompts_are_made_when_it_is_their_turn_and_in_requests_of_a_bounded_size(serve, engine, monkeypatch):
    made = []
    make = openai_backend._make_prompt

    def note(context, num_tokens, query, more):
        made.append(query)
        return make(context, num_tokens, query, more)

    monkeypatch.setattr(openai_backend, "_make_prompt", note)
    inputs = [f"number {number}" for number in range(9)]
    columns = len({column for column, _ in build_trie(engine.encoder.encode_labels(LABELS)).edges})

    async def scenario(backend, fake):
        fake.hold.clear()
        scoring = asyncio.create_task(backend.score(SPEC, inputs))
        while len(fake.requests) < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        begun = set(made), len(fake.requests)
        fake.hold.set()
        whole = await scoring
        monkeypatch.setattr(openai_backend, "MAX_REQUEST_TOKENS", 2 * len(fake.requests[0]["prompt"][0]) + 60)
        fake.requests.clear()
        parts = await backend.score(SPEC, inputs[:1])
        return begun, whole, parts, [len(request["prompt"]) for request in fake.requests]

    begun, whole, parts, sizes = serve("vllm", scenario, max_batch_queries=2)
    assert begun == ({engine.encoder.encode_query(text) for text in inputs[:2]}, 2)
    assert parts.log_probabilities[0] == pytest.approx(whole.log_probabilities[0], abs=1e-5)
    assert (sum(sizes), max(sizes), len(sizes)) == (columns, 2, (columns + 1) // 2)
    expected = engine.choose(engine.prefill(SPEC.examples), inputs, [LABELS] * 9)
    assert list(whole.log_probabilities) == [pytest.approx(own.tolist(), abs=1e-4) for own in expected]


def test_who_reads_an_answer_slowly_keeps_no_place(serve):
    async def scenario(backend, fake):
        slow = backend.generate(SPEC, "x", GenerationOptions(max_tokens=20))
        first = await anext(slow)
        whole = await asyncio.wait_for(write(backend, SPEC, "x", max_tokens=20), 20)
        assert backend.load().num_running == 0
        await asyncio.wait_for(backend.stop(), 5)
        assert text_of([first, *[piece async for piece in slow]]) == text_of(whole)

    serve("vllm", scenario, max_batch_queries=1)


def test_the_deadline_is_that_of_the_whole_answer_however_it_is_read(serve, monkeypatch):
    values = FakeServer.values
    monkeypatch.setattr(FakeServer, "values", lambda fake, prompt: time.sleep(0.01) or values(fake, prompt))

    async def scenario(backend, fake):
        pieces = backend.generate(SPEC, "x", GenerationOptions(max_tokens=300), deadline=time.monotonic() + 0.5)
        await anext(pieces)
        await asyncio.sleep(0.7)
        assert backend.load().num_running == 0
        with pytest.raises(DeadlineError, match="the server has not answered in the time"):
            text_of([piece async for piece in pieces])

    serve("bare", scenario)


@pytest.mark.parametrize("kind", ["vllm", "bare"])
def test_tokens_are_counted_also_where_chunks_hold_several(kind, serve):
    async def scenario(backend, fake):
        fake.tokens_at_once = 3
        return await write(backend, SPEC, "x", max_tokens=20)

    assert serve(kind, scenario)[-1].num_tokens == 20


def test_a_deadline_and_a_caller_who_leaves_end_the_request(serve):
    async def scenario(backend, fake):
        await backend.prepare(SPEC)
        fake.hold.clear()
        with pytest.raises(DeadlineError, match="the server has not answered in the time"):
            await backend.score(SPEC, ["x"], deadline=time.monotonic() + 0.1)
        with pytest.raises(DeadlineError):
            await anext(backend.generate(SPEC, "x", GenerationOptions(), deadline=time.monotonic() + 0.1))
        gone = asyncio.create_task(backend.score(SPEC, ["x"]))
        await asyncio.sleep(0.1)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        while fake.num_left < 3:
            await asyncio.sleep(0.01)
        fake.hold.set()
        pieces = backend.generate(SPEC, "x", GenerationOptions(max_tokens=300))
        await anext(pieces)
        await pieces.aclose()
        while fake.num_left < 4:
            await asyncio.sleep(0.01)
        assert backend.load().num_running == 0

    serve("vllm", scenario)


def test_more_queries_than_allowed_are_refused(serve):
    async def scenario(backend, fake):
        many = await backend.score(SPEC, ["x", "y", "z"])  # More than may be there at once, and answered in parts.
        alone = [await backend.score(SPEC, [text]) for text in "xyz"]
        assert many.log_probabilities == tuple(own.log_probabilities[0] for own in alone)
        fake.hold.clear()
        running = asyncio.create_task(backend.score(SPEC, ["x", "y"]))
        while backend.load().num_running < 2:
            await asyncio.sleep(0.01)
        with pytest.raises(OverloadedError, match="2 queries are with the server and 1 more were sent; 2 are allowed"):
            await write(backend, SPEC, "x")
        with pytest.raises(OverloadedError, match="2 queries are with the server and 1 more were sent"):
            backend.check_room(0)
        fake.hold.set()
        assert (await running).num_shots == (6, 6)
        backend.check_room(1)
        with pytest.raises(OverloadedError, match="0 queries are with the server and 1 more were sent"):
            backend.check_room(2)

    serve("vllm", scenario, max_queue=2)


def test_stopping_waits_for_what_has_begun_and_refuses_the_rest(serve):
    async def scenario(backend, fake):
        fake.hold.clear()
        running = asyncio.create_task(backend.score(SPEC, ["x"]))
        while not fake.requests:
            await asyncio.sleep(0.01)
        stopped = asyncio.create_task(backend.stop())
        await asyncio.sleep(0.05)
        assert not stopped.done()
        with pytest.raises(OverloadedError, match="the service is stopping"):
            await backend.score(SPEC, ["x"])
        fake.hold.set()
        assert (await running).num_shots == (6,)
        await stopped

    serve("vllm", scenario)


def test_a_task_that_is_forgotten_or_changed_is_read_anew(serve):
    longer = replace(SPEC, examples=(*SPEC.examples, Example("new", "odd")))

    async def scenario(backend, fake):
        for spec in (SPEC, SPEC, longer, SPEC):
            await backend.score(spec, ["x"])
        await backend.forget(SPEC.key)
        await backend.forget("b" * 32)
        await backend.score(SPEC, ["x"])
        return backend.load()

    assert dict(serve("vllm", scenario).opened) == {"computed": 4, "memory": 1}


def test_a_context_is_found_without_comparing_its_examples_each_time(serve, monkeypatch):
    compared = count_comparisons(monkeypatch)

    async def scenario(backend, fake):
        await backend.prepare(copy_of(SPEC))
        before = len(compared)
        for _ in range(3):
            await backend.prepare(SPEC)
        equal = len(compared)
        await backend.prepare(replace(SPEC, examples=(*copy_of(SPEC).examples, Example("new", "odd"))))
        return equal - before, len(compared) - equal

    assert serve("vllm", scenario) == (6, 0)


def test_every_edge_of_a_large_trie_is_asked_for_once_and_no_request_is_too_large():
    labels = [(first, second, 256) for first in range(200) for second in range(first % 3 + 1)]
    trie = build_trie(labels)
    requests = plan_requests(trie, 10_000)
    assert max(len(tokens) for _, tokens in requests) == MAX_CHOSEN_TOKENS
    assert all(len(set(columns)) == len(columns) for columns, _ in requests)
    asked = {(column, token) for columns, tokens in requests for column in columns for token in tokens}
    assert set(trie.edges) <= asked
    assert len(requests) <= 5
    by_three = plan_requests(trie, 3)
    assert max(len(columns) for columns, _ in by_three) == 3
    assert set(trie.edges) <= {(column, token) for columns, tokens in by_three for column in columns for token in tokens}


def test_the_encoder_has_the_format_of_the_models_rows(tiny_model_folder, tmp_path):
    folder = tmp_path / "exported"
    shutil.copytree(tiny_model_folder("llama"), folder)
    assert open_encoder(str(folder)).format == "plain"
    assert open_encoder(str(folder), format="chat").format == "chat"
    facts = folder / "manyicl.json"
    facts.write_text(json.dumps({"base": "", "note": "", "format": "chat"}), encoding="utf-8")
    encoder = open_encoder(str(folder))
    assert encoder.format == "chat"
    assert encoder.encode_query("x") == Encoder(encoder.tokenizer, format="chat").encode_query("x")
    assert open_encoder(str(folder), format="plain").format == "plain"
    facts.write_text("{", encoding="utf-8")
    with pytest.raises(
        ModelError, match=r"manyicl\.json: says no base model \(JSONDecodeError.*Give the folder of a finished run or of a whole"
    ):
        open_encoder(str(folder))
