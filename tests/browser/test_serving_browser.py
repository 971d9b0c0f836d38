"""The page in Chromium against a running service: a task from its examples to its deletion, and everything that goes wrong."""

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from browser_fixtures import Opened, SteppedBackend
from manyicl.errors import OverloadedError
from manyicl.serving.keys import add_key
from manyicl.serving.settings import Settings
from serving_fixtures import CAPITALS, TICKETS, chat_file, overloaded, plain_file, serving, wait_for
from test_serving_guard import Caller

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.slow

EVIL = "<script>window.evil=1</script><img src=x onerror=window.evil=2>"
NAMES = """() => [...document.querySelectorAll("input, textarea, button, [role=progressbar], section, nav, dialog")]
    .filter((node) => !(node.labels && node.labels.length) && !node.getAttribute("aria-labelledby") && !node.textContent.trim())
    .map((node) => node.outerHTML)"""
# Lists of bars that are wider than their place, so that numbers are cut.
CUT = """() => [...document.querySelectorAll(".bars")]
    .filter((list) => list.scrollWidth > list.clientWidth).map((list) => list.id)"""
# Every visible text with less contrast to what lies behind it than WCAG AA asks for: 4.5, and 3 where it is large.
FAINT = """() => {
    const parse = (text) => text.match(/[\\d.]+/g).map(Number);
    const light = ([red, green, blue]) => [red, green, blue].map((value) => value / 255)
        .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
        .reduce((sum, value, place) => sum + value * [0.2126, 0.7152, 0.0722][place], 0);
    const behind = (node) => {
        for (let at = node; at; at = at.parentElement) {
            const colour = parse(getComputedStyle(at).backgroundColor);
            if (colour.length < 4 || colour[3] === 1) return colour;
        }
        return [255, 255, 255];
    };
    const found = [];
    for (const node of document.querySelectorAll("body *")) {
        const hasText = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
        if (!hasText || !node.checkVisibility() || node.closest("[disabled], svg")) continue;
        const style = getComputedStyle(node);
        const [one, other] = [light(parse(style.color)), light(behind(node))].sort((a, b) => b - a);
        const ratio = (one + 0.05) / (other + 0.05);
        if (ratio < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5)) found.push([node.outerHTML.slice(0, 100), ratio]);
    }
    return found;
}"""


def test_a_task_from_its_examples_to_its_deletion(opened: Opened, backend: SteppedBackend, address: str) -> None:
    page = opened.page
    backend.gate.clear()
    opened.check(plain_file(TICKETS * 3).decode())
    page.wait_for_selector("#checked:visible")
    assert page.inner_text("#verdict") == "Usable, with 12 warnings"
    assert opened.texts("#label-counts li") == ["billing\n9", "bug\n9"]
    assert page.inner_text("#fit").startswith("18 of 18 examples fit: ")
    page.fill("#name", "tickets")
    page.click("#create")
    progress = page.get_by_role("progressbar", name="Making tickets")
    page.wait_for_selector("#progress[aria-valuenow='40']")
    assert progress.is_visible()
    assert page.inner_text("#job-status") == "Reading the examples."
    assert page.inner_text("#job-tokens") == "40 of 100 tokens computed"
    assert opened.texts("#events li")[-1] == "18 examples read; 2 labels."  # What the bar shows is not listed.
    backend.gate.set()
    page.wait_for_selector("#task:visible")
    assert page.inner_text("#task-title") == "tickets"
    assert page.evaluate("document.activeElement.id") == "task-title"
    assert opened.texts("#tasks li") == ["tickets"]
    assert page.get_attribute("#tasks button", "aria-current") == "page"
    assert opened.texts("#cost dd")[0] == "18 of 18"
    opened.ask("my invoice is wrong")
    page.wait_for_selector("#answer:visible")
    assert page.inner_text("#answer-text") == "billing"
    shares = [float(text.split("\n")[1].removesuffix("%")) for text in opened.texts("#probabilities li")]
    assert [text.split("\n")[0] for text in opened.texts("#probabilities li")] == ["billing", "bug"]
    assert shares[0] > 90
    assert sum(shares) == pytest.approx(100, abs=0.1)
    widths = page.eval_on_selector_all("#probabilities .meter div", "(bars) => bars.map((bar) => bar.style.width)")
    assert [float(width.removesuffix("%")) for width in widths] == pytest.approx(shares, abs=0.1)
    opened.until("document.querySelector('#answer-cost').textContent.includes('cached')")
    assert "after 18 shots. Tokens: " in page.inner_text("#answer-cost")
    page.click("#measure")
    page.wait_for_selector("#curve:visible")
    assert [text.split("\t")[0] for text in opened.texts("#curve-rows tr")] == ["0", "1", "4", "14"]
    assert page.locator("#plot svg .point").count() == 4
    assert page.locator("#plot svg").bounding_box()["width"] > 500  # type: ignore[index]
    call = Caller(address)
    assert call("GET", "/v1/files")[1]["data"] == []  # What the page uploaded it also removed.
    page.click("#delete")
    assert page.inner_text("#confirm-title") == "Delete tickets?"
    page.keyboard.press("Escape")
    assert [model["id"] for model in call("GET", "/v1/models")[1]["data"]] == ["base", "tickets"]
    page.click("#delete")
    page.click("#confirm-yes")
    page.wait_for_selector("#no-tasks:visible")
    assert page.locator("#make").is_visible()
    assert [model["id"] for model in call("GET", "/v1/models")[1]["data"]] == ["base"]
    assert (opened.said, opened.hosts) == ([], {address})


def test_what_users_write_is_never_markup(opened: Opened, address: str) -> None:
    page = opened.page
    pairs = [(f"{EVIL} {number}", [EVIL, "plain"][number % 2]) for number in range(10)]
    opened.check(chat_file([*pairs, (f"{EVIL} 3", EVIL)], system=EVIL).decode())
    page.wait_for_selector("#checked:visible")
    assert opened.texts("#label-counts .label") == [EVIL, "plain"]
    assert EVIL in page.inner_text("#problems")
    assert EVIL in page.inner_text("#check-facts")
    page.fill("#name", EVIL)
    page.click("#create")
    assert page.eval_on_selector("#name", "(field) => field.validity.patternMismatch")
    assert Caller(address)("GET", "/v1/fine_tuning/jobs")[1]["data"] == []
    page.fill("#name", "evil")
    page.click("#create")
    page.wait_for_selector("#task:visible")
    assert page.inner_text("#instruction") == EVIL
    opened.ask(EVIL)
    page.wait_for_selector("#answer:visible")
    assert sorted(opened.texts("#probabilities .label")) == sorted([EVIL, "plain"])
    opened.until("document.querySelector('#code').textContent.includes('evil=1')")
    assert page.evaluate("[window.evil === undefined, document.images.length, document.scripts.length]") == [True, 0, 4]
    assert opened.said == []
    refused = "document.body.innerHTML = '<b>x</b>'"
    with pytest.raises(Exception, match="TrustedHTML"):
        page.evaluate(refused)


def test_a_wrong_key_is_said_and_a_right_one_is_kept_in_the_tab(
    browser: "Browser", tmp_path: Path, backend: SteppedBackend
) -> None:
    key = add_key(tmp_path / "keys.txt", "acme")
    with serving(Settings(tmp_path / "data", api_keys=tmp_path / "keys.txt"), backend) as address:
        opened = Opened(browser, address)
        page = opened.page
        assert opened.error("tasks") == "Give your API key to see your tasks."
        page.fill("#key", "mi-wrong")
        page.press("#key", "Enter")
        opened.until("document.querySelector('#tasks-error').textContent.startsWith('Incorrect')")
        assert opened.error("tasks") == "Incorrect API key provided."
        assert page.evaluate("document.activeElement.id") == "key"
        page.fill("#key", key)
        page.press("#key", "Enter")
        page.wait_for_selector("#no-tasks:visible")
        assert page.locator("#tasks-error").is_hidden()
        assert page.input_value("#key") == ""
        page.click("#key-form [type=submit]")  # An empty field forgets nothing.
        assert page.evaluate("sessionStorage.length") == 1
        assert page.locator("header").bounding_box()["height"] < 80  # type: ignore[index]  # The form in one line.
        opened.make(chat_file(TICKETS), "mine")
        assert 'os.environ["MANYICL_API_KEY"]' in page.inner_text("#code")
        assert key not in page.content()
        assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        page.reload()
        page.wait_for_selector("#tasks button")
        page.click("#forget-key")
        assert opened.error("tasks") == "Give your API key to see your tasks."
        assert (opened.texts("#tasks li"), page.evaluate("sessionStorage.length")) == ([], 0)
        assert len(opened.said) == 1
        assert "401" in opened.said[0]
        opened.context.close()


def test_free_text_is_streamed_and_stopped(opened: Opened, backend: SteppedBackend) -> None:
    page = opened.page
    opened.make(plain_file(CAPITALS), "capitals")
    assert page.inner_text("#quality-title") == "Quality"
    opened.ask("capital of Norway")
    opened.until("document.querySelector('#answer-cost').textContent.endsWith('4 written.')")
    assert page.inner_text("#answer-text") == "Oslo"
    backend.delay = 0.4
    opened.ask("capital of France")
    opened.until("document.querySelector('#answer-text').textContent.startsWith('Pa')")
    assert page.get_attribute("#answer-text", "aria-busy") == "true"
    page.click("#stop")
    opened.until("document.querySelector('#query-note').textContent === 'Stopped.'")
    assert page.inner_text("#answer-text") in ("Pa", "Par", "Pari")
    written = backend.num_pieces
    backend.delay = 0
    assert page.locator("#stop").is_hidden()
    assert page.locator("#ask").is_enabled()
    assert written < len("Oslo") + len("Paris")
    assert opened.said == []


def test_the_services_errors_are_shown_in_its_words(opened: Opened, backend: SteppedBackend) -> None:
    page = opened.page
    opened.make(chat_file(TICKETS), "tickets")
    backend.failure = overloaded(6.2)
    opened.ask("my invoice")
    assert opened.error("query") == "the queue is full. Try again in 7 s."
    page.click("#measure")
    assert opened.error("quality") == "the queue is full. Try again in 7 s."
    backend.failure = None
    page.click("#ask")
    page.wait_for_selector("#answer:visible")
    assert page.locator("#query-error").is_hidden()
    page.click("#new-task")
    assert page.locator("#query-form").is_hidden()
    opened.check(chat_file(TICKETS).decode())
    page.fill("#name", "tickets")
    page.click("#create")
    assert "'tickets'" in opened.error("create")
    assert page.locator("#create").is_enabled()
    page.click("#new-task")
    assert page.input_value("#examples") == chat_file(TICKETS).decode()


def test_a_job_is_found_again_after_a_reload_and_can_be_cancelled(opened: Opened, backend: SteppedBackend, address: str) -> None:
    page = opened.page
    backend.gate.clear()
    opened.check(chat_file(TICKETS).decode())
    page.fill("#name", "tickets")
    page.click("#create")
    page.wait_for_selector("#progress[aria-valuenow='40']")
    page.reload()
    page.wait_for_selector("#progress[aria-valuenow='40']")
    assert page.inner_text("#job-title") == "Making tickets"
    page.click("#cancel")
    opened.until("document.querySelector('#job-status').textContent === 'Cancelled: nothing of it is kept.'")
    assert page.locator("#job-error").is_hidden()
    assert page.locator("#examples-form").is_visible()
    wait_for(lambda: not Caller(address)("GET", "/v1/files")[1]["data"])
    assert opened.texts("#tasks li") == []
    assert opened.said == []


def test_the_snippets_work(opened: Opened, address: str, tmp_path: Path) -> None:
    page = opened.page
    opened.make(chat_file(TICKETS), "tickets")
    opened.ask('my "invoice" isn\'t right')
    opened.until("document.querySelector('#code').textContent.includes('invoice')")
    opened.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#copy")
    opened.until("document.querySelector('#copied').textContent === 'Copied.'")
    python = page.evaluate("navigator.clipboard.readText()")
    done = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.stdout == "billing\n", done.stderr
    page.focus("#tab-python")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-curl"
    assert page.get_attribute("#tab-curl", "aria-selected") == "true"
    curl = page.inner_text("#code")
    assert curl.startswith(f"curl {address}/v1/classify")
    body = curl.partition("  -d '")[2].removesuffix("'").replace("'\\''", "'")
    assert json.loads(body) == {"model": "tickets", "input": 'my "invoice" isn\'t right'}


def test_the_keyboard_is_enough(opened: Opened) -> None:
    page = opened.page
    order = []
    for _ in range(7):
        page.keyboard.press("Tab")
        order.append(
            page.evaluate("document.activeElement.id || document.activeElement.className || document.activeElement.tagName")
        )
    assert order == ["skip", "new-task", "sample", "file", "examples", "SUMMARY", "check"]
    page.focus("#sample")
    page.keyboard.press("Enter")
    page.focus("#check")
    page.keyboard.press("Enter")
    page.wait_for_selector("#checked:visible")
    assert page.evaluate("document.activeElement.id") == "checked-title"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "name"
    page.keyboard.type("by-keyboard")
    page.keyboard.press("Enter")
    page.wait_for_selector("#task:visible")
    page.focus("#query")
    page.keyboard.type("my bill")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#answer:visible")
    assert page.inner_text("#answer-text") == "billing"


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 1200), ("light", 320), ("dark", 320)])
def test_it_is_readable_in_light_and_dark_wide_and_narrow(browser: "Browser", address: str, scheme: Any, width: int) -> None:
    opened = Opened(browser, address, color_scheme=scheme, viewport={"width": width, "height": 800})
    page = opened.page

    def look() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(FAINT) == []
        assert page.evaluate(NAMES) == []
        assert page.evaluate(CUT) == []

    look()
    opened.check("broken\n{}\n" + plain_file([*TICKETS, *TICKETS, ("long " * 60, "w" * 90), ("x" * 400, "w" * 90)]).decode())
    page.wait_for_selector("#problems:visible")
    page.click("summary")
    look()
    opened.make(plain_file([*TICKETS * 2, ("long " * 60, "w" * 90), ("x" * 400, "w" * 90)]), "m" * 64)
    opened.ask("my invoice is wrong " + "x" * 300)
    page.wait_for_selector("#answer:visible")
    page.click("#measure")
    page.wait_for_selector("#curve:visible")
    page.focus("#query")
    look()
    page.click("#delete")
    look()
    backgrounds = {"light": "rgb(246, 247, 248)", "dark": "rgb(18, 22, 26)"}
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == backgrounds[scheme]
    opened.context.close()


def test_an_answer_never_stands_under_another_query_or_task(opened: Opened, backend: SteppedBackend) -> None:
    page = opened.page
    opened.make(chat_file(TICKETS), "tickets")
    page.click("#new-task")
    opened.make(chat_file([(f"{given} or so", answer.upper()) for given, answer in TICKETS]), "other")
    assert opened.texts("#tasks li") == ["other", "tickets"]
    opened.ask("my invoice")
    page.wait_for_selector("#answer:visible")
    backend.delay = 0.5
    page.fill("#query", "a crash")
    page.focus("#ask")
    page.keyboard.press("Enter")
    opened.until("document.querySelector('#query-note').textContent === 'Asking…'")
    assert page.get_attribute("#answer", "class") == "old"
    assert page.evaluate("document.activeElement.id") == "ask"  # A button that works keeps the focus.
    page.click("#tasks button:text('tickets')")
    opened.until("document.querySelector('#task-title').textContent === 'tickets'")
    page.wait_for_timeout(700)
    assert page.locator("#answer").is_hidden()
    assert (page.inner_text("#query-note"), page.locator("#stop").is_hidden()) == ("", True)
    backend.delay = 0
    opened.ask("my invoice")
    page.wait_for_selector("#answer:visible")
    backend.failure = OverloadedError("Too much waits. Try again in 3.2 s.", retry_after_seconds=3.2)
    page.click("#ask")
    assert opened.error("query") == "Too much waits. Try again in 3.2 s."
    assert page.locator("#answer").is_hidden()


def test_labels_that_are_numbers_stand_by_their_probability(opened: Opened) -> None:
    pairs = [("lovely and kind", "10"), ("rude and late", "2"), ("lovely and quick", "10"), ("rude and slow", "2")]
    opened.make(plain_file(pairs), "stars")
    opened.ask("lovely and kind")
    opened.page.wait_for_selector("#answer:visible")
    assert opened.texts("#probabilities .label") == ["10", "2"]


def test_a_service_that_is_away_leaves_the_list(opened: Opened) -> None:
    page = opened.page
    opened.make(chat_file(TICKETS), "tickets")
    page.route("**/v1/**", lambda route: route.abort())
    page.click("#tasks button")
    assert opened.error("tasks") == "The service cannot be reached. Is it running?"
    assert opened.texts("#tasks li") == ["tickets"]
    page.unroute("**/v1/**")
    page.click("#tasks button")
    page.wait_for_selector("#tasks-error", state="hidden")


def test_the_curve_is_drawn_anew_in_another_width(opened: Opened) -> None:
    page = opened.page
    opened.make(chat_file(TICKETS * 3), "tickets")
    page.click("#measure")
    page.wait_for_selector("#curve:visible")
    page.set_viewport_size({"width": 320, "height": 800})
    opened.until("document.querySelector('#plot svg').viewBox.baseVal.width === document.querySelector('#plot').clientWidth")
    assert page.locator("#plot svg").bounding_box()["width"] == 288  # type: ignore[index]
