"""Callers of an HTTP service, for benchmarks/serving.py: some who wait for their answers, and many who do not.

As a program it is a flood: http_load.py JOB.json sends requests at a steady rate, answered or not, and prints what came back.
"""

import asyncio
import http.client
import json
import math
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

TICK_SECONDS = 0.001
RETRY_SECONDS = 0.05


class Caller:
    """One kept connection to a service."""

    def __init__(self, address: str, headers: dict[str, str] | None = None) -> None:
        place = urlsplit(address)
        self._connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=600)
        self._headers = headers or {}

    def call(self, method: str, path: str, body: Any = None, *, kind: str = "application/json") -> Any:
        """The answer as JSON, or as bytes where it is none; None where the service is too busy."""
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        self._connection.request(method, path, data, self._headers | ({"Content-Type": kind} if data is not None else {}))
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status == http.client.TOO_MANY_REQUESTS:
            return None
        if answer.status != http.client.OK:
            raise SystemExit(f"{method} {path}: {answer.status} {content[:500]!r}")
        return json.loads(content) if content.startswith((b"{", b"[")) else content

    def close(self) -> None:
        """End the connection."""
        self._connection.close()


def call_in_turn(
    address: str, path: str, bodies: Sequence[Any], *, callers: int, headers: dict[str, str] | None = None
) -> tuple[float, list[Any], list[float]]:
    """Send requests, each by the next caller who is free: seconds in all, answers in order, and seconds of each.

    One that is refused is sent again after a moment, and its seconds are those of the last time.
    """
    left = iter(range(len(bodies)))
    answers: list[Any] = [None] * len(bodies)
    seconds = [0.0] * len(bodies)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            caller = Caller(address, headers)
            for number in left:
                while answers[number] is None:
                    start = time.perf_counter()
                    answers[number] = caller.call("POST", path, bodies[number])
                    seconds[number] = time.perf_counter() - start
                    if answers[number] is None:
                        time.sleep(RETRY_SECONDS)
            caller.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(callers)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = time.perf_counter() - start
    if failures:
        raise failures[0]
    return total, answers, seconds


class _Connection(asyncio.Protocol):
    """A kept connection with one request at a time. As lean as it can be: sender and service share the processors."""

    def __init__(self, found: list[tuple[int, float]], free: list["_Connection"]) -> None:
        self._found, self._free = found, free
        self._transport: Any = None
        self._content, self._due = b"", 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._free.append(self)

    def send(self, request: bytes, due: float) -> None:
        """Send a request that was due at a time of `time.perf_counter()`."""
        self._content, self._due = b"", due
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._content += data
        head, found, body = self._content.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(head[head.lower().index(b"content-length:") + 15 :].split(b"\r\n", 1)[0])
        if len(body) >= length:
            self._found.append((int(head.split(b" ", 2)[1]), time.perf_counter() - self._due))
            self._free.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._found.append((0, time.perf_counter() - self._due))  # Status 0: none came.


async def flood(job: dict[str, Any]) -> dict[str, Any]:
    """Send `rate` requests a second for `seconds` over `connections`; one without a free connection waits for it.

    The time of a request is counted from when it was due.
    """
    place = urlsplit(job["address"])
    requests = [_request(place.netloc, job["path"], body) for body in job["bodies"]]
    found: list[tuple[int, float]] = []
    free: list[_Connection] = []
    for _ in range(job["connections"]):
        await asyncio.get_running_loop().create_connection(lambda: _Connection(found, free), place.hostname, place.port)
    begin, number, last = time.perf_counter(), 0, 0.0
    total = int(job["rate"] * job["seconds"])
    while len(found) < total:
        now = time.perf_counter()
        while free and number < total and number / job["rate"] <= now - begin:
            free.pop(0).send(requests[number % len(requests)], begin + number / job["rate"])
            number, last = number + 1, now
        await asyncio.sleep(TICK_SECONDS)
    return {
        "sent": number,
        "sent_per_second": number / (last - begin),
        "seconds": time.perf_counter() - begin,
        "statuses": {str(status): _summarise([took for own, took in found if own == status]) for status in {s for s, _ in found}},
    }


def _request(host: str, path: str, body: Any) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def _summarise(seconds: list[float]) -> dict[str, float]:
    """How many, and milliseconds that half and all but a twentieth of them took at most."""
    ordered = sorted(seconds)
    return {
        "count": len(ordered),
        "p50_ms": 1000 * statistics.median(ordered),
        "p95_ms": 1000 * ordered[math.ceil(0.95 * len(ordered)) - 1],
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(flood(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))))
