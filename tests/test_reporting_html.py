"""The report holds the numbers of its claims and records, says what is open, escapes what it is given and asks no network."""

import base64
import csv
import hashlib
import io
import re
import urllib.parse
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manyicl.errors import RecordsError
from manyicl.records import EvaluationRecord
from manyicl.reporting.answers import answer, claims_table
from manyicl.reporting.charts import Axis, Frame, Names, Point, Series, line_chart, number_axis
from manyicl.reporting.effects import harness_table
from manyicl.reporting.findings import Findings, shots_axis
from manyicl.reporting.html import render_report, sections, write_report
from manyicl.reporting.tables import (
    Column,
    Table,
    count_words,
    join_words,
    show_bytes,
    show_estimate,
    show_number,
    show_seconds,
)
from manyicl.results.files import StudyResults, write_results
from report_fixtures import EVIL, METHODS, SHOTS, study_results

FIGURES = [
    "claims",
    "shot-curves",
    "family-curves",
    "differences",
    "tasks",
    "forgetting-gain",
    "forgets-less",
    "harness",
    "budget-curves",
    "robustness",
    "dedicated-differences",
    "overtaking",
    "training-seeds",
    "left-out-family",
    "training-costs",
    "work",
    "failures",
]


class Page(HTMLParser):
    """The text of a page, its tables by the CSV that stands below each, and all its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tables: dict[str, tuple[list[list[tuple[str, str]]], str]] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self.best: list[str] = []
        self._rows: list[list[tuple[str, str]]] = []
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = {name: value or "" for name, value in attrs}
        self.attributes += [(tag, name, value) for name, value in known.items()]
        self._inside.append(tag)
        if tag == "table":
            self._rows = []
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("th", "td"):
            self._rows[-1].append((known.get("data-value", ""), ""))
            if "best" in known.get("class", ""):
                self.best.append(known["data-value"])
        elif tag == "a" and "download" in known:
            self.tables[known["download"].removesuffix(".csv")] = (self._rows, known["href"])

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if {"script", "style"} & set(self._inside):
            return
        self.text.append(data)
        if {"th", "td"} & set(self._inside):
            value, shown = self._rows[-1][-1]
            self._rows[-1][-1] = (value, shown + data)

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())

    def csv(self, key: str) -> list[list[str]]:
        prefix, _, content = self.tables[key][1].partition(",")
        assert prefix == "data:text/csv;charset=utf-8"
        return list(csv.reader(io.StringIO(urllib.parse.unquote(content), newline="")))


@pytest.fixture(scope="module")
def results() -> StudyResults:
    return study_results()


@pytest.fixture(scope="module")
def html(results: StudyResults) -> str:
    return render_report(results, command="manyicl report results")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def own_records(results: StudyResults, model: str, task: str, shots: object, condition: str = "") -> list[EvaluationRecord]:
    wanted = (model, task, shots, condition)
    return [record for record in results.records if (record.model, record.task, record.shots, record.condition) == wanted]


def test_the_answer_is_that_of_the_claim(results: StudyResults, page: Page) -> None:
    found = results.claims["claims"]["beats_few_shot"]
    size, low, high = (found["at_best_shots"][end] for end in ("value", "low", "high"))
    assert found["verdict"] == "holds"
    assert low > 5
    text = page.words()
    assert (
        f"Yes: trained on every answer, the model scores {size:.1f} points more than after few-shot tuning (5), 95% interval "
        f"+{low:.1f} to +{high:.1f}." in text
    )
    shots = found["best_shots"]
    assert (
        "Mean over families of 5 held-out tasks, points on 0-100, each at its own best number of shots (ours "
        f"{shots['all_answers']} and few-shot tuning (5) {shots['few_shot_5']}). The aim of +5 points is reached, over the whole "
        "interval." in text
    )
    slope = results.claims["claims"]["more_shots_help"]
    assert f"Each doubling of demonstrations changes ours by +{slope['all_answers']['value']:.1f} (" in text
    assert "36 of 38 cells are done, 1 failed. What is open: 1 cell; what follows is known so far." in text
    assert "Claims that wait for cells: beats many-shot tuning on the last answer." in text


def few_shot_claim(value: float, low: float, high: float, verdict: str, aim: float | None = 5.0) -> dict[str, Any]:
    found = {"value": value, "low": low, "high": high, "num_tasks": 1}
    return {
        "against": "few_shot_16",
        "at_best_shots": found,
        "at_max": found,
        "best_shots": {"all_answers": 64, "few_shot_16": 16},
        "by_task": {},
        "aim": aim,
        "verdict": verdict,
    }


@pytest.mark.parametrize(
    ("claim", "lead", "aim"),
    [
        (
            few_shot_claim(6.04, 5.2, 7.0, "holds"),
            "Yes: trained on every answer, the model scores 6.0 points more than after few-shot tuning (16), "
            "95% interval +5.2 to +7.0.",
            "The aim of +5 points is reached, over the whole interval.",
        ),
        (
            few_shot_claim(6.0, 1.0, 9.0, "holds"),
            "Yes: trained on every answer, the model scores 6.0 points more than after few-shot tuning (16), "
            "95% interval +1.0 to +9.0.",
            "The aim of +5 points is reached, though part of the interval lies below it.",
        ),
        (
            few_shot_claim(-2.0, -4.0, -0.5, "fails"),
            "No: trained on every answer, the model scores 2.0 points less than after few-shot tuning (16), "
            "95% interval −4.0 to −0.5.",
            "The aim of +5 points is missed.",
        ),
        (
            few_shot_claim(1.0, -4.0, 6.5, "not shown"),
            "Not shown: trained on every answer, the model differs by +1.0 points from few-shot tuning (16), "
            "95% interval −4.0 to +6.5.",
            "The aim of +5 points is not reached, though the interval does not exclude it.",
        ),
    ],
)
def test_the_answer_follows_the_verdict(claim: dict[str, Any], lead: str, aim: str) -> None:
    claims = {"claims": {"beats_few_shot": claim}, "waiting": []}
    found = answer(Findings(StudyResults(recipe={}, records=[], models=[], corpora=[], cells=[], claims=claims)))
    assert found.lead == lead
    assert found.basis == (
        "Mean over families of 1 held-out task, points on 0-100, each at its own best number of shots (ours 64 and few-shot "
        f"tuning (16) 16). {aim}"
    )
    assert (found.points, found.status) == ([], "")


def test_the_claims_table_holds_every_claim(results: StudyResults, page: Page) -> None:
    claims = results.claims["claims"]
    table = {row[0]: row for row in claims_table(Findings(results)).rows}

    def numbers(found: dict[str, float], factor: float = 1.0) -> tuple[float, ...]:
        return tuple(round(found[end] * factor, 4) for end in ("value", "low", "high"))

    zero = claims["beats_zero_shot"]
    row = ("beats zero-shot tuning", zero["verdict"], *numbers(zero["at_best_shots"]), "points", zero["at_max"]["value"], 8.0)
    assert table["beats zero-shot tuning"] == row
    assert table["beats many-shot tuning on the last answer"][1:3] == ("open", None)
    full = claims["approaches_dedicated"]["dedicated_full"]
    verdict = {"holds": "ahead", "fails": "behind", "not shown": "no difference shown"}[full["verdict"]]
    assert table["approaches dedicated tuning, whole train split"][1:5] == (verdict, *numbers(full["difference"]))
    share = table["share of the gain of dedicated tuning, whole train split"]
    assert share[2:6] == (*numbers(full["share_of_gain"], 100), "% of its gain")
    forgets = claims["forgets_less"]
    lost = forgets["ours_less_other"]["few_shot_5"]["novels.txt"]
    row = table["forgets less than few-shot tuning (5), novels.txt"]
    assert row[1:5] == (forgets["verdicts"]["few_shot_5"], *numbers(lost, 1000))
    family = results.claims["family"]
    row = table["beats few-shot tuning (5) on a family left out (nli)"]
    assert row[1:5] == (family["verdict"], *numbers(family["at_max"]))
    assert [row[0] for row in page.csv("claims")[1:]] == list(table)


def test_every_figure_has_its_data_to_download(page: Page) -> None:
    assert list(page.tables) == FIGURES
    for key, (rows, _) in page.tables.items():
        header, *lines = page.csv(key)
        assert [shown.strip() for _, shown in rows[0]] == header, key
        assert [[value for value, _ in row] for row in rows[1:]] == lines, key
        assert lines, key


def test_the_curves_are_those_of_the_claims_and_records(results: StudyResults, page: Page) -> None:
    rows = {(row[1], row[2]): row[3:] for row in page.csv("shot-curves")[1:]}
    labels = {"in_context": "no tuning", "all_answers": "many-shot, all answers (ours)", "zero_shot": "zero-shot tuning"}
    for method, label in labels.items():
        for shots in SHOTS:
            found = results.claims["methods"][method]["held_out"][str(shots)]
            assert [float(value) for value in rows[label, str(shots)][:3]] == [found["value"], found["low"], found["high"]]
    # The worst order is the lowest of the means over families: classification and nli hold two tasks each, qa one.
    families = [("spam", "trec"), ("rte", "sick"), (EVIL,)]
    by_order = [
        np.mean([np.mean([own_records(results, "base", task, 4)[order].value for task in tasks]) for tasks in families])
        for order in range(3)
    ]
    assert float(rows["no tuning", "4"][3]) == pytest.approx(100 * min(by_order), abs=1e-3)
    assert ("TF-IDF, no language model", "0") not in rows
    family = {(row[0], row[1], row[2]): row[3] for row in page.csv("family-curves")[1:]}
    mean = np.mean([record.value for record in own_records(results, "all_answers/seed-0", "svamp", 16)])
    assert float(family["math", labels["all_answers"], "16"]) == pytest.approx(100 * mean, abs=1e-3)


def test_the_best_of_each_task_is_marked(results: StudyResults, page: Page) -> None:
    header, *rows = page.csv("tasks")
    best = results.claims["methods"]["zero_shot"]["best_shots"]
    assert best == 0
    assert header[:5] == ["task", "family", "metric", "many-shot, all answers (ours) @ max", "no tuning @ max"]
    assert f"zero-shot tuning @ {best}" in header
    assert [row[0] for row in rows] == ["spam", "trec", "rte", "sick", EVIL, "svamp"]
    values = {row[0]: row[header.index(f"zero-shot tuning @ {best}")] for row in rows}
    for task, value in values.items():
        mean = np.mean([record.value for record in own_records(results, "zero_shot/seed-0", task, best)])
        assert float(value) == pytest.approx(100 * mean, abs=1e-3)
    marked = [number for row in rows for number in row[3:] if float(number) == max(map(float, row[3:]))]
    assert page.best == marked


def test_tasks_of_the_harness_stand_beside_the_untuned_model(results: StudyResults) -> None:
    figure = harness_table(Findings(results))
    assert figure is not None
    assert [row[:2] + row[3:5] for row in figure.table.rows] == [("piqa", "acc", value, 0.02) for value in (0.5, 0.45, 0.3)]
    assert [row[5] for row in figure.table.rows] == [None, pytest.approx(-0.05), pytest.approx(-0.2)]
    assert harness_table(Findings(results.model_copy(update={"harness": []}))) is None


def test_forgetting_is_drawn_against_the_gain(results: StudyResults, page: Page) -> None:
    header, *rows = page.csv("forgetting-gain")
    assert header[4:6] == ["bits per byte, novels.txt", "bits per byte, wikipedia.txt"]
    assert [(row[0], row[1]) for row in rows if row[0] == "few-shot tuning (5)"] == [
        ("few-shot tuning (5)", "25"),
        ("few-shot tuning (5)", "50"),
        ("few-shot tuning (5)", "75"),
    ]
    assert len(rows) == 9
    base = results.claims["methods"]["in_context"]
    start = base["held_out"][str(base["best_shots"])]["value"]
    end = results.claims["budget_curves"]["few_shot_5"][-1]["at_best_shots"]["value"]
    last = next(row for row in rows if row[:2] == ["few-shot tuning (5)", "75"])
    assert float(last[6]) == pytest.approx(end - start, abs=1e-3)
    entry = next(one for one in results.claims["claims"]["forgets_less"]["models"] if one["model"] == "few_shot_5/seed-0")
    assert float(last[4]) == entry["bits_per_byte_change"]["novels.txt"]["value"]


def test_robustness_is_that_of_the_records(results: StudyResults, page: Page) -> None:
    rows = page.csv("robustness")[1:]
    conditions = [f"{row[0]}:{row[1]}" for row in rows if row[2] == "no tuning"]
    assert conditions == [
        "order:shuffled",
        "order:grouped",
        "order:reversed",
        "flipped:0.1",
        "flipped:0.5",
        "symbols:",
        "nearest:",
        "context:2048",
        "context:4096",
    ]
    found = {(f"{row[0]}:{row[1]}", row[2]): float(row[3]) for row in rows}
    means = {}
    for condition in ("order:shuffled", "flipped:0.5"):
        by_task = [
            np.mean([record.value for record in own_records(results, "all_answers/seed-0", task, 16, condition)])
            for task in ("sick", "trec")
        ]
        means[condition] = 100 * np.mean(by_task)
        assert found[condition, "many-shot, all answers (ours)"] == pytest.approx(means[condition], abs=1e-3)
    change = show_number(means["flipped:0.5"] - means["order:shuffled"], is_signed=True)
    assert f"ours {change} points." in page.words()


def test_altered_demonstrations_are_compared_on_the_same_tasks(results: StudyResults) -> None:
    late = [record for record in results.records if (record.model, record.task, record.condition) != ("base", "trec", "symbols")]
    page = Page(render_report(results.model_copy(update={"records": late})))
    assert {row[6] for row in page.csv("robustness")[1:]} == {"1"}
    assert "Mean over sick. With 50% of the answers replaced" in page.words()
    value = np.mean([record.value for record in own_records(results, "base", "sick", 16, "symbols")])
    shown = next(row for row in page.csv("robustness")[1:] if (row[0], row[2]) == ("symbols", "no tuning"))
    assert float(shown[3]) == pytest.approx(100 * value, abs=1e-3)
    none = [record for record in late if (record.model, record.task, record.condition) != ("base", "sick", "nearest")]
    none = [
        record for record in none if (record.model, record.task, record.condition) != ("all_answers/seed-0", "sick", "symbols")
    ]
    assert (
        "Open: no altered demonstrations are evaluated for all methods on a task."
        in Page(render_report(results.model_copy(update={"records": none}))).words()
    )


def test_costs_and_failures_are_those_of_the_files(page: Page) -> None:
    costs = {(row[0], row[1], row[3]): row for row in page.csv("training-costs")[1:]}
    ours = costs["many-shot, all answers (ours)", "held_out", "0"]
    assert ours[4:] == ["75", "150000", "1600", "1500", "200.0", "1.5", "0.0006"]
    assert costs["dedicated, whole train split", "one a task", ""][2] == "1"
    assert len(costs) == 8
    work = {row[0]: row[1:] for row in page.csv("work")[1:]}
    assert work["robustness"][:3] == ["0", "1", "0"]
    assert float(work["train"][3]) == pytest.approx(4 * 260 / 3600)
    assert work["train"][5] == "1.5"
    assert page.csv("failures")[1:] == [["robustness/base/rte", "<b>out of memory</b>"]]


def test_overtaking_seeds_and_family_are_those_of_the_claims(results: StudyResults, page: Page) -> None:
    points = results.claims["overtaking"]
    assert [(row[0], row[1], float(row[2]), row[5], float(row[6])) for row in page.csv("overtaking")[1:]] == [
        (
            point["task"],
            str(point["examples"]),
            point["ours"]["value"],
            str(point["our_demonstrations"]),
            point["dedicated"]["value"],
        )
        for point in points
    ]
    assert "Where the dedicated model is ahead first: sick: at 16." in page.words()
    seeds = {(row[0], row[1], row[2]): float(row[3]) for row in page.csv("training-seeds")[1:]}
    assert seeds["zero-shot tuning", "max", "1"] == results.claims["training_seeds"]["zero_shot"]["max"]["1"]
    assert {row[1]: float(row[2]) for row in page.csv("left-out-family")[1:]}["mean"] == results.claims["family"]["at_max"][
        "value"
    ]


def test_names_notes_and_errors_are_escaped(html: str, page: Page) -> None:
    assert EVIL in page.words()
    assert html.count("<script") == 1
    for raw in (EVIL, "<b>out of memory</b>", "<i>some</i>"):
        assert raw not in html
        assert raw in page.words()


def test_the_page_asks_the_network_for_nothing(html: str, page: Page) -> None:
    addresses = [value for _, name, value in page.attributes if name in ("href", "src", "action", "srcset")]
    assert len(addresses) > 20
    assert [address for address in addresses if not address.startswith(("#", "data:text/csv;"))] == []
    assert not re.search(r"url\(|@import|https?://", html)
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and "default-src" in value)
    for tag in ("style", "script"):
        content = html.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")


def test_notes_commands_and_versions_are_told(page: Page) -> None:
    text = page.words()
    assert "The model is dequantised from Q4_1: this holds for every result here." in text
    assert "The default model has probably seen <i>some</i> public sets." in text
    assert "manyicl study study.yaml manyicl report results" in text
    assert "manyicl 0.1.0 torch 2.13.0+cpu" in text
    assert "max is what fits in 2,048 tokens: 48 to 50 demonstrations, depending on task and order." in text


def test_every_chart_can_be_read_aloud(html: str, page: Page) -> None:
    charts = re.findall(r'<svg class="chart[^>]*role="img" aria-labelledby="([^"]+)"><title id="([^"]+)">[^<]+</title>', html)
    assert len(charts) == html.count('<svg class="chart')
    assert len(charts) > 15
    identifiers = [value for _, name, value in page.attributes if name == "id"]
    assert len(set(identifiers)) == len(identifiers)
    assert all(set(label.split()) <= set(identifiers) for label, _ in charts)
    targets = [value.removeprefix("#") for _, name, value in page.attributes if name == "href" and value.startswith("#")]
    assert set(targets) <= set(identifiers)


def test_the_same_results_give_the_same_page(results: StudyResults, html: str) -> None:
    assert render_report(results, command="manyicl report results") == html


def only_base(results: StudyResults) -> StudyResults:
    return study_results(["in_context"], with_sides=False)


def nothing(results: StudyResults) -> StudyResults:
    return StudyResults(recipe={"shots": [0, "max"]}, records=[], models=[], corpora=[], cells=[])


def only_validation(results: StudyResults) -> StudyResults:
    kept = [record for record in results.records if record.role == "validation"]
    return results.model_copy(update={"records": kept, "claims": {}})


def no_few_shot(results: StudyResults) -> StudyResults:
    return study_results([method for method in METHODS if method != "few_shot_5"], with_sides=False)


def one_task_late(results: StudyResults) -> StudyResults:
    kept = [record for record in results.records if (record.model, record.task) != ("all_answers/seed-0", "sick")]
    return results.model_copy(update={"records": kept, "claims": {}})


ONE_LATE = (
    "Claims that wait for cells: beats few-shot tuning; beats zero-shot tuning; beats the model that is not tuned; beats "
    "many-shot tuning on the last answer; approaches dedicated tuning; more shots help."
)
NOT_ANSWERED = "Not answered yet: ours and few-shot tuning are not both evaluated on all validation and held-out tasks."


@pytest.mark.parametrize(
    ("change", "missing", "present"),
    [
        (nothing, [*FIGURES[1:]], ["Open: no held-out task is evaluated.", "Open: nothing is tuned."]),
        (only_base, ["differences", "forgetting-gain", "budget-curves"], ["Open: no method is tuned with several seeds."]),
        (
            only_validation,
            ["shot-curves", "tasks", "robustness"],
            ["Open: no altered demonstrations are evaluated for all methods on a task."],
        ),
        (no_few_shot, ["forgetting-gain", "left-out-family"], ["Against zero-shot tuning: +"]),
        (one_task_late, ["overtaking"], [ONE_LATE]),
    ],
)
def test_what_is_missing_is_said(
    results: StudyResults, change: Callable[[StudyResults], StudyResults], missing: list[str], present: list[str]
) -> None:
    found = Page(render_report(change(results)))
    assert NOT_ANSWERED in found.words()
    assert [key for key in missing if key in found.tables] == []
    assert [words for words in present if words not in found.words()] == []
    assert "claims" in found.tables


def test_claims_are_read_as_they_were_written(results: StudyResults) -> None:
    claims = results.claims | {"few_shot_variant": "few_shot_5", "claims": {"beats_few_shot": few_shot_claim(6, 5, 7, "holds")}}
    assert "the model scores 6.0 points more" in Page(render_report(results.model_copy(update={"claims": claims}))).words()
    made = render_report(results.model_copy(update={"claims": {}}))
    assert made == render_report(results)


def test_the_command_writes_the_report(
    results: StudyResults, tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    write_results(results, tmp_path / "results")
    output = tmp_path / "out" / "report.html"
    code, printed, _ = run_cli("report", tmp_path / "results", "-o", output)
    assert (code, printed) == (0, f"{len(results.records)} records, 38 cells; written to {output}\n")
    command = f"manyicl report {tmp_path / 'results'} --output {output}"
    assert output.read_text(encoding="utf-8") == render_report(results, command=command)


def test_a_folder_without_results_is_refused(tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]) -> None:
    code, _, errors = run_cli("report", tmp_path, "-o", tmp_path / "report.html")
    assert code == 2
    assert f"{tmp_path}: holds no study.yaml. Give the folder that `manyicl study` has written its results to." in errors
    with pytest.raises(RecordsError):
        write_report(tmp_path, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_a_line_chart_is_drawn_to_scale() -> None:
    axis = Axis("x", 0.0, 10.0, ((0.0, "0"), (10.0, "10")))
    series = Series("a<b", 0, [Point(0, 0, -1, 1), Point(10, 5, 4, 6)])
    frame = Frame(width=120, height=120, left=10, right=10, top=10, bottom=10)
    names = Names("key", "<title>", "it's")
    chart = line_chart([series], axis, Axis("y", -5, 5, ((0.0, "0"),)), names, frame=frame)
    assert '<path class="line" d="M10.0,60.0L110.0,10.0"/>' in chart
    assert '<path class="band" d="M10.0,50.0L110.0,0.0L110.0,20.0L10.0,70.0Z"/>' in chart
    assert chart.count('class="marker"') == 2
    assert 'data-method="a&lt;b"' in chart
    assert '<title id="key-title">&lt;title&gt;</title><desc id="key-description">it&#39;s</desc>' in chart
    alone = line_chart([Series("a", 0, [Point(0, 0, -1, 1)])], axis, axis, names, frame=frame, has_bands=False)
    assert 'class="line"' not in alone
    assert '<path class="whisker" d="M10.0,120.0L10.0,100.0"/>' in alone


def test_shots_have_a_logarithmic_scale() -> None:
    axis, places = shots_axis(["max", 0, 4, 16, 64], "shots")
    assert list(places) == [0, 4, 16, 64, "max"]
    assert places[16] - places[4] == pytest.approx(2.0)
    assert places[64] - places[16] == pytest.approx(2.0)
    assert [text for _, text in axis.ticks] == ["0", "4", "16", "64", "max"]
    assert shots_axis([1, 2, 4], "shots")[1] == {1: 0.0, 2: 1.0, 4: 2.0}


def test_number_axes_hold_all_values_with_round_ticks() -> None:
    axis = number_axis("score", [13.2, 61.0])
    assert (axis.low, axis.high) == (10.0, 70.0)
    assert [text for _, text in axis.ticks] == ["10", "20", "30", "40", "50", "60", "70"]
    small = number_axis("bits", [-0.004, 0.011], marks_zero=True)
    assert [text for _, text in small.ticks] == ["−0.005", "0.000", "0.005", "0.010", "0.015"]
    assert [text for _, text in number_axis("tokens", [0, 150_000]).ticks] == ["0", "50k", "100k", "150k"]
    flat = number_axis("score", [40.0, 40.0])
    assert flat.low < 40 < flat.high


def test_numbers_are_written_one_way() -> None:
    assert show_number(-1234.56) == "−1,234.6"
    assert show_number(-0.04) == "0.0"
    assert show_number(2, 0, is_signed=True) == "+2"
    assert show_estimate({"value": 1.94, "low": -0.26, "high": 4.12}) == "+1.9 (−0.3 to +4.1)"
    assert [show_bytes(count) for count in (0, 3 * 2**29, 2**20)] == ["–", "1.5 GiB", "1 MiB"]
    assert [show_seconds(seconds) for seconds in (40, 720, 12_240)] == ["40 s", "12 min", "3.4 h"]
    assert join_words(["a", "b", "c"]) == "a, b and c"
    assert (join_words(["a"]), join_words([])) == ("a", "")
    assert [count_words(count, "task") for count in (1, 1000)] == ["1 task", "1,000 tasks"]


def test_csv_keeps_commas_quotes_and_every_digit() -> None:
    table = Table((Column("name", is_number=False), Column("value")), [('a, "b"', 0.123456789), ("c", None)])
    assert table.csv() == 'name,value\r\n"a, ""b""",0.123456789\r\nc,\r\n'
    assert [table.columns[1].show(row[1]) for row in table.rows] == ["0.1", "–"]


def test_sections_stand_in_reading_order(results: StudyResults) -> None:
    assert [section.key for section in sections(Findings(results))] == [
        "shots",
        "tasks",
        "forgetting",
        "budget",
        "robustness",
        "dedicated",
        "seeds",
        "family",
        "costs",
    ]


def test_a_gain_that_may_be_none_has_no_share(results: StudyResults) -> None:
    claims = results.claims["claims"]
    nothing = {"value": None, "low": float("nan"), "high": None, "num_tasks": 5}
    full = claims["approaches_dedicated"]["dedicated_full"] | {"share_of_gain": nothing}
    dedicated = claims["approaches_dedicated"] | {"dedicated_full": full}
    changed = results.claims | {"claims": claims | {"approaches_dedicated": dedicated}}
    found = Findings(results.model_copy(update={"claims": changed}))
    table = {row[0]: row for row in claims_table(found).rows}
    assert table["share of the gain of dedicated tuning, whole train split"][2:5] == (None, None, None)
    own = show_estimate(full["difference"])
    assert f"; whole train split {own} points." in " ".join(answer(found).points)


def test_dedicated_tuning_that_learns_nothing_is_said(results: StudyResults) -> None:
    nothing = {"tasks": [], "not_learnt": {"sick": 1.25}, "best_shots": 16}
    changed = results.claims | {"claims": results.claims["claims"] | {"approaches_dedicated": nothing}}
    text = Page(render_report(results.model_copy(update={"claims": changed}))).words()
    assert "Dedicated tuning, one model a task, learns none of the held-out tasks." in text


def test_tasks_that_dedicated_tuning_does_not_learn_are_listed(results: StudyResults) -> None:
    claim = results.claims["claims"]["approaches_dedicated"] | {"not_learnt": {"rte": -2.0, "spam": 4.96}}
    changed = results.claims | {"claims": results.claims["claims"] | {"approaches_dedicated": claim}}
    text = Page(render_report(results.model_copy(update={"claims": changed}))).words()
    assert "is less than 5 points above the commonest label: rte (−2.0) and spam (+5.0)." in text
