"""Meta-training tasks with small label sets: opinions, topics, feelings, forms. Five of them only demonstrations define."""

from manyicl.tasks.builtin.grammar import labelled, sentence_task

_CAFE_WORDS = labelled("""
dish: soup | salad | roast chicken | mushroom pie | lasagne | fish stew | omelette | chocolate cake | apple tart | curry
dish: noodle bowl | bean burger
tasty: full of flavour | cooked just right | worth every penny | better than my mother's | a real treat | simply delicious
awful: cold when it came | far too salty | without any taste | impossible to finish | worse than canteen food | half raw
kind: kind and quick | happy to explain the menu | patient with our children | cheerful all evening
rude: rude from the start | nowhere to be seen | annoyed by every question | in a hurry to get rid of us
cafe: Blue Door | Corner Kitchen | Old Mill | Green Spoon | Harbour Room | Little Oven
when: last night | on Sunday | for my birthday | after the concert | at lunch today
praise: we will be back next week | I have told all my friends | it was a perfect evening | I left with a big smile
regret: we will never go back | I want my money back | it ruined our evening | I left hungry and cross
""")
_CAFE = labelled("""
positive: the {dish} was {tasty}, and the waiter was {kind}.
positive: {when} I had the {dish} at the {cafe}, and it was {tasty}.
positive: {praise}. The {dish} at the {cafe} was {tasty}.
positive: the waiter at the {cafe} was {kind}, and {praise}.
positive: the first {dish} was {awful}, but they replaced it at once, and {praise}.
negative: the {dish} was {awful}, and the waiter was {rude}.
negative: {when} I had the {dish} at the {cafe}, and it was {awful}.
negative: {regret}. The {dish} at the {cafe} was {awful}.
negative: the waiter at the {cafe} was {rude}, and {regret}.
negative: the {dish} was {tasty}, but the waiter was {rude}, and {regret}.
""")

_GADGET_WORDS = labelled("""
gadget: headphones | speakers | bathroom scales | hair clippers | earphones | fairy lights | walkie-talkies | smart glasses
merit: work straight out of the box | survived a fall down the stairs | still feel new after {months} months
merit: do all that the box promises | run for days on one charge | are easy to clean
fault: broke after {months} weeks | stopped working on the second day | rattle and smell of burnt plastic
fault: arrived with a cracked case | went dead in the middle of {errand} | hurt my hands after {months} minutes
months: two | three | four | five | six | eight
errand: a long trip | my holiday | a family party | the school play
thanks: Five stars from me | Money well spent | I bought a second set for {relative} | {relative} wants the same ones now
anger: One star is too much | Save your money | I sent the parcel back | {relative} laughed at me for buying them
relative: my sister | my uncle | my neighbour | my boss | Grandma
""")
_GADGET = labelled("""
liked: these {gadget} {merit}. {thanks}.
liked: {thanks}! My {gadget} {merit}.
liked: I use the {gadget} every day, and they {merit}.
liked: I doubted it at first, yet the {gadget} {merit}.
disliked: these {gadget} {fault}. {anger}.
disliked: {anger}! My {gadget} {fault}.
disliked: I used the {gadget} with care, and they {fault}.
disliked: I hoped for the best, yet the {gadget} {fault}.
""")

_HOBBY_WORDS = labelled("""
who: Ada | Bruno | my cousin | our teacher | Greta | the new neighbour | Hassan | my old friend
time: on Saturday | before breakfast | all afternoon | in the evening | as a surprise | for the first time
fry: onions | pancakes | thin slices of ham | peppers | dumplings
sauce: a pepper sauce | gravy | a lemon dressing | vanilla cream
plant: tulips | tomato seedlings | a rose bush | lettuce | sunflowers | an apple tree
score: a late goal | two penalties | a header | the winning goal
piece: a slow waltz | an old folk song | a short sonata | a march | a lullaby
instrument: cello | clarinet | accordion | trumpet | harp
garment: a silk blouse | a pair of trousers | a doll's dress | a warm coat | a velvet skirt
catch: a heavy carp | three small perch | an old boot | a silver eel | a young pike
water: the canal | the reservoir | the river bend | the pier
""")
_HOBBY = labelled("""
cooking: {who} fried {fry} in butter {time}. | {time} {who} stirred {sauce} until it was thick.
cooking: {who} chopped garlic and tasted {sauce}. | {who} forgot the {fry} in the pan {time}.
gardening: {who} planted {plant} by the fence {time}. | {time} {who} watered {plant} and pulled weeds.
gardening: {who} dug a bed and raked it smooth for {plant}. | {who} cut back {plant} with the shears {time}.
football: {who} scored {score} {time}. | {time} the whole team hugged {who} after {score}.
football: {who} saw the red card just after {score}. | the keeper could not stop {who}, who scored {score} {time}.
music: {who} played {piece} on the {instrument} {time}. | {time} {who} practised scales on the {instrument}.
music: {who} tuned the {instrument} and tried {piece}. | {who} hummed {piece} while tuning the {instrument}.
sewing: {who} stitched {garment} {time}. | {time} {who} cut a pattern for {garment}.
sewing: {who} threaded the needle to hem {garment}. | {who} sewed two buttons on {garment} {time}.
fishing: {who} hooked {catch} at {water} {time}. | {time} {who} cast a line from {water}.
fishing: {who} sat still with a rod at {water} and got {catch}. | {who} put a worm on the hook at {water} {time}.
""")

_HELPDESK_WORDS = labelled("""
hello: Hello, | Hi there, | Good morning, | Dear team, | Dear all, | Good evening,
amount: 12 euros | 40 euros | 75 euros | 18 pounds | 60 dollars
item: lamp | backpack | keyboard | kettle | jacket | bicycle pump | desk chair | blender
days: two days | a week | ten days | three weeks
town: Lyon | Bergen | Porto | Graz | Leeds | Turku
shop: your shop in {town} | the branch in {town} | the office in {town}
""")
_HELPDESK = labelled("""
billing: {hello} you charged me {amount} twice for one {item}. | {hello} the invoice for the {item} shows {amount} too much.
billing: {hello} why was {amount} taken from my card this month?
delivery: {hello} my {item} should have arrived {days} ago. | {hello} the driver left the {item} at a house in {town}.
delivery: {hello} can the van bring the {item} to {town} instead?
login: {hello} I forgot my password {days} ago and the link does not come. | {hello} the site in {town} rejects my user name.
login: {hello} I am locked out since I ordered the {item}; how do I sign in?
repair: {hello} the {item} makes a strange noise after {days}. | {hello} a part of my {item} snapped; who can mend it?
repair: {hello} can someone fix a broken {item} in {town}?
returns: {hello} I want to send the {item} back after {days}. | {hello} how do I exchange this {item} for a bigger one?
returns: {hello} the {item} is not my taste; where do I hand it in at {town}?
jobs: {hello} are you hiring at {shop}? | {hello} I would like to apply for work as a seller at {shop}.
jobs: {hello} where do I send my references for the post in {town}? | {hello} do you take trainees at {shop}?
hours: {hello} when does {shop} close on Fridays? | {hello} is {shop} open on public holidays?
hours: {hello} how late can I come to {shop} tonight? | {hello} at what time do you open in {town}?
praise: {hello} your helper at {shop} was wonderful. | {hello} thank you, the {item} made my whole family happy.
praise: {hello} I just want to say that the {item} is superb. | {hello} well done, I was served so kindly in {town}.
""")

_ANIMAL_WORDS = labelled("""
mammal: otter | badger | camel | hedgehog | squirrel | dolphin | reindeer | mole | leopard | donkey | bat | walrus
bird: heron | magpie | ostrich | puffin | sparrow | owl | pelican | woodpecker | goose | falcon | penguin | robin
fish: trout | carp | herring | seahorse | salmon | tuna | eel | cod | piranha | stingray | shark | perch
insect: wasp | ladybird | cricket | moth | termite | dragonfly | beetle | mosquito | bumblebee | mantis | earwig | ant
reptile: gecko | cobra | tortoise | crocodile | iguana | viper | chameleon | python | turtle | alligator | adder | skink
spot: near the camp | behind the research station | by the old bridge | in the nature park | close to the shore
keeper: the ranger | a tourist | our guide | the photographer | a schoolgirl | the vet
""")
_ANIMAL = {
    kind: tuple(
        template.replace("KIND", kind)
        for template in (
            "{keeper} watched a {KIND} {spot}.",
            "A young {KIND} was found {spot} and set free by {keeper}.",
            "{keeper} wrote a whole page about the {KIND}.",
            "Nobody had seen a {KIND} {spot} before.",
            "{keeper} pointed at the {KIND} and whispered.",
            "The drawing by {keeper} shows a {KIND} {spot}.",
            "According to {keeper}, a sick {KIND} needs rest and quiet.",
            "A {KIND} crossed our way {spot}.",
            "Have you ever come across a {KIND} {spot}?",
            "{keeper} dreamed of a {KIND} as tall as a house.",
            "There was a photo of a {KIND} in the paper, taken {spot}.",
        )
    )
    for kind in ("mammal", "bird", "fish", "insect", "reptile")
}

_EMOTION_WORDS = labelled("""
who: Carmen | Dmitri | my brother | our neighbour | Elsa | Farid | the old baker | my aunt | Ivy | the student
luck: winning the race | hearing of the baby's birth | getting the place in the choir | passing the driving test
luck: seeing the first snow | finding the lost kitten | reading the letter from home
nuisance: someone had scratched the new car | the boss took all the credit | the train was cancelled again
nuisance: the neighbours had cut down the hedge | nobody had washed the dishes | the parcel had been opened
threat: the floor creaked at midnight | a big dog ran up the path | the plane began to shake | the lights went out in the cellar
threat: something moved under the bed | the ice cracked | a stranger followed close behind
loss: the funeral | saying goodbye at the station | the death of the old dog | reading the last letter
loss: selling the family house | the friend moved away
twist: the shy girl could sing like that | the quiet tenant was a prince | the old judge could juggle
twist: the tiny box held a piano | the two strangers were twins | the cat could open doors
blunder: calling the teacher Mum | spilling wine on the bride | forgetting the speech on stage | waving at a stranger
blunder: being caught in a lie | tripping in front of everyone
""")
_EMOTION = labelled("""
joy: {who} danced around the kitchen after {luck}. | {who} could not stop smiling after {luck}.
joy: {luck}, {who} laughed out loud and hugged everyone. | it was the best day for {who}: {luck} at last.
anger: {who} slammed the door because {nuisance}. | {nuisance}, and {who} shouted at everyone in the room.
anger: {who} kicked the bin when it turned out that {nuisance}.
fear: {who} froze when {threat}. | {threat}, and the hands of {who} began to tremble.
fear: {who} hid and dared not breathe when {threat}.
sadness: {who} wept quietly after {loss}. | {who} sat alone with wet eyes after {loss}.
sadness: after {loss}, {who} did not want to eat or talk.
surprise: {who} never expected that {twist}. | {who} stared with an open mouth: {twist}!
surprise: who would have guessed that {twist}? Not {who}.
shame: {who} blushed and looked at the floor after {blunder}. | {who} wished to sink into the ground after {blunder}.
shame: after {blunder}, {who} could not look anyone in the eye.
""")

_TENSE_WORDS = labelled("""
who: the painter | Jonas | our landlord | the mayor | Lena | my grandfather | the young nurse | Mateo | the coach | her uncle
deed: repair the roof | clean the windows | visit the castle | open the gate | walk to the station | count the coins
deed: invite the neighbours | answer the letter | collect the tickets | wash the car | call the doctor | move the piano
place: at the corner | near the town hall | with a friend | without help | for the guests | in a hurry
""")


def _tense_sentences() -> dict[str, tuple[str, ...]]:
    """Templates by tense: each deed conjugated; all its verbs are regular."""
    forms: dict[str, list[str]] = {"past": [], "present": [], "future": []}
    for deed in _TENSE_WORDS["deed"]:
        verb, _, rest = deed.partition(" ")
        stem = verb.removesuffix("e")
        third = verb + ("es" if verb.endswith("sh") else "s")
        forms["past"] += [f"{{who}} {stem}ed {rest} {{place}}.", f"{{who}} had already {stem}ed {rest} {{place}}."]
        forms["present"] += [f"{{who}} {third} {rest} {{place}}.", f"{{who}} is {stem}ing {rest} {{place}}."]
        forms["future"] += [f"{{who}} will {deed} {{place}}.", f"{{who}} is going to {deed} {{place}}."]
    return {tense: tuple(templates) for tense, templates in forms.items()}


_MAIL_WORDS = labelled("""
prize: a free cruise | 5000 dollars | a brand new phone | a golden watch | a luxury car | a year of free petrol
shout: Congratulations! | Urgent! | Last chance! | Dear lucky winner! | Act now!
code: WIN | YES | CASH | GOLD | CLAIM
hours: 12 | 24 | 36 | 48
cure: miracle tea | slimming drops | magic patch | secret pill
pounds: 10 | 15 | 20 | 30
food: bread | milk | some eggs | cat food | a lemon | dog biscuits
when: at six | after work | tomorrow morning | on Thursday | around noon | tonight
friend: Kemal | Nadia | Otto | Priya | Mum | Dad
thing: umbrella | charger | blue folder | house key | gym bag | library card
""")
_MAIL = labelled("""
fine: can you bring {food} when you come over {when}? | {friend} says the meeting starts {when}, so do not be late.
fine: did I leave my {thing} at your place? I need it {when}. | running late, {friend} will let you in {when}.
fine: happy birthday, {friend}! See you {when}. | {friend} left the {thing} at school again, can you fetch it {when}?
fine: thanks for the {thing}, I will give it back {when}. | the dentist moved us to another slot, {friend} goes {when} instead.
fine: {friend} and I are making dinner {when}, do we need {food}?
junk: {shout} You have won {prize}. Reply {code} within {hours} hours to get it.
junk: your account will be closed in {hours} hours. Send your PIN and the word {code} to keep it.
junk: {shout} Lose {pounds} pounds in a week with our {cure}, or get {prize}.
junk: a rich widow wants to leave you {prize}. Write {code} to her lawyer today.
junk: {shout} Only {hours} places left to earn {prize} from your sofa. Text {code}.
""")

GRAMMARS = (
    sentence_task("cafe_sentiment", _CAFE, _CAFE_WORDS, instruction="Say whether the guest was pleased."),
    sentence_task("gadget_invented_words", _GADGET, _GADGET_WORDS, codes={"liked": "zorp", "disliked": "blick"}),
    sentence_task(
        "hobby_symbols",
        _HOBBY,
        _HOBBY_WORDS,
        codes={"cooking": "@", "gardening": "#", "football": "%", "music": "&", "sewing": "*", "fishing": "+"},
    ),
    sentence_task(
        "helpdesk_codes",
        _HELPDESK,
        _HELPDESK_WORDS,
        codes=dict(zip(_HELPDESK, ("K7", "M2", "P9", "T4", "R5", "W1", "D8", "F3"), strict=True)),
    ),
    sentence_task("animal_class", _ANIMAL, _ANIMAL_WORDS),
    sentence_task("emotion", _EMOTION, _EMOTION_WORDS, weights=(3, 2, 2, 2, 1, 1), instruction="Name the feeling of the person."),
    sentence_task("tense_symbols", _tense_sentences(), _TENSE_WORDS, codes={"past": "<", "present": "=", "future": ">"}),
    sentence_task("mail_filter", _MAIL, _MAIL_WORDS, weights=(7, 3)),
)
