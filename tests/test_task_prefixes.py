"""Which prefixes stay on disk when it is full: those used last, also where they were used in memory alone."""

import asyncio
from pathlib import Path

import pytest

from backend_fixtures import run_backend
from manyicl.encoding import Encoder
from manyicl.engines.native import NativeEngine
from manyicl.errors import BudgetError
from manyicl.serving import task_prefixes
from manyicl.serving.backends import ShortMemoryError, TaskSpec
from manyicl.tasks.task import Example

LABELS = ("odd", "even")


def spec_of(letter, count=6):
    """A task of a size that its number of examples fixes."""
    examples = tuple(Example(f"number {letter}{number}", LABELS[number % 2]) for number in range(count))
    return TaskSpec(letter * 32, examples, LABELS)


@pytest.fixture
def serve(tiny_loaded, tmp_path):
    """Run a coroutine function with a started backend; each has the same folder of prefixes."""
    engine = NativeEngine(tiny_loaded("llama"), Encoder(tiny_loaded("llama").tokenizer))

    def run(scenario, *, folder: Path = tmp_path / "prefixes", **limits):
        return run_backend(scenario, engine=engine, folder=folder, **limits)

    return run


@pytest.fixture
def size_of(serve, tmp_path):
    """Bytes that a task takes on disk."""

    def measure(spec):
        async def scenario(backend):
            await backend.prepare(spec)
            return backend._prefixes._store.num_bytes

        return serve(scenario, folder=tmp_path / f"measured-{len(spec.examples)}")

    return measure


def kept(serve, *specs):
    """Letters of the tasks that a service started now finds on disk."""

    async def scenario(backend):
        return [(spec.key[0], await backend.prepare(spec)) for spec in specs]

    return [letter for letter, prepared in serve(scenario) if prepared.computed_tokens == 0]


def test_what_is_used_in_memory_stays_on_disk(serve, size_of):
    a, b, c, d, e = map(spec_of, "abcde")
    limit = int(3.5 * size_of(a))

    async def scenario(backend):
        for spec in (a, b, c):
            await backend.prepare(spec)
        await backend.score(b, ["x"])
        await backend.score(a, ["x"])
        await backend.prepare(d)  # In place of c.
        await backend.prepare(e)  # In place of b.
        return dict(backend.load().opened)

    assert serve(scenario, max_stored_bytes=limit) == {"computed": 5, "memory": 2}
    assert kept(serve, a, b, c, d, e) == ["a", "d", "e"]


@pytest.mark.parametrize("uses_old", [False, True], ids=["extended", "as before"])
def test_of_a_task_and_what_it_was_before_the_one_that_is_used_stays(serve, size_of, uses_old):
    old, new, b, c = spec_of("a"), spec_of("a", 9), spec_of("b"), spec_of("c")
    used, other = (old, new) if uses_old else (new, old)
    limit = size_of(new) + int(2.5 * size_of(old))

    async def scenario(backend):
        await backend.prepare(old)
        await backend.extend(new, 6)
        await backend.prepare(b)
        await backend.score(used, ["x"])
        await backend.prepare(c)  # In place of the other prefix.

    serve(scenario, max_stored_bytes=limit)
    assert kept(serve, used, b, c) == ["a", "b", "c"]
    assert kept(serve, other) == []


def test_what_was_forgotten_is_answered_once_more_and_not_kept(serve):
    a = spec_of("a")

    async def scenario(backend):
        prefixes = backend._prefixes
        await backend.prepare(a)
        before = (await backend.score(a, ["x"])).log_probabilities
        await backend.forget(a.key)
        after = (await backend.score(a, ["x"])).log_probabilities  # By a query that found the task before it was deleted.
        assert after == before
        assert (list(prefixes._tasks), list(prefixes._fronts), prefixes._store.keys()) == ([], [], [])
        await backend.prepare(a)  # Whoever makes it anew.
        assert (list(prefixes._tasks), len(prefixes._store.keys())) == ([a.key], 1)

    serve(scenario)


def test_what_is_forgotten_while_a_query_computes_it_is_not_kept(serve):
    a = spec_of("a", 40)

    async def scenario(backend):
        prefixes = backend._prefixes
        asking = asyncio.create_task(backend.score(a, ["x"]))
        while not prefixes.computed_tokens and not prefixes._locks.get(a.key):
            await asyncio.sleep(0)
        await backend.forget(a.key)
        assert len((await asking).log_probabilities) == 1
        assert (list(prefixes._tasks), list(prefixes._fronts), prefixes._store.keys()) == ([], [], [])

    serve(scenario)


def test_the_keys_of_what_was_forgotten_do_not_grow_for_ever(serve, monkeypatch):
    monkeypatch.setattr(task_prefixes, "MAX_FORGOTTEN", 2)

    async def scenario(backend):
        for letter in "abc":
            await backend.forget(letter * 32)
        return [key[0] for key in backend._prefixes._forgotten]

    assert serve(scenario) == ["b", "c"]


def test_too_little_memory_is_no_fault_of_the_task(serve, monkeypatch):
    def refuse(num_bytes, *, purpose, remedy, device):
        raise BudgetError(f"{purpose} needs {num_bytes} bytes. {remedy}")

    monkeypatch.setattr(task_prefixes, "check_memory", refuse)

    async def scenario(backend):
        with pytest.raises(ShortMemoryError, match="Send fewer examples, or try again later"):
            await backend.prepare(spec_of("a"))

    serve(scenario)
