"""Another server behind the same protocol, here a small one with the tiny model: scores and answers are those of our engine."""

import asyncio
import contextlib
import json
import shutil
import threading
import time
from dataclasses import replace

import pytest
import torch

from manyicl.encoding import Encoder
from manyicl.engines.native import NativeEngine
from manyicl.errors import BudgetError, DeadlineError, ManyICLError, ModelError, OverloadedError, UserInputError
from manyicl.label_trie import build_trie
from manyicl.serving.backends import BackendLimits, GenerationOptions, TaskSpec
from manyicl.serving.openai_backend import OpenAIBackend, _plan_requests, open_encoder
from manyicl.serving.remote_server import MAX_CHOSEN_TOKENS
from manyicl.tasks.task import Example

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

LABELS = ("odd", "even", "neither of them", "e")
SPEC = TaskSpec("a" * 32, tuple(Example(f"number {number}", LABELS[number % 2]) for number in range(6)), LABELS)
KIND = {"vllm": {"ids", "chosen", "echo", "usage"}, "echo": {"ids", "echo"}, "bare": {"ids"}, "text": set()}


class FakeServer:
    """OpenAI's completions on whole prompts, by plain forward passes.

    Attributes:
        kind: What it can do, see `KIND`.
        requests: The body of each request.
        fail: A status to answer with instead, or None.
        break_off: End a stream after its first chunk.
    """

    def __init__(self, loaded, kind):
        self.loaded, self.can, self.requests, self.fail = loaded, KIND[kind], [], None
        self.break_off = False
        self.hold = threading.Event()
        self.hold.set()
        self.num_left = 0
        self.seen = set()
        self.app = FastAPI()
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/completions")(self.completions)

    async def models(self, request: Request):
        if request.headers.get("authorization") != "Bearer secret":
            return JSONResponse({"error": {"message": "no key"}}, status_code=401)
        sizes = {"max_model_len": 400} if "usage" in self.can else {}
        return {"data": [{"id": "tiny"} | sizes, {"id": "other"}]}

    async def completions(self, request: Request):
        body = await request.json()
        self.requests.append(body)
        if self.fail:
            return JSONResponse({"error": {"message": "secret text"}}, status_code=self.fail, headers={"Retry-After": "7"})
        unknown = {"logprob_token_ids", "return_tokens_as_token_ids", "cache_salt", "stop_token_ids"} & body.keys()
        given = body["prompt"]
        if (unknown and "chosen" not in self.can) or (body.get("echo") and "echo" not in self.can):
            return JSONResponse({"error": {"message": "unknown"}}, status_code=400)
        if isinstance(given, str):
            prompts = [self.loaded.tokenizer(given, add_special_tokens=False)["input_ids"]]
        elif "ids" not in self.can:
            return JSONResponse({"error": {"message": "text only"}}, status_code=422)
        else:
            prompts = given if isinstance(given[0], list) else [given]
        while not self.hold.is_set():
            if await request.is_disconnected():
                self.num_left += 1
                return JSONResponse({})
            await asyncio.sleep(0.01)
        if body.get("stream"):
            return StreamingResponse(self.stream(body, prompts[0]), media_type="text/event-stream")
        choices = [self.complete(body, prompt, place) for place, prompt in enumerate(prompts)]
        return {"choices": choices[::-1], "usage": self.usage(body, prompts)}

    def usage(self, body, prompts):
        told = {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": 1}
        if "usage" in self.can:
            cached = [self.cached(body.get("cache_salt"), prompt) for prompt in prompts]
            told["prompt_tokens_details"] = {"cached_tokens": sum(cached)}
        return told

    def cached(self, salt, prompt):
        """Tokens in whole blocks of ten that a prompt with the same salt began with before."""
        fronts = [(salt, tuple(prompt[:stop])) for stop in range(10, len(prompt) + 1, 10)]
        known = [len(front[1]) for front in fronts if front in self.seen]
        self.seen.update(fronts)
        return max(known, default=0)

    @torch.inference_mode()
    def values(self, prompt):
        return self.loaded.model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0].log_softmax(-1)

    def name(self, body, token):
        return f"token_id:{token}" if body.get("return_tokens_as_token_ids") else self.loaded.tokenizer.decode([token])

    def complete(self, body, prompt, place):
        values = self.values(prompt)
        wanted = body.get("logprob_token_ids")
        best = wanted or values[-1].topk(1).indices.tolist()
        told = {
            "tokens": [],
            "token_logprobs": [float(values[-1].max())],
            "top_logprobs": [{self.name(body, token): float(values[-1][token]) for token in best}],
        }
        if body.get("echo"):
            before = [None, *(float(values[at, token]) for at, token in enumerate(prompt[1:]))]
            told["token_logprobs"] = before + told["token_logprobs"]
        return {"index": place, "text": "x", "logprobs": told, "finish_reason": "length"}

    async def stream(self, body, prompt):
        def chunk(**fields):
            return f"data: {json.dumps(fields)}\n\n"

        ids, end = list(prompt), 256
        sent = ""
        yield ": a comment, as servers send them to keep a connection\n\n"
        for number in range(body["max_tokens"]):
            values = self.values(ids)[-1]
            token = int(values.argmax())
            ids.append(token)
            text = self.loaded.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
            new = "" if text.endswith("\ufffd") else text[len(sent) :]
            sent += new
            choice = {"index": 0, "text": new, "finish_reason": None}
            if body.get("logprobs") is not None:
                best = values.topk(body["logprobs"] + 1).indices.tolist()
                choice["logprobs"] = {
                    "tokens": [self.name(body, token)],
                    "token_logprobs": [float(values[token])],
                    "top_logprobs": [{self.name(body, each): float(values[each]) for each in best}],
                }
            if token == end or number + 1 == body["max_tokens"]:
                choice["finish_reason"] = "stop" if token == end else "length"
            try:
                yield chunk(choices=[choice])
                await asyncio.sleep(0)
            except (asyncio.CancelledError, GeneratorExit):
                self.num_left += 1
                raise
            if self.break_off:
                return
            if choice["finish_reason"]:
                break
        yield chunk(choices=[], usage=self.usage(body, [prompt]))
        yield "data: [DONE]\n\n"


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

    first, again, scored, load = serve("echo", scenario)
    assert first.computed_tokens == again.computed_tokens == prefix.num_tokens
    labels = engine.encoder.encode_labels(LABELS)
    assert scored.computed_tokens == (4 * (prefix.num_tokens + query) + sum(map(len, labels)),)
    assert load.cached_tokens == 0


@pytest.mark.parametrize("kind", ["vllm", "echo", "bare", "text"])
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
        with pytest.raises(UserInputError, match="so that labels cannot be scored on it"):
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
        with pytest.raises(BudgetError, match="3 inputs in one call are more than the 2 allowed"):
            await backend.score(SPEC, ["x"] * 3)
        fake.hold.clear()
        running = asyncio.create_task(backend.score(SPEC, ["x", "y"]))
        while backend.load().num_running < 2:
            await asyncio.sleep(0.01)
        with pytest.raises(OverloadedError, match="2 queries are with the server and 1 more were sent; 2 are allowed"):
            await write(backend, SPEC, "x")
        fake.hold.set()
        assert (await running).num_shots == (6, 6)

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


def test_every_edge_of_a_large_trie_is_asked_for_once_and_no_request_is_too_large():
    labels = [(first, second, 256) for first in range(200) for second in range(first % 3 + 1)]
    trie = build_trie(labels)
    requests = _plan_requests(trie)
    assert max(len(tokens) for _, tokens in requests) == MAX_CHOSEN_TOKENS
    assert all(len(set(columns)) == len(columns) for columns, _ in requests)
    asked = {(column, token) for columns, tokens in requests for column in columns for token in tokens}
    assert set(trie.edges) <= asked
    assert len(requests) <= 5


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
    with pytest.raises(ModelError, match=r"manyicl.json: cannot be read \(JSONDecodeError\). Export the model again, or give"):
        open_encoder(str(folder))
