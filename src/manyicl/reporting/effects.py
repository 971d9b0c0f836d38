"""Figures beside the score: forgetting against gain, robustness, dedicated tuning, training seeds, a family left out."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from manyicl.records import EvaluationRecord, Shots
from manyicl.reporting.charts import SMALL, DotRow, Names, Point, Series, dot_chart, line_chart, number_axis
from manyicl.reporting.curves import SCORE, Figure, difference_figure, interval_point, legend
from manyicl.reporting.findings import DEDICATED, NUM_DRAWS, Findings, in_sentence, method_label, shots_axis
from manyicl.reporting.tables import Column, Table, Value, join_words, show_estimate, show_interval, show_number
from manyicl.results.calibrated import CALIBRATED
from manyicl.results.contrasts import Term, estimate
from manyicl.results.dedicated import LEAST_GAIN
from manyicl.results.files import BASE
from manyicl.results.forgetting_card import CHAT
from manyicl.results.readings import BASE_METHOD, OURS


def forgetting_against_gain(findings: Findings) -> Figure | None:
    """Each snapshot by what it lost of plain text and what it gained on held-out tasks over the model that is not tuned."""
    entries = _snapshots(findings)
    if not entries:
        return None
    methods = list(dict.fromkeys(entry["method"] for entry in entries))
    corpora = list(dict.fromkeys(corpus for entry in entries for corpus in entry["bits_per_byte_change"]))
    charts = [(corpus, _scatter(findings, entries, corpus, number)) for number, corpus in enumerate(corpora)]
    columns = (
        Column("method", is_number=False),
        *(Column(name) for name in ("updates", "tokens", "target answers")),
        *(Column(f"bits per byte, {corpus}", digits=4, is_signed=True) for corpus in corpora),
        Column("gain in points", is_signed=True),
        *(Column(name, is_signed=True) for name in ("chat questions, points", "chat low", "chat high")),
    )
    rows = [
        (
            method_label(entry["method"]),
            *(entry[name] for name in ("updates", "tokens", "target_answers")),
            *(_change(entry, corpus) for corpus in corpora),
            entry["gain"],
            *_chat_ends(entry["chat_change"]),
        )
        for entry in entries
    ]
    sentence = (
        "Up is better, left is better: a method that forgets nothing because it learns nothing stands at the lower left. One "
        "marker per snapshot, the whole budget larger. The gain is that at the method's best shots over the model that is not "
        "tuned, at its own."
    )
    return Figure("forgetting-gain", "Forgetting against gain", sentence, Table(columns, rows), charts, legend(findings, methods))


def _change(entry: Mapping[str, Any], corpus: str) -> float | None:
    change = entry["bits_per_byte_change"].get(corpus)
    return change["value"] if change else None


def _chat_ends(change: Mapping[str, Any] | float | None) -> tuple[Value, Value, Value]:
    """Value and interval; results of an earlier version have no interval."""
    return _ends(change) if isinstance(change, Mapping) else (change, None, None)


def _snapshots(findings: Findings) -> list[dict[str, Any]]:
    """Entries of the forgetting card with the gain of the same snapshot; none where either is missing."""
    claim, reading = findings.claim("forgets_less"), findings.readings().get(BASE_METHOD)
    base = reading["held_out"].get(str(reading["best_shots"])) if reading else None
    if not claim or not base:
        return []
    scores = {
        (method, point["updates"]): point["at_best_shots"]
        for method, points in findings.claims.get("budget_curves", {}).items()
        for point in points
        if point["at_best_shots"]
    }
    judged = {
        facts.model for model in findings.models.values() for facts in findings.results.models if _is_on_way(facts.model, model)
    }
    return [
        dict(entry) | {"gain": round(scores[key]["value"] - base["value"], 3)}
        for entry in claim["models"]
        if entry["model"] in judged and (key := (entry["method"], entry["updates"])) in scores
    ]


def _is_on_way(model: str, final: str) -> bool:
    """Whether weights are `final`, or a snapshot on the way there."""
    return model == final or model.startswith(f"{final}/")


def _scatter(findings: Findings, entries: Sequence[Mapping[str, Any]], corpus: str, number: int) -> Any:
    known = [entry for entry in entries if corpus in entry["bits_per_byte_change"]]
    changes = [entry["bits_per_byte_change"][corpus] for entry in known]
    x = number_axis("change in bits per byte", [change[end] for change in changes for end in ("low", "high")], marks_zero=True)
    y = number_axis("gain over no tuning, points", [entry["gain"] for entry in known], marks_zero=True)
    series = []
    for method in dict.fromkeys(entry["method"] for entry in known):
        points = []
        for entry in (entry for entry in known if entry["method"] == method):
            change = entry["bits_per_byte_change"][corpus]
            note = (
                f"{method_label(method)}, {show_number(entry['tokens'], 0)} tokens: {show_number(entry['gain'], is_signed=True)}"
            )
            note += f" points, {show_estimate(change, 3)} bits per byte"
            ends = {"x_low": change["low"], "x_high": change["high"]}
            points.append(Point(change["value"], entry["gain"], **ends, note=note, is_large=entry["is_final"]))
        series.append(Series(method, findings.style(method), points, is_main=method == OURS))
    names = Names(f"forgetting-{number}", f"Gain by forgetting, {corpus}", "A line per method, from snapshot to snapshot.")
    return line_chart(series, x, y, names, has_bands=False)


def harness_table(findings: Findings) -> Figure | None:
    """Tasks of lm-evaluation-harness under each method, beside the model that is not tuned."""
    scores = {(facts.model, facts.task, facts.metric): facts for facts in findings.results.harness}
    columns = (
        *(Column(name, is_number=False) for name in ("task", "metric", "method")),
        Column("score", digits=3),
        Column("standard error", digits=3),
        Column("change from no tuning", digits=3, is_signed=True),
    )
    rows: list[tuple[Value, ...]] = []
    for facts in sorted(scores.values(), key=lambda facts: (facts.task, facts.metric)):
        base = scores.get((BASE, facts.task, facts.metric))
        change = None if base is None or base is facts else facts.value - base.value
        rows.append((facts.task, facts.metric, method_label(facts.method), facts.value, facts.standard_error, change))
    sentence = "As the harness reports them, with the shots that each task asks for; final weights."
    table = Table(columns, rows)
    return Figure("harness", "Tasks of lm-evaluation-harness", sentence, table, is_table_open=True) if rows else None


_KINDS = {
    "order": "order of the same demonstrations",
    "flipped": "share of answers replaced by another label",
    "symbols": "other",
    "nearest": "other",
    "context": "tokens of context, filled",
}


_UNVALUED = {"symbols": "labels as symbols", "nearest": "most similar ones"}


def robustness(findings: Findings) -> Figure | None:
    """Scores with altered demonstrations: a row per condition, a dot per method; over tasks that have all of them."""
    groups = _by_condition(findings)
    tasks = sorted(set.intersection(*(set(own) for by_method in groups.values() for own in by_method.values()))) if groups else []
    if not tasks:
        return None
    found = {
        condition: {method: _mean_over_tasks(own, tasks) for method, own in by_method.items()}
        for condition, by_method in sorted(groups.items(), key=lambda item: _condition_order(item[0]))
    }
    rows: list[tuple[Value, ...]] = []
    lines: list[DotRow] = []
    for condition, by_method in found.items():
        kind, _, value = condition.partition(":")
        heading = _KINDS.get(kind, kind)
        if heading not in [line.label for line in lines if line.is_heading]:
            lines.append(DotRow(heading, (), is_heading=True))
        dots = [
            (
                method,
                findings.style(method),
                interval_point(one, f"{method_label(method)}: {show_estimate(one, is_signed=False)}"),
            )
            for method, one in by_method.items()
        ]
        lines.append(DotRow(value or _UNVALUED.get(kind, kind), dots))
        rows += [(kind, value, method_label(method), *_ends(one), one["num_tasks"]) for method, one in by_method.items()]
    ends = [one[end] for by_method in found.values() for one in by_method.values() for end in ("low", "high")]
    names = Names("robustness-dots", "Score by what was done to the demonstrations", "A dot and its 95% interval per method.")
    methods = list(dict.fromkeys(method for by_method in found.values() for method in by_method))
    columns = (
        *(Column(name, is_number=False) for name in ("condition", "value", "method")),
        *(Column(name) for name in ("score", "low", "high", "tasks")),
    )
    return Figure(
        "robustness",
        "Altered demonstrations",
        _robustness_sentence(tasks, found),
        Table(columns, rows),
        [("", dot_chart(lines, number_axis(SCORE, ends), names))],
        legend(findings, methods),
    )


def _condition_order(condition: str) -> tuple[int, float, str]:
    kind, _, value = condition.partition(":")
    is_number = value.replace(".", "", 1).isdecimal()
    place = list(_KINDS).index(kind) if kind in _KINDS else len(_KINDS)
    return place, float(value) if is_number else (0.0 if value == "shuffled" else 1.0), condition


def _by_condition(findings: Findings) -> dict[str, dict[str, dict[str, list[EvaluationRecord]]]]:
    """Records by condition, method and task, ordered by seed; chat questions and calibrated scores have their own figures."""
    groups: dict[str, dict[str, dict[str, list[EvaluationRecord]]]] = {}
    methods = {model: method for method, model in findings.models.items()}
    for record in sorted(findings.results.records, key=lambda record: record.seed):
        if record.model in methods and record.condition and record.condition not in (CHAT, CALIBRATED):
            by_method = groups.setdefault(record.condition, {})
            by_method.setdefault(methods[record.model], {}).setdefault(record.task, []).append(record)
    return groups


def _mean_over_tasks(by_task: Mapping[str, list[EvaluationRecord]], tasks: Sequence[str]) -> dict[str, Any]:
    """The headline of some tasks, in points."""
    return estimate({task: [Term(1.0, by_task[task])] for task in tasks}, num_draws=NUM_DRAWS).as_json()


def _ends(found: Mapping[str, Any]) -> tuple[float, float, float]:
    return float(found["value"]), float(found["low"]), float(found["high"])


def _robustness_sentence(tasks: Sequence[str], found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Over which tasks, and what the largest share of wrong labels costs each method."""
    start = f"Mean over {join_words(tasks)}. "
    usual = found.get("order:shuffled", {})
    flipped = [condition for condition in found if condition.startswith("flipped:")]
    if not usual or not flipped:
        return f"{start}Every other figure has shuffled demonstrations."
    parts = [
        f"{in_sentence(method)} {show_number(found[flipped[-1]][method]['value'] - one['value'], is_signed=True)}"
        for method, one in usual.items()
        if method in found[flipped[-1]]
    ]
    share = f"{100 * float(flipped[-1].partition(':')[2]):.0f}%"
    return f"{start}With {share} of the answers replaced by another label, the score changes by: {join_words(parts)} points."


def overtaking(findings: Findings) -> Figure | None:
    """Ours and dedicated tuning by number of examples, one panel a task."""
    points: list[Mapping[str, Any]] = findings.claims.get("overtaking", [])
    known = [point for point in points if point["ours"]]
    if not known:
        return None
    charts, sentences = [], []
    style = {"ours": findings.style(OURS), "dedicated": findings.style("dedicated_full")}
    for number, task in enumerate(dict.fromkeys(point["task"] for point in known)):
        own = [point for point in known if point["task"] == task]
        counts: list[Shots] = ["max" if point["examples"] == "all" else point["examples"] for point in own]
        x, places = shots_axis(counts, "examples")
        y = number_axis("score", [point[name][end] for point in own for name in style for end in ("low", "high")])
        series = []
        for name, words in (("ours", OURS), ("dedicated", "dedicated_full")):
            drawn = [
                Point(places[count], *_ends(point[name]), note=f"{name}, {count}: {show_estimate(point[name], is_signed=False)}")
                for count, point in zip(counts, own, strict=True)
            ]
            series.append(Series(words, style[name], drawn, is_main=name == "ours"))
        names = Names(f"overtaking-{number}", f"Ours and dedicated tuning by examples, {task}", "Two lines with bands.")
        charts.append((task, line_chart(series, x, y, names, frame=SMALL)))
        ahead = next((point["examples"] for point in own if point["dedicated"]["value"] > point["ours"]["value"]), None)
        sentences.append(
            f"{task}: " + (f"from {ahead} examples on" if ahead == own[0]["examples"] else f"at {ahead}" if ahead else "not")
        )
    columns = (
        *(Column(name, is_number=False) for name in ("task", "examples")),
        *(Column(name) for name in ("ours", "low", "high", "our demonstrations", "dedicated", "dedicated low", "dedicated high")),
    )
    rows = [
        (point["task"], str(point["examples"]), *_ends(point["ours"]), point["our_demonstrations"], *_ends(point["dedicated"]))
        for point in known
    ]
    methods = [(OURS, method_label(OURS), style["ours"]), ("dedicated_full", "dedicated tuning", style["dedicated"])]
    sentence = (
        f"Where the dedicated model is ahead first: {'; '.join(sentences)}. max: all examples, of which ours holds what fits."
    )
    return Figure("overtaking", "Where dedicated tuning overtakes", sentence, Table(columns, rows), charts, methods, True)


def training_seeds(findings: Findings) -> Figure | None:
    """The headline of each training seed, a row per method and shots, a dot per seed."""
    spread: Mapping[str, Mapping[str, Mapping[str, float]]] = findings.claims.get("training_seeds", {})
    if not spread:
        return None
    lines, rows = [], []
    for method, by_shots in spread.items():
        for shots, by_seed in by_shots.items():
            if not by_seed:
                continue
            values = list(by_seed.values())
            # A line from the lowest to the highest seed, which is no interval.
            label = f"{method_label(method).removesuffix(' (ours)')} @ {shots}"
            note = f"{label}: {', '.join(show_number(value) for value in values)}"
            mean = Point(statistics.fmean(values), 0.0, x_low=min(values), x_high=max(values), note=note)
            dots = [("", findings.style(method), mean)]
            lines.append(DotRow(label, dots))
            rows += [(method_label(method), shots, int(seed), value) for seed, value in by_seed.items()]
    names = Names("seeds-dots", "Score by training seed", "The mean over seeds, and a line from the lowest to the highest.")
    x = number_axis(SCORE, [float(row[3]) for row in rows])
    columns = (*(Column(name, is_number=False) for name in ("method", "shots")), Column("training seed"), Column("score"))
    spans = [max(by.values()) - min(by.values()) for by_shots in spread.values() for by in by_shots.values() if len(by) > 1]
    widest = f"; the widest spread is {show_number(max(spans))} points" if spans else ""
    sentence = f"The same method tuned again with other seeds{widest}. Lines run from the lowest seed to the highest."
    return Figure(
        "training-seeds", "Spread over training seeds", sentence, Table(columns, rows), [("", dot_chart(lines, x, names))]
    )


def left_out_family(findings: Findings) -> Figure | None:
    """Ours against few-shot tuning where a whole family was not trained on."""
    claim = findings.claims.get("family")
    if not claim:
        return None
    label, mean = method_label(claim["against"]), claim["at_max"]
    sentence = (
        f"Trained without any task of {claim['family']}, ours differs from {label} by "
        f"{show_number(mean['value'], is_signed=True)} points at max shots, 95% interval {show_interval(mean)}: "
        f"{claim['verdict']}. Learning rates are those of the main setting, in which tasks of the family are trained on."
    )
    found = [
        (method_label(method), findings.style(method), {"mean": one["at_max"], **one["by_task"]})
        for method, one in claim["by_method"].items()
    ]
    return difference_figure("left-out-family", "A whole family left out", sentence, found)


def dedicated_differences(findings: Findings) -> Figure | None:
    """Ours less dedicated tuning, on the tasks that it can learn."""
    claim = findings.claim("approaches_dedicated")
    if not claim or not claim["tasks"]:
        return None
    found = [(method_label(method), findings.style(method), claim[method]["by_task"]) for method in DEDICATED]
    others = [f"{task} ({show_number(gain, is_signed=True)})" for task, gain in claim["not_learnt"].items()]
    sentence = f"Ours at {claim['best_shots']} shots, dedicated models at none." + (
        f" Not among them, as dedicated tuning on the whole train split is less than {LEAST_GAIN:.0f} points above the commonest "
        f"label: {join_words(others)}."
        if others
        else ""
    )
    return difference_figure("dedicated-differences", "Ours against a model of its own for each task", sentence, found)
