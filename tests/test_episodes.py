import math
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyicl.config import EpisodesConfig
from manyicl.episodes import (
    SYMBOLS,
    LeftOut,
    balance_order,
    draw_task,
    fill_budget,
    order_examples,
    sample_episode,
)
from manyicl.errors import BudgetError, TaskError
from manyicl.tasks.task import Example, Task


class Words:
    """Counts words as tokens, with one token for each terminator and gap."""

    def count_opening(self, instruction: str) -> int:
        return len(instruction.split())

    def count_example(self, input: str, answer: str) -> int:
        return len(input.split()) + len(answer.split()) + 2


def config(**fields) -> EpisodesConfig:
    return EpisodesConfig.model_validate({"max_tokens": 100_000} | fields)


def draw(task: Task, index: int = 0, seed: int = 0, **fields):
    return sample_episode(task, config=config(**fields), counter=Words(), seed=seed, index=index)


def sized(*lengths: int) -> list[Example]:
    """Examples that take the given numbers of tokens."""
    return [Example(f"w{place} " * (length - 3), "y", source=f"f:{place}") for place, length in enumerate(lengths)]


# Draws of examples.


@given(seed=st.integers(0, 2**40), index=st.integers(0, 2**40), count=st.integers(1, 12))
def test_orders_are_pure_functions_and_permutations(seed: int, index: int, count: int) -> None:
    examples = [Example(str(number), ("a", "b")[number % 3 == 0]) for number in range(count)]
    for order in (order_examples, balance_order):
        first = order(examples, seed=seed, purpose="p", index=index)
        assert first == order(examples, seed=seed, purpose="p", index=index)
        assert sorted(first, key=lambda example: int(example.input)) == examples


def test_orders_differ_with_seed_purpose_and_index() -> None:
    examples = [Example(str(number), "a") for number in range(30)]
    orders = {
        tuple(order_examples(examples, seed=seed, purpose=purpose, index=index))
        for seed in range(3)
        for purpose in ("p", "q")
        for index in range(3)
    }
    assert len(orders) == 18


def test_an_order_does_not_change_between_versions() -> None:
    examples = [Example(str(number), ("a", "b")[number % 2]) for number in range(8)]
    order = order_examples(examples, seed=1, purpose="episode/task", index=2)
    assert [example.input for example in order] == ["3", "0", "4", "5", "1", "2", "6", "7"]


def test_every_order_is_equally_likely() -> None:
    examples = [Example(letter, letter) for letter in "abc"]
    counts = Counter(
        "".join(example.input for example in order_examples(examples, seed=0, purpose="p", index=index)) for index in range(6000)
    )
    assert len(counts) == 6
    # Chi-square with five degrees of freedom: 20.5 is exceeded once in a thousand seeds.
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 20.5


def test_an_episode_is_a_pure_function_of_seed_task_and_index(small_task) -> None:
    first, second = small_task(num_train=50), small_task(num_train=50, name="other")
    wanted = {index: draw(first, index, num_shots=9) for index in range(6)}
    # Whatever is drawn in between, and in whatever order.
    for index in (5, 0, 3, 3, 1, 4, 2):
        draw(second, index + 1, num_shots=2)
        assert draw(first, index, num_shots=9) == wanted[index]
    assert len({episode.examples for episode in wanted.values()}) == 6
    assert draw(first, 0, seed=1, num_shots=9).examples != wanted[0].examples
    same_text = replace(second, train=first.train)
    assert draw(same_text, 0, num_shots=9).examples != wanted[0].examples


def test_shots_are_nested(small_task) -> None:
    task = small_task(num_train=60)
    longest = draw(task, num_shots=40).examples
    assert len(longest) == 41
    for num_shots in (0, 1, 4, 16):
        assert draw(task, num_shots=num_shots).examples == longest[: num_shots + 1]
    assert draw(task, max_tokens=64).examples == longest[: len(draw(task, max_tokens=64).examples)]


def test_examples_are_drawn_without_replacement_until_there_are_no_more(small_task) -> None:
    episode = draw(small_task(num_train=30))
    assert len(episode.examples) == 30
    assert len(set(episode.examples)) == 30
    assert episode.left_out == ()


# Order gives nothing away.


def best_guess_from_counts(history: list[str], table: dict, default: str) -> str:
    """What followed most often, so far, on the same last two answers and the same lead of one answer over the other."""
    seen = table.get(context(history))
    return seen.most_common(1)[0][0] if seen else default


def context(history: list[str]) -> tuple:
    counts = Counter(history)
    lead = counts["major"] - counts["minor"]
    return (tuple(history[-2:]), max(-3, min(3, lead)))


def accuracy_of_a_label_predictor(episodes: list[list[str]], default: str) -> tuple[float, int]:
    """Accuracy of a predictor that learns from the first half of the episodes what follows on which labels."""
    table: dict = defaultdict(Counter)
    half = len(episodes) // 2
    for answers in episodes[:half]:
        for place, answer in enumerate(answers):
            table[context(answers[:place])][answer] += 1
    guesses = [
        best_guess_from_counts(answers[:place], table, default) == answer
        for answers in episodes[half:]
        for place, answer in enumerate(answers)
    ]
    return sum(guesses) / len(guesses), len(guesses)


@pytest.mark.parametrize("class_balance", [False, True])
def test_preceding_labels_say_nothing_about_the_next_one(class_balance: bool) -> None:
    train = tuple(Example(f"q{number}", "major" if number % 10 < 7 else "minor") for number in range(3000))
    task = Task("skewed", "classification", "accuracy", train, (), labels=("major", "minor"))
    episodes = [
        [example.answer for example in draw(task, index, num_shots=29, class_balance=class_balance).examples]
        for index in range(400)
    ]
    accuracy, count = accuracy_of_a_label_predictor(episodes, default="major")
    majority = 0.5 if class_balance else 0.7
    # Four standard deviations: one seed in thirty thousand fails by chance.
    assert abs(accuracy - majority) < 4 * math.sqrt(majority * (1 - majority) / count)
    # The same predictor does see it when equal labels stand together.
    grouped = [sorted(answers) for answers in episodes]
    assert accuracy_of_a_label_predictor(grouped, default="major")[0] > majority + 0.15


@pytest.mark.parametrize("class_balance", [False, True])
def test_every_position_has_the_same_label_rate(class_balance: bool) -> None:
    train = tuple(Example(f"q{number}", "major" if number % 10 < 7 else "minor") for number in range(1000))
    task = Task("skewed", "classification", "accuracy", train, (), labels=("major", "minor"))
    episodes = [draw(task, index, num_shots=9, class_balance=class_balance).examples for index in range(1500)]
    rate = 0.5 if class_balance else 0.7
    bound = 4 * math.sqrt(rate * (1 - rate) / 1500)
    for place in range(10):
        assert abs(sum(episode[place].answer == "major" for episode in episodes) / 1500 - rate) < bound


def test_balance_draws_what_is_left_when_an_answer_runs_out() -> None:
    train = [Example(f"q{number}", "rare" if number < 2 else "often") for number in range(40)]
    for index in range(20):
        order = balance_order(train, seed=0, purpose="p", index=index)
        assert len(set(order)) == 40
    firsts = Counter(balance_order(train, seed=0, purpose="p", index=index)[0].answer for index in range(400))
    assert abs(firsts["rare"] - 200) < 4 * math.sqrt(100)
    # Both rare examples come first equally often.
    rare = Counter(
        next(example.input for example in balance_order(train, seed=0, purpose="p", index=index) if example.answer == "rare")
        for index in range(400)
    )
    assert abs(rare["q0"] - 200) < 4 * math.sqrt(100)


def test_balance_is_for_label_tasks_alone(small_task) -> None:
    task = small_task((), num_train=20)
    assert draw(task, num_shots=5, class_balance=True) == draw(task, num_shots=5)


# Draws of tasks.


def test_tasks_are_drawn_in_proportion_to_a_power_of_their_size(small_task) -> None:
    tasks = [small_task(num_train=size, name=f"t{size}") for size in (10, 40, 90)]
    for alpha, weights in ((0.0, (1, 1, 1)), (0.5, (1, 2, 3)), (1.0, (10, 40, 90))):
        draws = Counter(draw_task(tasks, seed=3, index=index, alpha=alpha).name for index in range(6000))
        for task, weight in zip(tasks, weights, strict=True):
            share = weight / sum(weights)
            assert abs(draws[task.name] / 6000 - share) < 4 * math.sqrt(share * (1 - share) / 6000)


def test_uniform_draws_show_every_task_once_a_block_in_changing_order(small_task) -> None:
    tasks = [small_task(name=name) for name in "abcde"]
    blocks = [tuple(draw_task(tasks, seed=0, index=5 * block + place).name for place in range(5)) for block in range(40)]
    assert {tuple(sorted(block)) for block in blocks} == {tuple("abcde")}
    assert len(set(blocks)) > 20
    assert draw_task(tasks, seed=0, index=12).name == blocks[2][2]


# The token budget.


def test_whole_examples_up_to_the_budget() -> None:
    ordered = sized(10, 10, 10, 10)
    for budget, count in ((40, 4), (39, 3), (30, 3), (29, 2), (10, 1), (9, 0)):
        examples, _ = fill_budget(ordered, instruction="", counter=Words(), max_tokens=budget)
        assert examples == ordered[:count]


def test_left_out_examples_have_their_reason() -> None:
    ordered = sized(10, 41, 10, 25, 3)
    examples, left_out = fill_budget(ordered, instruction="five words of an instruction", counter=Words(), max_tokens=45)
    assert examples == [ordered[0], ordered[2]]
    assert left_out == [
        LeftOut(ordered[1], "its 41 tokens are more than the row's 40"),
        # The last example would fit; going on to it would favour short examples at the end of rows.
        LeftOut(ordered[3], "its 25 tokens are more than the 20 left in the row"),
    ]


def test_the_limit_ends_an_episode_without_leaving_anything_out() -> None:
    examples, left_out = fill_budget(sized(10, 10, 10), instruction="", counter=Words(), max_tokens=100, limit=2)
    assert (len(examples), left_out) == (2, [])


@given(st.lists(st.integers(3, 30), min_size=1, max_size=20), st.integers(1, 100))
def test_no_episode_is_longer_than_its_budget(lengths: list[int], budget: int) -> None:
    ordered = sized(*lengths)
    examples, left_out = fill_budget(ordered, instruction="", counter=Words(), max_tokens=budget)
    used = sum(Words().count_example(example.input, example.answer) for example in examples)
    assert used <= budget
    # Taken and left out make up a front of the order: nothing is passed over in silence.
    passed = len(examples) + len(left_out)
    assert sorted([*examples, *(item.example for item in left_out)], key=lambda example: example.source) == sorted(
        ordered[:passed], key=lambda example: example.source
    )
    if passed < len(ordered):
        last = left_out[-1].example
        assert used + Words().count_example(last.input, last.answer) > budget


def test_a_budget_that_fits_no_demonstration_is_an_error(small_task) -> None:
    task = small_task(train=sized(20, 20, 20))
    with pytest.raises(BudgetError) as raised:
        draw(task, max_tokens=39)
    assert str(raised.value) == (
        "task 'parity': 1 example(s) fit max_tokens=39 and 1 were left out; its examples take 20 to 20 tokens. "
        "Raise episodes.max_tokens or leave the task out."
    )
    assert len(draw(task, max_tokens=40).examples) == 2
    assert len(draw(task, max_tokens=39, num_shots=0).examples) == 1


def test_examples_longer_than_the_budget_are_passed_over_and_named(small_task) -> None:
    task = small_task(train=sized(10, 500, 10, 10, 10))
    episode = draw(task, max_tokens=100)
    assert len(episode.examples) == 4
    assert [(item.example.source, item.reason) for item in episode.left_out] == [
        ("f:1", "its 500 tokens are more than the row's 100")
    ]


def test_a_task_whose_examples_are_nearly_all_too_long_is_an_error(small_task) -> None:
    task = small_task(train=sized(10, 500, 10, *[500] * 6))
    with pytest.raises(BudgetError, match=r"2 example\(s\) fit max_tokens=100 and 7 were left out; its examples take 10 to 500"):
        draw(task, max_tokens=100)


@pytest.mark.parametrize("count", [0, 1])
def test_an_episode_needs_two_examples(small_task, count: int) -> None:
    with pytest.raises(TaskError, match=rf"task 'parity' has {count} train example\(s\); an episode needs at least 2"):
        draw(small_task(num_train=count))


# Remapped label words.


def test_label_words_are_remapped_with_the_given_probability(small_task) -> None:
    task = small_task(("red", "green", "blue"), num_train=30)
    assert all(draw(task, index, num_shots=5).label_map == () for index in range(50))
    assert all(draw(task, index, num_shots=5, remap_probability=1.0).label_map for index in range(50))
    remapped = sum(bool(draw(task, index, num_shots=5, remap_probability=0.3).label_map) for index in range(1000))
    assert abs(remapped - 300) < 4 * math.sqrt(210)


def test_remapped_labels_are_symbols_or_each_other_one_to_one(small_task) -> None:
    labels = ("red", "green", "blue")
    task = small_task(labels, num_train=30)
    kinds = Counter()
    for index in range(400):
        episode = draw(task, index, num_shots=8, remap_probability=1.0)
        plain = draw(task, index, num_shots=8)
        mapping = dict(episode.label_map)
        assert sorted(mapping) == sorted(labels)
        assert len(set(mapping.values())) == 3
        kinds["labels" if set(mapping.values()) == set(labels) else "symbols"] += 1
        assert set(mapping.values()) == set(labels) or set(mapping.values()) <= set(SYMBOLS)
        # Only the words change: inputs, their order and which examples are alike stay.
        assert [example.input for example in episode.examples] == [example.input for example in plain.examples]
        assert [example.answer for example in episode.examples] == [mapping[example.answer] for example in plain.examples]
    assert abs(kinds["symbols"] - 200) < 4 * math.sqrt(100)


def test_more_labels_than_symbols_are_numbered(small_task) -> None:
    labels = tuple(f"label {number}" for number in range(50))
    task = small_task(labels, num_train=100)
    words = {word for index in range(10) for _, word in draw(task, index, remap_probability=1.0).label_map}
    assert words - set(labels) == {f"L{number}" for number in range(1, 51)}


def test_free_text_is_never_remapped(small_task) -> None:
    assert draw(small_task(()), remap_probability=1.0).label_map == ()
