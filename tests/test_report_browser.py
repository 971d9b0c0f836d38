"""The report in Chromium: curves have a size, tables sort by click and key, nothing is fetched, dark differs, CSV downloads."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from manyicl.results.files import write_results
from report_fixtures import EVIL, study_results

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.slow
PUBLISHED = Path(__file__).parents[1] / "docs" / "results" / "study.html"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from manyicl.reporting.html import write_report

    folder = tmp_path_factory.mktemp("study")
    write_results(study_results(), folder / "results")
    write_report(folder / "results", folder / "report.html")
    return folder / "report.html"


class Opened:
    """A page with what it has said and asked for."""

    def __init__(self, browser: "Browser", report: Path, **options: Any) -> None:
        self.page: Page = browser.new_page(**options)
        self.said: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", lambda dialog: self.said.append(f"dialog {dialog.message}"))
        self.page.goto(report.as_uri())


@pytest.fixture
def opened(browser: "Browser", report: Path) -> Iterator[Opened]:
    found = Opened(browser, report, viewport={"width": 1200, "height": 800}, color_scheme="light")
    yield found
    found.page.close()


def column(page: "Page", figure: str, place: int) -> list[str]:
    cells: list[str] = page.eval_on_selector_all(
        f"#{figure} tbody tr", "(rows, place) => rows.map((row) => row.children[place].dataset.value)", place
    )
    return cells


def test_nothing_is_said_and_nothing_asked_for(opened: Opened, report: Path) -> None:
    for details in opened.page.query_selector_all("summary"):
        details.click()
    for button in opened.page.query_selector_all(".switch button"):
        button.click()
    assert opened.said == []
    assert opened.requests == [report.as_uri()]
    assert EVIL in opened.page.inner_text("#tasks")


def test_the_published_report_is_drawn_sorts_and_says_nothing(browser: "Browser") -> None:
    found = Opened(browser, PUBLISHED, viewport={"width": 1200, "height": 800})
    page = found.page
    assert "95% interval" in page.locator("header").inner_text()
    widths = page.eval_on_selector_all(
        "figure svg.chart",
        "(charts) => charts.filter((each) => each.closest('[hidden]') === null).map((each) => each.clientWidth)",
    )
    assert len(widths) > 10
    assert min(widths) > 150
    headings = page.locator("figure thead th:first-child button, #claims thead th:first-child button")
    for place in range(headings.count()):
        headings.nth(place).dispatch_event("click")
    assert page.locator('thead th:first-child[aria-sort="ascending"], thead th:first-child[aria-sort="descending"]').count() == (
        headings.count()
    )
    assert headings.count() > 10
    assert (found.said, found.requests) == ([], [PUBLISHED.as_uri()])
    page.close()


def test_the_answer_stands_on_the_first_screen(opened: Opened) -> None:
    box = opened.page.locator(".lead").bounding_box()
    contents = opened.page.locator("nav").bounding_box()
    assert box is not None
    assert contents is not None
    assert 0 < box["y"] < 300
    assert contents["y"] + contents["height"] < 800


def test_curves_are_drawn(opened: Opened) -> None:
    boxes = opened.page.eval_on_selector_all(
        "#shot-curves .view:not([hidden]) .line",
        "(lines) => lines.map((line) => { const box = line.getBoundingClientRect(); return [box.width, box.height]; })",
    )
    assert len(boxes) == 5
    assert all(width > 300 and height > 5 for width, height in boxes)
    colours = opened.page.eval_on_selector_all(
        "#shot-curves .view:not([hidden]) .line", "(lines) => lines.map((line) => getComputedStyle(line).stroke)"
    )
    assert len(set(colours)) == 5
    panels = opened.page.eval_on_selector_all("#family-curves svg.chart", "(charts) => charts.map((chart) => chart.clientHeight)")
    assert len(panels) == 4
    assert min(panels) > 100


def test_a_click_sorts_a_table(opened: Opened) -> None:
    page = opened.page
    before = column(page, "tasks", 4)
    heading = page.locator("#tasks thead th").nth(4)
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert column(page, "tasks", 4) == sorted(before, key=float, reverse=True)
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert column(page, "tasks", 4) == sorted(before, key=float)
    page.locator("#tasks thead th").nth(0).locator("button").click()
    assert heading.get_attribute("aria-sort") is None
    assert column(page, "tasks", 0) == [EVIL, "rte", "sick", "spam", "svamp", "trec"]


def test_the_keyboard_sorts_a_table_and_what_is_missing_comes_last(opened: Opened) -> None:
    page = opened.page
    page.locator("#training-costs thead th").nth(0).locator("button").click()
    assert column(page, "training-costs", 3)[0] == ""
    # Training seeds, then learning rates: the dedicated models, now first, have neither.
    jointly_tuned = [facts for facts in study_results().models if facts.is_final and not facts.task]
    for place in (3, 10):
        for key in ("Enter", "Space"):
            page.locator("#training-costs thead th").nth(place).locator("button").focus()
            page.keyboard.press(key)
            values = column(page, "training-costs", place)
            assert values[-1] == ""
            known = [float(value) for value in values[:-1]]
            assert known == sorted(known, reverse=key == "Enter")
            assert len(known) == len(jointly_tuned)


def test_a_switch_shows_one_view(opened: Opened) -> None:
    page = opened.page
    buttons = page.locator("#budget-curves .switch button")
    assert buttons.all_inner_texts() == ["tokens fed", "answers that were targets", "seconds of updates"]
    buttons.nth(1).focus()
    page.keyboard.press("Enter")
    assert [buttons.nth(place).get_attribute("aria-pressed") for place in range(3)] == ["false", "true", "false"]
    assert page.locator("#budget-curves .view:visible svg title").first.text_content() == "Score by answers that were targets"
    assert page.locator("#budget-curves .view:visible").count() == 1


def test_a_method_can_be_hidden(opened: Opened) -> None:
    page = opened.page
    lines = page.locator('#family-curves .series[data-method="all_answers"]')
    assert lines.count() == 4
    button = page.locator('#family-curves .legend button[data-method="all_answers"]')
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert [lines.nth(place).is_visible() for place in range(4)] == [False] * 4
    assert page.locator('#family-curves .series[data-method="zero_shot"]').first.is_visible()
    button.click()
    assert lines.first.is_visible()


def test_a_figure_downloads_as_csv(opened: Opened, tmp_path: Path) -> None:
    page = opened.page
    page.locator("#shot-curves summary").click()
    with page.expect_download() as waiting:
        page.locator("#shot-curves a.download").click()
    assert waiting.value.suggested_filename == "shot-curves.csv"
    waiting.value.save_as(tmp_path / "curves.csv")
    with (tmp_path / "curves.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.reader(stream))
    assert rows[0] == ["tasks", "method", "shots", "score", "low", "high", "worst order"]
    assert [row[3] for row in rows[1:]] == column(page, "shot-curves", 3)


def test_dark_differs_and_is_readable(browser: "Browser", report: Path) -> None:
    read = (
        "() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('.main .line')).stroke]"
    )
    colours = {}
    for scheme in ("light", "dark"):
        found = Opened(browser, report, color_scheme=scheme)
        colours[scheme] = found.page.evaluate(read)
        found.page.close()
    assert colours["light"] == ["rgb(255, 255, 255)", "rgb(11, 92, 173)"]
    assert colours["dark"] == ["rgb(20, 24, 28)", "rgb(108, 178, 247)"]


@pytest.mark.parametrize("width", [390, 800, 1600])
def test_the_page_is_never_wider_than_the_screen(browser: "Browser", report: Path, width: int) -> None:
    found = Opened(browser, report, viewport={"width": width, "height": 800})
    for summary in found.page.query_selector_all("summary"):
        summary.click()
    assert found.page.evaluate("document.documentElement.scrollWidth") == width
    found.page.close()


def test_paper_shows_every_view_and_no_buttons(opened: Opened) -> None:
    page = opened.page
    page.emulate_media(media="print", color_scheme="dark")
    assert page.locator("#budget-curves .view:visible").count() == 3
    assert page.locator(".switch:visible, nav:visible, .download:visible").count() == 0
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_without_scripts_everything_is_there(browser: "Browser", report: Path) -> None:
    found = Opened(browser, report, java_script_enabled=False)
    assert found.page.locator("#budget-curves .view:visible").count() == 3
    assert found.page.locator(".switch").count() == 0
    assert found.said == []
    found.page.close()
