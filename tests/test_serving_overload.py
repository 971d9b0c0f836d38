"""A query that finds the queue full is refused before it is read, and only those that were read and wait count."""

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from manyicl.serving.app import create_app
from manyicl.serving.guard import QUERIES
from manyicl.serving.keys import add_key
from manyicl.serving.settings import Settings
from serving_fixtures import FakeBackend, serving, wait_for

PLACE = tuple[str, int]
HELLO = b'{"model": "base", "prompt": "hello"}'


@pytest.fixture
def backend(tmp_path: Path) -> FakeBackend:
    return FakeBackend(tmp_path / "fake")


@pytest.fixture
def place(tmp_path: Path, backend: FakeBackend) -> Iterator[PLACE]:
    with serving(Settings(tmp_path / "data"), backend) as address:
        host, _, port = address.removeprefix("http://").partition(":")
        yield host, int(port)


def head_of(place: PLACE, path: str, length: int, *lines: str) -> bytes:
    own = f"Host: {place[0]}:{place[1]}", "Content-Type: application/json", f"Content-Length: {length}", *lines
    return "\r\n".join([f"POST {path} HTTP/1.1", *own, "", ""]).encode()


def read_answer(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    answer = http.client.HTTPResponse(connection)
    answer.begin()
    headers = {name.lower(): value for name, value in answer.getheaders()}
    return answer.status, headers, json.loads(answer.read())


def ask(place: PLACE, body: bytes = HELLO) -> tuple[int, dict[str, str], Any]:
    with socket.create_connection(place, timeout=20) as connection:
        connection.sendall(head_of(place, "/v1/completions", len(body)) + body)
        return read_answer(connection)


@pytest.mark.parametrize("path", sorted(QUERIES))
def test_without_room_a_query_is_refused_before_its_body_comes(place: PLACE, backend: FakeBackend, path: str) -> None:
    backend.room = 0
    with socket.create_connection(place, timeout=20) as connection:
        connection.sendall(head_of(place, path, 1000))
        status, headers, content = read_answer(connection)
    assert (status, headers["retry-after"], content["error"]["code"]) == (429, "7", "overloaded")
    assert headers["x-request-id"].startswith("req-")
    assert backend.calls == []


def test_what_is_no_query_is_let_in_without_room(place: PLACE, backend: FakeBackend) -> None:
    backend.room = 0
    for path in ("/v1/models", "/v1/files", "/readyz"):
        connection = http.client.HTTPConnection(*place, timeout=20)
        connection.request("GET", path)
        assert connection.getresponse().status == 200
        connection.close()
    assert backend.asked_for_room == []


def test_a_connection_goes_on_after_a_query_was_refused(place: PLACE, backend: FakeBackend) -> None:
    with socket.create_connection(place, timeout=20) as connection:
        for room, expected in ((0, 429), (1, 200), (0, 429), (1, 200)):
            backend.room = room
            connection.sendall(head_of(place, "/v1/completions", len(HELLO)) + HELLO)
            assert read_answer(connection)[0] == expected


def test_refused_queries_stand_in_the_metrics_under_their_address(place: PLACE, backend: FakeBackend) -> None:
    backend.room = 0
    ask(place)
    connection = http.client.HTTPConnection(*place, timeout=20)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    assert 'manyicl_requests_total{method="POST",route="/v1/completions",status="429"} 1.0' in lines


def test_who_asks_comes_before_whether_there_is_room(tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    add_key(keys, "acme")
    backend = FakeBackend(tmp_path / "fake")
    backend.room = 0
    with serving(Settings(tmp_path / "data", api_keys=keys), backend) as address:
        host, _, port = address.removeprefix("http://").partition(":")
        assert ask((host, int(port)))[0] == 401
    assert backend.asked_for_room == []


def test_queries_count_from_when_they_are_read_until_they_are_answered(place: PLACE, backend: FakeBackend) -> None:
    backend.delay = 0.3  # Before the answer begins.
    with socket.create_connection(place, timeout=20) as half_sent:
        half_sent.sendall(head_of(place, "/v1/completions", len(HELLO)) + HELLO[:5])
        wait_for(lambda: backend.asked_for_room == [0])
        asking = threading.Thread(target=ask, args=(place,))
        asking.start()
        wait_for(lambda: backend.calls == ["generate"])
        backend.room = 1
        assert ask(place)[0] == 429
        assert backend.asked_for_room == [0, 0, 1]
        asking.join()
        assert ask(place, b"not JSON")[0] == 400
        assert ask(place)[0] == 200
    assert backend.asked_for_room == [0, 0, 1, 0, 0]


def test_a_query_whose_client_leaves_no_longer_counts(place: PLACE, backend: FakeBackend) -> None:
    backend.delay = 0.5
    with socket.create_connection(place, timeout=20) as connection:
        connection.sendall(head_of(place, "/v1/completions", len(HELLO)) + HELLO)
        wait_for(lambda: backend.calls == ["generate"])
    backend.room, backend.delay = 1, 0.0
    wait_for(lambda: ask(place)[0] == 200)


def test_every_address_of_a_query_is_there(tmp_path: Path) -> None:
    app = create_app(Settings(tmp_path / "unused"), FakeBackend(tmp_path / "unused"))
    assert {path for path, operations in app.openapi()["paths"].items() if "post" in operations} >= QUERIES
