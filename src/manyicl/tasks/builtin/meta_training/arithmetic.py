"""Meta-training word problems with small numbers, and one with made-up operations that only demonstrations define."""

import random

from manyicl.tasks.builtin.grammar import expand, labelled, number_task

_SHOP_WORDS = labelled("""
who: Ada | Bruno | Carmen | Dmitri | Elsa | Farid | Greta | Hassan
goods: pens | muffins | postcards | candles | socks | tickets | peaches | batteries
coin: dollars | euros | pounds | crowns
cost: {who} buys {count} {goods} at {price} {coin} each. How many {coin} is that?
cost: one pack of {goods} costs {price} {coin}. What do {count} packs cost in {coin}?
cost: a stall sells {goods} for {price} {coin} apiece. {who} takes {count}. How many {coin} must {who} pay?
change: {who} buys {count} {goods} at {price} {coin} each and pays with {paid} {coin}. How many {coin} come back?
change: {count} {goods} cost {price} {coin} apiece. {who} hands over {paid} {coin}. How much change is due?
cost: what is the price of {count} {goods} if a single one costs {price} {coin}?
change: after paying for {count} {goods} at {price} {coin} each, how much of {paid} {coin} does {who} still have?
change: with {paid} {coin} in the purse, {who} takes {count} {goods} at {price} {coin} each. What is left?
""")


def _shop_problem(draw: random.Random) -> tuple[str, int]:
    """Price times count; in half of the problems, what comes back from a larger sum."""
    count, price = draw.randint(2, 9), draw.randint(2, 9)
    cost, kind = count * price, draw.choice(("cost", "change"))
    paid = cost + draw.randint(1, 12)
    chosen = {"count": str(count), "price": str(price), "paid": str(paid)}
    return expand(f"{{{kind}}}", _SHOP_WORDS, draw, chosen), cost if kind == "cost" else paid - cost


_MARBLE_WORDS = labelled("""
who: Ivy | Jonas | Kemal | Lena | Mateo | Nadia | Otto | Priya
thing: marbles | stickers | stamps | shells | badges | toy cars | buttons | comics
add: {who} had {first} {thing} and found {second} more. How many {thing} does {who} have now?
add: {who} owns {first} {thing}, {who2} owns {second}. How many {thing} do they own together?
add: there were {first} {thing} in a box, and {who} put in {second} more. How many are in it?
take: {who} had {first} {thing} but lost {second} at school. How many {thing} are left?
take: of {first} {thing}, {who} gave {second} to {who2}. How many did {who} keep?
take: {who} has {first} {thing} and {who2} has {second}. How many more does {who} have?
add: {who2} hands {second} {thing} to {who}, who had {first} before. How many does {who} have then?
take: a jar held {first} {thing}. {who} took out {second}. How many are still inside?
take: {who} wants {first} {thing} and already has {second}. How many are missing?
""")


def _marble_problem(draw: random.Random) -> tuple[str, int]:
    """One addition or one subtraction."""
    first, second = draw.randint(12, 60), draw.randint(2, 11)
    kind = draw.choice(("add", "take"))
    text = expand(f"{{{kind}}}", _MARBLE_WORDS, draw, {"first": str(first), "second": str(second)})
    return text, first + second if kind == "add" else first - second


_SHARING_WORDS = labelled("""
who: the cook | the teacher | Grandma | the coach | the farmer | the nurse
thing: biscuits | pencils | balloons | plums | cards | cubes
group: bags | tables | boxes | teams | plates | trays
divide: {who} shares {total} {thing} equally among {parts} children. How many does each child get?
divide: {total} {thing} are spread evenly over {parts} {group}. How many are there in each?
divide: {who} packs {total} {thing}, {parts} to a box. How many boxes are filled?
left: {who} shares {more} {thing} equally among {parts} children and keeps the rest. How many does {who} keep?
divide: how many {group} are needed for {total} {thing} if {parts} go on each of the {group}?
left: {more} {thing} are laid out in rows of {parts}. How many do not fit into a full row?
""")


def _sharing_problem(draw: random.Random) -> tuple[str, int]:
    """A division without remainder, or the remainder of one."""
    parts, each = draw.randint(2, 9), draw.randint(2, 9)
    total, rest = parts * each, draw.randint(1, parts - 1)
    kind = draw.choice(("divide", "divide", "left"))
    chosen = {"total": str(total), "parts": str(parts), "more": str(total + rest)}
    return expand(f"{{{kind}}}", _SHARING_WORDS, draw, chosen), each if kind == "divide" else rest


def _operator_problem(draw: random.Random) -> tuple[str, int]:
    """Two numbers under a made-up operation: the larger, the smaller, or the sum of both."""
    left, right = draw.sample(range(2, 50), 2)
    word, result = draw.choice((("flim", max(left, right)), ("grop", min(left, right)), ("snad", left + right)))
    frame = draw.choice(("What is {0} {1} {2}?", "Work out {0} {1} {2}.", "{0} {1} {2} makes how much?"))
    return frame.format(left, word, right), result


GRAMMARS = (
    number_task("shop_change", _shop_problem),
    number_task("marble_counts", _marble_problem, instruction="Give the number alone."),
    number_task("fair_sharing", _sharing_problem),
    number_task("invented_operations", _operator_problem),
)
