"""What a study answers, in sentences and in one table: written from its claims by rules, and open where claims wait for cells."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from manyicl.reporting.findings import DEDICATED, Findings, in_sentence, method_label
from manyicl.reporting.tables import Column, Table, Value, count_words, join_words, show_estimate, show_interval, show_number
from manyicl.results.calibrated import is_calibrated
from manyicl.results.claims import AIMS
from manyicl.results.readings import BASE_METHOD, OURS, ZERO_SHOT

_COMPARED = {
    "beats_few_shot": "beats few-shot tuning",
    "beats_zero_shot": "beats zero-shot tuning",
    "beats_base": "beats the model that is not tuned",
    "beats_last_answer": "beats many-shot tuning on the last answer",
}
_WAITING = {
    **_COMPARED,
    "approaches_dedicated": "approaches dedicated tuning",
    "more_shots_help": "more shots help",
    "forgets_less": "forgets less",
}


@dataclass(frozen=True)
class Answer:
    """What stands on the first screen.

    Attributes:
        lead: The answer to whether training on every answer helps, in a sentence with its interval.
        basis: What that is a mean of, and whether the aim is met.
        points: What else is known, a sentence each.
        status: How much of the study is done, what failed, what is open.
    """

    lead: str
    basis: str
    points: list[str]
    status: str


def answer(findings: Findings) -> Answer:
    """The study's answer; where ours was not compared with few-shot tuning yet, it says that."""
    claim = findings.claim("beats_few_shot")
    points = [_compared_sentence(found, words) for name, words in _POINTS.items() if (found := findings.claim(name))]
    points += [
        sentence
        for sentence in (_dedicated_sentence(findings), _slope_sentence(findings), forgetting_sentence(findings))
        if sentence
    ]
    return Answer(_lead(claim), _basis(claim) if claim else "", points, _status(findings))


def _lead(claim: Mapping[str, Any] | None) -> str:
    if claim is None:
        return "Not answered yet: ours and few-shot tuning are not both evaluated on all validation and held-out tasks."
    found = claim["at_best_shots"]
    size = show_number(abs(found["value"]))
    other = method_label(claim["against"])
    interval = f"95% interval {show_interval(found)}"
    if claim["verdict"] == "holds":
        return f"Yes: trained on every answer, the model scores {size} points more than after {other}, {interval}."
    if claim["verdict"] == "fails":
        return f"No: trained on every answer, the model scores {size} points less than after {other}, {interval}."
    value = show_number(found["value"], is_signed=True)
    return f"Not shown: trained on every answer, the model differs by {value} points from {other}, {interval}."


def _basis(claim: Mapping[str, Any]) -> str:
    """What the lead is a mean of, and whether the aim is met."""
    shots = join_words([f"{in_sentence(method)} {count}" for method, count in claim["best_shots"].items()])
    num_tasks = count_words(claim["at_best_shots"]["num_tasks"], "held-out task")
    text = f"Mean over families of {num_tasks}, points on 0-100, each at its own best number of shots ({shots}). "
    return (text + _aim_words(claim)).strip()


def _aim_words(claim: Mapping[str, Any]) -> str:
    """Whether the aim that was set before is met; empty where none was set."""
    aim, found = claim.get("aim"), claim["at_best_shots"]
    if aim is None:
        return ""
    name = f"The aim of {show_number(aim, 0, is_signed=True)} points"
    if found["low"] >= aim:
        return f"{name} is reached, over the whole interval."
    if found["value"] >= aim:
        return f"{name} is reached, though part of the interval lies below it."
    return f"{name} is missed." if found["high"] < aim else f"{name} is not reached, though the interval does not exclude it."


_POINTS = {
    "beats_zero_shot": "zero-shot tuning",
    "beats_base": "no tuning",
    "beats_last_answer": "many-shot tuning on the last answer alone",
}
_VERDICT_WORDS = {"holds": "ahead", "fails": "behind", "not shown": "no difference shown"}


def _compared_sentence(claim: Mapping[str, Any], words: str) -> str:
    """Against zero-shot tuning: +9.1 points (+6.2 to +12.3), ahead."""
    found = show_estimate(claim["at_best_shots"])
    return f"Against {words}: {found} points, {_VERDICT_WORDS[claim['verdict']]}. {_aim_words(claim)}".strip()


def _dedicated_sentence(findings: Findings) -> str:
    claim = findings.claim("approaches_dedicated")
    if claim is None:
        return ""
    if not claim["tasks"]:
        return "Dedicated tuning, one model a task, learns none of the held-out tasks."
    parts = []
    for method in DEDICATED:
        read = (_dedicated_words(claim[method], place) for place in ("", "_at_max"))
        parts.append(f"{method_label(method).removeprefix('dedicated, ')} {' and at max '.join(read)}")
    tasks = count_words(len(claim["tasks"]), "task")
    return f"Against dedicated tuning, one model a task, on {tasks} that it can learn: {'; '.join(parts)}."


def _dedicated_words(own: Mapping[str, Any], place: str) -> str:
    """As in: -9.8 (-16.3 to -3.0) points, 66% of its gain."""
    share = _ends(own[f"share_of_gain{place}"], 100)[0]
    gain = f", {show_number(share, 0)}% of its gain" if share is not None else ""
    return f"{show_estimate(own[f'difference{place}'])} points{gain}"


def _slope_sentence(findings: Findings) -> str:
    claim = findings.claim("more_shots_help")
    if claim is None:
        return ""
    ours, base = show_estimate(claim[OURS]), show_estimate(claim[BASE_METHOD])
    return f"Each doubling of demonstrations changes ours by {ours} points, the model that is not tuned by {base}."


def final_forgetting(findings: Findings) -> dict[str, Mapping[str, Any]]:
    """The entries of the forgetting card of the weights by which each method is judged."""
    claim = findings.claim("forgets_less")
    entries = {entry["model"]: entry for entry in claim["models"]} if claim else {}
    return {method: entries[model] for method, model in findings.models.items() if model in entries}


def forgetting_sentence(findings: Findings) -> str:
    """What ours forgot of plain text, beside the method that it is compared with."""
    finals = final_forgetting(findings)
    if OURS not in finals:
        return ""
    others = [findings.claims.get("few_shot_variant"), ZERO_SHOT]
    parts = [f"{in_sentence(name)} {_bits(finals[name])}" for name in (OURS, *others) if name in finals]
    return f"Bits per byte of plain text change by: {'; '.join(parts)}."


def _bits(entry: Mapping[str, Any]) -> str:
    """The changes over all texts: +0.021, or +0.021 to +0.034."""
    values = sorted(change["value"] for change in entry["bits_per_byte_change"].values())
    ends = dict.fromkeys(show_number(value, 3, is_signed=True) for value in (values[0], values[-1]))
    return " to ".join(ends)


def _status(findings: Findings) -> str:
    """How far the study is."""
    cells = findings.results.cells
    parts = []
    if cells:
        done, failed, left = (findings.cells_with(status) for status in ("done", "failed", "open"))
        parts.append(f"{done} of {len(cells)} cells are done" + (f", {failed} failed" if failed else "") + ".")
        parts += [f"What is open: {count_words(left, 'cell')}; what follows is known so far."] if left else []
    waiting = [words for name, words in _WAITING.items() if name in findings.claims.get("waiting", [])]
    parts += [f"Claims that wait for cells: {'; '.join(waiting)}."] if waiting else []
    return " ".join(parts)


CLAIM_COLUMNS = (
    Column("claim", is_number=False),
    Column("verdict", is_number=False),
    Column("difference", digits=1, is_signed=True),
    Column("low", digits=1, is_signed=True),
    Column("high", digits=1, is_signed=True),
    Column("unit", is_number=False),
    Column("at max", digits=1, is_signed=True),
    Column("aim", digits=0, is_signed=True),
)


def claims_table(findings: Findings) -> Table:
    """Every claim with its verdict, figure, interval and aim; those that wait have none."""
    rows = [*_compared_rows(findings), *_dedicated_rows(findings), *_slope_rows(findings)]
    return Table(CLAIM_COLUMNS, [*rows, *_forgetting_rows(findings), *_family_rows(findings), *_variant_rows(findings)])


def _row(
    claim: str,
    verdict: str,
    found: Mapping[str, Any] | None,
    unit: str = "points",
    *,
    factor: float = 1.0,
    aims: tuple[float | None, float | None] = (None, None),
) -> tuple[Value, ...]:
    """A row of the table; `aims` are the value at max and the aim."""
    return claim, verdict, *(_ends(found, factor) if found else (None, None, None)), unit, *aims


def _ends(found: Mapping[str, Any], factor: float = 1.0) -> tuple[float | None, ...]:
    """Value, low and high in another unit, rounded as they were; None where there is none, as for the share of no gain."""
    ends = (found[end] for end in ("value", "low", "high"))
    return tuple(None if end is None or math.isnan(end) else round(float(end) * factor, 4) for end in ends)


def _compared_rows(findings: Findings) -> list[tuple[Value, ...]]:
    rows = []
    for name, words in _COMPARED.items():
        claim = findings.claim(name)
        if claim is None:
            rows.append(_row(words, "open", None, aims=(None, AIMS.get(name.removeprefix("beats_")))))
            continue
        words = f"beats {method_label(claim['against'])}" if name == "beats_few_shot" else words
        at_max = claim["at_max"]["value"]
        rows.append(_row(words, claim["verdict"], claim["at_best_shots"], aims=(float(at_max), claim["aim"])))
    return rows


def _dedicated_rows(findings: Findings) -> list[tuple[Value, ...]]:
    claim = findings.claim("approaches_dedicated")
    if claim is None:
        return [_row("approaches dedicated tuning", "open", None)]
    rows = []
    for method in DEDICATED if claim["tasks"] else ():
        own, words = claim[method], method_label(method).replace("dedicated", "dedicated tuning", 1)
        at_max = [_ends(own[name], factor)[0] for name, factor in (("difference_at_max", 1.0), ("share_of_gain_at_max", 100))]
        rows.append(_row(f"approaches {words}", _VERDICT_WORDS[own["verdict"]], own["difference"], aims=(at_max[0], None)))
        row = _row(f"share of the gain of {words}", "", own["share_of_gain"], "% of its gain", factor=100, aims=(at_max[1], None))
        rows.append(row)
    return rows


def _slope_rows(findings: Findings) -> list[tuple[Value, ...]]:
    slopes, unit = findings.claim("more_shots_help"), "points a doubling"
    if slopes is None:
        return [_row("more shots help", "open", None, unit)]
    return [
        _row("more shots help, ours", slopes["verdict"], slopes[OURS], unit),
        _row("more shots help, no tuning", "", slopes[BASE_METHOD], unit),
    ]


def _forgetting_rows(findings: Findings) -> list[tuple[Value, ...]]:
    """In thousandths, so that one digit after the point says enough; against few-shot and zero-shot tuning."""
    claim, unit = findings.claim("forgets_less"), "10⁻³ bits per byte"
    if claim is None:
        return [_row("forgets less", "open", None, unit)]
    return [
        _row(f"forgets less than {method_label(method)}, {corpus}", claim["verdicts"][method], change, unit, factor=1000)
        for method in (str(findings.claims.get("few_shot_variant")), ZERO_SHOT)
        for corpus, change in claim["ours_less_other"].get(method, {}).items()
    ]


def _family_rows(findings: Findings) -> list[tuple[Value, ...]]:
    claim = findings.claims.get("family")
    if not claim:
        return []
    words = f"beats {method_label(claim['against'])} on a family left out ({claim['family']})"
    return [_row(words, claim["verdict"], claim["at_max"], aims=(float(claim["at_max"]["value"]), None))]


def _variant_rows(findings: Findings) -> list[tuple[Value, ...]]:
    """Each variant of an ablation against what it is one of."""
    rows = []
    for name, claim in findings.claims.get("variants", {}).items():
        words = f"{method_label(name)} beats {method_label(claim['against'])}"
        rows.append(_row(words, claim["verdict"], claim["at_best_shots"], aims=(float(claim["at_max"]["value"]), None)))
    return rows


def forgetting_table(findings: Findings) -> Table | None:
    """Ours against each other tuned method: bits per byte lost at equal tokens, less being better."""
    claim = findings.claim("forgets_less")
    if claim is None:
        return None
    columns = (
        Column("ours against", is_number=False),
        Column("text", is_number=False),
        Column("difference in bits per byte", digits=4, is_signed=True),
        Column("low", digits=4, is_signed=True),
        Column("high", digits=4, is_signed=True),
        Column("verdict", is_number=False),
    )
    rows = [
        (method_label(method), corpus, *_ends(change), claim["verdicts"][method])
        for method, changes in claim["ours_less_other"].items()
        for corpus, change in changes.items()
    ]
    return Table(columns, rows)


def second_reading_table(findings: Findings) -> Table | None:
    """Ours against others with each method calibrated where the validation tasks want it; beside it the first reading."""
    second = findings.claims.get("second_reading")
    if not second or not second["claims"]:
        return None
    columns = (
        Column("ours against", is_number=False),
        Column("ours read", is_number=False),
        Column("the other read", is_number=False),
        *(Column(name, is_signed=True) for name in ("difference", "low", "high", "first reading")),
        Column("verdict", is_number=False),
    )
    rows = []
    for name, claim in second["claims"].items():
        first = findings.claim(name)
        read = (_how_read(second["methods"][method]) for method in (OURS, claim["against"]))
        is_same = first is not None and first["against"] == claim["against"]
        before = float(first["at_best_shots"]["value"]) if is_same else None
        rows.append((method_label(claim["against"]), *read, *_ends(claim["at_best_shots"]), before, claim["verdict"]))
    return Table(columns, rows)


def _how_read(method: Mapping[str, Any]) -> str:
    """As in: calibrated, 64 shots."""
    return f"{'calibrated' if is_calibrated(method['model']) else 'plain'}, {method['best_shots']} shots"
