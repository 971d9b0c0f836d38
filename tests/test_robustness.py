"""What is done to demonstrations: exactly that, and nothing else."""

from dataclasses import replace

import pytest

from manyicl.encoding import Encoder
from manyicl.engines.native import NativeEngine
from manyicl.errors import TaskError
from manyicl.evaluation import Plan, order_demonstrations
from manyicl.methods import InContext
from manyicl.records import RecordWriter
from manyicl.robustness import NearestDemonstrations, evaluate_robustness, flip_labels, group_by_label, use_symbols
from manyicl.tasks.task import Example

CONDITIONS = ["order:shuffled", "order:grouped", "order:reversed", "flipped:0.5", "symbols", "nearest", "context:400"]


@pytest.fixture
def method(tiny_loaded):
    loaded = tiny_loaded("llama", max_position_embeddings=512)
    return InContext(NativeEngine(loaded, Encoder(loaded.tokenizer)), name="ours")


@pytest.fixture
def colours(small_task):
    return small_task(("red", "green", "blue"), num_train=30, num_test=5, name="colours")


def test_flips_are_nested_and_exact(colours):
    order = order_demonstrations(colours, 0)
    flipped = {share: flip_labels(12, colours, share, order, 0) for share in (0.0, 0.25, 0.5, 1.0)}
    changed = {
        share: {place for place, (old, new) in enumerate(zip(order, found, strict=False)) if old.answer != new.answer}
        for share, found in flipped.items()
    }
    assert {share: len(places) for share, places in changed.items()} == {0.0: 0, 0.25: 3, 0.5: 6, 1.0: 12}
    assert changed[0.25] < changed[0.5]
    assert all([new.input for new in found] == [old.input for old in order[:12]] for found in flipped.values())
    assert {new.answer for new in flipped[1.0]} <= set(colours.labels)
    assert flip_labels(12, colours, 0.5, order, 0) == flipped[0.5]
    assert order == order_demonstrations(colours, 0)  # The given list is left alone.


def test_grouping_keeps_the_same_demonstrations(colours):
    order = order_demonstrations(colours, 1)
    grouped = group_by_label(12, colours, order, 1)
    places = [colours.labels.index(example.answer) for example in grouped]
    assert places == sorted(places)
    assert sorted(example.input for example in grouped) == sorted(example.input for example in order[:12])


def test_symbols_rename_labels_everywhere_alike(colours):
    renamed = use_symbols(colours)
    mapping = dict(zip(colours.labels, renamed.labels, strict=True))
    assert len(set(renamed.labels)) == 3
    assert not set(renamed.labels) & set(colours.labels)
    for old, new in zip(colours.train + colours.test, renamed.train + renamed.test, strict=True):
        assert (new.input, new.answer) == (old.input, mapping[old.answer])


def test_more_labels_than_symbols_is_an_error(small_task):
    with pytest.raises(TaskError, match=r"'many' has 40 labels, more than the 36 symbols"):
        use_symbols(small_task(tuple(f"l{number}" for number in range(40)), num_train=40, name="many"))


def test_each_query_sees_its_nearest_examples_the_most_similar_last(method, colours, monkeypatch):
    train = tuple(Example(f"word{number % 10} word{(number + 1) % 10}", "red") for number in range(30))
    task = replace(colours, train=train)
    seen = []
    opened = InContext.open
    monkeypatch.setattr(
        InContext, "open", lambda self, task, shown, queries: seen.append(shown) or opened(self, task, shown, queries)
    )
    nearest = NearestDemonstrations(method.engine, name="ours", num_shots=3)
    answers = nearest.open(task, [], []).answer([Example("word4 word5", "red"), Example("word7", "red")], 3)
    assert len(answers) == 2
    assert [example.input for example in seen[0]] == ["word4 word5"] * 3
    assert all("word7" in example.input for example in seen[1])


def test_every_condition_leaves_records_that_name_it(method, colours, tmp_path):
    plan = Plan(shots=(6,), num_seeds=2, num_queries=5, model="m")
    writer = RecordWriter(tmp_path / "records.jsonl")
    records = list(evaluate_robustness(method, colours, "held_out", plan=plan, writer=writer, conditions=CONDITIONS))
    assert [record.condition for record in records] == [condition for condition in CONDITIONS for _ in range(2)]
    by_condition = {record.condition: record for record in records if record.seed == 0}
    assert {by_condition[name].num_demonstrations for name in CONDITIONS[:-1]} == {6}
    assert by_condition["context:400"].shots == "max"
    assert by_condition["context:400"].num_demonstrations > 6
    again = list(evaluate_robustness(method, colours, "held_out", plan=plan, writer=writer, conditions=CONDITIONS))
    assert again == records


def test_the_same_demonstrations_unaltered_give_the_plain_result(method, colours, tmp_path):
    from manyicl.evaluation import evaluate_task

    plan = Plan(shots=(6,), num_seeds=1, num_queries=5, model="m")
    writer = RecordWriter(tmp_path / "records.jsonl")
    [plain] = evaluate_task(method, colours, "held_out", plan=plan, writer=writer)
    conditions = ["order:shuffled", "flipped:0"]
    for record in evaluate_robustness(method, colours, "held_out", plan=plan, writer=writer, conditions=conditions):
        assert record.queries == plain.queries
        assert record.prefix_tokens == plain.prefix_tokens


@pytest.mark.parametrize("condition", ["order:sideways", "upside-down"])
def test_an_unknown_condition_is_an_error(method, colours, tmp_path, condition):
    plan = Plan(shots=(6,), num_seeds=1, num_queries=5, model="m")
    writer = RecordWriter(tmp_path / "records.jsonl")
    with pytest.raises(TaskError, match="unknown"):
        list(evaluate_robustness(method, colours, "held_out", plan=plan, writer=writer, conditions=[condition]))


def test_a_task_without_labels_is_an_error(method, colours, tmp_path):
    plan, writer = Plan(shots=(6,)), RecordWriter(tmp_path / "records.jsonl")
    with pytest.raises(TaskError, match=r"'colours' has no label set"):
        list(
            evaluate_robustness(method, replace(colours, labels=()), "held_out", plan=plan, writer=writer, conditions=["symbols"])
        )
