"""`manyicl serve`, `keys` and `client` as they are typed, with a real (tiny) model in a process of its own."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from manyicl.serving.client import Client
from manyicl.serving.keys import KeyRing, add_key
from manyicl.serving.settings import Settings
from serving_fixtures import CAPITALS, TICKETS, FakeBackend, chat_file, plain_file, serving, wait_for
from test_serving_guard import Caller

RunCli = Callable[..., tuple[int, str, str]]


@contextmanager
def served(folder: Path, log: Path, *arguments: object) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A service started by the command, and its address."""
    command = [sys.executable, "-m", "manyicl", "serve", "--model", folder, "--port", "0", *arguments]
    log.write_bytes(b"")
    with log.open("ab") as stream, subprocess.Popen([str(part) for part in command], stderr=stream) as process:
        try:
            ready = wait_for(
                lambda: re.search(r"ready on (http://[\d.:]+)", log.read_text()) or process.poll() is not None, seconds=60
            )
            assert process.poll() is None, log.read_text()
            yield process, ready[1]
        finally:
            process.kill()


def test_a_model_is_served_stopped_and_served_again(tmp_path: Path, tiny_model_folder: Callable[..., Path]) -> None:
    folder, log = tiny_model_folder(), tmp_path / "log"
    key = add_key(tmp_path / "keys.txt", "acme")
    options = ("--data-dir", tmp_path / "data", "--api-keys", tmp_path / "keys.txt")
    question = {"model": "tickets", "input": ["my invoice", "a crash"]}
    with served(folder, log, *options) as (process, address):
        call = Caller(address, key)
        call.make_model("tickets")
        facts = call("GET", "/v1/tasks/tickets")[1]
        assert (facts["num_shots"], facts["num_left_out"]) == (6, 0)
        assert facts["prefix_tokens"] == facts["computed_tokens"] > sum(len(f"{given}{answer}") for given, answer in TICKETS)
        first = call("POST", "/v1/classify", question)[1]
        assert [entry["num_shots"] for entry in first["data"]] == [6, 6]
        assert sum(first["data"][0]["probabilities"].values()) == pytest.approx(1)
        appended = call("POST", "/v1/tasks/tickets/examples", {"examples": [{"input": "a long wait", "answer": "bug"}]})[1]
        assert (appended["num_shots"], appended["computed_tokens"]) == (7, appended["prefix_tokens"])
        after = call("POST", "/v1/classify", question)[1]
        assert after["data"][0]["probability"] != first["data"][0]["probability"]
        status, stream, _ = call("POST", "/v1/completions", {"model": "base", "prompt": "hello", "max_tokens": 5, "stream": True})
        events = [line.removeprefix("data: ") for line in stream.decode().splitlines() if line]
        assert (status, events[-1]) == (200, "[DONE]")
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
    with served(folder, log, *options) as (_, address):
        call = Caller(address, key)
        again = call("POST", "/v1/classify", question)[1]
        assert again["data"] == after["data"]
        opened = call("GET", "/metrics")[1].decode()
        assert 'manyicl_prefixes_opened_total{source="disk"} 1.0' in opened
        assert 'source="computed"' not in opened
        assert call("DELETE", "/v1/models/tickets")[0] == 200
    checked = [sys.executable, "-m", "manyicl", "serve", "--model", folder, "--data-dir", tmp_path / "data", "--check"]
    done = subprocess.run([str(part) for part in checked], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'data'}: whole\n")


def test_what_is_wrong_is_told_before_the_model_is_loaded(
    tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manyicl.serving.app.log_as_json", lambda level: None)
    arguments = ("serve", "--model", tmp_path / "none", "--data-dir", tmp_path / "data")
    code, _, error = run_cli(*arguments, "--host", "0.0.0.0")
    assert (code, "is reached from other machines" in error) == (2, True)
    code, _, error = run_cli(*arguments, "--api-keys", tmp_path / "none.txt")
    assert (code, f"manyicl keys add TENANT --file {tmp_path / 'none.txt'}" in error) == (2, True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, error = run_cli(*arguments, "--port", taken.getsockname()[1])
    assert (code, "cannot be listened on" in error, "Give another --host or --port" in error) == (2, True, True)
    (tmp_path / "file").write_text("in the way")
    code, _, error = run_cli("serve", "--model", tmp_path / "none", "--data-dir", tmp_path / "file", "--port", "0")
    assert (code, f"{tmp_path / 'file'}: cannot be written" in error) == (2, True)
    for wrong, message in (
        (("--engine", "other"), "give native, openai or vllm"),
        (("--engine", "openai"), "--base-url goes with --engine openai"),
        (("--base-url", "http://x/v1"), "--base-url goes with --engine openai"),
        (("--format", "odd"), "give plain or chat"),
    ):
        code, _, error = run_cli(*arguments, *wrong)
        assert (code, message in error) == (2, True), error


def test_a_damaged_folder_is_told(tmp_path: Path, run_cli: RunCli) -> None:
    data = tmp_path / "data"
    with serving(Settings(data), FakeBackend(tmp_path / "fake")) as address:
        file_id, _ = Caller(address).make_model()
    arguments = ("serve", "--model", "default", "--data-dir", data, "--check")
    assert run_cli(*arguments)[:2] == (0, f"{data}: whole\n")
    (data / "files" / f"{file_id}.jsonl").unlink()
    code, output, error = run_cli(*arguments)
    assert (code, output) == (1, f"file {file_id}: its bytes are gone\n")
    assert f"{data}: 1 problem(s)" in error


def test_a_look_at_what_is_no_services_folder_changes_nothing(tmp_path: Path, run_cli: RunCli) -> None:
    data = tmp_path / "data"
    arguments = ("serve", "--model", "default", "--data-dir", data, "--check")
    code, output, error = run_cli(*arguments)
    assert (code, output, f"{data}: no data folder of a service" in error) == (2, "", True)
    assert not data.exists()
    with serving(Settings(data), FakeBackend(tmp_path / "fake")) as address:
        file_id, _ = Caller(address).make_model()
    (data / "service.sqlite").unlink()  # As where the database is a PostgreSQL server's.
    code, output, error = run_cli(*arguments)
    assert (code, output, "Give the --database-url" in error) == (2, "", True)
    assert (data / "files" / f"{file_id}.jsonl").read_bytes() == chat_file(TICKETS)
    assert not (data / "service.sqlite").exists()


def test_every_event_of_a_long_job_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    polls = 0

    def call(client: Client, method: str, path: str, body: object = None) -> object:
        nonlocal polls
        if path.endswith("/events?limit=100"):
            count = 3 * polls
            return {"data": [{"id": f"e{number}", "message": f"{number}"} for number in range(count, max(0, count - 100), -1)]}
        if path.startswith("fine_tuning/jobs/"):
            polls += 1
            status = "succeeded" if polls == 70 else "running"
            return {"id": "j", "status": status, "finished_at": None, "error": None}
        return {"id": "j"}

    monkeypatch.setattr(Client, "call", call)
    monkeypatch.setattr("manyicl.serving.client._POLL_SECONDS", 0.0)
    (tmp_path / "t.jsonl").write_bytes(b"{}")
    told: list[str] = []
    Client("http://x").make("tickets", tmp_path / "t.jsonl", tell=told.append)
    assert told == [f"{number}" for number in range(1, 211)]


def test_keys_are_made(tmp_path: Path, run_cli: RunCli) -> None:
    code, output, _ = run_cli("keys", "add", "acme", "--file", tmp_path / "keys.txt")
    assert code == 0
    assert KeyRing(tmp_path / "keys.txt").find_tenant(output.strip()) == "acme"
    assert run_cli("keys", "add", "A B", "--file", tmp_path / "keys.txt")[0] == 2


def test_the_client_makes_asks_and_deletes(tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYICL_API_KEY", add_key(tmp_path / "keys.txt", "acme"))
    tickets, capitals = tmp_path / 'tick"ets.jsonl', tmp_path / "capitals.jsonl"
    tickets.write_bytes(chat_file(TICKETS))
    capitals.write_bytes(plain_file(CAPITALS))
    with serving(Settings(tmp_path / "data", api_keys=tmp_path / "keys.txt"), FakeBackend(tmp_path / "fake")) as address:
        monkeypatch.setenv("MANYICL_URL", address)
        code, output, error = run_cli("client", "make", "tickets", tickets)
        tokens = sum(len(f"{given} {answer}".split()) for given, answer in TICKETS)
        assert (code, output) == (0, f"tickets: 6 of 6 examples in {tokens} tokens, 2 labels, 0.25 s\n")
        assert error.splitlines()[-1] == "New fine-tuned model created: tickets"
        assert run_cli("client", "make", "capitals", capitals, "--url", f"{address}/")[1].endswith("free text, 0.25 s\n")
        assert run_cli("client", "models")[1] == "base\ntickets\ncapitals\n"
        assert run_cli("client", "ask", "capitals", "capital of Peru")[1] == "Lima\n"
        assert run_cli("client", "ask", "capitals", "capital of Peru", "--max-tokens", "2")[1] == "Li\n"
        assert json.loads(run_cli("client", "show", "tickets")[1])["labels"] == ["billing", "bug"]
        shown = run_cli("client", "ask", "tickets", "my invoice", "--probabilities")[1].splitlines()
        assert [line.split()[1] for line in shown] == ["billing", "bug"]
        assert sum(float(line.split()[0]) for line in shown) == pytest.approx(1, abs=1e-3)
        assert run_cli("client", "delete", "tickets")[0] == 0
        code, _, error = run_cli("client", "ask", "tickets", "x")
        assert (code, "The model 'tickets' does not exist" in error) == (2, True)
        capitals.write_bytes(b"broken\n")
        code, _, error = run_cli("client", "make", "broken", capitals)
        assert (code, "capitals.jsonl:1: broken JSON" in error) == (2, True)
        assert run_cli("client", "make", "absent", tmp_path / "absent")[0] == 2
        monkeypatch.setenv("MANYICL_API_KEY", "mi-wrong")
        code, _, error = run_cli("client", "models")
        assert (code, "Incorrect API key" in error) == (2, True)
    code, _, error = run_cli("client", "models")
    assert (code, "no service answers" in error) == (2, True)
    assert os.environ["MANYICL_URL"] in error
