"""Held-out premise and hypothesis tasks: who comes before whom, and what a rule allows one to conclude."""

import random

from manyicl.tasks.builtin.grammar import entailment_task, expand, labelled

_ORDER_WORDS = labelled("""
who: Aisha | Boris | Celine | Darius | Edith | Felipe | Gita | Hugo | Ingrid | Jamal | Kira | Leon
link: is taller than/is shorter than | is older than/is younger than | ran faster than/ran slower than
link: sits to the left of/sits to the right of | queues ahead of/queues behind | arrived before/arrived after
link: earns more than/earns less than
joint: , and | ; | , while | , but
""")


def _state_order(draw: random.Random) -> tuple[str, str, bool | None]:
    """Two comparisons among three people, and a third that follows, cannot be, or is left open."""
    names = draw.sample(_ORDER_WORDS["who"], 4)
    link = draw.choice(_ORDER_WORDS["link"]).split("/")
    first, second, third = names[:3]
    facts = draw.choice(
        (((first, second), (second, third)), ((first, second), (first, third)), ((first, third), (second, third)))
    )
    known = set(facts) | {(left, right) for left, middle in facts for start, right in facts if middle == start}
    told = [_tell_order(draw, pair, link) for pair in draw.sample(facts, 2)]
    pair = draw.choice([(left, right) for left in names[:3] for right in names[:3] if left != right] + [(first, names[3])])
    truth = True if pair in known else False if pair[::-1] in known else None
    return f"{told[0]}{draw.choice(_ORDER_WORDS['joint'])} {told[1]}.", _tell_order(draw, pair, link) + ".", truth


def _tell_order(draw: random.Random, pair: tuple[str, str], link: list[str]) -> str:
    """One comparison, told from either end."""
    left, right = pair
    return draw.choice((f"{left} {link[0]} {right}", f"{right} {link[1]} {left}"))


_RULE_WORDS = labelled("""
thing: box | crate | cabinet | parcel | trunk | jar | bag | chest
mark: red | striped | square | numbered | wooden | sealed | dusty | tiny
state: locked | empty | heavy | for sale | from Lisbon | insured | fragile | stolen
spot: by the door | under the stairs | on the cart | beside Olive | that Pablo holds | in the far corner
all: every {mark} {thing} is {state}. | all that is {mark} here is {state}. | if a {thing} is {mark}, it is {state}.
all: no {thing} is {mark} without being {state}. | you will find that each {mark} {thing} is {state}.
""")


def _state_rule(draw: random.Random) -> tuple[str, str, bool | None]:
    """A rule "all A are B" and one case of which A or B is known; the other follows in two of the four cases only."""
    chosen: dict[str, str] = {}
    rule = expand("{all}", _RULE_WORDS, draw, chosen)
    case = expand("the {thing} {spot}", _RULE_WORDS, draw, chosen)
    gives_mark, gives_yes, asks_yes = (draw.random() < 0.5 for _ in range(3))
    given, asked = (chosen["mark"], chosen["state"]) if gives_mark else (chosen["state"], chosen["mark"])
    truth = asks_yes == gives_yes if gives_mark == gives_yes else None
    premise = f"{rule} {case} is {'' if gives_yes else 'not '}{given}."
    return premise, f"{case} is {'' if asks_yes else 'not '}{asked}.", truth


GRAMMARS = (
    entailment_task(
        "orderings",
        ("entailment", "neutral", "contradiction"),
        _state_order,
        layout="First: {premise} Second: {hypothesis}",
    ),
    entailment_task("rules", ("yes", "unclear", "no"), _state_rule, layout="{premise}\nTherefore: {hypothesis}"),
)
