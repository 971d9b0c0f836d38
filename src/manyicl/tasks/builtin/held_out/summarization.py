"""Held-out summaries: a lost or found object as one line, a match as its result."""

from manyicl.tasks.builtin.grammar import labelled, paired, summary_task

_LOST_WORDS = labelled("""
thing: umbrella | earring | violin case | scarf | hat | walking stick | rucksack | penknife | glove | toy rabbit | bracelet
look: green | tartan | silver | brown leather | pale blue | old-fashioned | child-size | spotted
where: tram 4 | the park cafe | platform 2 | the dentist's waiting room | Elm Lane | the ferry | the skating hall
day: Monday | Tuesday | Thursday | Saturday | Sunday
phone: 3317 | 4052 | 6184 | 7720 | 9046 | 2593
owner: Aisha | Boris | Celine | Darius | Edith | Felipe
value: it was a present from my late husband | it is worth little but dear to me | my son cannot sleep without it
""")
_LOST = paired("""
On {day} I left my {look} {thing} on the way to {where}. Please, {value}! Ring {owner}, {phone}. => Lost: {look} {thing}, {phone}
Has anyone seen a {look} {thing}? Last noticed at {where}; {value}. {owner}, extension {phone}. => Lost: {look} {thing}, {phone}
{owner} misses a {thing}, {look}, since {day}. Whoever saw it near {where} may dial {phone}. => Lost: {look} {thing}, {phone}
Somebody forgot a {look} {thing} at {where} on {day}. {owner} has it; call {phone}. => Found: {look} {thing}, {phone}
Yours? This {thing}, {look}, lay at {where} when I passed. Phone {phone} and ask for {owner}. => Found: {look} {thing}, {phone}
I picked up a {look} {thing} near {where}. Tell me what is special about it: {phone}. => Found: {look} {thing}, {phone}
""")

_MATCH_WORDS = labelled("""
team: Falcons | Badgers | Comets | Wanderers | Mariners | Pilgrims | Lynx | Harriers
star: Okafor | Lindqvist | Moreau | Tanaka | Silva | Kowalski
loss: 0 | 1 | 2
gain: 3 | 4 | 5
even: 1-1 | 2-2 | 3-3 | 0-0
crowd: 800 | 1,200 | 2,500 | 4,000
weather: in pouring rain | under floodlights | on a muddy pitch | in icy wind | before a noisy crowd
mood: the coach was pleased | fans sang until dusk | there were few fouls | the referee had a calm night
""")
_MATCH = paired("""
{weather}, {team} outran {team2}. {star} scored twice; it ended {gain} to {loss}; {mood}. => {team} beat {team2} {gain}-{loss}
{team2} began well, but {team} scored {gain} after the break. {team2} got {loss}. => {team} beat {team2} {gain}-{loss}
A crowd of {crowd} saw {team2} lose to {team}. It was {gain} to {loss}, and {mood}. => {team} beat {team2} {gain}-{loss}
{team} met {team2} {weather}. {star} missed late on, and they shared the points at {even}. => {team} and {team2} draw {even}
No winner between {team} and {team2}: {even} after ninety minutes {weather}; {mood}. => {team} and {team2} draw {even}
{team} will not play {team2} today. The pitch lies under water, and {crowd} people went home. => {team} v {team2} called off
What an upset: {team2}, the champions, lost by {gain} to {loss}. {team} had never won there. => {team} beat {team2} {gain}-{loss}
Fog stopped {team} against {team2} at half time. It was {even} then; {crowd} fans got refunds. => {team} v {team2} called off
""")

GRAMMARS = (
    summary_task("lost_and_found", _LOST, _LOST_WORDS),
    summary_task("match_results", _MATCH, _MATCH_WORDS, instruction="State the result."),
)
