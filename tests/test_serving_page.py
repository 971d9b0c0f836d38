"""The page as files over HTTP, and the check of examples behind it: what it says is what a job would do."""

import asyncio
import json
import re
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from manyicl.serving import example_checks
from manyicl.serving.guard import PAGE_FILES
from manyicl.serving.keys import add_key
from manyicl.serving.settings import Limits, Settings
from serving_fixtures import CAPITALS, TICKETS, FakeBackend, chat_file, plain_file, serving, wait_for
from test_serving_guard import Caller, error_of

PAGE = files("manyicl.serving") / "page"
SYSTEM_PROBLEM = "Its system message is not the first line's. Give one system message to all lines, or none."


@pytest.fixture
def backend(tmp_path: Path) -> FakeBackend:
    return FakeBackend(tmp_path / "fake")


@pytest.fixture
def call(tmp_path: Path, backend: FakeBackend) -> Iterator[Caller]:
    limits = Limits(max_examples=400, max_text_chars=200)
    with serving(Settings(tmp_path / "data", limits=limits), backend) as address:
        yield Caller(address)


def text_of(content: bytes) -> str:
    return content.decode()


def problems_of(found: dict[str, Any]) -> list[tuple[str, str, int | None]]:
    return [(problem["severity"], problem["kind"], problem["line"]) for problem in found["problems"]]


def check(call: Caller, text: str, **options: Any) -> dict[str, Any]:
    status, found, _ = call("POST", "/v1/examples/check", {"text": text, **options})
    assert status == 200, found
    return dict(found)


# ---- the files


def test_the_page_lets_nothing_in_from_elsewhere(call: Caller) -> None:
    for path in ("/", *(f"/page/{name}" for name in PAGE_FILES)):
        status, _, headers = call("GET", path)
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert (status, policy["default-src"], policy["script-src"], policy["style-src"]) == (200, "'none'", "'self'", "'self'")
        assert policy["connect-src"] == "'self'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == policy["trusted-types"] == "'none'"
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


def test_no_file_of_the_page_needs_what_its_policy_forbids() -> None:
    document = (PAGE / "index.html").read_text()
    assert re.findall(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=|javascript:", document) == []
    scripts = {name: (PAGE / name).read_text() for name in PAGE_FILES if name.endswith(".js")}
    assert sorted(scripts) == ["base.js", "examples.js", "page.js", "task.js"]
    for name, script in scripts.items():
        forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc|setAttribute\(.style"
        assert re.findall(forbidden, script) == [], name
        assert '"use strict";' in script.splitlines()[:3]
    everything = "".join([document, (PAGE / "page.css").read_text(), *scripts.values()])
    # The two namespaces of SVG are names and not addresses.
    assert set(re.findall(r"(?:https?:)?//[\w.]+\w/\S*?(?=['\"])", everything)) == {"http://www.w3.org/2000/svg"}
    assert {path.name for path in PAGE.iterdir()} == {"index.html", *PAGE_FILES}


def test_files_are_kept_by_their_hash(call: Caller) -> None:
    status, content, headers = call("GET", "/")
    assert (status, headers["content-type"], headers["cache-control"]) == (200, "text/html; charset=utf-8", "no-cache")
    assert call("GET", "/", If_None_Match=headers["etag"])[:2] == (304, b"")
    assert call("GET", "/", If_None_Match='"other"')[0] == 200
    assert call("HEAD", "/")[:2] == (200, b"")
    addresses = re.findall(r'(?:src|href)="(/page/[^"]+)"', content.decode())
    assert [address.partition("?")[0] for address in addresses] == [f"/page/{name}" for name in PAGE_FILES]
    for address in addresses:
        status, content, headers = call("GET", address)
        assert (status, content) == (200, (PAGE / address.partition("?")[0].rpartition("/")[2]).read_bytes())
        assert headers["cache-control"] == "public, max-age=31536000, immutable"
        assert headers["content-type"] == ("text/css" if ".css" in address else "text/javascript") + "; charset=utf-8"
        assert call("GET", address.partition("?")[0])[2]["cache-control"] == "no-cache"
        assert call("GET", address[:-1] + "x")[2]["cache-control"] == "no-cache"
    assert call("GET", "/page/index.html")[0] == call("GET", "/page/../app.py")[0] == call("GET", "/page/")[0] == 404


def test_the_page_asks_for_a_key_where_the_service_has_some(tmp_path: Path, call: Caller) -> None:
    assert b'data-keys="no"' in call("GET", "/")[1]
    add_key(tmp_path / "keys.txt", "acme")
    settings = Settings(tmp_path / "other", api_keys=tmp_path / "keys.txt")
    with serving(settings, FakeBackend(tmp_path / "other-fake")) as address:
        closed = Caller(address)
        assert b'data-keys="yes"' in closed("GET", "/")[1]
        assert closed("GET", "/page/page.js")[0] == 200
        assert closed("GET", "/page/nothing.js")[0] == closed("POST", "/v1/examples/check", {"text": "x"})[0] == 401


# ---- the check


def test_good_examples_have_no_problems(call: Caller, backend: FakeBackend) -> None:
    num_tokens = sum(len(f"{given} {answer}".split()) for given, answer in TICKETS)
    for content in (chat_file(TICKETS), plain_file(TICKETS)):
        assert check(call, text_of(content)) == {
            "object": "examples.check",
            "is_usable": True,
            "problems": [],
            "num_errors": 0,
            "num_warnings": 0,
            "num_examples": 6,
            "instruction": "",
            "labels": [{"label": "billing", "count": 3}, {"label": "bug", "count": 3}],
            "num_fitting": 6,
            "prefix_tokens": num_tokens,
            "context_tokens": 400,
        }
    assert backend.calls == ["plan", "plan"]
    assert check(call, text_of(chat_file(TICKETS, system=" Route it. ")))["instruction"] == "Route it."
    free = check(call, text_of(plain_file(CAPITALS)))
    assert (free["is_usable"], free["labels"], free["problems"]) == (True, [], [])


def test_every_bad_line_is_named(call: Caller) -> None:
    lines = text_of(plain_file(TICKETS)).splitlines()
    lines[1:1] = [
        "not json",
        "",
        '{"prompt": "x"}',
        '{"prompt": "x", "completion": " "}',
        '{"prompt": "' + "x" * 201 + '", "completion": "y"}',
    ]
    found = check(call, "\n".join(lines))
    assert problems_of(found) == [
        ("error", "broken JSON", 2),
        ("error", "training line", 4),
        ("error", "training line", 5),
        ("error", "training line", 6),
    ]
    assert [problem["message"] for problem in found["problems"]] == [
        "Broken JSON at column 1: Expecting value. Mend or remove the line.",
        "Its fields are 'prompt'. Give `messages` alone, or `prompt` and `completion`.",
        "The answer is empty. Fill it in.",
        "The input has 201 characters; at most 200 are taken. Shorten it.",
    ]
    assert (found["is_usable"], found["num_errors"], found["num_examples"], found["num_fitting"]) == (False, 4, 6, 6)


def test_duplicates_and_contradictions_are_warnings(call: Caller) -> None:
    found = check(call, text_of(plain_file([*TICKETS, ("Refund my invoice!", "billing"), ("refund my invoice", "bug")])))
    assert problems_of(found) == [("warning", "duplicate", 7), ("warning", "conflicting duplicate", 8)]
    assert found["problems"][0]["message"] == "The input stands at line 3 too"
    assert found["problems"][1]["message"] == "The input stands at line 3 too, with the answer 'billing' instead of 'bug'"
    assert (found["is_usable"], found["num_errors"], found["num_warnings"]) == (True, 0, 2)


def test_inputs_that_name_their_label_are_a_leak(call: Caller) -> None:
    leaking = [(f"{given} [{answer}]", answer) for given, answer in TICKETS * 2]
    found = check(call, text_of(plain_file([(f"{number} {given}", answer) for number, (given, answer) in enumerate(leaking)])))
    assert problems_of(found) == [("warning", "label in input", 1)]
    assert found["problems"][0]["message"].startswith("12 of 12 inputs name their own label and no other")


def test_labels_that_differ_in_case_are_an_error_unless_listed(call: Caller) -> None:
    text = text_of(plain_file([*TICKETS, ("one more", "Bug"), ("and more", "billing")]))
    found = check(call, text)
    assert problems_of(found) == [("error", "labels differ in case", 7)]
    assert "'Bug' (1 examples), 'bug' (3 examples)" in found["problems"][0]["message"]
    assert not found["is_usable"]
    listed = check(call, text, labels=["bug", "Bug", " billing "])
    assert (listed["is_usable"], listed["problems"]) == (True, [])
    assert listed["labels"] == [{"label": "bug", "count": 3}, {"label": "Bug", "count": 1}, {"label": "billing", "count": 4}]
    unknown = check(call, text, labels=["bug", "billing"])
    assert problems_of(unknown) == [("error", "unknown label", 7)]
    assert (check(call, text, labels=[])["labels"], check(call, text, labels=[])["is_usable"]) == ([], True)


def test_a_misspelt_label_does_not_silently_make_free_text(call: Caller) -> None:
    found = check(call, text_of(plain_file([*TICKETS, ("my bill", "biling")])))
    assert problems_of(found) == [("warning", "free text or labels", 7)]
    assert found["problems"][0]["message"].startswith("The answer 'biling' stands once only, as 1 of 3 answers do")
    assert found["labels"] == []


def test_what_does_not_fit_is_told(call: Caller, backend: FakeBackend) -> None:
    backend.context_tokens = 12
    found = check(call, text_of(plain_file(TICKETS)))
    assert problems_of(found)[0][:2] == ("warning", "left out")
    assert 0 < found["num_fitting"] < 6
    assert found["problems"][0]["message"].startswith(f"{6 - found['num_fitting']} of 6 examples would not be in the context; ")
    assert 0 < found["prefix_tokens"] <= found["context_tokens"] == 12
    backend.context_tokens = 2
    found = check(call, text_of(plain_file(TICKETS)))
    assert problems_of(found) == [("error", "does not fit", None)]
    assert (found["is_usable"], found["num_fitting"], found["prefix_tokens"]) == (False, 0, 0)


def test_a_long_list_of_problems_is_cut_and_counted(call: Caller) -> None:
    found = check(call, "broken\n" * 300)
    assert (len(found["problems"]), found["num_errors"], found["num_warnings"]) == (200, 300, 0)
    assert [problem["line"] for problem in found["problems"]] == list(range(1, 201))


TEXTS = {
    "good": text_of(chat_file(TICKETS)),
    "free text": text_of(plain_file(CAPITALS)),
    "blank": " \n\n",
    "broken line": text_of(plain_file(TICKETS)) + "x\n",
    "no object": "[1]\n",
    "two systems": text_of(chat_file(TICKETS, system="A") + chat_file(TICKETS[:1], system="B")),
    "no answers": '{"messages": [{"role": "user", "content": "x"}]}\n',
    "half a pair": '{"prompt": "x", "completion": "\\ud800"}\n',
    "case": text_of(plain_file([*TICKETS, ("a", "Bug"), ("b", "Bug")])),
    "duplicates": text_of(plain_file(TICKETS * 2)),
    "too many": text_of(plain_file(TICKETS * 70)),
    "one": text_of(plain_file(CAPITALS[:1])),
    "nothing fits": text_of(plain_file([("word " * 20, "x")])),
}


@pytest.mark.parametrize("labels", [None, [], ["bug", "billing"]])
@pytest.mark.parametrize("kind", list(TEXTS))
def test_what_the_check_says_is_what_a_job_does(call: Caller, backend: FakeBackend, kind: str, labels: list[str] | None) -> None:
    text = TEXTS[kind]
    if kind == "nothing fits":
        backend.context_tokens = 20
    options = {} if labels is None else {"labels": labels}
    found = check(call, text, **options)
    file_id = call.upload(text.encode())[1]["id"]
    job_id = call("POST", "/v1/fine_tuning/jobs", {"training_file": file_id, "suffix": "t", **options})[1]["id"]
    job = wait_for(lambda: (job := call("GET", f"/v1/fine_tuning/jobs/{job_id}")[1])["finished_at"] and job)
    assert found["is_usable"] == (job["status"] == "succeeded"), (found, job["error"])
    if found["is_usable"]:
        facts = call("GET", "/v1/tasks/t")[1]
        assert [label["label"] for label in found["labels"]] == facts["labels"]
        shown = ("num_examples", "num_examples"), ("num_fitting", "num_shots"), ("prefix_tokens", "prefix_tokens")
        assert {key: found[key] for key, _ in shown} == {key: facts[other] for key, other in shown}
        assert found["instruction"] == facts["instruction"]


def test_both_outcomes_are_among_the_texts(call: Caller) -> None:
    usable = {kind for kind, text in TEXTS.items() if kind != "nothing fits" and check(call, text)["is_usable"]}
    assert usable == {"good", "free text", "duplicates", "one"}
    assert problems_of(check(call, TEXTS["two systems"]))[0] == ("error", "system message", 7)
    assert check(call, TEXTS["two systems"])["problems"][0]["message"] == SYSTEM_PROBLEM
    for kind in ("blank", "no answers", "too many"):
        assert problems_of(check(call, TEXTS[kind])) == [("error", "whole text", None)]


def test_nothing_of_a_check_is_kept(tmp_path: Path, call: Caller, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    check(call, TEXTS["broken line"])
    assert list((tmp_path / "temporary").iterdir()) == []
    assert call("GET", "/v1/files")[1]["data"] == call("GET", "/v1/fine_tuning/jobs")[1]["data"] == []
    assert (backend.calls, backend.kept) == (["plan"], {})


def test_more_checks_than_run_at_once_are_refused(call: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    check_text, running, go_on = example_checks.check_text_of_examples, [], threading.Event()

    def wait(*arguments: Any) -> example_checks.Checked:
        running.append(arguments)
        assert go_on.wait(20)
        return check_text(*arguments)

    monkeypatch.setattr(example_checks, "check_text_of_examples", wait)
    body = {"text": text_of(chat_file(TICKETS))}
    with ThreadPoolExecutor() as pool:
        first = [pool.submit(call, "POST", "/v1/examples/check", body) for _ in range(2)]
        try:
            wait_for(lambda: len(running) == 2)
            refused = call("POST", "/v1/examples/check", body)
        finally:
            go_on.set()
        assert [each.result()[0] for each in first] == [200, 200]
    assert (refused[0], error_of(refused)["code"], refused[2]["retry-after"]) == (429, "overloaded", "2")
    assert check(call, body["text"])["num_examples"] == 6


def test_a_check_ends_at_its_deadline(call: Caller, backend: FakeBackend) -> None:
    backend.delay = 30
    answer = call("POST", "/v1/examples/check", {"text": text_of(chat_file(TICKETS))}, X_Timeout_Seconds="0.3")
    assert (answer[0], error_of(answer)["code"]) == (504, "deadline_exceeded")
    backend.delay = 0
    assert check(call, text_of(chat_file(TICKETS)))["num_fitting"] == 6


def test_requests_that_cannot_be_checked(call: Caller) -> None:
    for body, param in (({}, "text"), ({"text": ""}, "text"), ({"text": 1}, "text"), ({"text": "x", "labels": ["a"]}, "labels")):
        answer = call("POST", "/v1/examples/check", body)
        assert (answer[0], error_of(answer)["param"]) == (400, param)
    half = call("POST", "/v1/examples/check", b'{"text": "\\ud800"}', Content_Type="application/json")
    assert (half[0], error_of(half)["code"]) == (400, "invalid_value")
    long = call("POST", "/v1/examples/check", json.dumps({"text": "x" * (8 * 2**20)}).encode(), Content_Type="application/json")
    assert (long[0], error_of(long)["code"]) == (413, "body_too_large")


def test_our_backend_plans_what_it_prepares(tmp_path: Path, tiny_loaded: Any) -> None:
    from manyicl.encoding import Encoder
    from manyicl.engines.native import NativeEngine
    from manyicl.serving.backends import TaskSpec
    from manyicl.serving.native_backend import NativeBackend
    from manyicl.tasks.task import Example

    loaded = tiny_loaded("llama")
    spec = TaskSpec("a" * 32, tuple(Example(given, answer) for given, answer in TICKETS), ("billing", "bug"))

    async def compare() -> tuple[Any, Any, list[Path]]:
        engine = NativeEngine(loaded, Encoder(loaded.tokenizer), context_tokens=160)
        backend = NativeBackend(lambda: engine, tmp_path / "prefixes")
        await backend.start()
        try:
            planned = await backend.plan(spec)
            kept = list(tmp_path.glob("prefixes/*"))
            return planned, await backend.prepare(spec), kept
        finally:
            await backend.stop()

    planned, prepared, kept = asyncio.run(compare())
    assert 0 < planned.num_used < len(TICKETS)
    assert (planned.num_used, planned.prefix_tokens, planned.left_out) == (
        prepared.num_used,
        prepared.prefix_tokens,
        prepared.left_out,
    )
    assert (planned.computed_tokens, planned.seconds, kept) == (0, 0.0, [])
