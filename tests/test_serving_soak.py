"""Many requests of every kind, and memory that stays flat. `MANYICL_SOAK_REQUESTS` sets how many; 100,000 take some minutes."""

import http.client
import json
import os
import random
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from serving_fixtures import TICKETS, chat_file
from test_serving_guard import Caller
from test_serving_kills import FORM, process, upload_form

NUM_THREADS = 4
MAX_GROWTH_BYTES = 8 * 2**20


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def send_many(address: str, count: int, draw: random.Random, statuses: dict[int, int]) -> None:
    """Requests of every kind over one kept connection; the service refuses some of them on purpose."""
    place = urlsplit(address)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
    words = " ".join(given for given, _ in TICKETS).split()

    def send(method: str, path: str, body: object = None, form: bytes | None = None) -> bytes:
        data, kind = (form, FORM) if form is not None else (json.dumps(body).encode(), "application/json")
        connection.request(method, path, data if method == "POST" else None, {"Content-Type": kind} if method == "POST" else {})
        answer = connection.getresponse()
        content = answer.read()
        statuses[answer.status] = statuses.get(answer.status, 0) + 1
        return content

    for number in range(count):
        text = " ".join(draw.choices(words, k=draw.randint(1, 60)))
        message = [{"role": "user", "content": text}]
        match number % 10:
            case 0:
                file_id = json.loads(send("POST", "/v1/files", form=upload_form(chat_file(TICKETS * draw.randint(1, 20)))))["id"]
                send("DELETE", f"/v1/files/{file_id}")
            case 1:
                send("POST", "/v1/chat/completions", {"model": "base", "messages": message, "stream": True, "max_tokens": 10})
            case 2:
                send("GET", f"/v1/tasks/{draw.choice(words)}-{number}")
            case 3:
                send("POST", "/v1/classify", {"model": "tickets", "input": [text, text], f"field{number}": 1})
            case 4:
                send("GET", "/metrics" if number % 100 == 4 else "/v1/models")
            case 5 | 6:
                send("POST", "/v1/chat/completions", {"model": "tickets", "messages": message})
            case _:
                send("POST", "/v1/classify", {"model": "tickets", "input": text})
    connection.close()


@pytest.mark.slow
def test_memory_stays_flat(tmp_path: Path) -> None:
    total = int(os.environ.get("MANYICL_SOAK_REQUESTS", "12000"))
    statuses: dict[int, int] = {}
    with process(tmp_path) as (running, address):
        Caller(address).make_model("tickets")
        measured = []
        for phase in range(4):
            share = total // 4 // NUM_THREADS
            threads = [
                threading.Thread(target=send_many, args=(address, share, random.Random(f"{phase}/{worker}"), statuses))
                for worker in range(NUM_THREADS)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            measured.append(resident_bytes(running.pid))
    print(f"{sum(statuses.values())} requests, {[size // 2**20 for size in measured]} MiB after each quarter, {statuses}")
    assert set(statuses) == {200, 400, 404}
    assert sum(statuses.values()) > total
    # What is kept for the next request is there after the first quarter.
    assert measured[-1] - measured[0] < MAX_GROWTH_BYTES
