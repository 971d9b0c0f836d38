"""A backend that needs no model, and a service on loopback around it."""

import asyncio
import json
import math
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from manyicl.errors import BudgetError, DeadlineError, OverloadedError, UserInputError
from manyicl.files import write_json_atomic
from manyicl.serving.app import create_app
from manyicl.serving.backends import BackendLoad, GenerationOptions, Piece, Prepared, Scored, TaskSpec, TokenLogprob
from manyicl.serving.settings import Settings
from manyicl.tasks.task import Example


class FakeBackend:
    """Answers by shared words. A demonstration costs as many tokens as its input and answer have words.

    Attributes:
        kept: Numbers of examples prepared, by key; in `folder` too, so that they outlive a process.
        calls: Names of the methods called.
        delay: Seconds that each prepare, score and piece takes.
        failure: An error that every call raises.
        is_alive: Whether what runs the model has not ended.
        room: Queries that may wait for their answers.
        asked_for_room: How many did each time that there was a further one.
    """

    name = "fake"

    def __init__(self, folder: Path, *, context_tokens: int = 400) -> None:
        self.folder = folder
        self.context_tokens = context_tokens
        self.calls: list[str] = []
        self.delay = 0.0
        self.failure: Exception | None = None
        self.num_pieces = 0
        self.is_started = False
        self.is_alive = True
        self.room = 1000
        self.asked_for_room: list[int] = []

    @property
    def context_identity(self) -> str:
        return f"fake/{self.context_tokens}"

    @property
    def kept(self) -> dict[str, int]:
        found = {}
        for path in self.folder.glob("*.json"):
            with suppress(FileNotFoundError):  # Forgotten meanwhile.
                found[path.stem] = json.loads(path.read_text())
        return found

    async def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.is_started = True

    async def stop(self) -> None:
        self.is_started = False

    async def _work(self, call: str) -> None:
        self.calls.append(call)
        if self.failure is not None:
            raise self.failure
        await asyncio.sleep(self.delay)

    def _used(self, spec: TaskSpec) -> tuple[list[Example], int, list[tuple[int, str]]]:
        used, tokens, left_out = [], 0, []
        for position, example in enumerate(spec.examples):
            cost = len(f"{example.input} {example.answer}".split())
            if tokens + cost > self.context_tokens:
                left_out.append((position, f"{cost} tokens do not fit in {self.context_tokens - tokens}"))
            else:
                used.append(example)
                tokens += cost
        return used, tokens, left_out

    async def prepare(self, spec: TaskSpec, *, progress: Callable[[int, int], None] | None = None) -> Prepared:
        await self._work("prepare")
        used, tokens, left_out = self._used(spec)
        if not used:
            raise BudgetError(f"none of {len(spec.examples)} examples fits in {self.context_tokens} tokens.")
        computed = 0 if self.kept.get(spec.key) == len(spec.examples) else tokens
        write_json_atomic(self.folder / f"{spec.key}.json", len(spec.examples))
        return Prepared(len(used), tokens, computed, tuple(left_out), 0.25)

    async def extend(self, spec: TaskSpec, num_old: int, *, progress: Callable[[int, int], None] | None = None) -> Prepared:
        await self._work("extend")
        old = self._used(TaskSpec(spec.key, spec.examples[:num_old]))[1]
        used, tokens, left_out = self._used(spec)
        write_json_atomic(self.folder / f"{spec.key}.json", len(spec.examples))
        return Prepared(len(used), tokens, tokens - old, tuple(left_out), 0.25)

    async def plan(self, spec: TaskSpec) -> Prepared:
        await self._work("plan")
        used, tokens, left_out = self._used(spec)
        if not used:
            raise BudgetError(f"none of {len(spec.examples)} examples fits in {self.context_tokens} tokens.")
        return Prepared(len(used), tokens, 0, tuple(left_out), 0.0)

    async def forget(self, key: str) -> None:
        self.calls.append("forget")
        (self.folder / f"{key}.json").unlink(missing_ok=True)

    async def score(
        self, spec: TaskSpec, inputs: Sequence[str], *, num_shots: int | None = None, deadline: float | None = None
    ) -> Scored:
        await self._work("score")
        if deadline is not None and time.monotonic() > deadline:
            raise DeadlineError("the deadline passed in the queue.")
        if not spec.labels:
            raise UserInputError("the task has no labels.")
        used, tokens, _ = self._used(spec)
        used = used[: len(used) if num_shots is None else num_shots]
        rows = []
        for text in inputs:
            words = set(text.lower().split())
            shared = [
                sum(len(words & set(shot.input.lower().split())) for shot in used if shot.answer == label)
                for label in spec.labels
            ]
            total = sum(math.exp(count) for count in shared)
            rows.append(tuple(count - math.log(total) - 0.5 for count in shared))
        lengths = tuple(len(text.split()) for text in inputs)
        return Scored(tuple(rows), (len(used),) * len(inputs), (tokens,) * len(inputs), lengths)

    async def generate(
        self, spec: TaskSpec, input: str, options: GenerationOptions, *, deadline: float | None = None
    ) -> AsyncGenerator[Piece, None]:
        await self._work("generate")
        used, tokens, _ = self._used(spec)
        words = set(input.lower().split())
        best = max(used, key=lambda shot: len(words & set(shot.input.lower().split())), default=None)
        text = best.answer if best is not None else f"echo: {input}"
        if options.temperature:
            text = f"{text} at {options.temperature} by {options.seed}"
        reason: Any = "stop"
        for stop in options.stop:
            text = text.partition(stop)[0]
        if options.max_tokens is not None and len(text) > options.max_tokens:
            text, reason = text[: options.max_tokens], "length"
        length = len(input.split())
        for number, letter in enumerate(text, 1):
            self.num_pieces += 1
            token = other = None
            if options.top_logprobs is not None:
                token = TokenLogprob(letter, letter.encode(), -0.5)
                other = (token, TokenLogprob("?", b"?", -math.inf))[: options.top_logprobs]
            yield Piece(letter, token, other or (), None, number, tokens, length)
            await asyncio.sleep(self.delay)
        yield Piece("", None, (), reason, len(text), tokens, length)

    def check_room(self, num_requests: int) -> None:
        self.asked_for_room.append(num_requests)
        if num_requests >= self.room:
            raise overloaded(7)

    def load(self) -> BackendLoad:
        return BackendLoad(2, 1, {1: 3, 4: 5}, {"disk": 7}, 100, 50)


def copy_of(spec: TaskSpec) -> TaskSpec:
    """An equal spec, of other objects."""
    return replace(spec, examples=tuple(replace(example) for example in spec.examples))


def count_comparisons(monkeypatch: pytest.MonkeyPatch) -> list[Example]:
    """A list that grows by an example each time one is compared with another."""
    compared: list[Example] = []
    equal = Example.__eq__

    def note(own: Example, other: object) -> bool:
        compared.append(own)
        return equal(own, other)

    monkeypatch.setattr(Example, "__eq__", note)
    return compared


def overloaded(seconds: float) -> OverloadedError:
    return OverloadedError("the queue is full.", retry_after_seconds=seconds)


@contextmanager
def serving(settings: Settings, backend: FakeBackend) -> Iterator[str]:
    """A running service; its address."""
    app = create_app(settings, backend)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, lifespan="on", log_config=None, access_log=False, timeout_graceful_shutdown=2)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
        thread.start()
        wait_for(lambda: server.started or not thread.is_alive())
        try:
            assert server.started
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=20)
            assert not thread.is_alive()


def wait_for(condition: Callable[[], Any], *, seconds: float = 20.0) -> Any:
    """What a condition returns once it is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
    return found


TICKETS = [
    ("I was charged twice", "billing"),
    ("my invoice is wrong", "billing"),
    ("refund my invoice", "billing"),
    ("the app crashes on start", "bug"),
    ("a crash after the update", "bug"),
    ("the screen stays black after the update", "bug"),
]
CAPITALS = [("capital of France", "Paris"), ("capital of Norway", "Oslo"), ("capital of Peru", "Lima")]


def chat_file(pairs: Sequence[tuple[str, str]], *, system: str = "") -> bytes:
    """A training file in the chat format."""
    first = [{"role": "system", "content": system}] if system else []
    lines = [
        {"messages": [*first, {"role": "user", "content": given}, {"role": "assistant", "content": answer}]}
        for given, answer in pairs
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def plain_file(pairs: Sequence[tuple[str, str]]) -> bytes:
    """A training file in the prompt and completion format."""
    return "".join(json.dumps({"prompt": given, "completion": answer}) + "\n" for given, answer in pairs).encode()
