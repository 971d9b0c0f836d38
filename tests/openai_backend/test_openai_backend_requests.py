"""What is sent to another server: bounded in size and number, ended with its caller; and what becomes of a refusal."""

import asyncio
import time

import pytest

from manyicl.errors import DeadlineError, ManyICLError, OverloadedError, UserInputError
from manyicl.label_trie import build_trie
from manyicl.serving import openai_backend
from manyicl.serving.backends import GenerationOptions
from manyicl.serving.openai_backend import OpenAIBackend
from manyicl.serving.remote_server import MAX_CHOSEN_TOKENS, RemoteServer, plan_requests

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from backend_fixtures import text_of, write
from openai_fixtures import LABELS, SPEC, FakeServer


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
