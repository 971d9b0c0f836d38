"""Tasks with their examples, kept in memory after they were read.

One entry a task, the longest one read: a task's first so many examples never change, so that it holds every shorter one. Those
used longest ago go when there are too many characters; the one used last stays whatever its size.
"""

import threading
from collections import OrderedDict
from dataclasses import replace

from manyicl.serving.backends import TaskSpec

_EXAMPLE_CHARACTERS = 200  # What an example takes beside its text.


class SpecCache:
    """Used by any thread.

    Args:
        max_characters: Of all examples together.
    """

    def __init__(self, max_characters: int) -> None:
        self.num_characters = 0
        self._max_characters = max_characters
        self._held: OrderedDict[str, tuple[TaskSpec, int]] = OrderedDict()
        self._num_removed = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def find(self, key: str, num_examples: int) -> tuple[TaskSpec | None, int]:
        """A task with its first so many examples, or None; and the moment of the look, for `hold`."""
        with self._lock:
            spec = self._held[key][0] if key in self._held else None
            if spec is None or len(spec.examples) < num_examples:
                return None, self._num_removed
            self._held.move_to_end(key)
            is_whole = len(spec.examples) == num_examples
            return spec if is_whole else replace(spec, examples=spec.examples[:num_examples]), self._num_removed

    def hold(self, spec: TaskSpec, moment: int) -> None:
        """Keep a task that was read after the look of that moment, unless one was removed since, which may be it."""
        size = sum(len(example.input) + len(example.answer) + _EXAMPLE_CHARACTERS for example in spec.examples)
        with self._lock:
            held = self._held.get(spec.key)
            if moment != self._num_removed or (held is not None and len(held[0].examples) >= len(spec.examples)):
                return
            self._drop(spec.key)
            self._held[spec.key] = spec, size
            self.num_characters += size
            while self.num_characters > self._max_characters and len(self._held) > 1:
                self._drop(next(iter(self._held)))

    def remove(self, key: str) -> None:
        """Forget a task; whoever reads it at this moment does not put it back."""
        with self._lock:
            self._num_removed += 1
            self._drop(key)

    def _drop(self, key: str) -> None:
        self.num_characters -= self._held.pop(key, (None, 0))[1]
