"""What the service adds to the bare engine: python benchmarks/serving.py --output FILE

One process, the default model, made-up requests and labels. Bare and served work alternate, `--repeats` times, and every ratio is
the median of those of the rounds, so that a machine that is busy otherwise slows both. Agreement comes first: served scores are
those of the bare engine for the same queries on the same prefix, or nothing is reported. The prefix itself is computed in other
slices than the bare engine's; how far bf16 moves scores by that is told beside.

    posted_to_answer   a task is prepared, kept on disk and answers its first query, over the bare prefill
    throughput         callers who each wait for their answer before they send the next query, over the bare engine with batches
                       as large as there are callers, and with all queries at once
    writing            answers written token by token for as many callers, over the bare engine writing them as one batch
    latency            one caller: what a query takes beyond the bare engine's time for it
    during_prefill     what one caller's queries take while another task is prepared, over what they take otherwise
    restart            tasks found again on disk: until the backend is ready, loading the model alone, and each first answer
"""

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_machine
from scoring import PLACES, THINGS, VERBS, make_example

from manyicl.calibration import flip_examples
from manyicl.prefix import Prefix
from manyicl.serving.backends import GenerationOptions, TaskSpec
from manyicl.serving.native_backend import NativeBackend, open_native_engine

MODEL = "default"
WRITTEN_TOKENS = 16
TOLERANCE = 0.05  # On the log-probability of a whole label: batches of other sizes may round bf16 in other places.


def main() -> None:
    """Measure, print JSON and write it to --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--labels", type=int, default=8)
    parser.add_argument("--queries", type=int, default=128)
    parser.add_argument("--callers", type=int, default=16)
    parser.add_argument("--tasks", type=int, default=50, help="tasks that a restart finds")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = asyncio.run(measure(arguments, Path(folder)))
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


def make_tasks(arguments: argparse.Namespace) -> tuple[TaskSpec, list[str]]:
    """A task and queries for it."""
    rng = random.Random(0)
    labels = tuple(f"{verb} {thing}" for verb in VERBS for thing in THINGS)[:: len(PLACES)][: arguments.labels]
    examples = tuple(make_example(rng, labels) for _ in range(arguments.examples))
    return TaskSpec("0" * 31 + "1", examples, labels), [make_example(rng, labels).input for _ in range(arguments.queries)]


async def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every part, agreement first."""
    spec, inputs = make_tasks(arguments)
    backend = NativeBackend(partial(open_native_engine, MODEL), folder)
    await backend.start()
    engine = backend._engine
    posted, prefix = await measure_posted(backend, spec, inputs[0], arguments)
    agreement = await compare_scores(backend, spec, inputs, prefix)
    parts = {
        "agreement": agreement,
        "posted_to_answer": posted,
        "throughput": await measure_throughput(backend, spec, inputs, prefix, arguments),
        "writing": await measure_writing(backend, spec, arguments),
        "latency": await measure_latency(backend, spec, inputs, prefix),
        "during_prefill": await measure_during_prefill(backend, spec, inputs),
    }
    loaded = engine.loaded
    result = {
        "machine": describe_machine(),
        "threads": arguments.threads,
        "model": f"{loaded.name} ({loaded.note}), {loaded.model.dtype}",
        "task": {
            "examples": len(spec.examples),
            "labels": len(spec.labels),
            "prefix_tokens": prefix.num_tokens,
            "queries": len(inputs),
            "callers": arguments.callers,
        },
        **parts,
    }
    await backend.stop()
    return result | {"restart": await measure_restart(spec, inputs[0], folder, arguments)}


async def timed(work: Awaitable[Any]) -> tuple[Any, float]:
    """What is awaited, and the seconds that it took."""
    start = time.perf_counter()
    return await work, time.perf_counter() - start


def bare(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a function returns, and the seconds that it took."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def renamed(spec: TaskSpec, number: int) -> TaskSpec:
    """The same task under another key, which shares nothing with it."""
    return TaskSpec(f"{number:032x}", spec.examples, spec.labels)


def bare_scores(backend: NativeBackend, prefix: Prefix, spec: TaskSpec, inputs: list[str]) -> list[Any]:
    """Label scores by the engine alone, as one call."""
    return backend._engine.choose(prefix, inputs, [spec.labels] * len(inputs))


async def measure_posted(
    backend: NativeBackend, spec: TaskSpec, text: str, arguments: argparse.Namespace
) -> tuple[dict[str, Any], Prefix]:
    """From examples to the first answer; the prefix of the bare engine comes back too."""
    await backend.score(TaskSpec("f" * 32, spec.examples[:20], spec.labels), [text])  # Loads kernels and warms up.
    prefills, served = [], []
    for number in range(arguments.repeats):
        prefix, seconds = bare(lambda: backend._engine.prefill(spec.examples))
        prefills.append(seconds)
        own = spec if number == 0 else renamed(spec, 1000 + number)
        _, preparing = await timed(backend.prepare(own))
        _, answering = await timed(backend.score(own, [text]))
        served.append(preparing + answering)
        if number:
            await backend.forget(own.key)
    ratios = [one / other for one, other in zip(served, prefills, strict=True)]
    return {"bare_prefill_seconds": prefills, "served_seconds": served, "ratio": statistics.median(ratios)}, prefix


async def compare_scores(backend: NativeBackend, spec: TaskSpec, inputs: list[str], prefix: Prefix) -> dict[str, Any]:
    """How far served scores are from the bare engine's, on the prefix that is served and on that of the bare engine."""
    held = backend._prefixes.find(spec)
    expected = np.stack(bare_scores(backend, held.prefix, spec, inputs))
    alone = np.array([(await backend.score(spec, [text])).log_probabilities[0] for text in inputs[:32]])
    together = np.array((await backend.score(spec, inputs)).log_probabilities)
    change = max(float(np.abs(alone - expected[:32]).max()), float(np.abs(together - expected).max()))
    if change > TOLERANCE:
        raise SystemExit(f"served scores differ from the bare engine's by up to {change:.3f}; nothing is reported")
    other = np.stack(bare_scores(backend, prefix, spec, inputs))
    same = float((together.argmax(axis=1) == other.argmax(axis=1)).mean())
    return {
        "largest_change": change,
        "other_slices": {"largest": float(np.abs(together - other).max()), "mean": float(np.abs(together - other).mean())},
        "same_best_label": same,
    }


async def measure_throughput(
    backend: NativeBackend, spec: TaskSpec, inputs: list[str], prefix: Prefix, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Queries a second of callers, and of the bare engine before and after them."""
    callers, rounds = arguments.callers, []
    before = dict(backend.load().batch_sizes)

    def in_batches(size: int) -> None:
        for first in range(0, len(inputs), size):
            bare_scores(backend, prefix, spec, inputs[first : first + size])

    for _ in range(arguments.repeats):
        small = [bare(lambda: in_batches(callers))[1]]
        _, served = await timed(call_in_turn(backend, spec, inputs, callers))
        small.append(bare(lambda: in_batches(callers))[1])
        _, whole = bare(lambda: in_batches(len(inputs)))
        rounds.append((len(inputs) / served, len(inputs) / statistics.mean(small), len(inputs) / whole))
    sizes = {
        size: count - before.get(size, 0)
        for size, count in sorted(backend.load().batch_sizes.items())
        if count > before.get(size, 0)
    }
    return {
        "served_queries_per_second": [served for served, _, _ in rounds],
        "bare_queries_per_second": {"batches_of_callers": [r[1] for r in rounds], "all_at_once": [r[2] for r in rounds]},
        "ratio_to_batches_of_callers": statistics.median(served / small for served, small, _ in rounds),
        "ratio_to_all_at_once": statistics.median(served / whole for served, _, whole in rounds),
        "batch_sizes": sizes,
    }


async def call_in_turn(backend: NativeBackend, spec: TaskSpec, inputs: list[str], callers: int) -> None:
    """Send every query, each by the next caller who is free."""
    left = iter(inputs)

    async def call() -> None:
        for text in left:
            await backend.score(spec, [text])

    await asyncio.gather(*(call() for _ in range(callers)))


async def measure_writing(backend: NativeBackend, spec: TaskSpec, arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of answers that are streamed to callers, and of the bare engine; both write the same tokens."""
    # Requests are the answers here, and labels the inputs: about a dozen tokens each.
    flipped = TaskSpec(f"{2500:032x}", tuple(flip_examples(spec.examples)))
    texts = [example.input for example in flipped.examples[: arguments.callers]]
    await backend.prepare(flipped)
    prefix = backend._prefixes.find(flipped).prefix
    options, rounds = GenerationOptions(max_tokens=WRITTEN_TOKENS), []

    async def read(text: str) -> tuple[str, int]:
        async with contextlib.aclosing(backend.generate(flipped, text, options)) as pieces:
            found = [piece async for piece in pieces]
        return "".join(piece.text for piece in found), found[-1].num_tokens

    for _ in range(arguments.repeats):
        expected, plain = bare(lambda: backend._engine.write(prefix, texts, max_new_tokens=WRITTEN_TOKENS))
        answers, served = await timed(asyncio.gather(*(read(text) for text in texts)))
        rounds.append((served, plain))
    same = sum(text == other for (text, _), other in zip(answers, expected, strict=True))
    await backend.forget(flipped.key)
    return {
        "tokens_written": sum(num_tokens for _, num_tokens in answers),
        "same_answers": f"{same} of {len(texts)}",
        "served_seconds": [served for served, _ in rounds],
        "bare_seconds": [plain for _, plain in rounds],
        "ratio": statistics.median(plain / served for served, plain in rounds),
    }


async def measure_latency(backend: NativeBackend, spec: TaskSpec, inputs: list[str], prefix: Prefix) -> dict[str, float]:
    """Milliseconds of a lone query, bare and served in turn; what is added is the median of the differences."""
    pairs = []
    for text in inputs[:60]:
        _, plain = bare(lambda: bare_scores(backend, prefix, spec, [text]))  # noqa: B023
        _, served = await timed(backend.score(spec, [text]))
        pairs.append((1000 * plain, 1000 * served))
    return {
        "bare_p50_ms": statistics.median(plain for plain, _ in pairs),
        "served_p50_ms": statistics.median(served for _, served in pairs),
        "added_p50_ms": statistics.median(served - plain for plain, served in pairs),
    }


async def measure_during_prefill(backend: NativeBackend, spec: TaskSpec, inputs: list[str]) -> dict[str, Any]:
    """Milliseconds of a lone caller's queries with and without a task being prepared beside them."""
    alone = [1000 * (await timed(backend.score(spec, [text])))[1] for text in inputs[:20]]
    other = renamed(spec, 2000)
    job = asyncio.create_task(backend.prepare(other))
    beside: list[float] = []
    while not job.done():
        beside.append(1000 * (await timed(backend.score(spec, [inputs[len(beside) % len(inputs)]])))[1])
    prepared = await job
    await backend.forget(other.key)
    return {
        "alone_p50_ms": statistics.median(alone),
        "beside_p50_ms": statistics.median(beside),
        "beside_max_ms": max(beside),
        "queries_meanwhile": len(beside),
        "preparing_seconds": prepared.seconds,
    }


async def measure_restart(spec: TaskSpec, text: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """A second backend on a folder of tasks that a first one has left."""
    specs = [TaskSpec(f"{number:032x}", spec.examples[:40], spec.labels) for number in range(3000, 3000 + arguments.tasks)]
    first = NativeBackend(partial(open_native_engine, MODEL), folder)
    await first.start()
    for own in specs:
        await first.prepare(own)
    await first.stop()
    _, loading = bare(lambda: open_native_engine(MODEL))
    second = NativeBackend(partial(open_native_engine, MODEL), folder)
    _, starting = await timed(second.start())
    answering = [(await timed(second.score(own, [text])))[1] for own in specs]
    opened = dict(second.load().opened)
    await second.stop()
    if opened != {"disk": len(specs)}:
        raise SystemExit(f"{len(specs)} tasks were kept and {opened} opened; nothing is reported")
    return {
        "tasks": len(specs),
        "model_load_seconds": loading,
        "start_seconds": starting,
        "first_answers_p50_ms": 1000 * statistics.median(answering),
        "first_answers_max_ms": 1000 * max(answering),
    }


if __name__ == "__main__":
    main()
