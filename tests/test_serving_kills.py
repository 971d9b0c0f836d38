"""A service that is killed at any moment has lost nothing that it acknowledged, and offers nothing half-made."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

from manyicl.serving.settings import Settings
from manyicl.serving.store import Store
from serving_fixtures import CAPITALS, TICKETS, chat_file, plain_file, wait_for

FORM = "multipart/form-data; boundary=edge"


def call(address: str, method: str, path: str, body: Any = None, *, form: bytes | None = None) -> Any:
    """The answer as JSON; raises OSError or HTTPException where there is none."""
    data, kind = (form, FORM) if form is not None else (None if body is None else json.dumps(body).encode(), "application/json")
    request = urllib.request.Request(f"{address}{path}", data, {"Content-Type": kind}, method=method)
    with urllib.request.urlopen(request, timeout=20) as answer:
        content = answer.read()
    return content if path.endswith("/content") else json.loads(content)


def upload_form(content: bytes) -> bytes:
    head = b'--edge\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    head += b'--edge\r\nContent-Disposition: form-data; name="file"; filename="t.jsonl"\r\n\r\n'
    return head + content + b"\r\n--edge--\r\n"


@contextmanager
def process(data_dir: Path, *, delay: float = 0.0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running service and its address; killed at the end unless it has ended."""
    command = [sys.executable, str(Path(__file__).with_name("serving_process.py")), str(data_dir), str(delay)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    data_dir.mkdir(exist_ok=True)
    with (
        (data_dir / "log").open("a") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as running,
    ):
        try:
            assert running.stdout is not None
            address = f"http://127.0.0.1:{int(running.stdout.readline())}"
            wait_for(lambda: is_ready(address))
            yield running, address
        finally:
            running.kill()


def is_ready(address: str) -> bool:
    try:
        return call(address, "GET", "/readyz") == {"status": "ok"}
    except OSError:
        return False


@dataclass
class Acknowledged:
    """What clients were told is kept."""

    files: dict[str, bytes] = field(default_factory=dict)
    deleted: set[str] = field(default_factory=set)
    jobs: dict[str, str] = field(default_factory=dict)
    models: set[str] = field(default_factory=set)
    made_of: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    examples: dict[str, int] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)


def load(address: str, known: Acknowledged, draw: random.Random, worker: str) -> None:
    """Upload, make models, append to this worker's and delete files, until the service is gone."""
    number = 0
    try:
        while True:
            number += 1
            mine = sorted(name for name in known.models if name.endswith(worker[-2:]))
            if mine and draw.random() < 0.5:
                append(address, known, draw.choice(mine))
            else:
                make_model(address, known, draw, f"m-{number}-{worker}")
    except urllib.error.HTTPError as error:
        raise AssertionError(f"refused: {error.code} {error.read()!r}") from error
    except (OSError, HTTPException, json.JSONDecodeError):
        return  # Killed.


def make_model(address: str, known: Acknowledged, draw: random.Random, name: str) -> None:
    pairs = draw.choice([TICKETS, CAPITALS]) * draw.randint(1, 9)
    content = draw.choice([chat_file, plain_file])(pairs)
    known.made_of[name] = pairs
    file_id = call(address, "POST", "/v1/files", form=upload_form(content))["id"]
    known.files[file_id] = content
    job = call(address, "POST", "/v1/fine_tuning/jobs", {"training_file": file_id, "model": "base", "suffix": name})
    known.jobs[job["id"]] = name
    for _ in range(draw.randint(0, 20)):
        if call(address, "GET", f"/v1/fine_tuning/jobs/{job['id']}")["status"] == "succeeded":
            known.models.add(name)
            break
    if draw.random() < 0.2:
        known.files.pop(file_id)
        known.deleted.add(file_id)
        call(address, "DELETE", f"/v1/files/{file_id}")


def append(address: str, known: Acknowledged, name: str) -> None:
    before = call(address, "GET", f"/v1/tasks/{name}")
    assert before["num_examples"] >= known.examples.get(name, 0)
    known.asked[name] = before["num_examples"] + 2
    places = range(before["num_examples"], before["num_examples"] + 2)
    new = [{"input": f"new {place}", "answer": (before["labels"] or ["x"])[0]} for place in places]
    call(address, "POST", f"/v1/tasks/{name}/examples", {"examples": new, "after": before["num_examples"]})
    known.examples[name] = before["num_examples"] + 2


def kill_again_and_again(data_dir: Path, *, num_kills: int, seed: int) -> Acknowledged:
    """Load a service and kill it, many times; after each kill all that was acknowledged is checked."""
    known, draw = Acknowledged(), random.Random(seed)
    failures: list[BaseException] = []
    for round_number in range(num_kills):
        with process(data_dir, delay=0.002) as (running, address):
            # Jobs of earlier lives are done first, so that few clients see the end of their own.
            known.models |= {model["id"] for model in call(address, "GET", "/v1/models")["data"]} - {"base"}
            threads = []
            for worker in range(3):
                own = random.Random(f"{seed}/{round_number}/{worker}")

                def work(own: random.Random = own, worker: int = worker, number: int = round_number) -> None:
                    try:
                        load(address, known, own, f"{number}-{worker}")
                    except BaseException as error:
                        failures.append(error)

                threads.append(threading.Thread(target=work))
            for thread in threads:
                thread.start()
            time.sleep(draw.uniform(0.0, 0.8))
            running.send_signal(signal.SIGKILL)
            for thread in threads:
                thread.join()
        assert failures == []
        store = Store(Settings(data_dir))
        assert store.check() == []
        store.close()
        # A restart itself may be killed too.
        if draw.random() < 0.3:
            with process(data_dir) as (running, _):
                running.send_signal(signal.SIGKILL)
    return known


def check_everything(data_dir: Path, known: Acknowledged) -> None:
    with process(data_dir) as (_, address):
        for file_id, content in known.files.items():
            assert call(address, "GET", f"/v1/files/{file_id}/content") == content
        statuses = {}
        for job_id, name in known.jobs.items():
            done = wait_for(
                lambda job_id=job_id: (job := call(address, "GET", f"/v1/fine_tuning/jobs/{job_id}"))["finished_at"] and job
            )
            statuses[name] = done["status"]
            # A file that was deleted before its job read it is the one reason to fail.
            assert done["status"] == "succeeded" or done["training_file"] in known.deleted, done["error"]
        offered = {model["id"] for model in call(address, "GET", "/v1/models")["data"]} - {"base"}
        assert known.models <= offered
        assert {name for name, status in statuses.items() if status == "succeeded"} <= offered
        for name in offered:
            facts = call(address, "GET", f"/v1/tasks/{name}")
            least = known.examples.get(name, facts["num_examples"])
            assert least <= facts["num_examples"] <= max(known.asked.get(name, 0), facts["num_shots"])
            answer = call(
                address, "POST", "/v1/chat/completions", {"model": name, "messages": [{"role": "user", "content": "crash"}]}
            )
            assert answer["choices"][0]["message"]["content"] != ""
        for name in sorted(offered)[:3]:
            append(address, known, name)
    check_examples(data_dir, known, offered)


def check_examples(data_dir: Path, known: Acknowledged, offered: set[str]) -> None:
    """A task has the examples of its file, and behind them those appended, each once and in order."""
    store = Store(Settings(data_dir))
    for name in offered:
        spec, pairs = store.read_spec(store.of("local").task(name)), known.made_of[name]
        found = [(example.input, example.answer) for example in spec.examples]
        answer = (spec.labels or ("x",))[0]
        assert sorted(found[: len(pairs)]) == sorted(pairs)
        assert found[len(pairs) :] == [(f"new {place}", answer) for place in range(len(pairs), len(found))]
        assert (len(found) - len(pairs)) % 2 == 0
    store.close()


def test_nothing_acknowledged_is_lost_by_a_kill(tmp_path: Path) -> None:
    known = kill_again_and_again(tmp_path, num_kills=3, seed=1)
    assert len(known.files) > 3
    check_everything(tmp_path, known)


@pytest.mark.slow
def test_nothing_acknowledged_is_lost_by_fifty_kills(tmp_path: Path) -> None:
    known = kill_again_and_again(tmp_path, num_kills=50, seed=2)
    assert len(known.files) > 100
    assert sum(known.examples.values()) > 100
    check_everything(tmp_path, known)


def test_a_service_told_to_stop_answers_what_it_has(tmp_path: Path) -> None:
    with process(tmp_path, delay=0.05) as (running, address):
        answers: list[Any] = []
        body = {"model": "base", "messages": [{"role": "user", "content": "a few words"}]}
        thread = threading.Thread(target=lambda: answers.append(call(address, "POST", "/v1/chat/completions", body)))
        thread.start()
        time.sleep(0.3)
        running.send_signal(signal.SIGTERM)
        thread.join()
        assert answers[0]["choices"][0]["message"]["content"] == "echo: a few words"
        assert running.wait(timeout=10) == 0
        lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    events = [line["event"] for line in lines]
    assert [event.partition(" on ")[0] for event in events if event.startswith("ready on http://127.0.0.1:")] == ["ready"]
    assert events[-1] == "stopping"
    assert {"POST"} == {line["method"] for line in lines if line.get("route") == "/v1/chat/completions"}
    assert "a few words" not in json.dumps(lines)


def test_a_second_service_keeps_its_hands_off(tmp_path: Path) -> None:
    with process(tmp_path):
        command = [sys.executable, str(Path(__file__).with_name("serving_process.py")), str(tmp_path), "0"]
        second = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        )
    assert second.returncode == 1
    assert f"{tmp_path}: another service is using this folder. Stop it, or give another." in second.stderr
