"""Meta-training summaries: a town notice as a headline, a short dialogue as one sentence, a meeting as one line."""

from manyicl.tasks.builtin.grammar import labelled, paired, summary_task

_TOWN_WORDS = labelled("""
place: swimming pool | town library | old theatre | primary school | bus depot | city museum | sports hall
day: Monday | Tuesday | Wednesday | Thursday | Friday
month: March | April | May | June | September | October
who: Ada Lind | Bruno Costa | Carmen Ruiz | Dmitri Volkov | Elsa Berg | Farid Nasser | Greta Holm
job: baker | nurse | bus driver | student | pensioner | carpenter
cause: fire | flood | gas leak | power cut | storm
project: car park | playground | bicycle path | cafe | bus stop | rose garden
contest: chess cup | baking contest | marathon | poetry prize | quiz night | fishing derby
sum: 20,000 euros | 45,000 euros | 80,000 euros | 300,000 euros
number: 40 | 65 | 120 | 250 | 300 | 700
hurt: nobody was hurt | no one had to go to hospital | all visitors got out safely
""")
_TOWN = paired("""
A {cause} hit the {place} early on {day}, but {hurt}. The doors stay locked until {day2}. => {cause} shuts {place} until {day2}
After the {cause} of last {day}, the {place} needs repairs. The mayor puts the cost at {sum}. => {place} repairs to cost {sum}
The council agreed to build a {project} next to the {place}. Work starts in {month}. => New {project} planned by {place}
{who}, a {job}, came first in the {contest} on {day}. There were {number} others. => {job} {who} wins {contest}
The {place} counted {number} visitors on {day}, more than on any day before. Staff were thrilled. => Record {day} for {place}
{number} people marched to the {place} on {day}. They want a {project} built there. => {number} march for {project} at {place}
From {month} on, the {place} opens on {day} nights as well. {who} had asked for it. => {place} to open {day} nights from {month}
Thieves broke into the {place} on {day} and took {sum}. {who}, a {job}, saw them run. => Thieves take {sum} from {place}
{who} gave {sum} to the {place} on {day}. The money pays for a {project}. => {who} gives {sum} for {project}
The {project} at the {place} is ready a month early. {who} cut the ribbon on {day}. => New {project} opens at {place}
Plans for a {project} by the {place} were dropped on {day}. At {sum}, it was too dear. => No {project} for {place}
""")

_DIALOGUE_WORDS = labelled("""
a: Hassan | Ivy | Jonas | Kemal | Lena | Mateo
b: Nadia | Otto | Priya | Ruth | Samir | Thea
tool: ladder | drill | tent | cake tin | sewing machine | camera | roof rack
when: tonight | tomorrow | on Saturday | on Sunday morning | next week | after lunch
chore: paint the hall | carry the sofa | clear the loft | pick the apples | fix the bike | bake for the fair
outing: go to the lake | see the new film | visit Grandma | play tennis | try the new cafe | ride to the castle
bring: sandwiches | a blanket | the tickets | some lemonade | the map
excuse: I have to work | my back hurts | my sister is visiting | I have an exam | I am away
price: ten | twenty | thirty | fifty
""")
_DIALOGUE = paired("""
{a}: Could you lend me your {tool} {when}? // {b}: Of course, I do not need it. => {b} will lend {a} a {tool} {when}.
{a}: May I have your {tool} {when}? // {b}: No, I need it myself. => {b} will not lend {a} a {tool} {when}.
{a}: I want to {chore} {when}. Any chance of a hand? // {b}: Sure, count on me. => {b} will help {a} to {chore} {when}.
{a}: Can you help me to {chore} {when}? // {b}: Sorry, {excuse}. => {b} cannot help {a} to {chore} {when}.
{a}: Shall we {outing} {when}? // {b}: Lovely, I will bring {bring}. => {a} and {b} will {outing} {when}; {b} brings {bring}.
{a}: We could {outing} {when}. // {b}: I would love to, but {excuse}. => {b} cannot {outing} with {a} {when}.
{a}: Is your {tool} for sale? // {b}: Yes, for {price} euros. Fetch it {when}. => {b} sells {a} a {tool} for {price} euros.
{a}: I broke your {tool}. // {b}: Oh no! Then please get me a new one {when}. => {a} must replace the {tool} of {b} {when}.
{a}: Did you forget? We want to {outing} {when}. // {b}: Not at all! => {a} and {b} will {outing} {when}.
{a}: The {tool} costs me {price} euros a day. // {b}: Use mine, then! => {b} lets {a} use a {tool}.
""")

_MEETING_WORDS = labelled("""
who: Anders | Beatriz | Chen | Dalia | Emil | Fatima | Goran | Hanna
team: parents' council | sales team | choir board | lab group | tenants' club | rowing crew
topic: the budget | the summer party | parking | the website | new members | last month's figures
task: print the posters | call the printer | write the report | book a room | order the chairs | check the accounts
task: send the invitations | find a speaker | compare three offers | update the list
due: Monday | Wednesday | Friday | the end of the month | the tenth | next week
chat: it was a long debate | coffee was served at four | two people came late | most agreed at once
""")
_MEETING = paired("""
The {team} met and spoke about {topic}; {chat}. {who} offered to {task} by {due}. => {who} to {task} by {due}
Minutes of the {team}: {who} and {who2} talked about {topic}. {who2} must {task} by {due}. => {who2} to {task} by {due}
At the {team}, {who} took on to {task}. The deadline is {due}. Then {topic} came up; {chat}. => {who} to {task} by {due}
{topic} filled most of the hour at the {team}. By {due}, {who} and {who2} will {task}. => {who} and {who2} to {task} by {due}
{who} cannot {task}, so {who2} does it by {due}. The {team} put off {topic}. => {who2} to {task} by {due}, not {who}
The {team} has settled {topic}: {chat}. Nothing is left to do before {due}. => {topic} settled; no task before {due}
""")

GRAMMARS = (
    summary_task("town_headlines", _TOWN, _TOWN_WORDS, instruction="Write a headline."),
    summary_task("dialogue_outcomes", _DIALOGUE, _DIALOGUE_WORDS),
    summary_task("meeting_tasks", _MEETING, _MEETING_WORDS),
)
