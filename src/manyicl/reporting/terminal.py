"""Tables of records on a terminal or as Markdown: tasks by shots, one line per model."""

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from manyicl.records import CurvePoint, EvaluationRecord, Shots, mean_curve, shot_order, task_curves


def curve_rows(records: Sequence[EvaluationRecord]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the shot-curve table, on 0-100.

    One row per task and model, then the mean over all tasks; a shot count that does not fit a task is shown as a dash, and
    a mean says how many tasks reach it.
    """
    tasks = {record.task: record for record in records}
    several_methods = len({record.method for record in records}) > 1
    points = task_curves(records) + mean_curve(records)
    shots = sorted({point.shots for point in points}, key=shot_order)
    lines: dict[tuple[str, str, str], dict[Shots, CurvePoint]] = {}
    for point in points:
        lines.setdefault((point.task, point.method, point.model), {})[point.shots] = point
    rows = []
    for (task, method, model), line in lines.items():
        metric = tasks[task].metric if task in tasks else ""
        cells = [_cell(line.get(count), num_tasks=len(tasks) if task not in tasks else 1) for count in shots]
        rows.append([task, metric, f"{method}, {model}" if several_methods else model, *cells])
    return ["task", "metric", "model", *map(str, shots)], rows


def _cell(point: CurvePoint | None, *, num_tasks: int) -> str:
    if point is None:
        return "-"
    text = f"{100 * point.mean:.1f}"
    if not math.isnan(point.low):
        text += f" ±{100 * (point.high - point.mean):.1f}"
    return text if point.num_tasks == num_tasks else f"{text} ({point.num_tasks} tasks)"


def print_curves(records: Sequence[EvaluationRecord], console: Console | None = None) -> None:
    """Print the shot-curve table; values are means over seeds with the half-width of their 95% interval.

    Nothing is cut off: where the terminal is narrow, cells are folded.
    """
    console = console or Console()
    header, rows = curve_rows(records)
    table = Table()
    for place, name in enumerate(header):
        table.add_column(Text(name), justify="left" if place < 3 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    if rows:
        console.print(table)
    console.print(Text(caption(records)))


def markdown_curves(records: Sequence[EvaluationRecord]) -> str:
    """The shot-curve table as Markdown."""
    header, rows = curve_rows(records)
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * 3}{'---:|' * (len(header) - 3)}"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([*lines, "", caption(records)])


def caption(records: Sequence[EvaluationRecord]) -> str:
    """What a reader must know beside the table."""
    if not records:
        return "No records: none of the numbers of shots asked for fits."
    seeds = len({record.seed for record in records})
    queries = sorted({record.num_queries for record in records})
    notes = sorted({f"{record.model}: {record.model_note}" for record in records if record.model_note})
    span = f"{queries[0]}" if queries[0] == queries[-1] else f"{queries[0]} to {queries[-1]}"
    what = (
        f"mean over {seeds} orders of demonstrations ± half of the 95% t interval" if seeds > 1 else "one order of demonstrations"
    )
    text = f"Columns are shots; 0-100; {what}; {span} queries a task."
    return text + ("" if not notes else " " + "; ".join(notes) + ".")
