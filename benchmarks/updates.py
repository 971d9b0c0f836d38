"""Seconds of each update of a transformers Trainer. Shared by the two sides of benchmarks/training.py."""

import time
from typing import Any

from transformers import TrainerCallback


class UpdateTimer(TrainerCallback):
    """Seconds of every update, from its first forward pass to the optimizer's step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)
