"""What the tests of the backends share: tasks of a few numbers, a started native backend, its passes, and answers read whole."""

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from manyicl.engines.native import NativeEngine
from manyicl.serving.backends import BackendLimits, GenerationOptions, Piece, TaskSpec
from manyicl.serving.native_backend import NativeBackend
from manyicl.tasks.task import Example

LABELS = ("odd", "even", "neither of them")


def examples(count: int, *, word: str = "number", first: int = 0) -> tuple[Example, ...]:
    return tuple(Example(f"{word} {number}", LABELS[number % 2]) for number in range(first, first + count))


def spec_of(
    letter: str = "a", count: int = 6, *, labels: tuple[str, ...] = LABELS, instruction: str = "", word: str = "number"
) -> TaskSpec:
    return TaskSpec(letter * 32, examples(count, word=word), labels, instruction)


class Passes:
    """Forward passes of a model with its branches: tokens of each, and a gate that holds the first one back."""

    def __init__(self, model: Any) -> None:
        self.tokens: list[int] = []
        self.open = threading.Event()
        self.open.set()
        self.began = threading.Event()
        self.hook = model.get_decoder().register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: Any, arguments: Any, options: dict[str, Any]) -> None:
        if options.get("branches") is not None:
            self.tokens.append(options["input_ids"].numel())
            self.began.set()
            assert self.open.wait(20)

    def hold(self) -> None:
        self.open.clear()
        self.began.clear()

    async def until_held(self) -> None:
        await asyncio.to_thread(self.began.wait, 20)

    def close(self) -> None:
        self.open.set()
        self.hook.remove()


def run_backend(scenario: Callable[[NativeBackend], Awaitable[Any]], *, engine: NativeEngine, folder: Path, **limits: Any) -> Any:
    """What a coroutine function returns that is given a started backend; it is stopped after."""

    async def whole() -> Any:
        backend = NativeBackend(lambda: engine, folder, BackendLimits(**limits))
        await backend.start()
        try:
            return await asyncio.wait_for(scenario(backend), 60)
        finally:
            await asyncio.wait_for(backend.stop(), 20)

    return asyncio.run(whole())


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def write(backend: Any, spec: TaskSpec, text: str, **options: Any) -> list[Piece]:
    async with contextlib.aclosing(backend.generate(spec, text, GenerationOptions(**options))) as pieces:
        return [piece async for piece in pieces]


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def expected_scores(engine: NativeEngine, spec: TaskSpec, inputs: Sequence[str], num_shots: int | None = None) -> list[Any]:
    """What the bare engine gives, to be compared with log-probabilities of a backend."""
    prefix = engine.prefill(spec.examples[:num_shots], instruction=spec.instruction)
    return [pytest.approx(own.tolist(), abs=1e-4) for own in engine.choose(prefix, inputs, [spec.labels] * len(inputs))]
