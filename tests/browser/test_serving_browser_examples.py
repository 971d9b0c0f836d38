"""Examples in the page, in Chromium: typed, given as a table or a sample, checked, and their errors named and found."""

import json

import pytest

from browser_fixtures import Opened, SteppedBackend
from serving_fixtures import TICKETS, chat_file, plain_file

pytestmark = pytest.mark.slow

NO_TABLE = 'Line 1 is neither an object such as {"prompt": …, "completion": …} nor a row of two columns, input and answer.'


def test_a_bad_line_is_named_and_found(opened: Opened) -> None:
    lines = plain_file(TICKETS).decode().splitlines()
    lines[2] = "refund my invoice"
    opened.check("\n".join(lines))
    opened.page.wait_for_selector("#checked:visible")
    assert opened.page.inner_text("#verdict") == "Not usable yet: 1 error"
    assert opened.texts("#problems li") == [
        "Line 3\nError: broken JSON\nBroken JSON at column 1: Expecting value. Mend or remove the line."
    ]
    assert opened.page.locator("#create-form").is_hidden()
    opened.page.click("#problems button")
    selected = "(area) => area.value.slice(area.selectionStart, area.selectionEnd)"
    assert opened.page.eval_on_selector("#examples", selected) == lines[2]
    assert opened.page.evaluate("document.activeElement.id") == "examples"
    opened.page.fill("#examples", "\n".join(lines[:2]))
    assert opened.page.locator("#checked").is_hidden()
    assert opened.said == []


@pytest.mark.parametrize(
    ("name", "content", "first"),
    [
        ("a.csv", 'Text,Label\r\n"charged twice, again",billing\r\n"it says ""no""",bug\r\n', "a heading"),
        ("a.csv", '\ufeff"charged twice, again",billing\n"it says ""no""",bug', "an example"),
        ("a.tsv", "charged twice, again\tbilling\n\"it says \"\"no\"\"\"\tbug\n", "an example"),
        ("a.csv", "input;answer\ncharged twice, again;billing\nit says \"no\";bug\n", "a heading"),
    ],
)  # fmt: skip
def test_a_table_becomes_lines(opened: Opened, name: str, content: str, first: str) -> None:
    page = opened.page
    page.set_input_files("#file", {"name": name, "mimeType": "text/csv", "buffer": content.encode()})
    opened.until("document.querySelector('#examples').value !== ''")
    lines = [json.loads(line) for line in page.input_value("#examples").splitlines()]
    assert lines == [
        {"prompt": "charged twice, again", "completion": "billing"},
        {"prompt": 'it says "no"', "completion": "bug"},
    ]
    assert page.inner_text("#examples-note") == f"{name}: 2 rows turned into lines; the first row was read as {first}."
    assert page.input_value("#name") == "a"
    page.click("#check")
    page.wait_for_selector("#checked:visible")
    assert page.inner_text("#verdict") == "Nothing wrong with them"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\nc,d,e\n", "Line 2 has 3 columns, the first has 2. Put a text that holds a comma in quotes."),
        (b'a,b\nc,d\n"e,f\n', "Line 3: a quote is opened and never closed."),
        (b"a,b\nc,\xff\n", "t.csv: line 2 is not UTF-8. Save the file as UTF-8."),
        (b"no table\n", NO_TABLE),
        (b"x" * (8 * 2**20 + 1), "t.csv has 8,388,609 bytes; this page takes 8,388,608. Post it with an OpenAI client."),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_explained(opened: Opened, content: bytes, message: str) -> None:
    opened.page.set_input_files("#file", {"name": "t.csv", "mimeType": "text/csv", "buffer": content})
    assert opened.error("examples") == message
    assert opened.said == []


def test_the_sample_takes_no_ones_place(opened: Opened) -> None:
    page = opened.page
    page.fill("#examples", "mine")
    page.click("#sample")
    assert page.input_value("#examples") == "mine"
    note = "Your examples were left as they are. Empty the field to insert the sample."
    assert page.inner_text("#examples-note") == note
    page.fill("#examples", "")
    page.click("#sample")
    assert len(page.input_value("#examples").splitlines()) == 12
    assert page.inner_text("#examples-note") == ""


def test_a_check_of_labels_that_were_changed_meanwhile_is_not_shown(opened: Opened, backend: SteppedBackend) -> None:
    page = opened.page
    backend.delay = 0.4
    opened.check(chat_file(TICKETS).decode())
    opened.until("document.querySelector('#examples-note').textContent === 'Checking…'")
    page.click("summary")
    page.fill("#labels", "bug\nbilling\nwish")
    opened.until("document.querySelector('#examples-note').textContent !== 'Checking…'")
    assert page.locator("#checked").is_hidden()
    page.click("#check")
    page.wait_for_selector("#checked:visible")
    assert opened.texts("#label-counts li") == ["bug\n3", "billing\n3", "wish\n0"]


def test_a_long_list_of_labels_is_reached_by_the_keyboard(opened: Opened) -> None:
    page = opened.page
    page.click("summary")
    page.fill("#labels", "\n".join(f"label {number}" for number in range(40)))
    opened.check(plain_file([("input", "label 3"), ("another", "label 4")]).decode())
    page.wait_for_selector("#checked:visible")
    assert page.get_attribute("#label-counts", "tabindex") == "0"  # Chromium would reach it anyway, other browsers would not.
    page.fill("#labels", "label 3\nlabel 4")
    page.click("#check")
    page.wait_for_selector("#checked:visible")
    assert page.get_attribute("#label-counts", "tabindex") is None
