"""Figures of what a study took: score against budget, tokens and time of each method, and the work cell by cell."""

from collections.abc import Mapping, Sequence
from typing import Any

from manyicl.reporting.charts import Names, Point, Series, line_chart, number_axis
from manyicl.reporting.curves import SCORE, Figure, legend
from manyicl.reporting.findings import Findings, in_sentence, method_label
from manyicl.reporting.tables import Column, Table, Value, count_words, show_bytes, show_estimate, show_number, show_seconds
from manyicl.results.files import CellFacts, ModelFacts
from manyicl.results.readings import BASE_METHOD, OURS

BUDGETS = {"tokens": "tokens fed", "target_answers": "answers that were targets", "seconds": "seconds of updates"}


def budget_curves(findings: Findings) -> Figure | None:
    """Score of each snapshot against tokens, target answers and seconds."""
    curves = _known_curves(findings)
    if not curves:
        return None
    base = _base_score(findings)
    charts = []
    for budget, words in BUDGETS.items():
        x = number_axis(words, [0.0, *(point[budget] for points in curves.values() for point in points)])
        series = [_budget_series(findings, method, points, budget) for method, points in curves.items()]
        if base is not None:
            ends = [Point(x.low, base, note=f"no tuning: {base:.1f}"), Point(x.high, base)]
            series.insert(0, Series(BASE_METHOD, findings.style(BASE_METHOD), ends))
        y = number_axis(SCORE, [end for each in series for point in each.points for end in (point.y, point.low, point.high)])
        names = Names(f"budget-{budget}", f"Score by {words}", "A line per method, a marker per snapshot.")
        charts.append((words, line_chart(series, x, y, names, has_bands=False)))
    methods = [BASE_METHOD] * (base is not None) + list(curves)
    return Figure(
        "budget-curves",
        "Score by budget",
        _budget_sentence(findings, curves),
        _budget_table(curves),
        charts,
        legend(findings, methods),
    )


def _known_curves(findings: Findings) -> dict[str, list[Mapping[str, Any]]]:
    curves: Mapping[str, list[Mapping[str, Any]]] = findings.claims.get("budget_curves", {})
    known = {method: [point for point in points if point["at_best_shots"]] for method, points in curves.items()}
    return {method: points for method, points in known.items() if points}


def _base_score(findings: Findings) -> float | None:
    """The headline of the model that is not tuned, at its best shots."""
    reading = findings.readings().get(BASE_METHOD)
    found = reading["held_out"].get(str(reading["best_shots"])) if reading else None
    return float(found["value"]) if found else None


def _budget_series(findings: Findings, method: str, points: Sequence[Mapping[str, Any]], budget: str) -> Series:
    drawn = [
        Point(
            float(point[budget]),
            found["value"],
            found["low"],
            found["high"],
            note=f"{method_label(method)}, {show_number(point[budget], 0)}: {show_estimate(found, is_signed=False)}",
        )
        for point in points
        if (found := point["at_best_shots"])
    ]
    return Series(method, findings.style(method), drawn, is_main=method == OURS)


def _budget_table(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    columns = (
        Column("method", is_number=False),
        *(Column(name) for name in ("updates", "tokens", "target answers")),
        Column("seconds"),
        *(Column(name) for name in ("score", "low", "high", "at max")),
    )
    rows = [
        (
            method_label(method),
            *(point[name] for name in ("updates", "tokens", "target_answers")),
            float(point["seconds"]),
            *(point["at_best_shots"][end] for end in ("value", "low", "high")),
            point["at_max"]["value"] if point["at_max"] else None,
        )
        for method, points in curves.items()
        for point in points
    ]
    return Table(columns, rows)


def _budget_sentence(findings: Findings, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """How equal the budgets are."""
    finals = {method: points[-1] for method, points in curves.items()}
    tokens = [point["tokens"] for point in finals.values()]
    answers = {method: point["target_answers"] for method, point in finals.items()}
    fewest, most = min(answers, key=answers.__getitem__), max(answers, key=answers.__getitem__)
    span = dict.fromkeys(show_number(end, 0) for end in (min(tokens), max(tokens)))
    return (
        f"Budgets are matched in tokens ({' to '.join(span)}). "
        f"In them {in_sentence(fewest)} met {show_number(answers[fewest], 0)} target answers, {in_sentence(most)} "
        f"{show_number(answers[most], 0)}. Each method is read at its own best shots."
    )


def training_costs(findings: Findings) -> Figure | None:
    """What each tuned model took, whole budgets only; dedicated models are added up."""
    finals = [facts for facts in findings.results.models if facts.is_final]
    if not finals:
        return None
    columns = (
        Column("method", is_number=False),
        Column("setting", is_number=False),
        *(Column(name) for name in ("models", "training seed", "updates", "tokens", "answers", "target answers")),
        Column("seconds"),
        Column("peak memory, GiB"),
        Column("learning rate", digits=5),
    )
    rows: list[tuple[Any, ...]] = []
    for facts in (facts for facts in finals if not facts.task):
        rows.append((method_label(facts.method), facts.setting, 1, facts.training_seed, *_sums([facts]), facts.learning_rate))
    dedicated = [facts for facts in finals if facts.task]
    for method in dict.fromkeys(facts.method for facts in dedicated):
        own = [facts for facts in dedicated if facts.method == method]
        rows.append((method_label(method), "one a task", len(own), None, *_sums(own), None))
    return Figure(
        "training-costs", "What tuning took", _cost_sentence(findings, dedicated), Table(columns, rows), is_table_open=True
    )


def _sums(models: Sequence[ModelFacts]) -> tuple[int, int, int, int, float, float]:
    """Updates, tokens, answers, target answers and seconds together, and the highest memory."""
    updates, tokens, answers, targets = (
        sum(getattr(facts, name) for facts in models) for name in ("updates", "tokens", "answers", "target_answers")
    )
    seconds = sum(facts.seconds for facts in models)
    return updates, tokens, answers, targets, seconds, max(facts.peak_memory_bytes for facts in models) / 2**30


def _cost_sentence(findings: Findings, dedicated: Sequence[ModelFacts]) -> str:
    ours = findings.results.model_facts(findings.models.get(OURS, ""))
    parts = []
    if ours is not None:
        memory = show_bytes(ours.peak_memory_bytes)
        parts.append(f"Ours took {show_seconds(ours.seconds)} of updates and {memory}, once for all tasks.")
    if dedicated:
        tasks = count_words(len({facts.task for facts in dedicated}), "task")
        seconds = show_seconds(sum(facts.seconds for facts in dedicated))
        parts.append(
            f"Dedicated tuning took {seconds} for {count_words(len(dedicated), 'model')} of {tasks}; it is not matched in budget."
        )
    return " ".join(parts) or "Tokens are those fed, padding not counted."


def work(findings: Findings) -> Figure | None:
    """Cells by kind: how many, how long, how much memory."""
    cells = findings.results.cells
    if not cells:
        return None
    columns = (
        Column("kind", is_number=False),
        *(Column(name) for name in ("done", "failed", "open")),
        Column("hours", digits=2),
        Column("longest cell, minutes"),
        Column("peak memory, GiB"),
    )
    rows: list[tuple[Value, ...]] = []
    for kind in dict.fromkeys(cell.kind for cell in cells):
        own = [cell for cell in cells if cell.kind == kind]
        counts = [sum(cell.status == status for cell in own) for status in ("done", "failed", "open")]
        times, memory = [cell.seconds for cell in own], max(cell.peak_memory_bytes for cell in own)
        rows.append((kind, *counts, sum(times) / 3600, max(times) / 60, memory / 2**30 or None))
    total = show_seconds(sum(cell.seconds for cell in cells))
    sentence = f"{len(cells)} cells, {total} of wall time in all."
    return Figure("work", "The work, by kind of cell", sentence, Table(columns, rows), is_table_open=True)


def failures(cells: Sequence[CellFacts]) -> Figure | None:
    """Cells that failed, with the reason."""
    rows = [(cell.cell, cell.error) for cell in cells if cell.status == "failed"]
    if not rows:
        return None
    columns = (Column("cell", is_number=False), Column("reason", is_number=False))
    sentence = "A cell that fails leaves the others going on; it is done again when the study is started again."
    return Figure("failures", "What failed", sentence, Table(columns, rows), is_table_open=True)
