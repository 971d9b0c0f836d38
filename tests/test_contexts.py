"""Which examples stand in a task's context: appending never takes one out, and there is always room for a query like them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyicl.encoding import Encoder
from manyicl.errors import BudgetError
from manyicl.serving.backends import TaskSpec
from manyicl.serving.contexts import plan_context
from manyicl.tasks.task import Example

CONTEXT = 120
texts = st.integers(1, 80).map("x".__mul__)
example_lists = st.lists(st.builds(Example, texts, st.integers(1, 20).map("y".__mul__)), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def encoder(byte_tokenizer):
    return Encoder(byte_tokenizer)


def plan(encoder, examples, labels=(), instruction=""):
    return plan_context(TaskSpec("a" * 32, tuple(examples), labels, instruction), encoder, CONTEXT)


def fits_alone(encoder, example, labels, instruction):
    encoded = encoder.encode_example(example.input, example.answer)
    answer = max(map(len, encoder.encode_labels(labels)), default=len(encoded.answer_ids))
    used = encoder.count_opening(instruction) + encoded.num_tokens
    return used + min(len(encoded.input_ids), CONTEXT // 4) + answer <= CONTEXT


@given(examples=example_lists, count=st.integers(1, 12), labels=st.sampled_from([(), ("yes", "no")]))
def test_appending_examples_takes_none_out(encoder, examples, count, labels):
    try:
        before = plan(encoder, examples[:count], labels)
    except BudgetError:
        return
    after = plan(encoder, examples, labels)
    num = len(before.used)
    assert after.used[:num] == before.used
    assert all(position >= count for position in after.used[num:])
    assert after.token_ids[: len(before.token_ids)] == before.token_ids
    assert after.stops[: num + 1] == before.stops
    assert after.left_out[: len(before.left_out)] == before.left_out or count > len(examples)


@given(examples=example_lists, labels=st.sampled_from([(), ("yes", "no")]), instruction=st.sampled_from(["", "Say."]))
def test_every_example_is_in_or_out_and_its_like_fits_as_a_query(encoder, examples, labels, instruction):
    if not any(fits_alone(encoder, example, labels, instruction) for example in examples):
        with pytest.raises(
            BudgetError, match=rf"none of {len(examples)} examples fits the context of 120 tokens; of the first, its "
        ):
            plan(encoder, examples, labels, instruction)
        return
    context = plan(encoder, examples, labels, instruction)
    assert sorted([*context.used, *(position for position, _ in context.left_out)]) == list(range(len(examples)))
    assert len(context.token_ids) == context.stops[-1]
    longest = max(min(len(encoder.encode_query(examples[position].input)), CONTEXT // 4) for position in context.used)
    assert context.fitting_shots(longest, CONTEXT) == context.num_shots == len(context.used)
    spec = TaskSpec("a" * 32, tuple(examples), labels, instruction)
    whole = list(encoder.encode_opening(instruction))
    for example in context.pick_demonstrations(spec):
        encoded = encoder.encode_example(example.input, example.answer)
        whole += [*encoded.input_ids, *encoded.answer_ids, *encoded.gap_ids]
    assert context.token_ids == tuple(whole)


def test_a_query_gets_the_most_demonstrations_that_leave_it_room(encoder):
    context = plan(encoder, [Example("a", "b")] * 5, ("yes", "no"), "Say.")
    assert context.stops == (6, 20, 34, 48, 62, 76)
    assert context.answer_tokens == len(" yes") + 1
    assert [context.fitting_shots(size, CONTEXT) for size in (39, 40, 53, 54, 109)] == [5, 4, 4, 3, 0]
    assert [context.fitting_shots(40, CONTEXT, num_shots=shots) for shots in (0, 3, 9)] == [0, 3, 4]
    with pytest.raises(BudgetError, match="the input takes 110 tokens and its answer up to 5, more than the context of 120 has"):
        context.fitting_shots(110, CONTEXT)


def test_without_examples_there_is_room_for_one_token(encoder):
    context = plan(encoder, [])
    assert (context.num_shots, context.token_ids, context.stops, context.answer_tokens) == (0, (), (0,), 1)
