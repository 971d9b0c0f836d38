"""Held-out questions: details of an announced event, and which object serves a purpose, chosen among three."""

import random

from manyicl.tasks.builtin.grammar import TaskGrammar, capitalise, expand, labelled, listed
from manyicl.tasks.task import Example

_EVENT_WORDS = labelled("""
event: lantern walk | flea market | puppet show | pottery class | wine tasting | bell concert | seed swap | tango night
event: ghost tour | kite contest
venue: Orchard Hall | the forge | Room 9 | the boathouse | Pier 3 | the rose garden | St Anne's | the tram shed
date: 3 May | 14 June | 21 July | 8 August | 30 September | 17 November
hour: 10:30 | 14:00 | 16:45 | 18:15 | 19:30 | 20:00
fee: 4 euros | 7 euros | 12 euros | 15 euros | 22 euros
host: Mira Novak | Nestor Gil | Olive Hart | Pablo Sanz | Kira Blom | Leon Adler
item: a cushion | warm socks | a mug | an apron | a torch | good shoes
""")
_EVENT_PASSAGES = listed("""
{host} invites all to the {event} at {venue} on {date}, {hour}. It costs {fee}. Bring {item}.
on {date} there will be a {event}. Meet {host} at {venue} by {hour} with {item} and {fee}.
{venue} will host a {event} on {date}. Led by {host}, it begins at {hour}; pay {fee} at the door. You need {item}.
do not forget {item} when you join the {event} of {host} on {date}! {hour}, {venue}, {fee}.
the {event} of {host} has been moved to {date}. It is still at {venue} and still {fee}; pack {item} and come by {hour}.
""")
_EVENT_QUESTIONS = (
    ("What kind of event is announced?", "{event}"),
    ("In which place is it held?", "{venue}"),
    ("On which date?", "{date}"),
    ("At what hour does it begin?", "{hour}"),
    ("How much must one pay?", "{fee}"),
    ("Who is in charge?", "{host}"),
    ("What are guests told to bring?", "{item}"),
)


def _write_event(draw: random.Random, label: str) -> Example:
    chosen: dict[str, str] = {}
    passage = capitalise(expand(draw.choice(_EVENT_PASSAGES), _EVENT_WORDS, draw, chosen))
    question, answer = draw.choice(_EVENT_QUESTIONS)
    return Example(f"{passage} {question}", expand(answer, _EVENT_WORDS, draw, chosen), group=passage)


_PURPOSES = listed("""
cut wood = saw | drive in a nail = hammer | boil water = kettle | style wet curls = hairdryer | unlock a door = key
measure a fever = thermometer | keep off the rain = umbrella | write on a blackboard = chalk | sweep the floor = broom
tell the time at night = alarm clock | see far-off ships = telescope | look at germs = microscope | press a shirt = flat iron
blow up a tyre = bicycle pump | climb onto a roof = ladder | carry water from a well = bucket | dig a hole = shovel
light a candle = match | get at canned beans = tin opener | cut a loaf = bread knife | glue paper = paste | tie a parcel = string
find north = compass | weigh flour = kitchen scales | whisk cream = egg beater | catch a butterfly = net
row across a lake = oars | slide down a snowy hill = toboggan | sleep in the woods = tent | send a letter = postage stamp
get rid of plaque = toothbrush | add large sums = calculator | hang up a picture = hook
draw a circle = pair of compasses | draw a straight line = ruler | rub out pencil marks = eraser | hold papers together = stapler
stir a stew = ladle | flip a pancake = spatula | drain noodles = sieve | grate cheese = grater | bake a loaf = oven
keep milk cold = fridge | clean dirty shirts = washing machine | trim a lawn = mower
give flowers a drink = watering can | split logs = axe | tighten a bolt = spanner | make holes in a wall = power drill
see what is behind your car = rear mirror | stop a bleeding finger = plaster | hear a heartbeat = stethoscope
take a family picture = camera | call a friend abroad = telephone | fasten a coat = zip | make boots shine = shoe brush
carry a baby on a walk = pram | stay afloat at sea = life jacket | protect your head on a bike = helmet
warm a cold bed = hot water bottle | cool yourself in the heat = fan | frighten birds = scarecrow
cross a river on foot = bridge | learn what a word means = dictionary | know today's date = calendar | pay in a shop = coins
""")
_PURPOSE_QUESTIONS = listed("""
you want to {0}. Take the {1}? | what helps to {0}, the {1}? | if someone has to {0}, which is best: {1}?
to {0} one needs something. Is it the {1}? | {1}: which of them is made to {0}?
""")


def _write_purpose(draw: random.Random, label: str) -> Example:
    pairs = [pair.split(" = ") for pair in draw.sample(_PURPOSES, 3)]
    options = [thing for _, thing in pairs]
    draw.shuffle(options)
    purpose, answer = pairs[0]
    question = draw.choice(_PURPOSE_QUESTIONS).format(purpose, ", ".join(options[:-1]) + " or " + options[-1])
    return Example(capitalise(expand(question, {}, draw)), answer, options=tuple(options), group=purpose)


GRAMMARS = (
    TaskGrammar(name="event_details", family="qa", metric="token_f1", write=_write_event),
    TaskGrammar(name="purpose_choice", family="qa", metric="accuracy", write=_write_purpose),
)
