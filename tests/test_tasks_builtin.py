"""The built-in suite: its promises of size, variety and separation, and its answers worked out a second time from the text."""

import ast
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from manyicl.errors import TaskError
from manyicl.tasks import builtin
from manyicl.tasks.builtin import held_out, load_builtin_suite, meta_training, validation
from manyicl.tasks.builtin.grammar import TaskGrammar, capitalise, expand, labelled, paired, sentence_task
from manyicl.tasks.checks import check_suite
from manyicl.tasks.readers import load_suite
from manyicl.tasks.task import FAMILIES, Example, Task

SUITE = load_builtin_suite()
ROLES = ("meta_training", "validation", "held_out")
NEEDS_DEMONSTRATIONS = {
    "gadget_invented_words": "meta_training",
    "hobby_symbols": "meta_training",
    "helpdesk_codes": "meta_training",
    "tense_symbols": "meta_training",
    "moves_symbols": "meta_training",
    "invented_operations": "meta_training",
    "advice_invented_words": "validation",
    "stay_invented_words": "held_out",
    "material_symbols": "held_out",
    "museum_colours": "held_out",
}
LARGE_LABEL_SETS = {"assistant_intent": 36, "trade": 34, "library_desk": 34}
SYMBOLS = ("hobby_symbols", "tense_symbols", "moves_symbols", "material_symbols")
CHOICES_BY_EXAMPLE = ("kind_choice", "opposite_choice", "purpose_choice")

every_task = pytest.mark.parametrize("task", SUITE.tasks.values(), ids=list(SUITE.tasks))


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def examples(name: str) -> tuple[Example, ...]:
    return SUITE.tasks[name].train + SUITE.tasks[name].test


def test_counts_by_role_and_family():
    assert {role: len(getattr(SUITE, role)) for role in ROLES} == {"meta_training": 24, "validation": 4, "held_out": 13}
    assert len(SUITE.tasks) == 41
    by_role = {role: Counter(task.family for task in SUITE.select(role)) for role in ROLES}
    assert by_role["meta_training"] == {"classification": 10, "nli": 3, "qa": 4, "summarization": 3, "math": 4}
    assert by_role["validation"] == {"classification": 1, "nli": 1, "summarization": 1, "math": 1}
    assert by_role["held_out"] == {"classification": 5, "nli": 2, "qa": 2, "summarization": 2, "math": 2}
    assert set().union(*by_role.values()) == set(FAMILIES)


def test_kinds_of_label_sets():
    assert {name: SUITE.role(name) for name in NEEDS_DEMONSTRATIONS} == NEEDS_DEMONSTRATIONS
    large = {name: len(task.labels) for name, task in SUITE.tasks.items() if len(task.labels) >= 30}
    assert large == LARGE_LABEL_SETS
    assert SUITE.role("library_desk") == "held_out"
    symbols = [name for name, task in SUITE.tasks.items() if task.labels and not words("".join(task.labels))]
    assert symbols == list(SYMBOLS)
    assert set(SUITE.tasks["material_symbols"].labels).isdisjoint(
        label for name in SYMBOLS[:3] for label in SUITE.tasks[name].labels
    )
    assert tuple(name for name, task in SUITE.tasks.items() if task.is_choice and not task.labels) == CHOICES_BY_EXAMPLE


def test_load_suite_reads_the_builtin_suite():
    assert load_suite("builtin") is SUITE


def test_checks_find_nothing():
    assert check_suite(SUITE) == []


@pytest.mark.parametrize("seed", [1, 2])
def test_checks_find_nothing_for_other_seeds(seed: int):
    assert check_suite(load_builtin_suite(seed)) == []


def test_no_run_of_five_words_stands_in_two_roles():
    runs: dict[str, set[tuple[str, ...]]] = {}
    for role in ROLES:
        texts = [words(example.input) for task in SUITE.select(role) for example in task.train + task.test]
        runs[role] = {tuple(text[start : start + 5]) for text in texts for start in range(len(text) - 4)}
    assert min(len(found) for found in runs.values()) > 1000
    assert runs["held_out"] & runs["meta_training"] == set()
    assert runs["held_out"] & runs["validation"] == set()
    assert runs["validation"] & runs["meta_training"] == set()


def test_roles_import_nothing_of_each_other():
    folder = Path(builtin.__file__).parent
    for role in ROLES:
        files = sorted((folder / role).glob("*.py")) or [folder / f"{role}.py"]
        for file in files:
            imported = [node.module for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
            others = [other for other in ROLES if other != role]
            assert not [name for name in imported if name and any(other in name for other in others)], file


@every_task
def test_sizes_and_distinct_inputs(task: Task):
    assert len(task.train) >= 320
    assert len(task.test) >= 60
    inputs = Counter(" ".join(words(example.input)) for example in task.train + task.test)
    assert inputs.most_common(1)[0][1] == 1
    lengths = sorted(len(example.input.split()) for example in task.train + task.test)
    assert lengths[0] >= 2
    assert lengths[-1] <= 40


@pytest.mark.parametrize("task", [task for task in SUITE.tasks.values() if task.labels], ids=lambda task: task.name)
def test_labels_are_balanced_and_seen_in_train(task: Task):
    train, test = Counter(example.answer for example in task.train), Counter(example.answer for example in task.test)
    assert set(train) == set(test) == set(task.labels)
    largest_ratio = {"emotion": 3.0, "mail_filter": 7 / 3}.get(task.name, 1.0)
    assert max(train.values()) / min(train.values()) == pytest.approx(largest_ratio, rel=0.12)
    assert (task.metric == "macro_f1") == (largest_ratio > 1)


@every_task
def test_text_is_clean_english(task: Task):
    for example in task.train + task.test:
        assert not re.search(r"[{}]|  |\bNone\b|^\s|\s$", example.input + example.answer), example
        assert not re.search(r"\b[Aa] [aeio]|\b[Aa]n [bcdfgjklmnpqrstvwz]", example.input), example
        assert task.name == "assistant_intent" or not example.input[0].islower(), example


@every_task
def test_groups_do_not_stand_in_both_splits(task: Task):
    grouped = task.family == "nli" or task.name in {
        "moved_objects",
        "world_facts",
        "opposite_choice",
        "event_details",
        "purpose_choice",
    }
    train, test = ({example.group for example in split} for split in (task.train, task.test))
    assert train.isdisjoint(test) if grouped else train == test == {""}
    assert not grouped or "" not in train | test


@pytest.mark.parametrize("name", CHOICES_BY_EXAMPLE)
def test_options_hold_the_answer_once_and_stand_in_the_input(name: str):
    places = Counter()
    for example in examples(name):
        assert example.options.count(example.answer) == 1
        assert len(set(example.options)) == len(example.options) >= 3
        assert all(option.lower() in example.input.lower() for option in example.options)
        places[example.options.index(example.answer)] += 1
    assert max(places.values()) < 1.5 * min(places.values())


def test_same_seed_same_examples_in_another_process_and_no_torch():
    code = (
        "import sys; from manyicl.tasks.builtin import load_builtin_suite as load\n"
        "print(*(task.fingerprint() for task in load().tasks.values()))\n"
        "print([name for name in ('torch', 'transformers', 'datasets') if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    fingerprints, heavy = done.stdout.splitlines()
    assert fingerprints.split() == [task.fingerprint() for task in SUITE.tasks.values()]
    assert heavy == "[]"


def test_another_seed_gives_other_examples_of_the_same_tasks():
    other = load_builtin_suite(1)
    assert [task.name for task in other.tasks.values()] == list(SUITE.tasks)
    assert [role for role in ROLES if getattr(other, role) != getattr(SUITE, role)] == []
    for name, task in other.tasks.items():
        assert task.fingerprint() != SUITE.tasks[name].fingerprint()
        assert task.labels == SUITE.tasks[name].labels


def test_loading_takes_under_a_second_of_processor_time():
    before = time.process_time()
    load_builtin_suite(3)
    assert time.process_time() - before < 1.0


# Answers worked out again, from the text alone.


def solve(name: str, text: str) -> int:
    """The result of a word problem by its own words."""
    first, *rest = numbers(text)
    if name == "shop_change":
        if "purse" in text:
            return first - rest[0] * rest[1]
        return rest[1] - first * rest[0] if rest[1:] else first * rest[0]
    if name == "marble_counts":
        adds = re.search(r"found|together|put in|hands", text)
        return first + rest[0] if adds else first - rest[0]
    if name == "fair_sharing":
        return first % rest[0] if re.search(r"keeps the rest|full row", text) else first // rest[0]
    if name == "invented_operations":
        return {"flim": max, "grop": min, "snad": lambda left, right: left + right}[re.search("flim|grop|snad", text)[0]](
            first, rest[0]
        )
    if name == "journey_minutes":
        if "legs" in text:
            return 2 * first + rest[0]
        return first - rest[0] if "remain" in text else first + rest[0]
    if name == "passengers":
        on, off = (first, rest[0]) if "new faces" in text else rest[::-1]
        start = rest[1] if "new faces" in text else first
        if re.search(r"join|plus", text):
            on, off = rest
        return start + on - off
    grown = first * rest[0]
    return grown + (rest[1] if "pots" in text else -rest[1] if rest[1:] else 0)


@pytest.mark.parametrize(
    ("name", "text", "result"),
    [
        ("shop_change", "With 50 euros in the purse, Ada takes 4 pens at 9 euros each. What is left?", 14),
        ("fair_sharing", "23 cubes are laid out in rows of 5. How many do not fit into a full row?", 3),
        ("passengers", "A tram leaves with 20 riders. At the zoo, 3 step out and 5 step in. How many ride on?", 22),
        ("passengers", "14 people sit in the lift. 5 join them by the zoo; then 3 leave. How many are seated?", 16),
        ("harvest", "Mira grows 5 melons in each of 6 beds, and deer eat 4. How many survive?", 26),
    ],
)
def test_the_solver_of_these_tests(name: str, text: str, result: int):
    assert solve(name, text) == result


@pytest.mark.parametrize("name", [name for name, task in SUITE.tasks.items() if task.family == "math"])
def test_results_of_word_problems(name: str):
    wrong = [example for example in examples(name) if str(solve(name, example.input)) != example.answer]
    assert wrong == []
    assert all(0 <= int(example.answer) < 130 for example in examples(name))


def judge_counts(text: str) -> str:
    """The label of a stock_counts input."""
    premise, hypothesis = text.removeprefix("Premise: ").split("\nHypothesis: ")
    counts = {thing: int(count) for count, thing in re.findall(r"(\d+) (\w+)", premise)}
    named = re.findall(r"\w+", hypothesis)
    known = [thing for thing in named if thing in counts]
    if re.search("more|fewer", hypothesis) and len(known) == 2:
        truth = counts[known[0]] > counts[known[1]] if "more" in hypothesis else counts[known[0]] < counts[known[1]]
    elif "at least" in hypothesis:
        truth = counts[known[0]] >= numbers(hypothesis)[0]
    elif "below" in hypothesis:
        truth = counts[known[0]] < numbers(hypothesis)[0]
    elif known and re.search(r"has (no|some) ", hypothesis):
        truth = "has some" in hypothesis
    else:
        return "neutral"
    return "entailment" if truth else "contradiction"


def judge_order(text: str) -> str:
    """The label of an orderings input: the hypothesis follows from the premise, or its opposite does."""
    rising = ("taller", "older", "faster", "left", "ahead", "before", "more")

    def read(fact: str) -> tuple[str, str]:
        one, *link, other = fact.strip(" .").split()
        return (one, other) if set(link) & set(rising) else (other, one)

    premise, hypothesis = text.removeprefix("First: ").split(" Second: ")
    facts = [read(fact) for fact in re.split(r", and|;|, while|, but", premise)]
    facts += [(left, right) for left, middle in facts for start, right in facts if middle == start]
    asked = read(hypothesis)
    return "entailment" if asked in facts else "contradiction" if asked[::-1] in facts else "neutral"


def judge_rule(text: str) -> str:
    """The label of a rules input, by trying all things that the rule allows."""
    premise, hypothesis = text.split("\nTherefore: ")
    rule, case = re.fullmatch(r"(.*?\.) (The .*)", premise).groups()
    marks = "red|striped|square|numbered|wooden|sealed|dusty|tiny"
    states = "locked|empty|heavy|for sale|from Lisbon|insured|fragile|stolen"
    mark, state = (re.search(rf"\b({kinds})\b", rule)[1] for kinds in (marks, states))

    def holds(fact: str, is_marked: bool, has_state: bool) -> bool:
        value = is_marked if fact.endswith(f" {mark}.") else has_state
        assert fact.endswith((f" {mark}.", f" {state}."))
        return value != (" is not " in fact)

    worlds = [(False, False), (False, True), (True, True)]
    possible = [holds(hypothesis, *world) for world in worlds if holds(case, *world)]
    return "yes" if all(possible) else "unclear" if any(possible) else "no"


JUDGES = {"stock_counts": judge_counts, "orderings": judge_order, "rules": judge_rule}


@pytest.mark.parametrize(
    ("name", "text", "label"),
    [
        (
            "stock_counts",
            "Premise: There are 9 lamps and 4 chairs.\nHypothesis: There are more chairs than lamps.",
            "contradiction",
        ),
        ("stock_counts", "Premise: There are 9 lamps and 4 chairs.\nHypothesis: There are at least 8 lamps.", "entailment"),
        ("stock_counts", "Premise: There are 9 lamps and 4 chairs.\nHypothesis: The shop has some brooms.", "neutral"),
        ("orderings", "First: Ada is taller than Bo; Cy is shorter than Bo. Second: Ada is taller than Cy.", "entailment"),
        ("orderings", "First: Ada is taller than Bo; Ada is taller than Cy. Second: Bo is taller than Cy.", "neutral"),
        ("orderings", "First: Ada arrived before Bo, but Cy arrived after Bo. Second: Cy arrived before Ada.", "contradiction"),
        ("rules", "Every red box is locked. The box here is not locked.\nTherefore: The box here is red.", "no"),
        ("rules", "Every red box is locked. The box here is locked.\nTherefore: The box here is red.", "unclear"),
        ("rules", "No box is red without being locked. The box here is red.\nTherefore: The box here is locked.", "yes"),
    ],
)
def test_the_judges_of_these_tests(name: str, text: str, label: str):
    assert JUDGES[name](text) == label


@pytest.mark.parametrize("name", JUDGES)
def test_labels_of_premise_and_hypothesis(name: str):
    assert [example for example in examples(name) if JUDGES[name](example.input) != example.answer] == []


def test_opening_hours_by_the_clock():
    judged = 0
    for example in examples("opening_hours"):
        sign, claim = example.input.split("\nClaim: ")
        opens, closes = numbers(sign)
        if "normal day" in claim:
            is_open = opens <= numbers(claim)[0] < closes
            assert example.answer == ("true" if is_open != ("is shut" in claim) else "false"), example
            judged += 1
    assert judged > 50


@pytest.mark.parametrize("name", ["moved_objects", "event_details"])
def test_answers_are_spans_of_the_passage(name: str):
    assert [example for example in examples(name) if example.answer.lower() not in example.group.lower()] == []


@pytest.mark.parametrize("name", [name for name, task in SUITE.tasks.items() if task.family == "summarization"])
def test_summaries_are_short_and_say_nothing_new(name: str):
    for example in examples(name):
        told = set(words(example.input))
        assert set(numbers(example.answer)) <= set(numbers(example.input)), example
        new = [word for word in words(example.answer) if word not in told]
        assert len(new) <= 6, example
        assert len(words(example.answer)) <= 0.9 * len(words(example.input)), example
    assert len({example.answer for example in examples(name)}) > 100


def test_match_results_name_the_winner_first():
    for example in examples("match_results"):
        if " beat " in example.answer:
            high, low = numbers(example.answer)
            assert high > low
        if " lose to " in example.input:
            loser, winner = re.search(r"saw (\w+) lose to (\w+)", example.input).groups()
            assert example.answer.startswith(f"{winner} beat {loser} ")


# The grammar.


def test_expand_repeats_a_slot_and_tells_numbered_slots_apart():
    lists = labelled("city: Oslo | Lima\nthing: {colour} oar\ncolour: red")
    for number in range(20):
        text = expand("{city}, {city2}, {city}, a {thing}", lists, random.Random(number))
        assert text in ("Oslo, Lima, Oslo, a red oar", "Lima, Oslo, Lima, a red oar")


def test_expand_keeps_chosen_values_and_adds_to_them():
    chosen = {"city": "Oslo"}
    assert expand("{city} {city2}", {"city": ("Oslo", "Lima")}, random.Random(0), chosen) == "Oslo Lima"
    assert chosen == {"city": "Oslo", "city2": "Lima"}


@pytest.mark.parametrize(
    ("template", "text"),
    [("a apple", "an apple"), ("A old unicorn", "An old unicorn"), ("a unicorn", "a unicorn"), ("a umbrella", "an umbrella")],
)
def test_articles(template: str, text: str):
    assert expand(template, {}, random.Random(0)) == text


def test_capitalise_begins_each_sentence():
    assert capitalise("one here. two there? ok\nthree") == "One here. Two there? Ok\nThree"


def test_readers_of_word_lists():
    assert labelled("a: x | y\nb: z: w\na: v") == {"a": ("x", "y", "v"), "b": ("z: w",)}
    assert paired("one // two => three") == (("one\ntwo", "three"),)


def test_weights_set_the_share_of_each_label():
    sentences = labelled("many: {n} a | {n} b\nfew: {n} c")
    grammar = sentence_task("counted", sentences, {"n": [str(n) for n in range(500)]}, weights=(3, 1))
    task = grammar.make_task(0)
    assert Counter(example.answer for example in task.train) == {"many": 240, "few": 80}
    assert Counter(example.answer for example in task.test) == {"many": 60, "few": 20}
    assert task.metric == "macro_f1"


def test_a_grammar_too_small_says_so():
    grammar = TaskGrammar(
        name="tiny", family="qa", metric="exact_match", write=lambda draw, label: Example(f"Word {draw.randrange(9)}", "x")
    )
    with pytest.raises(TaskError, match=r"'tiny'.*after 9 examples. Widen its word lists"):
        grammar.make_task(0)


def test_every_grammar_is_in_the_suite_under_its_own_name():
    grammars = meta_training.GRAMMARS + validation.GRAMMARS + held_out.GRAMMARS
    assert [grammar.name for grammar in grammars] == list(SUITE.tasks)
