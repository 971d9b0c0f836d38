"""What stands behind the claims, as tables: differences by training seed and by budget, and what the choice of shots costs."""

from collections.abc import Mapping
from typing import Any

from manyicl.reporting.curves import Figure
from manyicl.reporting.findings import Findings, method_label
from manyicl.reporting.tables import Column, Table, Value

_ENDS = tuple(Column(name, is_signed=True) for name in ("difference", "low", "high"))


def tables(findings: Findings) -> list[Figure | None]:
    """All of them; None for what was not evaluated."""
    return [
        one_label_shares(findings),
        costs_of_choice(findings),
        differences_by_seed("causes-seeds", "Ours against others by training seed", _found(findings, "by_seed")),
        differences_by_budget(findings),
    ]


def one_label_shares(findings: Findings) -> Figure | None:
    """How often each method gives its commonest label, task by task."""
    rows: list[tuple[Value, ...]] = []
    for task, one in _found(findings, "one_label").items():
        rows += [
            (task, method_label(method), *(100 * value for value in (own["at_best_shots"], own["at_max"], one["right"])))
            for method, own in one["methods"].items()
        ]
    columns = (
        *(Column(name, is_number=False) for name in ("task", "method")),
        *(Column(name, digits=0) for name in ("commonest answer at its best shots, %", "at max, %", "commonest right label, %")),
    )
    sentence = (
        "Held-out label tasks. A method that gives one label to nearly all queries reads nothing of them; its accuracy is that "
        "label's share, its macro-F1 is low, and both move with whatever moves the label."
    )
    table = Table(columns, rows)
    return Figure("causes-labels", "How often one label is given", sentence, table, is_table_open=True) if rows else None


def differences_by_seed(key: str, title: str, found: Mapping[str, Any]) -> Figure | None:
    """Ours less each other method by training seed, and the mean over seeds with its verdict.

    Args:
        key: Name of the figure in the report.
        title: Its heading.
        found: `by_seed` of the claims' causes, or of the second reading.
    """
    rows: list[tuple[Value, ...]] = []
    for other, by_shots in found.items():
        for shots, one in by_shots.items():
            rows += [(method_label(other), shots, seed, *_ends(own), "") for seed, own in one["by_seed"].items()]
            rows.append((method_label(other), shots, "mean", *_ends(one["mean"]), one["verdict"]))
    columns = tuple(Column(name, is_number=False) for name in ("ours against", "shots", "training seed"))
    sentence = (
        "Ours less the other method, each seed against the same seed. Intervals are over tasks, queries and orders of "
        "demonstrations; how far the seeds lie apart says what one training run is worth."
    )
    table = Table((*columns, *_ENDS, Column("verdict", is_number=False)), rows)
    return Figure(key, title, sentence, table, is_table_open=True) if rows else None


def differences_by_budget(findings: Findings) -> Figure | None:
    """Ours less each other method from snapshot to snapshot."""
    rows: list[tuple[Value, ...]] = []
    for other, points in _found(findings, "by_budget").items():
        rows += [
            (method_label(other), point["tokens"], name.removeprefix("at_").replace("_", " "), *_ends(point[name]))
            for name in ("at_best_shots", "at_max")
            for point in points
        ]
    columns = (Column("ours against", is_number=False), Column("tokens"), Column("shots", is_number=False))
    sentence = (
        "Ours less the other method after each share of the budget, with the orders of demonstrations that all snapshots have."
    )
    table = Table((*columns, *_ENDS), rows)
    return Figure("causes-budget", "Ours against others by budget", sentence, table, is_table_open=True) if rows else None


def costs_of_choice(findings: Findings) -> Figure | None:
    """What the shots that validation tasks choose cost on held-out tasks."""
    found = _found(findings, "choice")
    rows: list[tuple[Value, ...]] = [
        (method_label(method), one["chosen"], one["highest"], one["cost"]) for method, one in found.items()
    ]
    columns = (
        *(Column(name, is_number=False) for name in ("method", "shots chosen", "best shots on held-out tasks")),
        Column("points lost"),
    )
    sentence = (
        "Held-out tasks choose nothing; this is what each method would have more on them at the shots that are best there, which "
        "no one may choose."
    )
    table = Table(columns, rows)
    return Figure("causes-choice", "What the choice of shots costs", sentence, table, is_table_open=True) if rows else None


def _found(findings: Findings, name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = findings.claims.get("causes", {}).get(name, {})
    return found


def _ends(found: Mapping[str, Any]) -> tuple[float, float, float]:
    return float(found["value"]), float(found["low"]), float(found["high"])
