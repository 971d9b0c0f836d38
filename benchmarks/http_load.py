"""Callers of an HTTP service, for benchmarks/serving.py: some who wait for their answers, and many who do not.

As a program it is a flood: http_load.py JOB.json sends requests at a steady rate, answered or not, and prints what came back.
"""

import asyncio
import http.client
import json
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

HEADERS = {"Content-Type": "application/json"}


class Caller:
    """One kept connection to a service."""

    def __init__(self, address: str, headers: dict[str, str] | None = None) -> None:
        place = urlsplit(address)
        self._connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=600)
        self._headers = headers or {}

    def call(self, method: str, path: str, body: Any = None, *, kind: str = "application/json") -> Any:
        """The answer as JSON, or as bytes where it is none."""
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        self._connection.request(method, path, data, self._headers | ({"Content-Type": kind} if data is not None else {}))
        answer = self._connection.getresponse()
        content = answer.read()
        if answer.status != http.client.OK:
            raise SystemExit(f"{method} {path}: {answer.status} {content[:500]!r}")
        return json.loads(content) if content.startswith((b"{", b"[")) else content

    def close(self) -> None:
        """End the connection."""
        self._connection.close()


def call_in_turn(
    address: str, path: str, bodies: Sequence[Any], *, callers: int, headers: dict[str, str] | None = None
) -> tuple[float, list[Any], list[float]]:
    """Send requests, each by the next caller who is free: seconds in all, answers in order, and seconds of each."""
    left = iter(range(len(bodies)))
    answers: list[Any] = [None] * len(bodies)
    seconds = [0.0] * len(bodies)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            caller = Caller(address, headers)
            for number in left:
                start = time.perf_counter()
                answers[number] = caller.call("POST", path, bodies[number])
                seconds[number] = time.perf_counter() - start
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


async def flood(job: dict[str, Any]) -> dict[str, Any]:
    """Send `rate` requests a second for `seconds` over `connections`; one without a free connection waits for it.

    The time of a request is counted from when it was due, and what was sent is counted when it is written.
    """
    place = urlsplit(job["address"])
    requests = [_request(place.netloc, job["path"], body) for body in job["bodies"]]
    free: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    for _ in range(job["connections"]):
        free.put_nowait(await asyncio.open_connection(place.hostname, place.port))
    found: list[tuple[int, float]] = []
    sent: list[float] = []

    async def send(number: int, due: float) -> None:
        reader, writer = await free.get()
        writer.write(requests[number % len(requests)])
        sent.append(time.perf_counter())
        status = await _read_status(reader)
        found.append((status, time.perf_counter() - due))
        free.put_nowait((reader, writer))

    begin, tasks = time.perf_counter(), []
    for number in range(int(job["rate"] * job["seconds"])):
        due = begin + number / job["rate"]
        ahead = due - time.perf_counter()
        if ahead > 0 or number % 20 == 0:
            await asyncio.sleep(max(0.0, ahead))
        tasks.append(asyncio.create_task(send(number, due)))
    await asyncio.gather(*tasks)
    return {
        "sent": len(sent),
        "sent_per_second": len(sent) / (max(sent) - begin),
        "seconds": time.perf_counter() - begin,
        "statuses": {str(status): _summarise([took for own, took in found if own == status]) for status in {s for s, _ in found}},
    }


def _request(host: str, path: str, body: Any) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


async def _read_status(reader: asyncio.StreamReader) -> int:
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    length = next(int(line.partition(":")[2]) for line in lines if line.lower().startswith("content-length:"))
    await reader.readexactly(length)
    return int(lines[0].split()[1])


def _summarise(seconds: list[float]) -> dict[str, float]:
    """How many, and milliseconds that half and all but a twentieth of them took at most."""
    ordered = sorted(seconds)
    return {
        "count": len(ordered),
        "p50_ms": 1000 * statistics.median(ordered),
        "p95_ms": 1000 * ordered[int(0.95 * (len(ordered) - 1))],
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(flood(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))))
