"""Held-out word problems: people who get on and off, and a harvest in rows."""

import random

from manyicl.tasks.builtin.grammar import expand, labelled, number_task

_PASSENGER_WORDS = labelled("""
ride: tram | funicular | school bus | lift | ferry | minibus
stop: harbour | square | clinic | market hall | zoo | stadium
both: a {ride} leaves with {start} riders. At the {stop}, {off} step out and {on} step in. How many ride on?
both: {start} people sit in the {ride}. {on} join them by the {stop}; then {off} leave. How many are seated?
both: before the {stop}, {start} were aboard the {ride}. {off} got off there and {on} got on. How many are aboard?
both: {on} new faces and {off} goodbyes at the {stop}: how full is the {ride} now, if {start} rode in it before?
both: the driver of the {ride} counts {start} fares. {off} guests alight near the {stop}, {on} climb in. How many stay on?
both: at the {stop}, a {ride} with {start} inside swaps {off} people for {on} others. How many travel further?
both: count the heads in the {ride}: {start}, plus {on} from the {stop}, minus {off} who alight. What is the total?
""")


def _passenger_problem(draw: random.Random) -> tuple[str, int]:
    """One subtraction and one addition."""
    start, off, on = draw.randint(10, 30), draw.randint(2, 9), draw.randint(2, 9)
    text = expand("{both}", _PASSENGER_WORDS, draw, {"start": str(start), "off": str(off), "on": str(on)})
    return text, start - off + on


_HARVEST_WORDS = labelled("""
grower: Mira | Nestor | Olive | Pablo | Leon | Ingrid
crop: pumpkins | melons | cabbages | maize plants | lettuces | artichokes
grid: {grower} sets out {rows} rows with {each} {crop} in every row. What is the number of {crop}?
grid: in the field of {grower}, {crop} grow in {rows} lines of {each}. How many {crop} grow there?
lost: out of {rows} rows with {each} {crop} apiece, hail ruins {gone}. How many {crop} does {grower} still harvest?
lost: {grower} grows {each} {crop} in each of {rows} beds, and deer eat {gone}. How many survive?
grid: {crop} fill {rows} trays, {each} to a tray. How many does {grower} have?
lost: {grower} planted {rows} times {each} {crop}, but {gone} never came up. How many grew?
more: besides {rows} rows with {each} {crop} each, {grower} has {gone} {crop} in pots. What do they come to?
""")


def _harvest_problem(draw: random.Random) -> tuple[str, int]:
    """Rows times plants, alone or with some lost or added."""
    rows, each, gone = draw.randint(2, 9), draw.randint(3, 9), draw.randint(1, 5)
    kind, change = draw.choice((("grid", 0), ("lost", -gone), ("more", gone)))
    chosen = {"rows": str(rows), "each": str(each), "gone": str(gone)}
    return expand(f"{{{kind}}}", _HARVEST_WORDS, draw, chosen), rows * each + change


GRAMMARS = (number_task("passengers", _passenger_problem), number_task("harvest", _harvest_problem))
