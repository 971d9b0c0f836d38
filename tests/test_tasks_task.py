from dataclasses import replace

import pytest

from manyicl.errors import TaskError
from manyicl.tasks.task import Example, Task, TaskSuite


def suite(**roles: tuple[str, ...]) -> TaskSuite:
    tasks = {name: Task(name, "math", "exact_match", (Example("1", "2"),) * 2, ()) for name in ("a", "b", "c")}
    return TaskSuite("letters", tasks, **roles)


def test_roles_select_tasks_in_the_order_of_names() -> None:
    letters = suite(meta_training=("c", "a"), held_out=("b",))
    assert [task.name for task in letters.select("meta_training")] == ["c", "a"]
    assert letters.select("validation") == ()
    assert [letters.role(name) for name in ("a", "b", "c", "d")] == ["meta_training", "held_out", "meta_training", "none"]


def test_a_task_with_two_roles_is_refused() -> None:
    with pytest.raises(TaskError) as raised:
        suite(meta_training=("a", "b"), held_out=("b",))
    assert str(raised.value) == (
        "suite 'letters': 'b' is both meta_training and held_out. Give each task one role: "
        "what is trained on, or chooses anything, is not held out."
    )


def test_an_unknown_name_in_a_role_is_refused_with_the_known_ones() -> None:
    with pytest.raises(TaskError, match=r"validation names 'd', which is not among its 3 tasks \(a, b, c\)"):
        suite(validation=("d",))


def test_choices_are_the_options_of_the_example_or_else_the_labels(small_task) -> None:
    task = small_task(("x", "y"))
    assert task.choices(task.train[0]) == ("x", "y")
    assert task.is_choice
    own = replace(task.train[0], options=("p", "q"))
    assert task.choices(own) == ("p", "q")
    assert small_task((), train=[own, own]).is_choice
    free = small_task(())
    assert free.choices(free.train[0]) == ()
    assert not free.is_choice


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"metric": "macro_f1"},
        {"labels": ("no", "yes")},
        {"instruction": "Say yes."},
        {"max_answer_tokens": 3},
    ],
)
def test_the_fingerprint_depends_on_every_setting(small_task, change) -> None:
    task = small_task()
    assert replace(task, **change).fingerprint() != task.fingerprint()


def test_the_fingerprint_depends_on_examples_their_order_and_their_split(small_task) -> None:
    task = small_task()
    first, *rest = task.train
    changed = [
        replace(task, train=(*rest, first)),
        replace(task, train=task.train[:-1], test=(task.train[-1], *task.test)),
        replace(task, train=(replace(first, input="other"), *rest)),
        replace(task, train=(replace(first, accepted=("yes!",)), *rest)),
    ]
    prints = {task.fingerprint(), *(other.fingerprint() for other in changed)}
    assert len(prints) == 5
    # Where the examples were read from changes no result.
    assert replace(task, train=(replace(first, source="elsewhere:9"), *rest)).fingerprint() == task.fingerprint()
