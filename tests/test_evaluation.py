"""Cells, records, and what an interruption leaves: with a method made for the test, and once with a real one."""

import pytest

from manyicl.encoding import Encoder
from manyicl.engines.native import NativeEngine
from manyicl.episodes import order_examples
from manyicl.errors import RecordsError, TaskError
from manyicl.evaluation import Plan, evaluate_task
from manyicl.methods import Answer, InContext
from manyicl.records import RecordWriter, read_records
from manyicl.tasks.task import Example
from model_fixtures import count_calls


class Parrot:
    """Answers with the label of the last demonstration, and with the first label without one; fits `room` demonstrations."""

    name = "parrot"
    fingerprint = "parrot-1"

    def __init__(self, room=5):
        self.room = room
        self.opened = []
        self.answered = []
        self.stop_after = None

    def open(self, task, demonstrations, queries):
        self.opened.append((task.name, list(demonstrations), list(queries)))
        return OpenedParrot(self, task, list(demonstrations)[: self.room])


class OpenedParrot:
    def __init__(self, method, task, demonstrations):
        self.method, self.task, self.demonstrations = method, task, demonstrations

    @property
    def num_demonstrations(self):
        return len(self.demonstrations)

    def prefix_tokens(self, num_shots):
        return 10 * num_shots

    def query_tokens(self, query):
        return len(query.input)

    def answer(self, queries, num_shots):
        if self.method.stop_after == len(self.method.answered):
            raise KeyboardInterrupt
        assert num_shots <= len(self.demonstrations)
        self.method.answered.append(num_shots)
        text = self.demonstrations[num_shots - 1].answer if num_shots else self.task.labels[0] if self.task.labels else "?"
        return [self.said(query, text) for query in queries]

    def said(self, query, text):
        choices = self.task.choices(query)
        return Answer(text, choices.index(text) if text in choices else 0) if choices else Answer(text)


def run(method, task, path, *, shots=(0, 1, 4, "max"), role="held_out", **fields):
    plan = Plan(shots=shots, num_seeds=fields.pop("num_seeds", 2), num_queries=fields.pop("num_queries", 4), model="m", **fields)
    return list(evaluate_task(method, task, role, plan=plan, writer=RecordWriter(path)))


def cells(records):
    return [(record.seed, record.shots, record.num_demonstrations) for record in records]


def test_a_record_says_everything_about_its_cell(small_task, tmp_path):
    task = small_task(("yes", "no"), num_test=6)
    (record,) = run(
        Parrot(), task, tmp_path / "r.jsonl", shots=(3,), num_seeds=1, model_note="a note", versions=(("torch", "1"),)
    )
    order = order_examples(task.train, seed=0, purpose="demonstrations/parity", index=0)
    said = task.labels.index(order[2].answer)
    gold = [task.labels.index(query.answer) for query in task.test[:4]]
    values = record.model_dump()
    assert values.pop("seconds") >= 0
    assert values.pop("prefill_seconds") >= 0
    assert len(values.pop("fingerprint")) == 64
    assert values == {
        "schema_version": 1,
        "method": "parrot",
        "model": "m",
        "model_note": "a note",
        "task": "parity",
        "family": "classification",
        "role": "held_out",
        "split": "test",
        "metric": "accuracy",
        "shots": 3,
        "num_demonstrations": 3,
        "seed": 0,
        "condition": "",
        "value": 0.5,
        "num_queries": 4,
        "prefix_tokens": 30,
        "query_tokens": sum(len(query.input) for query in task.test[:4]),
        "versions": {"torch": "1"},
        "queries": {
            "ids": [0, 1, 2, 3],
            "scores": [float(said == label) for label in gold],
            "gold": gold,
            "predicted": [said] * 4,
        },
    }
    assert read_records(tmp_path / "r.jsonl") == [record]


def test_orders_are_nested_over_shots_and_follow_seed_and_task(small_task, tmp_path):
    method, task = Parrot(), small_task(num_train=9)
    run(method, task, tmp_path / "a.jsonl", shots=(2,), num_seeds=2)
    run(method, task, tmp_path / "b.jsonl", shots=("max",), num_seeds=2)
    (_, two, queries), (_, two_other, _), (_, every, _), _ = method.opened
    assert (len(two), len(every)) == (2, 9)
    assert every[:2] == two
    assert two_other != two
    assert sorted(example.input for example in every) == sorted(example.input for example in task.train)
    assert queries == list(task.test[:4])


def test_a_shot_count_that_does_not_fit_is_absent_and_never_repeated(small_task, tmp_path):
    method = Parrot(room=5)
    records = run(method, small_task(), tmp_path / "r.jsonl", shots=(0, 1, 5, 6, 64, "max"), num_seeds=1)
    assert cells(records) == [(0, "max", 5), (0, 0, 0), (0, 1, 1), (0, 5, 5)]
    assert method.answered == [5, 0, 1, 5]
    few = run(Parrot(room=50), small_task(num_train=3), tmp_path / "few.jsonl", shots=(2, 3, 4), num_seeds=1)
    assert cells(few) == [(0, 2, 2), (0, 3, 3)]


def test_an_evaluation_again_computes_nothing_and_gives_the_same_records(small_task, tmp_path):
    first, again = Parrot(), Parrot()
    records = run(first, small_task(), tmp_path / "r.jsonl", shots=(0, 1, 64, "max"))
    content = (tmp_path / "r.jsonl").read_bytes()
    found = run(again, small_task(), tmp_path / "r.jsonl", shots=(0, 1, 64, "max"))
    assert sorted(map(str, found)) == sorted(map(str, records))
    assert (again.opened, again.answered) == ([], [])
    assert (tmp_path / "r.jsonl").read_bytes() == content


@pytest.mark.parametrize("finished", range(6))
def test_an_interrupted_evaluation_goes_on_and_computes_no_cell_twice(small_task, tmp_path, finished):
    whole = run(Parrot(), small_task(), tmp_path / "whole.jsonl", shots=(0, 1, "max"))
    method = Parrot()
    method.stop_after = finished
    path = tmp_path / "r.jsonl"
    if finished < 5:
        with pytest.raises(KeyboardInterrupt):
            run(method, small_task(), path, shots=(0, 1, "max"))
    else:
        run(method, small_task(), path, shots=(0, 1, "max"))
    assert len(read_records(path)) == finished + (finished >= 4)  # Without demonstrations the second order is the first.
    with path.open("ab") as stream:
        stream.write(b'{"torn')  # As a kill in the middle of a line leaves it.
    method.stop_after = None
    records = run(method, small_task(), path, shots=(0, 1, "max"))
    assert len(method.answered) == 5
    untimed = {"seconds", "prefill_seconds"}
    assert sorted(str(record.model_dump(exclude=untimed)) for record in records) == sorted(
        str(record.model_dump(exclude=untimed)) for record in whole
    )
    assert len(read_records(path)) == 6


def test_more_shots_and_seeds_are_added_to_what_is_there(small_task, tmp_path):
    method, path = Parrot(), tmp_path / "r.jsonl"
    run(method, small_task(), path, shots=(0, 1), num_seeds=1)
    records = run(method, small_task(), path, shots=(0, 1, 2), num_seeds=2)
    assert method.answered == [0, 1, 2, 1, 2]
    assert sorted(cells(records)) == [(seed, shots, shots) for seed in (0, 1) for shots in (0, 1, 2)]


def test_only_what_is_missing_is_prefilled(small_task, tmp_path):
    method, path = Parrot(), tmp_path / "r.jsonl"
    run(method, small_task(), path, shots=("max",), num_seeds=1)
    run(method, small_task(), path, shots=(1, 3, "max"), num_seeds=1)
    assert [len(demonstrations) for _, demonstrations, _ in method.opened] == [20, 3]
    run(method, small_task(), path, shots=(1, 3, 6, "max"), num_seeds=1)
    assert len(method.opened) == 2  # `max` on file says that six do not fit.


def test_records_of_other_settings_are_refused(small_task, tmp_path):
    path = tmp_path / "r.jsonl"
    run(Parrot(), small_task(), path, shots=(1,), num_seeds=1)
    other = Parrot()
    other.fingerprint = "parrot-2"
    tasks = {
        "method": (other, small_task(), 4),
        "task": (Parrot(), small_task(num_train=19), 4),
        "queries": (Parrot(), small_task(), 3),
    }
    for method, task, num_queries in tasks.values():
        with pytest.raises(
            RecordsError, match="holds parity at 1 shots, seed 0, of another model, other examples or other settings"
        ):
            run(method, task, path, shots=(1,), num_seeds=1, num_queries=num_queries)
        assert method.answered == []


def test_macro_f1_is_made_from_label_indices(small_task, tmp_path):
    task = small_task(("yes", "no"), metric="macro_f1", num_test=4)
    (record,) = run(Parrot(), task, tmp_path / "r.jsonl", shots=(0,), num_seeds=1)
    assert record.queries.predicted == [0] * 4
    assert record.value == pytest.approx((2 / 3 + 0) / 2)


def test_free_text_is_scored_against_every_accepted_answer(small_task, tmp_path):
    test = [Example("a", "blue", accepted=("?", "azure")), Example("b", "green")]
    task = small_task((), train=[Example("x", "red")] * 3, test=test, metric="exact_match")
    (record,) = run(Parrot(), task, tmp_path / "r.jsonl", shots=(0,), num_seeds=1)
    assert record.queries.scores == [1.0, 0.0]
    assert (record.queries.gold, record.queries.predicted, record.value) == ([-1, -1], [-1, -1], 0.5)


def test_gold_is_the_place_among_each_querys_options(small_task, tmp_path):
    test = [Example("a", "p", options=("o", "p", "q")), Example("b", "s", options=("s", "t"))]
    task = small_task((), train=[Example("x", "p", options=("p", "q"))] * 3, test=test, metric="accuracy")
    (record,) = run(Parrot(), task, tmp_path / "r.jsonl", shots=(1,), num_seeds=1)
    assert (record.queries.gold, record.queries.predicted) == ([1, 0], [1, 0])
    assert record.value == 1.0


def test_a_task_without_queries_is_an_error(small_task, tmp_path):
    with pytest.raises(TaskError, match=r"task .parity. has no test examples to evaluate on\. Add a test file"):
        run(Parrot(), small_task(test=[]), tmp_path / "r.jsonl")


def test_a_record_is_on_file_before_it_is_given(small_task, tmp_path):
    plan = Plan(shots=(0, 1), num_seeds=1, num_queries=2, model="m")
    given = evaluate_task(Parrot(), small_task(), "held_out", plan=plan, writer=RecordWriter(tmp_path / "r.jsonl"))
    for number, record in enumerate(given, 1):
        assert read_records(tmp_path / "r.jsonl")[-1] == record
        assert len(read_records(tmp_path / "r.jsonl")) == number


def test_one_prefill_serves_the_whole_curve_of_a_real_method(tiny_loaded, small_task, tmp_path, monkeypatch):
    loaded = tiny_loaded("llama")
    engine = NativeEngine(loaded, Encoder(loaded.tokenizer), context_tokens=300)
    prefills = count_calls(monkeypatch, engine, "prefill")
    task = small_task(("yes", "no"))
    records = run(InContext(engine), task, tmp_path / "r.jsonl", shots=(0, 2, 64, "max"), num_seeds=2)
    assert len(prefills) == 2
    fitting = records[0].num_demonstrations
    assert 2 < fitting < 20
    assert [(record.seed, record.shots) for record in records] == [(0, "max"), (0, 0), (0, 2), (1, "max"), (1, 0), (1, 2)]
    order = order_examples(task.train, seed=1, purpose="demonstrations/parity", index=0)
    prefix = engine.prefill(order[:2])
    scores = engine.choose(prefix, [query.input for query in task.test[:4]], [task.labels] * 4)
    assert records[-1].queries.predicted == [int(own.argmax()) for own in scores]
    assert records[-1].prefix_tokens == prefix.num_tokens


def test_one_of_several_processes_evaluates_its_seeds_alone(small_task, tmp_path):
    method, plan = Parrot(), Plan(shots=(0, 1), num_seeds=4, num_queries=2, model="m")
    given = evaluate_task(method, small_task(), "held_out", plan=plan, writer=RecordWriter(tmp_path / "r.jsonl"), seeds=(1, 3))
    assert [(record.seed, record.shots) for record in given] == [(1, 0), (1, 1), (3, 0), (3, 1)]
    assert len(method.opened) == 2
