"""Meta-training tasks on premise and hypothesis: counts, kinds of things, moves. True logic decides, not wording."""

import random

from manyicl.tasks.builtin.grammar import entailment_task, expand, labelled, listed

_STOCK_WORDS = labelled("""
shop: the corner shop | the market stall | the school kiosk | Bruno's store | the museum shop | the old depot
thing: lamps | chairs | kettles | baskets | candles | mirrors | blankets | hammers | teapots | buckets | pillows | brooms
claim: most of the {thing} are blue | the {thing} are cheaper than the {thing2} | the {thing} were made abroad
claim: nobody wants to buy the {thing} | the {thing2} arrived before the {thing} | the {thing} stand in the window
""")
_STOCK_PREMISES = listed("""
{shop} has {n} {thing} and {m} {thing2} | there are {n} {thing} and {m} {thing2} in {shop}
besides {n} {thing}, {shop} sells {m} {thing2} | {n} {thing} and {m} {thing2} are left in {shop}
you can count {n} {thing} and {m} {thing2} in {shop} | in {shop} stand {n} {thing} next to {m} {thing2}
""")


def _state_stock(draw: random.Random) -> tuple[str, str, bool | None]:
    """Two counts, and a statement about them: a comparison, a bound, or something that was not said."""
    counts = draw.sample(range(3, 60), 2)
    chosen = {"n": str(counts[0]), "m": str(counts[1])}
    premise = expand(draw.choice(_STOCK_PREMISES), _STOCK_WORDS, draw, chosen)
    things = [chosen["thing"], chosen["thing2"]]
    place = draw.randrange(2)
    this, that = things[place], things[1 - place]
    count, other = counts[place], counts[1 - place]
    bound = max(2, count + draw.choice((-9, -5, -2, -1, 1, 2, 4, 8)))
    hypothesis, truth = draw.choice(
        (
            (f"there are more {this} than {that}", count > other),
            (f"there are fewer {this} than {that}", count < other),
            (f"there are at least {bound} {this}", count >= bound),
            (f"the number of {this} is below {bound}", count < bound),
            (f"{chosen['shop']} has no {this} at all", False),
            (f"{chosen['shop']} has some {this}", True),
            (expand("{claim}", _STOCK_WORDS, draw, {"thing": this, "thing2": that}), None),
            (expand("{shop} has no {thing3} at all", _STOCK_WORDS, draw, chosen), None),
            (expand("{shop} has some {thing3}", _STOCK_WORDS, draw, chosen), None),
        )
    )
    return premise + ".", hypothesis + ".", truth


_KINDS = labelled("""
fish: trout | carp | herring | tuna | salmon
bird: crow | swan | parrot | stork | finch
flower: tulip | daisy | orchid | poppy | dahlia
tool: chisel | wrench | screwdriver | drill | spade
fruit: plum | peach | melon | cherry | mango
boat: canoe | ferry | raft | dinghy | barge
""")
_KIND_WORDS = labelled("""
who: Ada | Hassan | the painter | Greta | a sailor | Jonas | the girl next door | Priya
verb: drew/draw | photographed/photograph | saw/see | found/find | noticed/notice
place: at the harbour | near the market | in the park | behind the museum | by the river | on the island
looks: small/huge | dark/pale | beautiful/ugly | light/heavy
more: it was raining | the sun was going down | many other people were there | a band was playing | nobody else was there
""")


def _state_kind(draw: random.Random) -> tuple[str, str, bool | None]:
    """What somebody saw where, and a statement that is more general, more special, opposite or beside the point."""
    kind = draw.choice(tuple(_KINDS))
    one, other = draw.sample(_KINDS[kind], 2)
    foreign = draw.choice([name for name in _KINDS if name != kind])
    who, place, place2 = (draw.choice(_KIND_WORDS["who"]), *draw.sample(_KIND_WORDS["place"], 2))
    past, base = draw.choice(_KIND_WORDS["verb"]).split("/")
    looks = draw.choice(_KIND_WORDS["looks"]).split("/")
    look, opposite = draw.sample(looks, 2)
    if draw.random() < 0.25:
        premise, hypothesis, truth = f"{who} {past} a {look} {kind} {place}", f"{who} {past} a {one} {place}", None
    else:
        premise = f"{who} {past} a {look} {one} {place}"
        hypothesis, truth = draw.choice(
            (
                (f"{who} {past} a {kind} {place}", True),
                (f"{who} {past} a {one} {place}", True),
                (f"{who} {past} something {place}", True),
                (f"the {one} that {who} {past} {place} was {look}", True),
                (f"{who} did not {base} a single {kind} {place}", False),
                (f"the {one} that {who} {past} {place} was {opposite}", False),
                (f"{who} {past} nothing {place}", False),
                (f"{who} {past} a {other} {place}", None),
                (f"{who} {past} something {place2}", None),
                (f"{who} {past} nothing {place2}", None),
                (f"{who} did not {base} a single {foreign} {place}", None),
                (expand("{more}", _KIND_WORDS, draw) + f" when {who} {past} the {one}", None),
            )
        )
    return expand(premise, {}, draw) + ".", expand(hypothesis, {}, draw) + ".", truth


_MOVE_WORDS = labelled("""
who: Carmen | Dmitri | Elsa | Farid | Ivy | Kemal | Lena | Mateo | Nadia | Otto
city: Bergen | Porto | Krakow | Quito | Nairobi | Hanoi | Dublin | Tampere | Perth | Osaka | Lyon | Tbilisi
number: two | three | four | six | seven | nine
premise: {who} lived in {city} for {number} years and then moved to {city2} for good.
premise: After {number} years in {city}, {who} left for {city2} and is still there.
premise: {who} came straight from {city} to {city2} {number} years ago and has not moved since.
premise: Since moving from {city} to {city2} {number} years ago, {who} has stayed in {city2}.
open: {who} likes {city2} better than {city} | {who} moved because of a job | {who} rents a flat with a balcony
""")


def _state_move(draw: random.Random) -> tuple[str, str, bool | None]:
    """A move from one city to another, and a statement about these two or a third; nothing is known of the third."""
    chosen: dict[str, str] = {}
    premise = expand("{premise}", _MOVE_WORDS, draw, chosen)
    third = expand("{city3}", _MOVE_WORDS, draw, chosen)
    who, old, new = chosen["who"], chosen["city"], chosen["city2"]
    hypothesis, truth = draw.choice(
        (
            (f"{who} lives in {new} now", True),
            (f"{who} lives in {old} now", False),
            (f"{who} once lived in {old}", True),
            (f"{who} once lived in {third}", None),
            (f"{who} has never set foot in {old}", False),
            (f"{who} has never set foot in {third}", None),
            (f"the last move of {who} was from {old} to {new}", True),
            (f"the last move of {who} was from {new} to {old}", False),
            (expand("{open}", _MOVE_WORDS, draw, chosen), None),
        )
    )
    return premise, hypothesis + ".", truth


GRAMMARS = (
    entailment_task(
        "stock_counts",
        ("entailment", "neutral", "contradiction"),
        _state_stock,
        layout="Premise: {premise}\nHypothesis: {hypothesis}",
    ),
    entailment_task(
        "kinds_of_things",
        ("yes", "maybe", "no"),
        _state_kind,
        layout="{premise}\nIs it true that: {hypothesis}",
        instruction="Read the first sentence and judge the second.",
    ),
    entailment_task("moves_symbols", ("+", "~", "-"), _state_move, layout="{premise} / {hypothesis}"),
)
