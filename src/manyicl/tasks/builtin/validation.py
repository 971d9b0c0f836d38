"""Grammars of the built-in tasks that choose learning rates and checkpoints; one of them only demonstrations define."""

import random

from manyicl.tasks.builtin.grammar import (
    entailment_task,
    expand,
    labelled,
    number_task,
    paired,
    sentence_task,
    summary_task,
)

_ADVICE_WORDS = labelled("""
who: Quentin | Rosa | Stefan | Tamar | Umberto | Vera | Wendell | Xenia
often: for a week | since Easter | for years | for months | since last spring
ache: knees | shoulders | wrists | ears
debt: rent | tram fines | phone bills | old loans
pet: parakeet | hamster | terrier | goldfish
course: chemistry | algebra | geography | Latin
""")
_ADVICE = labelled("""
health: {who} has had sore {ache} {often}. | {who} has coughed and slept badly {often}. | {who} asks what helps with bad {ache}.
health: {often}, {who} has been taking pills for stiff {ache}. | {who} has felt dizzy {often} and has pain in both {ache}.
money: {who} has been unable to pay {debt} {often}. | {who} wonders how to save up and clear the {debt}.
money: {often}, {who} has borrowed cash for {debt}. | the bank wrote to {who} about unpaid {debt}.
pets: the {pet} of {who} has refused its food {often}. | {who} asks how to teach a {pet} to obey.
pets: {who} wants a second {pet} for company. | {often}, the {pet} has kept {who} awake.
study: {who} is failing {course} and the exam is near. | {who} has skipped lessons in {course} {often}.
study: {often}, {who} has stared at {course} notes in vain. | how does one learn {course} quickly, asks {who}.
""")

_HOURS_WORDS = labelled("""
venue: the ice rink | the zoo | the planetarium | the sauna | the aquarium | the post office | the garden centre
rest: Sundays | Mondays | Tuesdays | Wednesdays | Thursdays
other: children enter {venue} free of charge | the owner of {venue} is from Malta | a locker at {venue} costs extra
other: dogs are welcome at {venue} | {venue} was built by monks
""")


def _state_hours(draw: random.Random) -> tuple[str, str, bool | None]:
    """Opening hours, and a statement about an hour of the day, a day of rest, or something else."""
    opens, closes, hour = draw.randint(6, 11), draw.randint(14, 22), draw.randint(5, 23)
    chosen = {"opens": str(opens), "closes": str(closes)}
    frame = draw.choice(
        (
            "{venue} is open from {opens} to {closes} every day but {rest}",
            "except on {rest}, {venue} opens at {opens} and closes at {closes}",
            "daily from {opens} to {closes} you may visit {venue}, though not on {rest}",
        )
    )
    premise = expand(frame, _HOURS_WORDS, draw, chosen)
    venue, rest, other_day = chosen["venue"], chosen["rest"], expand("{rest2}", _HOURS_WORDS, draw, chosen)
    hypothesis, truth = draw.choice(
        (
            (f"on a normal day you can enter {venue} at {hour} sharp", opens <= hour < closes),
            (f"on a normal day {venue} is shut at {hour} thirty", not opens <= hour < closes),
            (f"{venue} opens on {rest}", False),
            (f"{venue} opens on {other_day}", True),
            (f"whoever comes on {rest} finds {venue} shut", True),
            (f"whoever comes on {other_day} finds {venue} shut", False),
            (expand("{other}", _HOURS_WORDS, draw, chosen), None),
            (f"on {rest} the staff of {venue} clean the floors", None),
        )
    )
    return premise + ".", hypothesis + ".", truth


_FORECAST_WORDS = labelled("""
region: the coast | the valley | the hill country | the lake district | the islands | the eastern plain | the capital
sky: thick cloud | bright sunshine | steady rain | light drizzle | patchy mist | strong gales
dawn: the day begins with | early risers will meet | the morning brings | at first light there is
turn: turning to | giving way to | followed by
high: 4 | 9 | 13 | 18 | 22 | 27
note: Drivers should take care. | Take a hat. | The pollen count is low. | Boats should stay in port. | Nights stay mild.
""")
_FORECAST = paired("""
In {region} {dawn} {sky}, {turn} {sky2} by noon. Highs near {high} degrees. {note} => {region}: {sky}, then {sky2}, {high} degrees
{note} {dawn} {sky} in {region}. It will last all day, with {high} degrees at best. => {region}: {sky} all day, {high} degrees
After days of {sky2}, {region} can expect {sky}. Thermometers reach {high}. {note} => {region}: {sky} at last, {high} degrees
{sky} over {region} should fade slowly; hope for {high} degrees and no more. {note} => {region}: {sky} fading, {high} degrees
Who lives in {region} may see {sky} this week. It stays near {high} degrees. {note} => {region}: {sky} possible, {high} degrees
A front brings {sky} to {region} and {sky2} behind it. At most {high} degrees. => {region}: {sky}, then {sky2}, {high} degrees
""")

_JOURNEY_WORDS = labelled("""
way: coach | hydrofoil | night express | cable car | airship
pause: customs check | lunch stop | tyre change | photo stop
""")


def _journey_problem(draw: random.Random) -> tuple[str, int]:
    """Minutes of a journey: legs and a stop added up, or taken away from the whole."""
    leg, leg2, stop = draw.randint(10, 45), draw.randint(10, 45), draw.randint(3, 15)
    chosen = {"leg": str(leg), "leg2": str(leg2), "stop": str(stop), "whole": str(leg + leg2)}
    frame, minutes = draw.choice(
        (
            ("the {way} needs {leg} minutes to the border and {leg2} more to the end. How long is the ride?", leg + leg2),
            ("a {pause} of {stop} minutes delays the {way}, which usually takes {leg}. How many minutes in all?", leg + stop),
            ("of {whole} minutes on the {way}, {leg} have passed. How many remain?", leg2),
            ("the {way} left {leg} minutes ago and arrives in {leg2}. How many minutes does it travel?", leg + leg2),
            ("without the {pause} of {stop} minutes the {way} would take {leg}. How long does it take with it?", leg + stop),
            ("two legs of {leg} minutes each and a {pause} of {stop}: how long does the {way} take?", 2 * leg + stop),
        )
    )
    return expand(frame, _JOURNEY_WORDS, draw, chosen), minutes


GRAMMARS = (
    sentence_task(
        "advice_invented_words",
        _ADVICE,
        _ADVICE_WORDS,
        codes={"health": "dorf", "money": "quim", "pets": "lasp", "study": "yent"},
    ),
    entailment_task("opening_hours", ("true", "unknown", "false"), _state_hours, layout="Sign: {premise}\nClaim: {hypothesis}"),
    summary_task("forecasts", _FORECAST, _FORECAST_WORDS),
    number_task("journey_minutes", _journey_problem),
)
