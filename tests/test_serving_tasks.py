"""Addresses beyond OpenAI's: classification in batches, appending, facts, quality and shot curves."""

import http.client
import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manyicl.serving import task_routes
from manyicl.serving.measuring import fit_temperature, log_loss, split_examples, temper, wilson_interval
from manyicl.serving.service import Served
from manyicl.serving.settings import Limits, Settings
from manyicl.serving.training_files import shuffle_examples
from manyicl.tasks.task import Example
from serving_fixtures import CAPITALS, TICKETS, FakeBackend, chat_file, overloaded, plain_file, serving, wait_for
from test_serving_guard import Caller, error_of

NUM_TOKENS = sum(len(f"{given} {answer}".split()) for given, answer in TICKETS)


@pytest.fixture
def backend(tmp_path: Path) -> FakeBackend:
    return FakeBackend(tmp_path / "fake", context_tokens=5000)


@pytest.fixture
def call(tmp_path: Path, backend: FakeBackend) -> Iterator[Caller]:
    limits = Limits(max_examples=100, max_text_chars=500, max_inputs=3)
    with serving(Settings(tmp_path / "data", limits=limits), backend) as address:
        yield Caller(address)


def make(call: Caller, content: bytes, name: str = "tickets", **options: Any) -> dict[str, Any]:
    file_id = call.upload(content)[1]["id"]
    job = call("POST", "/v1/fine_tuning/jobs", {"training_file": file_id, "suffix": name, **options})[1]
    return dict(wait_for(lambda: (found := call("GET", f"/v1/fine_tuning/jobs/{job['id']}")[1])["finished_at"] and found))


def test_inputs_are_classified_with_probabilities(call: Caller) -> None:
    make(call, chat_file(TICKETS))
    status, found, _ = call("POST", "/v1/classify", {"model": "tickets", "input": ["my invoice", " crashes on start "]})
    assert (status, found["object"], found["model"]) == (200, "classification", "tickets")
    assert [(entry["index"], entry["label"], entry["num_shots"]) for entry in found["data"]] == [(0, "billing", 6), (1, "bug", 6)]
    for entry in found["data"]:
        assert sum(entry["probabilities"].values()) == pytest.approx(1)
        assert next(iter(entry["probabilities"])) == entry["label"]
        assert entry["probability"] == entry["probabilities"][entry["label"]] > 0.5
    assert found["usage"] == {
        "prompt_tokens": 2 * NUM_TOKENS + 5,
        "completion_tokens": 0,
        "total_tokens": 2 * NUM_TOKENS + 5,
        "prompt_tokens_details": {"cached_tokens": 2 * NUM_TOKENS},
    }
    one = call("POST", "/v1/classify", {"model": "tickets", "input": "my invoice", "top_labels": 1})[1]["data"]
    assert [list(entry["probabilities"]) for entry in one] == [["billing"]]
    assert one[0]["probability"] == found["data"][0]["probability"]


def test_an_answer_tells_no_more_probabilities_than_allowed(tmp_path: Path, backend: FakeBackend) -> None:
    with serving(Settings(tmp_path / "data", limits=Limits(max_probabilities=3)), backend) as address:
        call = Caller(address)
        make(call, chat_file(TICKETS))
        question = {"model": "tickets", "input": ["my invoice", "a crash"]}
        error = error_of(refused := call("POST", "/v1/classify", question))
        assert (refused[0], error["code"], error["param"]) == (400, "too_many_probabilities", "top_labels")
        assert error["message"] == (
            "2 inputs with 2 labels each; at most 3 probabilities are told at once. Send fewer inputs, or give top_labels."
        )
        assert "score" not in backend.calls
        best = call("POST", "/v1/classify", question | {"top_labels": 1})[1]["data"]
        assert [list(entry["probabilities"]) for entry in best] == [["billing"], ["bug"]]


def test_free_text_is_not_classified(call: Caller) -> None:
    make(call, plain_file(CAPITALS), "capitals")
    for name in ("capitals", "base"):
        assert error_of(call("POST", "/v1/classify", {"model": name, "input": "x"}))["code"] == "no_labels"


def test_labels_can_be_given(call: Caller) -> None:
    assert make(call, plain_file(CAPITALS), labels=["Paris", "Oslo", "Lima", "Rome"])["status"] == "succeeded"
    assert call("GET", "/v1/tasks/tickets")[1]["labels"] == ["Paris", "Oslo", "Lima", "Rome"]
    failed = make(call, plain_file(CAPITALS), "other", labels=["Paris", "Oslo"])
    assert failed["error"]["message"] == "line 3: the answer 'Lima' is not among the 2 labels. Correct it or list it."
    assert make(call, chat_file(TICKETS), "free", labels=[])["status"] == "succeeded"
    assert call("GET", "/v1/tasks/free")[1]["labels"] == []
    alone = call("POST", "/v1/fine_tuning/jobs", {"training_file": "x", "labels": ["one"]})
    assert (alone[0], error_of(alone)["param"]) == (400, "labels")


def test_facts_of_a_task(call: Caller, backend: FakeBackend) -> None:
    backend.context_tokens = NUM_TOKENS - 1
    make(call, chat_file(TICKETS, system="Route it."))
    facts = call("GET", "/v1/tasks/tickets")[1]
    assert facts.pop("created_at") > 1_700_000_000
    [left_out] = facts.pop("left_out")
    assert left_out["reason"].endswith(" tokens do not fit in " + left_out["reason"].rpartition(" ")[2])
    assert TICKETS[left_out["line"] - 1] == shuffle_examples(TICKETS, seed=0)[left_out["position"]]
    used = facts.pop("prefix_tokens")
    assert facts == {
        "id": "tickets",
        "object": "task",
        "labels": ["billing", "bug"],
        "instruction": "Route it.",
        "num_examples": 6,
        "num_shots": 5,
        "computed_tokens": used,
        "prefill_seconds": 0.25,
        "temperature": 1.0,
        "context_tokens": NUM_TOKENS - 1,
        "num_left_out": 1,
    }


def test_the_event_of_a_left_out_example_names_its_line(call: Caller, backend: FakeBackend) -> None:
    backend.context_tokens = NUM_TOKENS - 1
    job = make(call, chat_file(TICKETS))
    [left_out] = call("GET", "/v1/tasks/tickets")[1]["left_out"]
    messages = [event["message"] for event in call("GET", f"/v1/fine_tuning/jobs/{job['id']}/events")[1]["data"]]
    expected = f"1 of 6 examples are not in the context: line {left_out['line']}: {left_out['reason']}"
    assert [message for message in messages if "context" in message] == [expected]


def test_facts_are_those_of_the_context_that_the_service_has_now(call: Caller, backend: FakeBackend) -> None:
    make(call, chat_file(TICKETS))
    before = call("GET", "/v1/tasks/tickets")[1]
    assert (before["num_shots"], before["num_left_out"], backend.calls.count("plan")) == (6, 0, 0)
    backend.context_tokens = NUM_TOKENS - 1  # As after a restart with another --context.
    for _ in range(2):
        facts = call("GET", "/v1/tasks/tickets")[1]
        assert (facts["num_shots"], facts["num_left_out"], facts["context_tokens"]) == (5, 1, NUM_TOKENS - 1)
        assert facts["prefix_tokens"] < NUM_TOKENS
        assert [own["line"] is None for own in facts["left_out"]] == [False]
        assert (facts["computed_tokens"], facts["prefill_seconds"]) == (before["computed_tokens"], before["prefill_seconds"])
    assert backend.calls.count("plan") == 1
    new = {"examples": [{"input": "word " * 90, "answer": "bug"}]}  # It has no line.
    assert [own["line"] is None for own in call("POST", "/v1/tasks/tickets/examples", new)[1]["left_out"]] == [False, True]


def test_appended_examples_change_answers_and_compute_only_themselves(call: Caller, backend: FakeBackend) -> None:
    make(call, chat_file(TICKETS))
    question = {"model": "tickets", "input": "password forgotten login"}
    assert call("POST", "/v1/classify", question)[1]["data"][0]["probability"] == 0.5
    new = {"examples": [{"input": " password login ", "answer": "bug"}], "after": 6}
    status, facts, _ = call("POST", "/v1/tasks/tickets/examples", new)
    assert (status, facts["num_examples"], facts["num_shots"], facts["prefix_tokens"]) == (200, 7, 7, NUM_TOKENS + 3)
    assert (facts["computed_tokens"], facts["prefill_seconds"]) == (NUM_TOKENS + 3, 0.5)
    assert call("POST", "/v1/classify", question)[1]["data"][0]["label"] == "bug"
    assert backend.calls.count("prepare") == 1
    repeated = call("POST", "/v1/tasks/tickets/examples", new)
    assert (repeated[0], error_of(repeated)["code"]) == (409, "task_changed")
    assert call("GET", "/v1/tasks/tickets")[1]["num_examples"] == 7


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "at least 1 item"),
        ([{"input": "x", "answer": "neither"}], "line 1: the answer 'neither' is not among the 2 labels"),
        ([{"input": " ", "answer": "bug"}], "the input is empty"),
        ([{"input": "x" * 501, "answer": "bug"}], "the input has 501 characters; at most 500 are taken"),
        ([{"input": "a\x00b", "answer": "bug"}], "the input holds a NUL character"),
        ([{"input": "x", "answer": "bug"}] * 95, "'tickets' would have more than 100 examples"),
    ],
)
def test_examples_that_cannot_be_appended(call: Caller, backend: FakeBackend, examples: list[Any], message: str) -> None:
    make(call, chat_file(TICKETS))
    answer = call("POST", "/v1/tasks/tickets/examples", {"examples": examples})
    assert answer[0] == 400
    assert message in error_of(answer)["message"]
    assert "extend" not in backend.calls
    assert call("GET", "/v1/tasks/tickets")[1]["num_examples"] == 6


def test_an_append_that_fails_changes_nothing(call: Caller, backend: FakeBackend) -> None:
    make(call, chat_file(TICKETS))
    backend.failure = overloaded(5)
    answer = call("POST", "/v1/tasks/tickets/examples", {"examples": [{"input": "x", "answer": "bug"}]})
    assert (answer[0], answer[2]["retry-after"]) == (429, "5")
    assert call("GET", "/v1/tasks/tickets")[1]["num_examples"] == 6


def test_an_append_ends_at_its_deadline_and_keeps_nothing_locked(call: Caller, backend: FakeBackend) -> None:
    make(call, chat_file(TICKETS))
    new = {"examples": [{"input": "x", "answer": "bug"}]}
    backend.delay = 30
    started = time.monotonic()
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(call, "POST", "/v1/tasks/tickets/examples", new, X_Timeout_Seconds="1")
        wait_for(lambda: "extend" in backend.calls)
        behind = call("POST", "/v1/tasks/tickets/examples", new, X_Timeout_Seconds="0.1")
        assert not slow.done()  # The one behind waits for the task no longer than it is given.
        for late in (behind, slow.result()):
            assert (late[0], error_of(late)["code"]) == (504, "deadline_exceeded")
    assert time.monotonic() - started < 5
    assert (backend.calls.count("extend"), call("GET", "/v1/tasks/tickets")[1]["num_examples"]) == (1, 6)
    backend.delay = 0
    assert call("POST", "/v1/tasks/tickets/examples", new)[1]["num_examples"] == 7
    assert call("DELETE", "/v1/models/tickets")[0] == 200


def test_an_append_whose_client_leaves_ends(call: Caller, backend: FakeBackend) -> None:
    make(call, chat_file(TICKETS))
    new = json.dumps({"examples": [{"input": "x", "answer": "bug"}]}).encode()
    backend.delay = 1
    connection = http.client.HTTPConnection(call.host, call.port)
    connection.request("POST", "/v1/tasks/tickets/examples", new, {"Content-Type": "application/json"})
    wait_for(lambda: "extend" in backend.calls)
    connection.close()
    time.sleep(1.5)
    assert call("GET", "/v1/tasks/tickets")[1]["num_examples"] == 6


def test_examples_are_not_added_to_another_task_of_the_same_name(
    call: Caller, backend: FakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(call, chat_file(TICKETS))
    find, found = task_routes.find_task, []

    async def find_another(*arguments: Any) -> Served:
        """As if the task was made again while its lock was waited for."""
        served = await find(*arguments)
        found.append(served)
        return replace(served, spec=replace(served.spec, key=str(len(found)) * 32))

    monkeypatch.setattr(task_routes, "find_task", find_another)
    answer = call("POST", "/v1/tasks/tickets/examples", {"examples": [{"input": "x", "answer": "bug"}]})
    assert (answer[0], error_of(answer)["code"], len(found)) == (409, "task_changed", 2)
    assert "extend" not in backend.calls


def many_tickets(count: int) -> bytes:
    draw = random.Random(1)
    return chat_file(
        [(f"{draw.choice(TICKETS[:3])[0]} {n}", "billing") if n % 2 else (f"a crash {n}", "bug") for n in range(count)]
    )


def test_quality_is_measured_on_held_out_examples(call: Caller, backend: FakeBackend) -> None:
    make(call, many_tickets(50))
    status, found, _ = call("POST", "/v1/tasks/tickets/quality", {"share": 0.2, "seed": 4})
    assert status == 200
    low, _ = wilson_interval(10, 10)
    assert found == {
        "object": "quality",
        "model": "tickets",
        "metric": "accuracy",
        "value": 1.0,
        "low": pytest.approx(low),
        "high": 1.0,
        "num_held_out": 10,
        "num_shots": 40,
        "seed": 4,
        "log_loss": pytest.approx(found["log_loss"]),
        "temperature": pytest.approx(0.1, abs=1e-3),  # All right, so the surer the better, as far as it goes.
        "calibrated_log_loss": pytest.approx(0, abs=1e-3),
    }
    assert 0 <= found["log_loss"] < 0.01
    wait_for(lambda: len(backend.kept) == 1)
    assert call("POST", "/v1/tasks/tickets/quality", {"seed": 4})[1] == found


def test_quality_of_free_text_is_token_f1(call: Caller) -> None:
    make(call, plain_file([(f"capital of {place}", f"it is {place}") for place in "ABCDEFGHIJ"]), "capitals")
    found = call("POST", "/v1/tasks/capitals/quality", {})[1]
    assert (found["metric"], found["num_held_out"], found["num_shots"]) == ("token_f1", 2, 8)
    # "it is X" against "it is Y": two of three words.
    assert found["value"] == pytest.approx(2 / 3)
    curve = call("GET", "/v1/tasks/capitals/shot-curve")
    assert error_of(curve)["code"] == "no_labels"


def test_a_shot_curve_is_drawn_on_one_held_out_share(call: Caller, backend: FakeBackend) -> None:
    make(call, many_tickets(20))
    status, found, _ = call("GET", "/v1/tasks/tickets/shot-curve?shots=0,4,max,900&share=0.5")
    assert (status, found["num_held_out"], [point["num_shots"] for point in found["points"]]) == (200, 10, [0, 4, 10])
    assert found["points"][-1]["value"] == 1.0
    assert 0 < found["points"][0]["value"] < 1
    assert backend.calls.count("prepare") == 2
    wait_for(lambda: len(backend.kept) == 1)
    for query in ("shots=", "shots=4,many", "share=0.9", "share=nan", "seed=-1"):
        assert call("GET", f"/v1/tasks/tickets/shot-curve?{query}")[0] == 400


def test_a_measurement_that_takes_too_long_ends(call: Caller, backend: FakeBackend) -> None:
    make(call, many_tickets(20))
    backend.delay = 30
    started = time.monotonic()
    answer = call("POST", "/v1/tasks/tickets/quality", {}, X_Timeout_Seconds="0.2")
    assert (answer[0], error_of(answer)["code"]) == (504, "deadline_exceeded")
    assert time.monotonic() - started < 5
    for header in ("0", "-1", "nan", "inf", "soon"):
        assert call("POST", "/v1/tasks/tickets/quality", {}, X_Timeout_Seconds=header)[0] == 400


def test_too_few_examples_are_not_split(call: Caller) -> None:
    make(call, plain_file(CAPITALS), "capitals")
    assert error_of(call("POST", "/v1/tasks/capitals/quality", {}))["code"] == "too_few_examples"


def test_calibrated_probabilities_are_told_from_then_on(call: Caller) -> None:
    draw = random.Random(3)
    words = ["invoice", "crash"]
    pairs = [
        (f"{word} {n}", answer if draw.random() < 0.8 else other)
        for n in range(150)
        for word, answer, other in [(words[n % 2], *(("billing", "bug") if n % 2 == 0 else ("bug", "billing")))]
    ]
    make(call, chat_file([*pairs[:100]]))
    question = {"model": "tickets", "input": "invoice"}
    before = call("POST", "/v1/classify", question)[1]["data"][0]
    found = call("POST", "/v1/tasks/tickets/quality", {"share": 0.5, "calibrate": True})[1]
    assert found["temperature"] > 2  # Shared words make the fake backend far too sure.
    assert found["calibrated_log_loss"] < found["log_loss"] - 0.5
    after = call("POST", "/v1/classify", question)[1]["data"][0]
    assert (after["label"], before["label"]) == ("billing", "billing")
    assert 0.5 < after["probability"] < before["probability"]
    assert sum(after["probabilities"].values()) == pytest.approx(1)
    assert call("GET", "/v1/tasks/tickets")[1]["temperature"] == found["temperature"]
    few = call("POST", "/v1/tasks/tickets/quality", {"share": 0.05, "calibrate": True})
    assert (few[0], error_of(few)["param"]) == (400, "calibrate")


def test_the_temperature_is_where_the_log_loss_is_smallest() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(2000, 4)) * 2
    gold = np.array([generator.choice(4, p=np.exp(row)) for row in temper(logits, 1.0)])
    for factor in (0.5, 1.0, 3.0):
        assert fit_temperature(logits * factor, gold) == pytest.approx(factor, rel=0.1)
    best = fit_temperature(logits, gold)
    assert log_loss(logits, gold, best) <= min(log_loss(logits, gold, best * 1.01), log_loss(logits, gold, best / 1.01))
    assert np.exp(temper(logits, 2.5)).sum(axis=1) == pytest.approx(1)


def test_the_split_keeps_every_example_once() -> None:
    examples = [Example(f"{n}", "a") for n in range(10)]
    stay, held_out = split_examples(examples, share=0.3, seed=0)
    assert (len(stay), len(held_out)) == (7, 3)
    assert sorted(stay + held_out, key=lambda example: int(example.input)) == examples
    assert split_examples(examples, share=0.3, seed=1)[1] != held_out
    assert len(split_examples(examples * 1000, share=0.5, seed=0)[1]) == 500


def test_wilson_intervals_are_those_of_the_formula() -> None:
    assert wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson_interval(0, 5) == pytest.approx((0.0, 0.4344825), abs=1e-6)
    assert wilson_interval(5, 5) == pytest.approx((0.5655175, 1.0), abs=1e-6)
