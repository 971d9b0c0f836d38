"""Meta-training tasks with 30 labels and more: what a voice assistant is asked for, which trade a person follows."""

import random
from dataclasses import replace

from manyicl.tasks.builtin.grammar import TaskGrammar, expand, labelled, listed, sentence_task
from manyicl.tasks.task import Example

_ASSISTANT_WORDS = labelled("""
time: half past six | seven | quarter to nine | noon | four | eight | ten past five
day: today | tomorrow | on monday | on friday | this weekend | next week
guests: two | three | four | five | six | eight
minutes: three | five | twelve | twenty | forty | ninety
room: bedroom | kitchen | hall | nursery | study | bathroom
city: oslo | madrid | cairo | delhi | lima | boston
person: mum | dad | carla | my boss | uncle joe | the plumber
genre: jazz | salsa | piano music | hip hop | country songs | opera
food: rice | yoghurt | flour | carrots | tea bags | cheese
dish: pancakes | goulash | lentil soup | banana bread | risotto | dumplings
language: french | japanese | turkish | polish | arabic | greek
word: journey | castle | lantern | gratitude | shadow | puzzle
number: 17 | 23 | 45 | 68 | 112 | 250
unit: miles | pounds | feet | gallons | inches | ounces
film: a western | a cartoon | a spy film | a musical | a nature film | a comedy
event: the staff meeting | yoga class | the dentist | choir practice | the parents' evening | lunch with carla
team: the tigers | the red caps | united | the rovers | the giants | the sharks
coins: yen | francs | pesos | rupees | kroner | zloty
end: please | thanks | right now | if you can | for me | when you have a moment
""")
_ASSISTANT = labelled("""
set alarm: wake me up at {time} {day} | i must be out of bed by {time} | ring the morning bell at {time}
start timer: count down {minutes} minutes | start counting {minutes} minutes for the {dish} | beep after {minutes} minutes
check weather: will it rain in {city} {day} | how warm does it get in {city} | do i need a coat in {city} {day}
play music: put on some {genre} | i feel like hearing {genre} | let us listen to {genre} in the {room}
lights off: make it dark in the {room} | switch off every lamp in the {room} | put out the lamp in the {room}
lights on: it is too dark in the {room} | brighten up the {room} | i cannot see a thing in the {room}
heating up: i am freezing in the {room} | make the {room} warmer | it is chilly in the {room}
heating down: it is far too hot in the {room} | cool the {room} by two degrees | i am sweating in the {room}
make call: ring {person} | get {person} on the line | dial the number of {person}
send message: text {person} that i am late | write to {person} that i miss the bus | tell {person} i am on my way
read messages: did {person} write to me | what is new in my inbox from {person} | read what {person} sent me
add groceries: put {food} on the shopping list | we are out of {food} | note that we have to buy {food}
find recipe: how do i make {dish} | what can i cook with {food} | give me the steps for {dish}
reserve table: get us {guests} seats at the pizza place {day} | book dinner for two at {time} {day}
order taxi: i need a cab at {time} | send a driver to take me to {event} | get me a car to the airport {day}
find route: what is the fastest way to {city} | how do i get to {event} on foot | guide me to {city} by bike
check traffic: are there jams on the road to {city} | how busy is the motorway to {city} | is the road to {city} clear {day}
translate phrase: how do you say {word} in {language} | put good night into {language} | what is {word} in {language}
spell word: what are the letters of {word} | how is {word} written | is there a double letter in {word}
define word: what does {word} mean | explain the word {word} | look up {word} in the dictionary
do sums: how much is {number} times {number2} | add {number} and {number2} | take {number} away from {number2}
convert units: how many {unit} is {number} metres | turn {number} {unit} into metric | what is {number} {unit2} in {unit}
tell joke: make me laugh about {food} | say something funny about {person} | do you know any jokes about {city}
tell story: read my son a tale about a {word} | once upon a time in {city} and go on | i want a bedtime story about {food}
read news: what happened in {city} {day} | give me the headlines from {city} | anything in the papers about {city}
sports result: did {team} win | what was the score of {team} against {team2} | who won when {team} met {team2}
show calendar: what have i planned {day} | am i free {day} at {time} | when is {event}
add appointment: put {event} down for {day} at {time} | enter {event} {day} | schedule {event} at {time}
set reminder: do not let me forget to buy {food} {day} | remind me {day} to ring {person}
find phone: i lost my mobile in the {room} | make my handset beep, it is in the {room} | is my mobile in the {room} or the {room2}
volume up: louder, i cannot hear the {genre} | turn the {genre} up | raise the sound in the {room}
volume down: the {genre} is too loud | quieter, {person} is asleep | lower the sound in the {room}
skip song: not this one, next {genre} track | i hate this tune, go on to other {genre} | jump over this {genre} track
play film: show me {film} | let us watch {film} in the {room} | start {film} on the big screen
exchange rate: how many {coins} do i get for {number} euros | what are {number} {coins} worth | are {coins} cheap {day}
track parcel: where is the box from {person} | has the courier left {city} with my order | when will the box from {city} come
""")


def _write_request(draw: random.Random, label: str) -> Example:
    """What is said to the assistant: lower case, without marks at the end, now and then a polite ending."""
    request = expand(draw.choice(_ASSISTANT[label]), _ASSISTANT_WORDS, draw)
    return Example(f"{request} {draw.choice(_ASSISTANT_WORDS['end'])}" if draw.random() < 0.4 else request, label)


_TRADE_ACTS = labelled("""
baker: kneads dough | pulls loaves from a hot oven | dusts the bench with flour | sells rolls before dawn
barber: trims beards | sweeps up cut hair | sharpens a razor | asks how short it should be at the back
beekeeper: lifts frames out of hives | calms a swarm with smoke | fills jars with honey | wears a veil
butcher: cuts chops | hangs hams on hooks | stuffs sausages | sharpens a cleaver
carpenter: planes boards | joins beams | hammers nails into planks | hangs new doors
dentist: fills cavities | pulls a molar | tells patients to open wide | polishes teeth
doctor: listens to lungs | writes prescriptions | asks where it hurts | looks at sore throats
electrician: pulls cables through walls | replaces fuses | wires sockets | measures the voltage
farmer: ploughs fields | brings in the hay | drives the cows to the barn | repairs a tractor
firefighter: climbs a long ladder | unrolls hoses | carries people out of the smoke | slides down a pole
florist: ties bouquets | binds wreaths | cuts the stems of lilies | keeps roses in buckets
gardener: prunes hedges | mows lawns | rakes leaves | plants borders for other people
glazier: cuts panes | fits new windows | presses putty into frames | picks up splinters
hotel porter: carries suitcases | shows guests to the lift | calls cabs for guests | holds the door of the lobby
jeweller: sets diamonds | weighs gold | resizes rings | threads pearls
judge: hears both sides | reads the verdict | calls for order in the court | passes sentence
librarian: shelves novels | stamps due dates | tells readers to whisper | looks up titles in a catalogue
lifeguard: watches the swimmers | blows a whistle by the pool | pulls people from the waves | hoists the red flag
locksmith: copies keys | opens doors without breaking them | fits bolts | files a key blank
mason: lays bricks | mixes mortar | checks a wall with a level | chisels blocks of granite
mechanic: changes the oil | looks under the bonnet | fits new brakes | swaps worn tyres
optician: tests eyes | fits lenses | adjusts frames on noses | asks people to read the smallest letters
photographer: waits for the right light | asks everyone to smile | changes lenses | edits portraits
pilot: checks the runway | speaks to the tower | lands in heavy fog | announces turbulence
plumber: unblocks drains | mends taps | solders pipes | stops leaks under sinks
postman: sorts letters | rings doorbells with parcels | fills letter boxes | walks the same streets with a heavy bag
referee: shows a yellow card | blows for a foul | tosses a coin before the match | stops play for offside
shepherd: counts lambs | shears the flock | whistles for the dog | moves the sheep uphill
tailor: takes waist measurements | lets out trousers | pins hems | sews suits to measure
teacher: marks homework | writes on the board | hands out worksheets | explains fractions to children
vet: vaccinates puppies | bandages paws | weighs a nervous cat | checks a horse's hoof
waiter: takes orders | balances plates | pours wine for table four | brings the bill
watchmaker: opens tiny cases with tweezers | oils small cogs | replaces springs | makes old clocks tick again
zookeeper: feeds the seals | cleans out cages | weighs the baby elephant | locks the lions in at night
""")
_TRADE_FRAMES = listed("""
{name} {act} and {act2}. | every morning {name} {act} or {act2}. | on a busy day {name} {act}, {act2} and {act3}.
{name} often {act} and then {act2}. | while a colleague {act}, {name} {act2}.
{name} {act} all week, but on Fridays {name} mostly {act2}.
""")


def _trades() -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """Templates by trade, and their word lists: the acts of each trade are a list of its own."""
    sentences: dict[str, tuple[str, ...]] = {}
    words = {"name": listed("Ines | Karl | Zoe | Igor | Amina | Luca | Marta | Sven | Tara | Yusuf")}
    for trade, acts in _TRADE_ACTS.items():
        slot = trade.replace(" ", "_")
        words[slot] = acts
        sentences[trade] = tuple(frame.replace("{act", "{" + slot) for frame in _TRADE_FRAMES)
    return sentences, words


_ASSISTANT_TASK = TaskGrammar(
    name="assistant_intent",
    family="classification",
    metric="accuracy",
    write=_write_request,
    labels=tuple(_ASSISTANT),
    num_train=360,
    num_test=72,
)
_TRADE_TASK = replace(sentence_task("trade", *_trades(), instruction="Name the trade."), num_train=340, num_test=68)

GRAMMARS = (_ASSISTANT_TASK, _TRADE_TASK)
