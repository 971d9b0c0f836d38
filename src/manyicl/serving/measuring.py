"""How good a task is, told from its own examples: some are held out, and answered after the others.

The held-out share is drawn by seed and is the same for every number of shots. What is measured is a task of the other examples,
made for the purpose and forgotten after. Intervals: Wilson's for accuracy, Student's t for the mean of token F1.

Label probabilities are calibrated by one temperature T, softmax(scores / T), which makes the held-out labels most probable (Guo
et al. 2017, arXiv 1706.04599, section 4.2). It changes no label.
"""

import math
import random
import secrets
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

import numpy as np
import numpy.typing as npt

from manyicl.serving.backends import GenerationOptions, TaskSpec
from manyicl.serving.errors import ApiError
from manyicl.serving.service import Served, Service, in_thread
from manyicl.serving.store import Owned
from manyicl.serving.threads import run_whole
from manyicl.tasks.task import Example

Scores = npt.NDArray[np.float64]

MAX_HELD_OUT = 500
MIN_CALIBRATION = 20
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.1, 10.0
_MAX_ANSWER_TOKENS = 128
_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Estimate:
    """A mean over held-out examples, after so many shots, with a 95% interval.

    Attributes:
        log_loss: Mean of -log p of the right label, in nats; None for free text.
        temperature: That makes it smallest.
        calibrated_log_loss: It, at that temperature.
    """

    num_shots: int
    value: float
    low: float
    high: float
    log_loss: float | None = None
    temperature: float | None = None
    calibrated_log_loss: float | None = None


@dataclass(frozen=True)
class Measured:
    """What was found out about a task."""

    metric: Literal["accuracy", "token_f1"]
    num_held_out: int
    estimates: tuple[Estimate, ...]


def split_examples(examples: Sequence[Example], *, share: float, seed: int) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Examples that stay, and those held out, each in their order.

    Raises:
        ApiError: there are too few to split.
    """
    num_held_out = min(MAX_HELD_OUT, max(1, round(share * len(examples))))
    if len(examples) < 4:
        raise ApiError(
            400, f"{len(examples)} examples are too few to hold some out; it takes 4.", code="too_few_examples", param="model"
        )
    held_out = set(random.Random(f"{seed}/held out").sample(range(len(examples)), num_held_out))
    stay = tuple(example for place, example in enumerate(examples) if place not in held_out)
    return stay, tuple(examples[place] for place in sorted(held_out))


@dataclass(frozen=True)
class Split:
    """Which share of the examples is held out, and after how many shots it is answered; None takes all that are left."""

    share: float
    seed: int
    shots: tuple[int, ...] | None = None


async def measure(service: Service, owned: Owned, served: Served, split: Split, *, deadline: float) -> Measured:
    """The quality of a task after each number of shots.

    Raises:
        ApiError: too few examples.
        DeadlineError: it takes too long.
    """
    stay, held_out = split_examples(served.spec.examples, share=split.share, seed=split.seed)
    key = secrets.token_hex(16)
    owned.store.scratch_keys.add(key)
    try:
        await run_whole(owned.add_scratch, key)
        spec = replace(served.spec, key=key, examples=stay)
        prepared = await service.backend.prepare(spec)
        asked = (prepared.num_used,) if split.shots is None else split.shots
        counts = sorted({min(count, prepared.num_used) for count in asked})
        choose = _choose if spec.labels else _write
        estimates = [await choose(service, spec, held_out, count, deadline) for count in counts]
        return Measured("accuracy" if spec.labels else "token_f1", len(held_out), tuple(estimates))
    finally:
        owned.store.scratch_keys.discard(key)
        service.runner.wake()


async def _choose(service: Service, spec: TaskSpec, held_out: Sequence[Example], num_shots: int, deadline: float) -> Estimate:
    """Accuracy and calibration of labels."""
    inputs = [example.input for example in held_out]
    scored = await service.backend.score(spec, inputs, num_shots=num_shots, deadline=deadline)
    scores = np.asarray(scored.log_probabilities, dtype=np.float64)
    gold = np.array([spec.labels.index(example.answer) for example in held_out])
    num_right = int((scores.argmax(axis=1) == gold).sum())
    low, high = wilson_interval(num_right, len(gold))
    temperature = await in_thread(fit_temperature, scores, gold)
    losses = (log_loss(scores, gold), temperature, log_loss(scores, gold, temperature))
    return Estimate(num_shots, num_right / len(gold), low, high, *losses)


async def _write(service: Service, spec: TaskSpec, held_out: Sequence[Example], num_shots: int, deadline: float) -> Estimate:
    """Token F1 of free text, after all shots."""
    options = GenerationOptions(max_tokens=_MAX_ANSWER_TOKENS)
    texts = []
    for example in held_out:
        async with aclosing(service.backend.generate(spec, example.input, options, deadline=deadline)) as pieces:
            texts.append("".join([piece.text async for piece in pieces]))
    return Estimate(num_shots, *await in_thread(_judge, texts, held_out))


def _judge(texts: Sequence[str], held_out: Sequence[Example]) -> tuple[float, float, float]:
    """The mean and its interval, within 0 and 1."""
    # SciPy takes a second to import, for which neither a start nor the event loop should wait.
    from manyicl.metrics import mean_interval, score_answer

    values = [score_answer("token_f1", text, (example.answer,)) for text, example in zip(texts, held_out, strict=True)]
    mean, low, high = mean_interval(values)
    return (mean, 0.0, 1.0) if math.isnan(low) else (mean, max(0.0, low), min(1.0, high))


def temper(scores: Scores, temperature: float) -> Scores:
    """Log-probabilities over the labels of each row, at a temperature."""
    scaled = scores / temperature
    return np.asarray(scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True))


def log_loss(scores: Scores, gold: npt.NDArray[np.int_], temperature: float = 1.0) -> float:
    """Mean of -log p of the right labels, in nats."""
    return float(-temper(scores, temperature)[np.arange(len(gold)), gold].mean())


def fit_temperature(scores: Scores, gold: npt.NDArray[np.int_]) -> float:
    """The temperature of the smallest log loss, by golden-section search over its logarithm; there is one."""
    low, high = math.log(MIN_TEMPERATURE), math.log(MAX_TEMPERATURE)
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(40):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if log_loss(scores, gold, math.exp(left)) <= log_loss(scores, gold, math.exp(right)):
            high = right
        else:
            low = left
    return math.exp((low + high) / 2)


def wilson_interval(num_right: int, num_all: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion at 95% (Wilson, 1927)."""
    share, square = num_right / num_all, _Z**2 / num_all
    middle = (share + square / 2) / (1 + square)
    half = _Z * math.sqrt(share * (1 - share) / num_all + square / (4 * num_all)) / (1 + square)
    return max(0.0, middle - half), min(1.0, middle + half)
