"""The prefixes of tasks: held open in memory, kept on disk, and computed where they are neither.

    spec ──► open in memory? ──► on disk? ──► computed, slice by slice, from the longest front that is at hand
                                                  each slice a turn, so that queries of other tasks go on meanwhile

A prefix is kept under its tokens, the model and the key of its task: it serves no other task, and tells nobody that another task
has the same examples. What is evicted is made again. Queries use prefixes in memory, which the disk does not see: before one is
written, for which others may have to go, those held open are noted as used there, in the order of their last use. Work that is
cancelled leaves what it has computed in memory, where the next attempt finds it; nothing half-made is written.
"""

import asyncio
import hashlib
import logging
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from manyicl.engines.native import NativeEngine
from manyicl.errors import BudgetError, PrefixError, StorageError
from manyicl.label_trie import TokenIds, build_trie
from manyicl.planning import check_memory, prefix_bytes
from manyicl.prefix import Prefix, extend
from manyicl.prefix_files import PrefixFacts, identify_prefix, read_prefix_facts
from manyicl.prefix_states import StatesBuffer
from manyicl.prefix_store import PrefixStore, prefix_key
from manyicl.serving.backends import ShortMemoryError, TaskSpec, equal_specs
from manyicl.serving.batching import Batcher, Group, stopping
from manyicl.serving.contexts import TaskContext, plan_context
from manyicl.serving.threads import run_whole
from manyicl.serving.writing import AnswerWriter
from manyicl.tasks.task import Example

logger = logging.getLogger(__name__)

SLICE_TOKENS = 512
SPECS_PER_TASK = 2
MAX_FRONTS = 4
# Keys that are remembered as forgotten, far more than are forgotten in the time of a request.
MAX_FORGOTTEN = 10_000

Progress = Callable[[int, int], None]


@dataclass(eq=False)
class OpenTask:
    """A task whose prefix is in memory.

    Attributes:
        num_label_nodes: Tokens that the labels of a query add to it.
        entry: Its key in the store; None where it is not kept.
        groups: Queries that wait to be scored, by the number of demonstrations that they see.
        writers: Answers that are written, by the same.
    """

    spec: TaskSpec
    context: TaskContext
    prefix: Prefix
    num_label_nodes: int
    entry: str | None = None
    groups: dict[int, Group[TokenIds, tuple[float, ...]]] = field(default_factory=dict)
    writers: dict[int, AnswerWriter] = field(default_factory=dict)


class TaskPrefixes:
    """Opens prefixes. Used on one event loop.

    Args:
        max_open_bytes: Memory of the prefixes held open; those used longest ago are closed. The one in use may exceed it.
    """

    def __init__(self, engine: NativeEngine, store: PrefixStore, batcher: Batcher, *, max_open_bytes: int) -> None:
        self.opened: Counter[str] = Counter()
        self.computed_tokens = 0
        self.is_closed = False
        self._engine = engine
        self._store = store
        self._batcher = batcher
        self._max_open_bytes = max_open_bytes
        self._tasks: OrderedDict[str, list[OpenTask]] = OrderedDict()
        self._fronts: OrderedDict[str, Prefix] = OrderedDict()
        self._forgotten: OrderedDict[str, None] = OrderedDict()
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    def find(self, spec: TaskSpec) -> OpenTask | None:
        """The task where it is open."""
        tasks = self._tasks.get(spec.key, [])
        for task in tasks:
            if equal_specs(task.spec, spec):
                task.spec = spec  # This one comes again, and is found to be itself at once.
                tasks.remove(task)
                tasks.append(task)
                self._tasks.move_to_end(spec.key)
                self.opened["memory"] += 1
                return task
        return None

    async def open(
        self, spec: TaskSpec, *, num_old: int | None = None, progress: Progress | None = None, must_keep: bool = False
    ) -> tuple[OpenTask, int]:
        """The task with its prefix, and how many tokens of that were computed.

        Args:
            num_old: The first so many examples may be kept on disk as a prefix of their own.
            must_keep: Raise an error if the prefix cannot be kept on disk. Without it, what was forgotten is computed and not
                kept, as a query may ask for it that began before.

        Raises:
            BudgetError: no example fits.
            ShortMemoryError: memory is short.
            StorageError: see `must_keep`.
            OverloadedError: the service stops before all is computed.
        """
        found = self.find(spec)
        if found is not None and not must_keep:
            return found, 0
        if must_keep:
            self._forgotten.pop(spec.key, None)
        async with self._lock(spec.key):
            found = self.find(spec)
            computed = 0
            if found is None:
                found, computed = await self._make(spec, num_old, progress)
                if spec.key in self._forgotten:
                    return found, computed
                self._remember(found)
            await self._keep(found, must_keep=must_keep)
            if num_old is not None:
                await self._drop_outdated(found, num_old)
            return found, computed

    async def forget(self, key: str) -> None:
        """Remove a task from memory and disk; queries that are being answered keep what they use."""
        self._forgotten[key] = None
        if len(self._forgotten) > MAX_FORGOTTEN:
            self._forgotten.popitem(last=False)
        async with self._lock(key):
            self._tasks.pop(key, None)
            self._fronts.pop(key, None)
            await run_whole(self._remove_entries, key, ())

    def _lock(self, key: str) -> asyncio.Lock:
        return self._locks.setdefault(key, asyncio.Lock())

    async def _make(self, spec: TaskSpec, num_old: int | None, progress: Progress | None) -> tuple[OpenTask, int]:
        context = await asyncio.to_thread(plan_context, spec, self._engine.encoder, self._engine.context_tokens)
        prefix, where = await self._find_front(spec, context, num_old)
        num_found = prefix.num_tokens
        if prefix.num_shots < context.num_shots or prefix.stops[0] != context.stops[0]:
            where = "computed"
            prefix = await self._compute(prefix, spec, context, progress)
        self._fronts.pop(spec.key, None)
        self.opened[where] += 1
        nodes = len(build_trie(context.label_ids).tokens)
        return OpenTask(spec, context, prefix, nodes), prefix.num_tokens - num_found

    async def _find_front(self, spec: TaskSpec, context: TaskContext, num_old: int | None) -> tuple[Prefix, str]:
        """The longest front of the context that is in memory or on disk, and where; an empty one where there is none."""
        held = [task.prefix for task in self._tasks.get(spec.key, ())]
        held += [self._fronts[spec.key]] if spec.key in self._fronts else []
        fronts = [front for front in (_shared_front(prefix, context) for prefix in held) if front is not None]
        best = max(fronts, key=lambda front: front.num_shots, default=None)
        if context.num_shots == 0 or (best is not None and best.num_shots == context.num_shots):
            return best or _EMPTY, "memory"
        stored = await self._read_stored(spec, context)
        if stored is not None:
            return stored, "disk"
        if best is None and num_old:
            old = replace(spec, examples=spec.examples[:num_old])
            old_context = await asyncio.to_thread(plan_context, old, self._engine.encoder, self._engine.context_tokens)
            stored = await self._read_stored(spec, old_context)
            best = _shared_front(stored, context) if stored is not None else None
        return best or _EMPTY, "memory"

    async def _read_stored(self, spec: TaskSpec, context: TaskContext) -> Prefix | None:
        key = prefix_key(self._facts(spec.key, spec.instruction), context.token_ids)
        found = await asyncio.to_thread(self._store.get, key, device=self._engine.loaded.model.device)
        return found[0] if found is not None else None

    async def _compute(self, front: Prefix, spec: TaskSpec, context: TaskContext, progress: Progress | None) -> Prefix:
        """The whole prefix; the front's demonstrations are not computed again."""
        key, num_tokens = spec.key, len(context.token_ids)
        demonstrations = context.pick_demonstrations(spec)
        prefix = front
        try:
            if not prefix.num_tokens:
                prefix = await self._batcher.compute(key, partial(self._engine.prefill, (), instruction=spec.instruction))
            prefix = await self._batcher.compute(key, partial(self._make_room, prefix, num_tokens))
            for first, stop in _slices(context.stops, prefix.num_shots):
                if self.is_closed:
                    raise stopping()
                prefix = await self._batcher.compute(key, partial(self._extend, prefix, demonstrations[first:stop]))
                if progress is not None:
                    progress(prefix.num_tokens, num_tokens)
        finally:
            self.computed_tokens += prefix.num_tokens - front.num_tokens
            if prefix.num_tokens < num_tokens and key not in self._forgotten:
                self._fronts[key] = prefix
                if len(self._fronts) > MAX_FRONTS:
                    self._fronts.popitem(last=False)
        return prefix

    def _make_room(self, prefix: Prefix, num_tokens: int) -> Prefix:
        """The prefix in a buffer that takes all of the tokens, and further ones where it is one that grows."""
        if prefix.buffer is not None and prefix.buffer.capacity >= num_tokens:
            return prefix
        model = self._engine.loaded.model
        capacity = min(self._engine.context_tokens, num_tokens + (prefix.num_tokens // 4 if prefix.num_shots else 0))
        try:
            check_memory(
                prefix_bytes(model.config, capacity, model.dtype),
                purpose=f"a prefix of {num_tokens} tokens",
                remedy="Send fewer examples, or try again later.",
                device=model.device,
            )
        except BudgetError as error:
            raise ShortMemoryError(str(error)) from error
        buffer = StatesBuffer(capacity)
        buffer.claim(0, prefix.num_tokens)
        if prefix.states:
            buffer.write(0, prefix.states)
        return replace(prefix, states=buffer.view(prefix.num_tokens), buffer=buffer)

    def _extend(self, prefix: Prefix, demonstrations: Sequence[Example]) -> Prefix:
        engine = self._engine
        return extend(engine.loaded.model, engine.encoder, prefix, demonstrations, max_tokens=engine.context_tokens)

    def _remember(self, task: OpenTask) -> None:
        """Hold a task open, beside the one before its examples were extended; close those used longest ago."""
        key = task.spec.key
        self._tasks[key] = [*self._tasks.get(key, []), task][-SPECS_PER_TASK:]
        self._tasks.move_to_end(key)
        sizes = {key: max(task.prefix.num_bytes for task in tasks) for key, tasks in self._tasks.items()}
        total = sum(sizes.values())
        while total > self._max_open_bytes and len(self._tasks) > 1:
            total -= sizes[self._tasks.popitem(last=False)[0]]

    async def _keep(self, task: OpenTask, *, must_keep: bool) -> None:
        if not task.prefix.num_shots:
            return
        try:
            facts = self._facts(task.spec.key, task.spec.instruction)
            used = [entry for tasks in self._tasks.values() if (entry := tasks[-1].entry) is not None]
            task.entry = await run_whole(self._put, task.prefix, facts, used)
        except StorageError as error:
            if must_keep:
                raise
            logger.warning("a prefix of %d tokens is not kept: %s", task.prefix.num_tokens, error)

    def _put(self, prefix: Prefix, facts: PrefixFacts, used: Sequence[str]) -> str:
        """Keep a prefix on disk, where others have been used in the order given, the last one last."""
        self._store.note_use(used)
        return self._store.put(prefix, facts)

    async def _drop_outdated(self, task: OpenTask, num_old: int) -> None:
        """Remove from disk what the task was before the last extension; the caller may still go back to `num_old` examples."""
        spec = task.spec
        old = replace(spec, examples=spec.examples[:num_old])
        context = await asyncio.to_thread(plan_context, old, self._engine.encoder, self._engine.context_tokens)
        facts = self._facts(spec.key, spec.instruction)
        kept = (prefix_key(facts, context.token_ids), prefix_key(facts, task.context.token_ids))
        await run_whole(self._remove_entries, spec.key, kept)

    def _remove_entries(self, key: str, kept: Sequence[str]) -> None:
        """Remove every prefix of a task from disk but those kept."""
        identity = self._facts(key, "").identity
        entries = self._store.keys()
        for entry in entries:
            try:
                facts = read_prefix_facts(self._store.folder / entry)
            except PrefixError:
                continue
            if facts.identity == identity and entry not in kept:
                self._store.remove(entry)

    def _facts(self, key: str, instruction: str) -> PrefixFacts:
        """Whose a prefix is: the model's and the task's."""
        loaded = self._engine.loaded
        fingerprint = hashlib.sha256(f"{loaded.fingerprint}/{key}".encode()).hexdigest()
        return PrefixFacts(identity=identify_prefix(loaded.model, fingerprint, self._engine.encoder), instruction=instruction)


_EMPTY = Prefix((), (0,), ())


def _shared_front(prefix: Prefix, context: TaskContext) -> Prefix | None:
    """The prefix of the demonstrations with which both begin; None where they do not begin alike."""
    pairs = enumerate(zip(prefix.token_ids, context.token_ids, strict=False))
    shared = min(prefix.num_tokens, len(context.token_ids))
    shared = next((place for place, (own, other) in pairs if own != other), shared)
    num_stops = 0
    for own, other in zip(prefix.stops, context.stops, strict=False):
        if own != other or own > shared:
            break
        num_stops += 1
    return prefix.trim(num_stops - 1) if num_stops else None


def _slices(stops: Sequence[int], first: int) -> Iterator[tuple[int, int]]:
    """Ranges of demonstrations from `first` on, of about `SLICE_TOKENS` tokens each."""
    start = first
    for stop in range(first + 1, len(stops)):
        if stops[stop] - stops[start] >= SLICE_TOKENS or stop + 1 == len(stops):
            yield start, stop
            start = stop
