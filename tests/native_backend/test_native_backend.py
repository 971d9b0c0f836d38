"""The native backend's answers: they equal the bare engine's, whatever else is in flight, and say what they cost."""

import asyncio
from dataclasses import replace
from functools import partial

import pytest

from backend_fixtures import expected_scores, spec_of, text_of, write
from manyicl.encoding import Encoder
from manyicl.engines.native import NativeEngine
from manyicl.errors import BudgetError, TaskError, UserInputError
from manyicl.scoring import generate_answers
from manyicl.serving.backends import GenerationOptions, TaskSpec
from manyicl.serving.native_backend import NativeBackend, open_native_engine


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
