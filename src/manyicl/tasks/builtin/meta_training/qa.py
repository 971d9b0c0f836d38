"""Meta-training questions: objects that are moved about, facts of the world, and two kinds of multiple choice."""

import random

from manyicl.tasks.builtin.grammar import TaskGrammar, capitalise, expand, labelled, listed
from manyicl.tasks.task import Example

_TRACKING_WORDS = labelled("""
who: Ada | Bruno | Carmen | Dmitri | Elsa | Farid | Greta | Hassan | Ivy | Jonas
thing: passport | torch | necklace | flute | wallet | notebook | compass | teddy bear | camera | hammer
where: drawer | suitcase | cupboard | basket | shed | cellar | attic | wardrobe | bathtub | garage
then: later | in the evening | an hour later | after lunch | the next morning
""")
_TRACKING_PASSAGES = listed("""
{who} left the {thing} in the {where} and the {thing2} in the {where2}. {then} {who2} took the {thing} to the {where3}.
the {thing} was in the {where}, the {thing2} in the {where2}. {then} {who2} moved the {thing} to the {where3} for {who}.
{who} hid the {thing2} in the {where2}. The {thing} lay in the {where} until {who2} put it into the {where3} {then}.
{who2} carried the {thing} from the {where} to the {where3}, while {who} kept the {thing2} in the {where2}.
{who} still looks for the {thing} in the {where}, but {who2} put it in the {where3}. The {where2} holds the {thing2}.
""")
_TRACKING_QUESTIONS = (
    ("Where is the {thing} now?", "{where3}"),
    ("Where was the {thing} at first?", "{where}"),
    ("Where can the {thing2} be found?", "{where2}"),
    ("Who moved the {thing}?", "{who2}"),
    ("What is in the {where2}?", "{thing2}"),
    ("What did {who2} move?", "{thing}"),
)


def _write_tracking(draw: random.Random, label: str) -> Example:
    chosen: dict[str, str] = {}
    passage = capitalise(expand(draw.choice(_TRACKING_PASSAGES), _TRACKING_WORDS, draw, chosen))
    question, answer = draw.choice(_TRACKING_QUESTIONS)
    asked = expand(question, _TRACKING_WORDS, draw, chosen)
    return Example(f"{passage}\n{asked}", expand(answer, _TRACKING_WORDS, draw, chosen), group=passage)


_FACTS = labelled("""
capital: France = Paris | Italy = Rome | Spain = Madrid | Portugal = Lisbon | Germany = Berlin | Austria = Vienna
capital: Poland = Warsaw | Hungary = Budapest | Greece = Athens | Norway = Oslo | Sweden = Stockholm | Finland = Helsinki
capital: Denmark = Copenhagen | Ireland = Dublin | Belgium = Brussels | Romania = Bucharest | Bulgaria = Sofia
capital: Russia = Moscow | Ukraine = Kyiv | Turkey = Ankara | Egypt = Cairo | Kenya = Nairobi | Ghana = Accra
capital: Nigeria = Abuja | Ethiopia = Addis Ababa | Morocco = Rabat | Tunisia = Tunis | Senegal = Dakar | Libya = Tripoli
capital: Iran = Tehran | Iraq = Baghdad | Syria = Damascus | Lebanon = Beirut | Jordan = Amman | Qatar = Doha
capital: India = New Delhi | Pakistan = Islamabad | Nepal = Kathmandu | Bangladesh = Dhaka | China = Beijing | Japan = Tokyo
capital: Mongolia = Ulaanbaatar | Vietnam = Hanoi | Thailand = Bangkok | Cambodia = Phnom Penh | Malaysia = Kuala Lumpur
capital: Australia = Canberra | New Zealand = Wellington | Fiji = Suva | Canada = Ottawa | Mexico = Mexico City
capital: Cuba = Havana | Jamaica = Kingston | Peru = Lima | Chile = Santiago | Argentina = Buenos Aires | Uruguay = Montevideo
capital: Brazil = Brasilia | Colombia = Bogota | Venezuela = Caracas | Ecuador = Quito | Paraguay = Asuncion
capital: Iceland = Reykjavik | Estonia = Tallinn | Latvia = Riga | Lithuania = Vilnius | Serbia = Belgrade | Croatia = Zagreb
symbol: hydrogen = H | helium = He | lithium = Li | carbon = C | nitrogen = N | oxygen = O | fluorine = F | neon = Ne
symbol: sodium = Na | magnesium = Mg | aluminium = Al | silicon = Si | phosphorus = P | sulphur = S | chlorine = Cl
symbol: argon = Ar | potassium = K | calcium = Ca | titanium = Ti | chromium = Cr | manganese = Mn | iron = Fe
symbol: cobalt = Co | nickel = Ni | copper = Cu | zinc = Zn | arsenic = As | bromine = Br | krypton = Kr | silver = Ag
symbol: tin = Sn | iodine = I | barium = Ba | tungsten = W | platinum = Pt | gold = Au | mercury = Hg | lead = Pb
symbol: radium = Ra | uranium = U | plutonium = Pu
young: dog = puppy | cat = kitten | cow = calf | horse = foal | sheep = lamb | goat = kid | pig = piglet | hen = chick
young: duck = duckling | goose = gosling | swan = cygnet | lion = cub | deer = fawn | kangaroo = joey | frog = tadpole
young: owl = owlet | hare = leveret | butterfly = caterpillar | eel = elver
coin: Japan = yen | Russia = rouble | India = rupee | China = yuan | Mexico = peso | Poland = zloty | Britain = pound
coin: Switzerland = franc | South Africa = rand | Brazil = real | Thailand = baht | Israel = shekel | Turkey = lira
coin: Vietnam = dong | Sweden = krona | South Korea = won | Hungary = forint | Czech Republic = koruna
many: mouse = mice | child = children | ox = oxen | tooth = teeth | foot = feet | wolf = wolves | knife = knives
many: leaf = leaves | woman = women | cactus = cacti | thief = thieves | loaf = loaves | person = people
""")
_FACT_QUESTIONS = labelled("""
capital: What is the capital of {0}? | Which city is the seat of government of {0}? | {0} has which capital?
capital: The capital of {0} is called what? | Name the capital city of {0}. | Capital of {0}?
symbol: What is the chemical symbol of {0}? | How do chemists abbreviate {0}? | Which letters stand for the element {0}?
symbol: Give the symbol of {0}. | {0} is written how in a formula? | Symbol for {0}?
young: What is a young {0} called? | Give the name of a baby {0}. | A {0} is grown up; what was it first?
young: Word for the young of the {0}? | The child of a {0} is a what? | Name the little one of a {0}.
coin: What is the currency of {0}? | With which money do people pay in {0}? | Which currency is used in {0}?
coin: Name the money of {0}. | Shops in {0} take which currency? | Currency of {0}?
many: What is the plural of {0}? | One {0}, two what? | How do you write more than one {0}?
many: Give the plural form of {0}. | There is one {0}; now there are many. Many what? | Plural of {0}?
""")


def _write_fact(draw: random.Random, label: str) -> Example:
    topic = draw.choices(tuple(_FACTS), weights=[len(facts) for facts in _FACTS.values()])[0]
    thing, answer = draw.choice(_FACTS[topic]).split(" = ")
    question = expand(draw.choice(_FACT_QUESTIONS[topic]).format(thing), {}, draw)
    return Example(capitalise(question), answer, group=f"{topic} {thing}")


_KINDS = labelled("""
fruit: apple | banana | strawberry | lemon | grape | pear | apricot | fig
vegetable: carrot | cabbage | leek | turnip | broccoli | celery | spinach | beetroot
musical instrument: violin | drum | piano | flute | guitar | trombone | banjo | harp
piece of clothing: shirt | sock | skirt | glove | jumper | scarf | cap | vest
piece of furniture: sofa | table | stool | shelf | bed | desk | bench | wardrobe
vehicle: tram | lorry | bicycle | scooter | bus | van | train | taxi
part of the body: elbow | knee | chin | wrist | ankle | shoulder | thumb | hip
colour: crimson | turquoise | beige | purple | yellow | grey | scarlet | pink
game: chess | poker | tag | dominoes | bingo | draughts | marbles | rummy
kind of weather: fog | hail | drizzle | thunder | frost | sleet | breeze | snow
planet: Mars | Venus | Saturn | Jupiter | Neptune | Uranus | Earth
language: Welsh | Hindi | Swahili | Finnish | Basque | Korean | Danish | Persian
metal: iron | copper | zinc | nickel | tin | silver | lead | steel
dance: tango | polka | waltz | rumba | samba | flamenco | foxtrot | mazurka
drink: lemonade | cocoa | coffee | cider | milk | tea | juice | ale
""")
_KIND_QUESTIONS = listed("""
Which of these is a {0}: {1}? | Pick the {0}: {1}. | Only one of {1} is a {0}. Which?
{1} - which word names a {0}? | Find a {0} among {1}.
""")


def _write_kind(draw: random.Random, label: str) -> Example:
    kinds = draw.sample(tuple(_KINDS), 4)
    answer = draw.choice(_KINDS[kinds[0]])
    options = [answer, *(draw.choice(_KINDS[kind]) for kind in kinds[1:])]
    draw.shuffle(options)
    question = draw.choice(_KIND_QUESTIONS).format(kinds[0], ", ".join(options[:-1]) + " or " + options[-1])
    return Example(capitalise(question), answer, options=tuple(options))


_OPPOSITES = listed("""
hot cold | big little | fast slow | early late | rich poor | happy unhappy | strong weak | light dark | loud quiet
full empty | hard soft | high low | wide narrow | thick thin | old young | clean dirty | dry wet | open shut | sharp blunt
brave cowardly | cheap expensive | deep shallow | smooth rough | sweet bitter | tight loose | true false | polite rude
lazy busy | safe dangerous | generous stingy | public private | guilty innocent | native foreign
awake asleep | alive dead | straight crooked | fresh stale | rare common | proud humble
arrive depart | push pull | buy sell | laugh cry | build destroy | remember forget | win lose | accept refuse
increase decrease | love hate | start finish | give take | lend borrow | float sink | freeze melt
friend enemy | north south | victory defeat | question answer | entrance exit
""")
_OPPOSITE_QUESTIONS = listed("""
The opposite of {0}: {1}? | Which word means the contrary of {0}: {1}? | Not {0} at all, but {1}?
{0} is to its opposite as day is to night. Is it {1}? | Choose the antonym of {0}: {1}.
""")


def _write_opposite(draw: random.Random, label: str) -> Example:
    pair, *others = draw.sample(_OPPOSITES, 3)
    word, answer = draw.sample(pair.split(), 2)
    options = [answer, *(draw.choice(other.split()) for other in others)]
    draw.shuffle(options)
    question = draw.choice(_OPPOSITE_QUESTIONS).format(word, ", ".join(options[:-1]) + " or " + options[-1])
    return Example(capitalise(question), answer, options=tuple(options), group=pair)


GRAMMARS = (
    TaskGrammar(name="moved_objects", family="qa", metric="exact_match", write=_write_tracking),
    TaskGrammar(
        name="world_facts",
        family="qa",
        metric="exact_match",
        write=_write_fact,
        num_test=60,
        instruction="Answer in as few words as you can.",
    ),
    TaskGrammar(name="kind_choice", family="qa", metric="accuracy", write=_write_kind),
    TaskGrammar(name="opposite_choice", family="qa", metric="accuracy", write=_write_opposite),
)
