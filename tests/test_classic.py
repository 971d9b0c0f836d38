"""The baseline without a language model: labels, options and free text, and what it says when it has seen nothing."""

import pytest

from manyicl.classic import ClassicBaseline
from manyicl.tasks.task import Example, Task

WORDS = {"sport": ["goal", "match", "team"], "food": ["soup", "bread", "cheese"]}
TRAIN = tuple(Example(f"{word} today", label) for place in range(3) for label, words in WORDS.items() for word in [words[place]])
QUERIES = (Example("the team and the goal", "sport"), Example("cheese with bread", "food"))


def topic_task(**fields) -> Task:
    return Task("topic", "classification", "accuracy", TRAIN, QUERIES, **{"labels": ("food", "sport")} | fields)


def test_labels_come_from_the_words_of_the_demonstrations():
    opened = ClassicBaseline().open(topic_task(), TRAIN, QUERIES)
    assert opened.num_demonstrations == 6
    answers = opened.answer(QUERIES, 6)
    assert [(answer.text, answer.choice) for answer in answers] == [("sport", 1), ("food", 0)]


@pytest.mark.parametrize(("num_shots", "expected"), [(0, "food"), (1, "sport")])
def test_with_fewer_than_two_labels_seen_there_is_no_choice(num_shots, expected):
    answers = ClassicBaseline().open(topic_task(), TRAIN, QUERIES).answer(QUERIES, num_shots)
    assert [answer.text for answer in answers] == [expected, expected]


def test_only_the_first_demonstrations_are_used():
    turned = TRAIN + tuple(Example(example.input, "food") for example in TRAIN for _ in range(5))
    opened = ClassicBaseline().open(topic_task(), turned, QUERIES)
    assert [answer.text for answer in opened.answer(QUERIES, 6)] == ["sport", "food"]
    assert [answer.text for answer in opened.answer(QUERIES, len(turned))] == ["food", "food"]


def test_free_text_is_the_answer_of_the_most_similar_demonstration():
    train = (Example("capital of France", "Paris"), Example("colour of snow", "white"), Example("", "nothing"))
    task = Task("facts", "qa", "token_f1", train, QUERIES)
    opened = ClassicBaseline().open(task, train, QUERIES)
    asked = (Example("what colour has snow", ""), Example("France's capital", ""))
    assert [answer.text for answer in opened.answer(asked, 3)] == ["white", "Paris"]
    assert [(answer.text, answer.choice) for answer in opened.answer(asked, 0)] == [("", -1), ("", -1)]


def test_an_option_is_chosen_by_its_words():
    options = ("a loaf of bread", "a red car", "?!")
    task = Task("choice", "qa", "accuracy", (Example("x", "a red car", options=options),), ())
    opened = ClassicBaseline().open(task, task.train, ())
    answers = opened.answer([Example("who drives the red car", "", options=options)], 1)
    assert [(answer.text, answer.choice) for answer in answers] == [("a red car", 1)]
