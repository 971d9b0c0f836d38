"""Answers token by token: the same alone and in company, drawn by the right probabilities, and shown as whole characters."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyicl.encoding import Encoder
from manyicl.engines.native import NativeEngine
from manyicl.errors import BudgetError
from manyicl.prefix import Prefix, prefill
from manyicl.sampling import AnswerText, ShownText, TokenStreams, read_token
from manyicl.scoring import generate_answers
from model_fixtures import letter_example

QUERIES = ("x", "a second query", "third", "and one more, which is longer than the others")


@pytest.fixture(scope="module")
def encoder(byte_tokenizer):
    return Encoder(byte_tokenizer)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama")


@pytest.fixture(scope="module")
def prefix(model, encoder):
    return prefill(model, encoder, [letter_example(number) for number in range(4)])


def write(streams, name, num_tokens):
    """Tokens of one answer, step by step; the others go on beside it."""
    tokens = [streams.step()[name].token_id for _ in range(num_tokens)]
    streams.drop(name)
    return tuple(tokens)


def write_alone(model, prefix, query, num_tokens, **options):
    streams = TokenStreams(model, prefix)
    streams.add("only", query, **options)
    return write(streams, "only", num_tokens)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3"])
def test_greedy_tokens_are_those_of_generate_answers(architecture, tiny_model, encoder):
    model = tiny_model(architecture)
    prefix = prefill(model, encoder, [letter_example(number) for number in range(4)])
    queries = [encoder.encode_query(text) for text in QUERIES]
    expected = generate_answers(model, prefix, queries, terminator_id=-1, max_new_tokens=12)
    streams = TokenStreams(model, prefix)
    for name, query in enumerate(queries):
        streams.add(name, query)
    found = [streams.step() for _ in range(12)]
    assert [tuple(step[name].token_id for step in found) for name in range(4)] == expected


def test_answers_are_the_same_whoever_joins_and_leaves(model, prefix, encoder):
    queries = [encoder.encode_query(text) for text in QUERIES]
    options = [{"temperature": 1.0, "seed": 3}, {}, {"temperature": 0.7, "seed": 3}, {"temperature": 1.5, "seed": 4}]
    alone = [write_alone(model, prefix, query, 10, **own) for query, own in zip(queries, options, strict=True)]
    streams = TokenStreams(model, prefix)
    written: dict[int, list[int]] = {name: [] for name in range(4)}
    joins = {0: 0, 1: 3, 2: 4, 3: 9}  # Name and the step before which it joins; the first leaves as the last one joins.
    for step in range(20):
        for name, first in joins.items():
            if first == step:
                streams.add(name, queries[name], **options[name])
        for name, token in streams.step().items():
            written[name].append(token.token_id)
            if len(written[name]) == 10:
                streams.drop(name)
    assert [tuple(tokens) for tokens in written.values()] == alone
    assert len(streams) == 0


def test_places_that_nobody_sees_any_more_are_given_up_when_a_query_joins(model, prefix, encoder):
    streams = TokenStreams(model, prefix)
    streams.add("long", tuple(range(30, 130)))
    streams.add("short", encoder.encode_query("x"))
    streams.step()
    streams.drop("long")
    streams.step()
    assert streams._seen.shape == (1, 101)
    streams.add("new", encoder.encode_query("x"))
    streams.step()
    assert streams._seen.shape == (2, len(encoder.encode_query("x")) + 2)
    assert streams._seen.sum(axis=1).tolist() == [len(encoder.encode_query("x")) + 2, len(encoder.encode_query("x"))]


def test_the_same_seed_draws_the_same_answer_and_another_one_another(model, prefix, encoder):
    query = encoder.encode_query("x")
    first, again, other = (write_alone(model, prefix, query, 20, temperature=1.0, seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert first != other
    assert write_alone(model, prefix, query, 20, temperature=1e-9, seed=5) == write_alone(model, prefix, query, 20)


def test_tokens_are_drawn_by_their_probability_at_the_temperature(model, prefix, encoder):
    query = encoder.encode_query("x")
    streams = TokenStreams(model, prefix)
    for seed in range(2000):
        streams.add(seed, query, temperature=1.5, seed=seed, num_alternatives=261 if seed == 0 else None)
    found = streams.step()
    values = torch.tensor([value for _, value in sorted(found[0].alternatives)], dtype=torch.float64)
    expected = torch.softmax(values / 1.5, dim=-1).numpy() * 2000
    counts = np.bincount([token.token_id for token in found.values()], minlength=261)
    likely = expected > 20
    assert likely.sum() >= 5
    assert (np.abs(counts - expected)[likely] < 5 * np.sqrt(expected[likely])).all()


def test_log_probabilities_are_those_of_temperature_one_with_the_best_first(model, prefix, encoder):
    query = encoder.encode_query("x")
    streams = TokenStreams(model, prefix)
    streams.add("drawn", query, temperature=5.0, seed=1, num_alternatives=3)
    streams.add("greedy", query, num_alternatives=261)
    streams.add("bare", query)
    streams.add("own", query, num_alternatives=0)
    found = streams.step()
    values = dict(found["greedy"].alternatives)
    assert sum(np.exp(list(values.values()))) == pytest.approx(1.0, abs=1e-5)
    assert found["greedy"].alternatives[0] == (found["greedy"].token_id, found["greedy"].log_probability)
    assert [token for token, _ in found["drawn"].alternatives] == [token for token, _ in found["greedy"].alternatives[:3]]
    assert found["drawn"].log_probability == pytest.approx(values[found["drawn"].token_id], abs=1e-5)
    assert np.isnan(found["bare"].log_probability)
    assert found["bare"].alternatives == found["own"].alternatives == ()
    assert found["own"].log_probability == pytest.approx(found["greedy"].log_probability, abs=1e-5)


def test_a_query_that_leaves_no_room_for_a_token_is_refused(tiny_model, encoder):
    model = tiny_model("llama", max_position_embeddings=64)
    prefix = prefill(model, encoder, [letter_example(0)])
    streams = TokenStreams(model, prefix)
    longest = tuple(range(30, 30 + 63 - prefix.num_tokens))
    streams.add("fits", longest)
    with pytest.raises(BudgetError, match=rf"query 0 and its answer take {len(longest) + 2} tokens after a prefix of"):
        streams.add("too long", (*longest, 1))
    assert list(streams.step()) == ["fits"]


def test_without_queries_there_are_no_tokens(model):
    streams = TokenStreams(model, Prefix((), (0,), ()))
    assert streams.step() == {}
    streams.add("gone", (1, 2))
    streams.drop("gone")
    assert streams.step() == {}


def test_a_drop_before_the_first_step_leaves_the_others(model, prefix, encoder):
    streams = TokenStreams(model, prefix)
    for name in ("a", "b"):
        streams.add(name, encoder.encode_query(name))
    streams.drop("a")
    assert len(streams) == 1
    assert list(streams.step()) == ["b"]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def pieces_of(tokenizer, ids, stops=()):
    """The pieces shown, the last one at the end, and whether a stop string ended them."""
    text = AnswerText(tokenizer, stops)
    pieces = []
    for token in ids:
        pieces.append(text.take(token))
        if text.is_stopped:
            return pieces, True
    return [*pieces, text.finish()], text.is_stopped


def test_characters_of_several_tokens_come_whole(byte_tokenizer):
    assert pieces_of(byte_tokenizer, ids_of(byte_tokenizer, " é€😀a"))[0] == ["", "", "é", "", "", "€", "", "", "", "😀", "a", ""]
    assert pieces_of(byte_tokenizer, ids_of(byte_tokenizer, "a€")[:-1])[0] == ["a", "", "", "\ufffd"]


def test_a_stop_string_across_tokens_is_found_and_not_shown(byte_tokenizer):
    pieces, is_stopped = pieces_of(byte_tokenizer, ids_of(byte_tokenizer, " one END two"), ["END"])
    assert (pieces, is_stopped) == (["", "o", "n", "e", "", "", "", ""], True)
    pieces, is_stopped = pieces_of(byte_tokenizer, ids_of(byte_tokenizer, "one EN"), ["END"])
    assert (pieces, is_stopped) == (["o", "n", "e", "", "", "", " EN"], False)
    pieces, is_stopped = pieces_of(byte_tokenizer, ids_of(byte_tokenizer, "a ENEND b"), ["END", "\n\n"])
    assert (pieces, is_stopped) == (["a", "", "", "", " EN", "", ""], True)


def test_text_that_was_held_back_is_shown_when_a_stop_string_follows_it(byte_tokenizer):
    # What is held back for one stop string comes before another; an unfinished character comes together with a stop string.
    assert pieces_of(byte_tokenizer, ids_of(byte_tokenizer, "abcX"), ["abcd", "X"]) == (["", "", "", "abc"], True)
    assert pieces_of(byte_tokenizer, [*ids_of(byte_tokenizer, "é")[:1], *ids_of(byte_tokenizer, "#")], ["#"]) == (
        ["", "\ufffd"],
        True,
    )


def test_nothing_is_shown_after_a_stop_string():
    text = ShownText(["END"])
    assert [text.take("one E"), text.take("ND two"), text.take(" three"), text.finish()] == ["one", "", "", ""]
    assert text.is_stopped
    assert ShownText().take("any text") == "any text"


def test_the_first_of_several_stop_strings_ends_the_answer(byte_tokenizer):
    assert "".join(pieces_of(byte_tokenizer, ids_of(byte_tokenizer, "abcd"), ["cd", "bc", "x"])[0]) == "a"
    assert pieces_of(byte_tokenizer, ids_of(byte_tokenizer, " \nabc"), ["\n"]) == (["", ""], True)
    assert "".join(pieces_of(byte_tokenizer, ids_of(byte_tokenizer, "abc"), ["", "zz"])[0]) == "abc"


def test_a_stop_string_of_several_byte_characters_is_found(byte_tokenizer):
    pieces, is_stopped = pieces_of(byte_tokenizer, ids_of(byte_tokenizer, "né€x"), ["€"])
    assert ("".join(pieces), is_stopped) == ("né", True)


@settings(max_examples=400)
@given(
    text=st.text(st.sampled_from("ab \n€😀"), max_size=20),
    cut=st.integers(0, 3),
    stops=st.lists(st.text(st.sampled_from("ab \n€"), min_size=1, max_size=4), min_size=1, max_size=4),
)
def test_pieces_together_are_the_text_up_to_the_first_stop_string(text, cut, stops, byte_tokenizer):
    ids = ids_of(byte_tokenizer, text)
    ids = ids[: max(0, len(ids) - cut)]
    whole = byte_tokenizer.decode(ids, skip_special_tokens=True)
    found = [whole.index(stop) for stop in stops if stop in whole]
    pieces, is_stopped = pieces_of(byte_tokenizer, ids, stops)
    assert "".join(pieces) == whole[: min(found, default=len(whole))].strip()
    assert is_stopped == bool(found)


def test_the_pieces_of_a_greedy_answer_are_what_the_engine_writes(tiny_loaded):
    loaded = tiny_loaded("llama")
    engine = NativeEngine(loaded, Encoder(loaded.tokenizer))
    prefix = engine.prefill([letter_example(number) for number in range(4)])
    for text, expected in zip(QUERIES, engine.write(prefix, QUERIES, max_new_tokens=30), strict=True):
        tokens = write_alone(loaded.model, prefix, engine.encoder.encode_query(text), 30)
        tokens = tokens[: tokens.index(256)] if 256 in tokens else tokens
        assert "".join(pieces_of(loaded.tokenizer, tokens)[0]) == expected


def test_special_tokens_are_not_shown(byte_tokenizer):
    assert pieces_of(byte_tokenizer, [*ids_of(byte_tokenizer, "a"), 257, *ids_of(byte_tokenizer, "b")])[0] == ["a", "", "b", ""]


def test_a_token_is_read_with_its_own_bytes(byte_tokenizer):
    first, second = ids_of(byte_tokenizer, "é")
    assert [read_token(byte_tokenizer, token) for token in (first, second)] == [("\ufffd", b"\xc3"), ("\ufffd", b"\xa9")]
    assert read_token(byte_tokenizer, ids_of(byte_tokenizer, " ")[0]) == (" ", b" ")
    assert read_token(byte_tokenizer, 256) == ("<|end|>", b"<|end|>")


@pytest.mark.parametrize(
    ("spelling", "text", "expected"),
    [("▁the", "the", b"the"), ("<0xE2>", "\ufffd", b"\xe2"), ("é", "é", b"\xc3\xa9"), ("Ġthe", " the", b" the")],
)
def test_tokens_of_other_tokenizers_are_read_too(spelling, text, expected):
    class Other:
        def decode(self, ids):
            return text

        def convert_ids_to_tokens(self, token_id):
            return spelling

    assert read_token(Other(), 0) == (text, expected)
