"""Our own model in this process: prefixes kept on disk and held open in memory, queries batched on one thread.

In: tasks and inputs. Out: label scores that equal `NativeEngine.choose`, and answers that at temperature 0 equal
`NativeEngine.write`. All work on the model is done by one thread in turns (see `batching`); long inputs are tokenized, and files
read and written, by others.
"""

import asyncio
import contextlib
import secrets
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from manyicl.attention import use_shared_prefix_attention
from manyicl.branching import choose_batch_tokens
from manyicl.dtypes import Dtype
from manyicl.encoding import Encoder
from manyicl.engines.native import NativeEngine
from manyicl.errors import DeadlineError, OverloadedError, UserInputError
from manyicl.label_trie import TokenIds
from manyicl.modeling import Format, load_model
from manyicl.prefix import Prefix
from manyicl.prefix_store import PrefixStore
from manyicl.sampling import TokenStreams
from manyicl.scoring import score_labels
from manyicl.serving.backends import BackendLimits, BackendLoad, GenerationOptions, Piece, Prepared, Scored, TaskSpec
from manyicl.serving.batching import Batcher, Group
from manyicl.serving.contexts import plan_context
from manyicl.serving.task_prefixes import OpenTask, Progress, TaskPrefixes
from manyicl.serving.threads import run_whole
from manyicl.serving.writing import Answer, AnswerWriter

INLINE_CHARACTERS = 4000


def open_native_engine(
    model: str, *, dtype: Dtype = "auto", format: Format | None = None, context_tokens: int | None = None
) -> NativeEngine:
    """The engine of a model by name.

    Args:
        format: None takes that of the rows the model was tuned on.

    Raises:
        ModelError: see `modeling.load_model`.
        BudgetError: the context is wider than the model's positions.
    """
    loaded = load_model(model, dtype=dtype)
    use_shared_prefix_attention(loaded.model)
    return NativeEngine(loaded, Encoder(loaded.tokenizer, format=format or loaded.format), context_tokens=context_tokens)


class NativeBackend:
    """Serves tasks with a model in this process; see `backends.Backend`.

    Args:
        open_engine: Makes the engine, `partial(open_native_engine, "default")` for instance; runs on the model's thread.
        folder: Where prefixes are kept; made on first use. One model at a time finds its own again.
    """

    def __init__(self, open_engine: Callable[[], NativeEngine], folder: Path, limits: BackendLimits | None = None) -> None:
        self._limits = limits or BackendLimits()
        self._open_engine = open_engine
        self._folder = folder
        self._writers: weakref.WeakSet[AnswerWriter] = weakref.WeakSet()
        self._num_answers = 0
        self._cached_tokens = self._computed_tokens = 0

    @property
    def name(self) -> str:
        """Name of the model; known once started."""
        return self._engine.loaded.name

    @property
    def context_tokens(self) -> int:
        """Tokens that demonstrations, query and answer may have together; known once started."""
        return self._engine.context_tokens

    @property
    def context_identity(self) -> str:
        """What decides which examples of a task stand in its context; known once started."""
        return f"{self.name}/{self._engine.encoder.format}/{self.context_tokens}"

    @property
    def is_alive(self) -> bool:
        """Whether what runs the model is there, this process."""
        return True

    async def start(self) -> None:
        """Load the model.

        Raises:
            ModelError: it cannot be loaded.
        """
        limits = self._limits
        self._batcher = Batcher(max_queue=limits.max_queue, max_batch=limits.max_batch_queries)
        self._engine = await self._batcher.compute("", self._open_engine)
        self._batch_tokens = choose_batch_tokens(self._engine.loaded.model)
        store = PrefixStore(self._folder, max_bytes=limits.max_stored_bytes)
        self._prefixes = TaskPrefixes(self._engine, store, self._batcher, max_open_bytes=limits.max_open_bytes)

    async def stop(self) -> None:
        """Finish what is being computed and the answers that are being written, and refuse everything else."""
        self._batcher.close()
        self._prefixes.is_closed = True
        for writer in list(self._writers):
            await writer.finish()
        await self._batcher.stop()

    async def prepare(self, spec: TaskSpec, *, progress: Progress | None = None) -> Prepared:
        """Compute the prefix of a task and keep it; see `backends.Backend.prepare`."""
        return await self._prepare(spec, None, progress)

    async def extend(self, spec: TaskSpec, num_old: int, *, progress: Progress | None = None) -> Prepared:
        """Like `prepare`, computing only the examples behind the first `num_old`; see `backends.Backend.extend`."""
        return await self._prepare(spec, num_old, progress)

    async def _prepare(self, spec: TaskSpec, num_old: int | None, progress: Progress | None) -> Prepared:
        start = time.monotonic()
        self._batcher.check_room(0)
        task, computed = await self._prefixes.open(spec, num_old=num_old, progress=progress, must_keep=True)
        seconds = time.monotonic() - start
        return Prepared(task.context.num_shots, task.prefix.num_tokens, computed, task.context.left_out, seconds)

    async def plan(self, spec: TaskSpec) -> Prepared:
        """What `prepare` would return, without computing anything."""
        context = await run_whole(plan_context, spec, self._engine.encoder, self.context_tokens)
        return Prepared(context.num_shots, context.stops[-1], 0, context.left_out, 0.0)

    async def forget(self, key: str) -> None:
        """Remove what is kept of a task."""
        await self._prefixes.forget(key)

    async def score(
        self, spec: TaskSpec, inputs: Sequence[str], *, num_shots: int | None = None, deadline: float | None = None
    ) -> Scored:
        """Log-probability of each label of the task after each input; see `backends.Backend.score`."""
        if not spec.labels:
            raise UserInputError("the task has no labels to score. Ask for an answer as text instead.")
        task, queries = await self._admit(spec, inputs, deadline)
        shots = task.context.fit_inputs(list(map(len, queries)), self.context_tokens, num_shots=num_shots)
        work = [(self._group(task, own), query) for own, query in zip(shots, queries, strict=True)]
        scores = await self._batcher.submit(work, deadline=deadline)
        cached = tuple(task.prefix.stops[own] for own in shots)
        computed = tuple(len(query) + task.num_label_nodes for query in queries)
        self._cached_tokens += sum(cached)
        self._computed_tokens += sum(computed)
        return Scored(tuple(scores), tuple(shots), cached, computed)

    async def generate(
        self, spec: TaskSpec, input: str, options: GenerationOptions, *, deadline: float | None = None
    ) -> AsyncGenerator[Piece, None]:
        """The answer to an input, piece by piece; see `backends.Backend.generate`."""
        with self._count_answer():
            task, (query,) = await self._admit(spec, [input], deadline)
            shots = task.context.fitting_shots(len(query), self.context_tokens)
            cached = task.prefix.stops[shots]
            left = self.context_tokens - cached - len(query)
            answer = Answer(
                query,
                max_tokens=left if options.max_tokens is None else min(left, options.max_tokens),
                temperature=options.temperature,
                seed=secrets.randbits(64) if options.seed is None else options.seed % 2**64,
                stop=options.stop,
                top_logprobs=options.top_logprobs,
                cached_tokens=cached,
            )
            self._cached_tokens += cached
            self._computed_tokens += len(query)
            async with contextlib.aclosing(self._writer(task, shots).write(answer, deadline=deadline)) as pieces:
                async for piece in pieces:
                    self._computed_tokens += 1
                    yield piece

    def check_room(self, num_requests: int) -> None:
        """Refuse a further request where the queue is full; see `backends.Backend.check_room`."""
        self._batcher.check_room(1)
        if num_requests >= self._limits.max_queue + self._count_running():
            raise self._batcher.overloaded(1)

    def load(self) -> BackendLoad:
        """How busy it is."""
        return BackendLoad(
            num_waiting=self._batcher.num_waiting + sum(writer.num_waiting for writer in list(self._writers)),
            num_running=self._count_running(),
            batch_sizes=dict(self._batcher.batch_sizes),
            opened=dict(self._prefixes.opened),
            cached_tokens=self._cached_tokens,
            computed_tokens=self._computed_tokens + self._prefixes.computed_tokens,
        )

    def _count_running(self) -> int:
        return self._batcher.num_running + sum(writer.num_running for writer in list(self._writers))

    async def _admit(self, spec: TaskSpec, inputs: Sequence[str], deadline: float | None) -> tuple[OpenTask, list[TokenIds]]:
        """The open task and the queries' tokens; meanwhile the queries count as waiting."""
        with self._batcher.admit(len(inputs)):
            task = self._prefixes.find(spec)
            if task is None:
                try:
                    async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                        task, _ = await self._prefixes.open(spec)
                except TimeoutError as error:
                    raise DeadlineError("the task's examples were not computed in the time that the query was given.") from error
            if sum(map(len, inputs)) <= INLINE_CHARACTERS:
                return task, self._encode(inputs)
            return task, await asyncio.to_thread(self._encode, inputs)

    def _encode(self, inputs: Sequence[str]) -> list[TokenIds]:
        return [self._engine.encoder.encode_query(text) for text in inputs]

    @contextlib.contextmanager
    def _count_answer(self) -> Iterator[None]:
        limit = self._limits.max_queue
        if self._num_answers >= limit:
            raise OverloadedError(
                f"{limit} answers are being written or waited for, the most allowed. Try again soon.",
                retry_after_seconds=self._batcher.retry_after_seconds,
            )
        self._num_answers += 1
        try:
            yield
        finally:
            self._num_answers -= 1

    def _group(self, task: OpenTask, num_shots: int) -> Group[TokenIds, tuple[float, ...]]:
        """The queries that are scored after the first `num_shots` demonstrations of a task."""
        if num_shots not in task.groups:
            task.groups[num_shots] = Group(
                task.spec.key,
                partial(self._score, task.prefix.trim(num_shots), task.context.label_ids),
                weigh=lambda query: len(query) + task.num_label_nodes,
                max_weight=self._batch_tokens,
            )
        return task.groups[num_shots]

    def _score(self, prefix: Prefix, label_ids: Sequence[TokenIds], queries: Sequence[TokenIds]) -> list[tuple[float, ...]]:
        labels = [label_ids] * len(queries)
        scores = score_labels(self._engine.loaded.model, prefix, queries, labels, max_batch_tokens=self._batch_tokens)
        return [tuple(own.tolist()) for own in scores]

    def _writer(self, task: OpenTask, num_shots: int) -> AnswerWriter:
        """What writes the answers after the first `num_shots` demonstrations of a task."""
        if num_shots not in task.writers:
            prefix = task.prefix.trim(num_shots)
            writer = AnswerWriter(
                self._batcher,
                task.spec.key,
                lambda: TokenStreams(self._engine.loaded.model, prefix, max_batch_tokens=self._batch_tokens),
                encoder=self._engine.encoder,
                max_streams=self._limits.max_batch_queries,
            )
            task.writers[num_shots] = writer
            self._writers.add(writer)
        return task.writers[num_shots]
