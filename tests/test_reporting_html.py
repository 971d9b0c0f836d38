"""The page of a report: its charts are to scale, what is open is said, what it is given is escaped, and no network is asked."""

import base64
import hashlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from manyicl.errors import RecordsError
from manyicl.reporting.charts import Axis, Frame, Names, Point, Series, line_chart, number_axis
from manyicl.reporting.findings import Findings, shots_axis
from manyicl.reporting.html import KINDS, render_report, sections, write_report
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
from report_fixtures import EVIL, METHODS, Page, study_results

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
    "causes-labels",
    "causes-choice",
    "causes-seeds",
    "causes-budget",
    "left-out-family",
    "training-costs",
    "work",
    "failures",
]


@pytest.fixture(scope="module")
def results() -> StudyResults:
    return study_results()


@pytest.fixture(scope="module")
def html(results: StudyResults) -> str:
    return render_report(results, command="manyicl report results")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_every_figure_has_its_data_to_download(page: Page) -> None:
    assert list(page.tables) == FIGURES
    for key, (rows, _) in page.tables.items():
        header, *lines = page.csv(key)
        assert [shown.strip() for _, shown in rows[0]] == header, key
        assert [[value for value, _ in row] for row in rows[1:]] == lines, key
        assert lines, key


def test_every_figure_says_what_makes_it(html: str, results: StudyResults) -> None:
    said = re.findall(r'<p class="command">Made by <code>(.*?)</code>, then <code>manyicl report results</code></p>', html)
    assert len(said) == len(FIGURES)
    assert said[0] == "manyicl study study.yaml"
    by_key = {section.key: section for section in sections(Findings(results), command="manyicl report results")}
    assert by_key["robustness"].commands[0] == "manyicl study study.yaml --only train,robustness"
    assert by_key["shots"].commands == ["manyicl study study.yaml --only train,evaluate", "manyicl report results"]
    assert by_key["costs"].commands[0] == "manyicl study study.yaml"
    assert set(by_key) - set(KINDS) == {"costs"}


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
        "causes",
        "family",
        "costs",
    ]
