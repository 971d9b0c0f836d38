"""Another server behind the same protocol, here a small one with the tiny model: scores and answers are those of our engine."""

import json
import shutil
from dataclasses import replace

import pytest

from manyicl.encoding import Encoder
from manyicl.errors import BudgetError, ManyICLError, ModelError, UserInputError
from manyicl.label_trie import build_trie
from manyicl.serving.backends import TaskSpec
from manyicl.serving.openai_backend import open_encoder
from manyicl.tasks.task import Example

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

from backend_fixtures import text_of, write
from openai_fixtures import LABELS, SPEC, FakeServer
from serving_fixtures import copy_of, count_comparisons


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


@pytest.mark.parametrize("kind", ["vllm", "bare"])
def test_tokens_are_counted_also_where_chunks_hold_several(kind, serve):
    async def scenario(backend, fake):
        fake.tokens_at_once = 3
        return await write(backend, SPEC, "x", max_tokens=20)

    assert serve(kind, scenario)[-1].num_tokens == 20


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
