"""Figures of scores: by shots, by family, by task, by budget, and against what was forgotten. Each brings the table behind it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from manyicl.records import Shots
from manyicl.reporting.charts import (
    SMALL,
    DotRow,
    Names,
    Point,
    Series,
    dot_chart,
    line_chart,
    number_axis,
)
from manyicl.reporting.findings import (
    DEDICATED,
    NUM_DRAWS,
    Findings,
    in_sentence,
    method_label,
    shots_axis,
)
from manyicl.reporting.tables import Column, Table, count_words, show_estimate, show_number
from manyicl.results.contrasts import Term, estimate, task_value, terms_at, worst_order
from manyicl.results.readings import BASE_METHOD, OURS

SCORE = "score, 0-100"
SHOTS = "demonstrations (shots), log scale"


@dataclass(frozen=True)
class Figure:
    """One or more charts of the same methods, a sentence that says what to see, and the data behind them.

    Attributes:
        key: Its id on the page and the name of its CSV file.
        charts: Labels and drawings; shown one at a time with a switch, or side by side.
        methods: Names, labels and styles for the legend, which turns them on and off.
    """

    key: str
    title: str
    sentence: str
    table: Table
    charts: Sequence[tuple[str, Markup]] = ()
    methods: Sequence[tuple[str, str, int]] = ()
    is_side_by_side: bool = False
    is_table_open: bool = False


def legend(findings: Findings, methods: Sequence[str]) -> list[tuple[str, str, int]]:
    """Name, label and style of methods."""
    return [(method, method_label(method), findings.style(method)) for method in methods]


@dataclass(frozen=True)
class _CurvePoint:
    method: str
    shots: Shots
    value: float
    low: float | None
    high: float | None
    worst: float


CURVE_COLUMNS = (
    Column("tasks", is_number=False),
    Column("method", is_number=False),
    Column("shots", is_number=False),
    Column("score"),
    Column("low"),
    Column("high"),
    Column("worst order"),
)


def shot_curves(findings: Findings) -> Figure | None:
    """Headline by shots: the mean over orders of demonstrations with its interval, and the worst order."""
    tasks = findings.cells.tasks_of("held_out")
    points = _curve(findings, tasks)
    if not points:
        return None
    values = [end for point in points for end in (point.value, point.low, point.high, point.worst) if end is not None]
    x, places = shots_axis(sorted({point.shots for point in points}, key=_order), SHOTS)
    y = number_axis(SCORE, values)
    charts = []
    for key, words, is_worst in (("mean", "mean over orders", False), ("worst", "worst order", True)):
        names = Names(
            f"shots-{key}", f"Score by demonstrations, {words}", f"One line per method over {len(tasks)} held-out tasks."
        )
        charts.append((words, line_chart(_curve_series(findings, points, places, is_worst=is_worst), x, y, names)))
    methods = list(dict.fromkeys(point.method for point in points))
    return Figure(
        "shot-curves",
        "Score by number of demonstrations",
        _curve_sentence(points),
        Table(CURVE_COLUMNS, [_curve_row("all held-out", point) for point in points]),
        charts,
        legend(findings, methods),
    )


def family_curves(findings: Findings) -> Figure | None:
    """The same curves family by family, small and side by side; math is there and in no headline."""
    by_family = {family: _curve(findings, tasks, num_draws=NUM_DRAWS) for family, tasks in findings.families().items()}
    by_family = {family: points for family, points in by_family.items() if points}
    if not by_family:
        return None
    charts, rows = [], []
    for number, (family, points) in enumerate(by_family.items()):
        tasks = findings.families()[family]
        x, places = shots_axis(sorted({point.shots for point in points}, key=_order), "shots")
        y = number_axis("score", [end for point in points for end in (point.value, point.low, point.high) if end is not None])
        names = Names(f"family-{number}", f"Score by demonstrations, {family}", f"Mean over {', '.join(tasks)}.")
        chart = line_chart(_curve_series(findings, points, places), x, y, names, frame=SMALL)
        charts.append((f"{family}: {', '.join(tasks)}", chart))
        rows += [_curve_row(family, point) for point in points]
    methods = list(dict.fromkeys(point.method for points in by_family.values() for point in points))
    sentence = (
        "One panel per family, with a scale of its own; math is in no headline. Bands are 95% intervals "
        f"({NUM_DRAWS} draws) over tasks, queries and orders."
    )
    return Figure(
        "family-curves",
        "The same by family of tasks",
        sentence,
        Table(CURVE_COLUMNS, rows),
        charts,
        legend(findings, methods),
        is_side_by_side=True,
    )


def _curve(findings: Findings, tasks: Sequence[str], *, num_draws: int | None = None) -> list[_CurvePoint]:
    """A point per method and shots where all tasks are evaluated; intervals of the headline are those of the claims."""
    points = []
    for method, model in findings.models.items():
        reading = findings.readings().get(method, {})
        for count in findings.shots:
            terms = terms_at(findings.cells, tasks, [(1.0, model, count)])
            if not terms:
                continue
            known = None if num_draws else reading.get("held_out", {}).get(str(count))
            found: dict[str, Any] = known or estimate(terms, num_draws=num_draws or NUM_DRAWS).as_json()
            points.append(_CurvePoint(method, count, found["value"], found["low"], found["high"], round(worst_order(terms), 3)))
    return points


def _order(shots: Shots) -> float:
    return float("inf") if shots == "max" else float(shots)


def _curve_series(
    findings: Findings, points: Sequence[_CurvePoint], places: Mapping[Shots, float], *, is_worst: bool = False
) -> list[Series]:
    series = []
    for method in dict.fromkeys(point.method for point in points):
        own = [point for point in points if point.method == method]
        drawn = [
            Point(places[point.shots], point.worst, note=f"{method_label(method)}, {point.shots} shots: {point.worst:.1f}")
            if is_worst
            else Point(
                places[point.shots],
                point.value,
                point.low,
                point.high,
                note=f"{method_label(method)}, {point.shots} shots: {show_estimate(vars(point), is_signed=False)}",
            )
            for point in own
        ]
        series.append(Series(method, findings.style(method), drawn, is_main=method == OURS))
    return series


def _curve_row(tasks: str, point: _CurvePoint) -> tuple[Any, ...]:
    return tasks, method_label(point.method), str(point.shots), point.value, point.low, point.high, point.worst


def _curve_sentence(points: Sequence[_CurvePoint]) -> str:
    """Where ours starts and ends, and where the model that is not tuned does."""
    parts = []
    for method in (OURS, BASE_METHOD):
        own = [point for point in points if point.method == method]
        if own:
            first, last = show_number(own[0].value), show_number(own[-1].value)
            parts.append(f"{in_sentence(method)} goes from {first} at {own[0].shots} to {last} at {own[-1].shots}")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}{'. ' if text else ''}Bands are 95% intervals over tasks, queries and orders."


def task_table(findings: Findings) -> Figure | None:
    """A row per held-out task, a column per method at its best shots; the best of each row is marked."""
    methods, by_method = _methods_by_task(findings)
    families = findings.families()
    if not methods or not families:
        return None
    tasks = [name for names in families.values() for name in names]
    columns = (
        Column("task", is_number=False),
        Column("family", is_number=False),
        Column("metric", is_number=False),
        *(Column(_with_shots(findings, method)) for method in methods),
    )
    rows: list[tuple[Any, ...]] = []
    for task in tasks:
        record = findings.cells.tasks[task]
        rows.append((task, record.family, record.metric, *(by_method[method].get(task) for method in methods)))
    best = {
        (line, column)
        for line, row in enumerate(rows)
        for column, value in enumerate(row)
        if column > 2 and value is not None and value == max(other for other in row[3:] if other is not None)
    }
    sentence = (
        "Points on 0-100, mean over orders of demonstrations, each method at the number of shots that is best for it on the "
        "validation tasks; the best of each row is marked. Columns sort."
    )
    return Figure("tasks", "Every method on every task", sentence, Table(columns, rows, frozenset(best)), is_table_open=True)


def _methods_by_task(findings: Findings) -> tuple[list[str], dict[str, dict[str, float]]]:
    """Values in points of each method on each held-out task that it was evaluated on."""
    found: dict[str, dict[str, float]] = {}
    for names in findings.families().values():
        for task in names:
            for method, model in findings.models.items():
                records = findings.cells.find(model, task, findings.best_shots(method))
                if records:
                    found.setdefault(method, {})[task] = round(task_value([Term(1.0, records)]), 3)
            for method in DEDICATED:
                records = findings.cells.of_method(method, task)
                if records:
                    found.setdefault(method, {})[task] = round(task_value([Term(1.0, records)]), 3)
    return list(found), found


def _with_shots(findings: Findings, method: str) -> str:
    """A method with the shots at which it is read."""
    return method_label(method) if method in DEDICATED else f"{method_label(method)} @ {findings.best_shots(method)}"


def task_differences(findings: Findings) -> Figure | None:
    """Ours less each compared method, task by task."""
    compared = {"beats_few_shot": "few-shot tuning", "beats_zero_shot": "zero-shot tuning", "beats_base": "no tuning"}
    known = {name: claim for name in compared if (claim := findings.claim(name))}
    if not known:
        return None
    found = [(compared[name], findings.style(claim["against"]), claim["by_task"]) for name, claim in known.items()]
    return difference_figure("differences", "Where it helps, task by task", _wins_sentence(known), found)


def difference_figure(key: str, title: str, sentence: str, compared: Sequence[tuple[str, int, Mapping[str, Any]]]) -> Figure:
    """Ours less others, a row per task, the largest first.

    Args:
        compared: For each other a label, a style, and estimates by task.
    """
    charts, rows = [], []
    ends = [found[end] for _, _, by_task in compared for found in by_task.values() for end in ("low", "high")]
    x = number_axis("ours less the other, points", ends, marks_zero=True)
    for number, (label, style, by_task) in enumerate(compared):
        ordered = sorted(by_task.items(), key=lambda item: -item[1]["value"])
        lines = [DotRow(task, [("", style, interval_point(found, f"{task}: {show_estimate(found)}"))]) for task, found in ordered]
        names = Names(f"{key}-{number}", f"Ours less {label}, by task", "A dot and its 95% interval per task.")
        charts.append((f"against {label}", dot_chart(lines, x, names)))
        rows += [(label, task, float(found["value"]), float(found["low"]), float(found["high"])) for task, found in ordered]
    columns = (
        Column("ours against", is_number=False),
        Column("task", is_number=False),
        Column("difference", is_signed=True),
        Column("low", is_signed=True),
        Column("high", is_signed=True),
    )
    return Figure(key, title, sentence, Table(columns, rows), charts)


def _wins_sentence(known: Mapping[str, Any]) -> str:
    claim = next(iter(known.values()))
    found = list(claim["by_task"].values())
    above, below = sum(one["low"] > 0 for one in found), sum(one["high"] < 0 for one in found)
    return (
        f"Against {method_label(claim['against'])}, ours is ahead on {above} of {count_words(len(found), 'task')} and behind on "
        f"{below}; on the others the interval over queries and orders holds zero."
    )


def interval_point(found: Mapping[str, Any], note: str) -> Point:
    """A point of a dot chart from an estimate."""
    return Point(found["value"], 0.0, x_low=found["low"], x_high=found["high"], note=note)
