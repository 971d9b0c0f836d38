"""Held-out tasks with small label sets; three of the four only demonstrations define."""

from manyicl.tasks.builtin.grammar import labelled, listed, sentence_task

_STAY_WORDS = labelled("""
lodging: guesthouse | mountain hut | motel | campsite | bed and breakfast | riverside hotel | hostel
part: mattress | shower | balcony | bed linen | breakfast room | carpet | minibar | wifi
fine: spotless | wonderfully comfortable | far better than in the photos | as good as new | a dream
poor: filthy | falling apart | nothing like in the photos | older than I am | a nightmare
host: receptionist | landlady | porter | night clerk
warm: greeted us like old friends | gave us a free upgrade | drove us to the station | lent us raincoats
cold: lost our booking | made us wait for an hour | charged us for towels | yelled at our toddler
nights: one night | two nights | a long weekend | ten days | a week
joy: can hardly wait to return | felt at home from the first minute | would book it again without a thought
woe: checked out a day early | could not sleep at all | would rather sleep in the car next time
""")
_STAY = labelled("""
good: the {part} was {fine} and the {host} {warm}. | after {nights} at this {lodging} we {joy}.
good: we stayed {nights}; the {host} {warm} and we {joy}. | what a {lodging}! The {part} was {fine}.
good: not cheap for a {lodging}, but the {part} was {fine}. | our {host} {warm} on arrival, so we {joy}.
bad: the {part} was {poor} and the {host} {cold}. | after {nights} at this {lodging} we {woe}.
bad: we stayed {nights}; the {host} {cold} and we {woe}. | what a {lodging}! The {part} was {poor}.
bad: cheap for a {lodging}, but the {part} was {poor}. | our {host} {cold} on arrival, so we {woe}.
""")

_MATERIAL_WORDS = labelled("""
wood: rowing oar | bookcase | toothpick | barn door | chopping board | rolling pin | walking stick | wine barrel | log
wood: picnic bench | baseball bat | crate | coffin | clog
metal: horseshoe | anvil | padlock | nail | frying pan | anchor | sword | bolt | rail | tin opener | coin | wrench
metal: chainsaw blade | church bell
glass: window pane | wine goblet | light bulb | test tube | crystal bowl | fishbowl | mirror | jam jar | magnifying lens
glass: car windscreen | hourglass | beaker
cloth: pillowcase | bath towel | flag | tablecloth | handkerchief | curtain | bandage | bathrobe | sail | cushion cover
cloth: tea towel | duvet
paper: newspaper | envelope | wall calendar | banknote | exercise book | postage stamp | receipt | theatre programme
paper: birthday card | comic strip | menu | diploma
stone: gravestone | millstone | kerb | pebble | flagstone | paving slab | marble statue | lintel | obelisk | gargoyle
stone: cobble | temple pillar
finder: Aisha | Boris | Celine | Darius | a collector | the inspector | two hikers | the heir
year: 1890 | 1912 | 1934 | 1951 | 1967 | 1985
""")
_MATERIAL_FRAMES = listed("""
{finder} found a MATERIAL from {year}. | there is only one MATERIAL in the whole catalogue, dated {year}.
what {finder} needed most was a MATERIAL. | {finder} sold a MATERIAL to a dealer in {year}.
in {year} a MATERIAL like this cost next to nothing. | a MATERIAL stood out among all the things {finder} owned.
{finder} took a MATERIAL for the exhibition. | in {year} the insurance paid for a MATERIAL.
please hand the MATERIAL back to {finder}. | the thief of {year} wanted nothing but a MATERIAL.""")
_MATERIAL = {
    kind: tuple(frame.replace("MATERIAL", f"{{{kind}}}") for frame in _MATERIAL_FRAMES)
    for kind in ("wood", "metal", "glass", "cloth", "paper", "stone")
}

_MUSEUM_WORDS = labelled("""
origin: Peru | Tibet | Malta | Samoa | Sicily | Java | Nubia | Lapland | Crete | Siam
age: very rare | priceless | beautifully made | slightly damaged | nearly intact | much admired | recently restored
giver: a widow from {origin2} | a missionary | a royal house | an anonymous donor | a collector in {origin2}
weapon: crossbow | dagger | musket | spear | halberd | rapier | battle axe | longbow
timepiece: sundial | pocket watch | cuckoo clock | pendulum | hourglass | grandfather clock | water clock | chronometer
garment: kimono | toga | corset | cloak | bonnet | gown | waistcoat | poncho
fossil: ammonite | dinosaur egg | mammoth tusk | petrified fern | trilobite | shark tooth in rock | amber bee | giant femur
instrument: lute | bagpipe | kettledrum | zither | fiddle | panpipe | hurdy-gurdy | gong
vessel: galleon model | kayak | gondola | outrigger | lifeboat | junk model | coracle | longship prow
toy: doll's house | rocking horse | spinning top | jack-in-the-box | puppet | kite | tin soldier | skipping rope
gem: sapphire | emerald pendant | opal ring | ruby | tiara | diamond brooch | coral bracelet | pearl earring
""")
_MUSEUM_FRAMES = listed("""
a {age} KIND from {origin} came in today. | a {age} KIND, given by {giver}. | this KIND is {age} and on show for the first time.
the label reads: KIND, {origin}. | two visitors from {origin} asked to see the KIND.
{giver} left us this {age} KIND. | please dust the {age} KIND before noon. | where does the KIND of {giver} belong?
""")
_MUSEUM_ROOMS = {
    "weapon": "green",
    "timepiece": "amber",
    "garment": "violet",
    "fossil": "white",
    "instrument": "black",
    "vessel": "brown",
    "toy": "silver",
    "gem": "blue",
}
_MUSEUM = {kind: tuple(frame.replace("KIND", f"{{{kind}}}") for frame in _MUSEUM_FRAMES) for kind in _MUSEUM_ROOMS}

_SEASON_WORDS = labelled("""
child: Edith | Felipe | Gita | Hugo | Ingrid | Jamal | the twins | my niece | little Kira | our youngest
spot: the yard | the meadow | the orchard | the lane | the schoolyard | the park next door
bloom: crocuses | cherry blossom | daffodils | the first violets | catkins
chick: lambs | ducklings | nestlings | tadpoles
heat: sunburn | ice lollies | the heatwave | mosquito bites | sticky heat | cold melon
fall: chestnuts | acorns | pumpkins | ripe walnuts | mushrooms
frost: icicles | a snowman | a sledge | snowballs | frozen puddles | thick mittens
""")
_SEASON = labelled("""
spring: {child} counted {bloom} in {spot}. | new {chick} hopped about in {spot}, and {child} cheered.
spring: {bloom} were out at last, so {child} packed the thick coats away. | {child} picked {bloom} just before Easter.
spring: as buds opened in {spot}, {child} looked for {chick}. | days grow longer and {bloom} fill {spot}.
summer: {child} remembers {heat} and bare feet in {spot}. | {heat} again: {child} slept with all windows open.
summer: {child} spent the long July holidays in {spot}. | even at ten at night {child} sat in {spot} and spoke of {heat}.
summer: in August there was no shade in {spot}, only {heat}. | {child} ran under the sprinkler in {spot}.
autumn: {child} gathered {fall} in {spot}. | brown leaves and {fall} covered {spot}.
autumn: {child} raked the fallen leaves in {spot}. | with baskets of {fall}, {child} came home through October fog.
autumn: storks had left {spot}, and {child} dried {fall}. | {child} carved a face for Halloween in {spot}.
winter: {child} saw {frost} in {spot}. | {frost} kept {child} busy in {spot} all morning.
winter: it was dark by four, and {child} came in from {spot} with red ears. | New Year brought {frost} to {spot}.
winter: {child} scraped ice off the car near {spot}. | {child} asked for {frost} in the week before Christmas.
""")

GRAMMARS = (
    sentence_task("stay_invented_words", _STAY, _STAY_WORDS, codes={"good": "vusk", "bad": "plim"}),
    sentence_task(
        "material_symbols",
        _MATERIAL,
        _MATERIAL_WORDS,
        codes={"wood": "$", "metal": "^", "glass": "|", "cloth": "/", "paper": "[", "stone": "]"},
    ),
    sentence_task("museum_colours", _MUSEUM, _MUSEUM_WORDS, codes=_MUSEUM_ROOMS),
    sentence_task("season", _SEASON, _SEASON_WORDS),
)
