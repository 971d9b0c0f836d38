"""Any server with OpenAI's completions in place of our own model, with prefix caching on its side.

In: tasks and inputs. Out: what `backends.Backend` says. Our encoder makes the tokens, so that a tuned model sees those of its
training; they are sent as ids where the server takes these. Nothing is kept here: a context is made anew from its examples.

A label's score is the sum of the log-probabilities of its tokens and its end, exact in both ways in which it is had:

    tells_chosen   of each token that some label goes on with, after the query and what labels share: one prompt for each such
                   place, all of an input's in one request; of each prompt only what follows the cached prefix is computed
    tells_prompt   of the label's own tokens at the end of a prompt: one prompt for each label, each computed whole

A server that does neither cannot score labels, and says so. Where it tells chosen tokens, its cache is salted with the task's
key, so that tasks share nothing, and what it tells of the cached tokens of contexts and answers is passed on. Elsewhere that
would tell of other tasks; there, and for scores of chosen tokens, the context counts as cached.
"""

import asyncio
import contextlib
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from manyicl.encoding import Encoder
from manyicl.errors import BudgetError, DeadlineError, ManyICLError, ModelError, OverloadedError, UserInputError
from manyicl.label_trie import LabelTrie, TokenIds, build_trie
from manyicl.model_names import RUN_FILE, read_run_file
from manyicl.modeling import Format, load_tokenizer
from manyicl.sampling import ShownText, read_token
from manyicl.serving.backends import (
    BackendLimits,
    BackendLoad,
    FinishReason,
    GenerationOptions,
    Piece,
    Prepared,
    Scored,
    TaskSpec,
    TokenLogprob,
    equal_specs,
)
from manyicl.serving.batching import stopping
from manyicl.serving.contexts import TaskContext, plan_context
from manyicl.serving.remote_server import (
    ID_MARK,
    Json,
    RemoteServer,
    ServerAbilities,
    column_paths,
    plan_requests,
    read_usage,
)
from manyicl.serving.threads import run_whole

MAX_CONTEXTS = 256
RETRY_SECONDS = 1.0
# Of the prompts of one request together, one prompt apart: what it takes in memory and holds the event loop up.
MAX_REQUEST_TOKENS = 2**18

Result = TypeVar("Result")
Progress = Callable[[int, int], None]
MakePrompt = Callable[[TokenIds], TokenIds]


def open_encoder(model: str, *, format: Format | None = None) -> Encoder:
    """The encoder of the model that a server runs, from its tokenizer alone; `model` is a name or folder on this machine.

    Args:
        format: None takes that of the rows the model was tuned on, as a run and an exported model tell it.

    Raises:
        ModelError: there is no such tokenizer, or it has no chat template and the format is chat; or the run's file is broken.
    """
    if format is None:
        format = read_run_file(Path(model))["format"] if (Path(model) / RUN_FILE).is_file() else "plain"
    return Encoder(load_tokenizer(model), format=format)


class OpenAIBackend:
    """Serves tasks through another server; see the module and `backends.Backend`.

    Args:
        base_url: The server's address, up to and with its `/v1`.
        model: The model's name there.
        make_encoder: Makes the encoder, `partial(open_encoder, "runs/mine-merged")` for instance; run once, in a thread.
        context_tokens: Tokens that demonstrations, query and answer may have; None takes what the server says.
        api_key: The server's key; None for none.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        make_encoder: Callable[[], Encoder],
        *,
        context_tokens: int | None = None,
        api_key: str | None = None,
        limits: BackendLimits | None = None,
    ) -> None:
        self.name = model
        self._make_encoder = make_encoder
        self._context_tokens = context_tokens
        self._limits = limits or BackendLimits()
        self._server = RemoteServer(base_url, model, api_key=api_key)
        self._slots = asyncio.Semaphore(self._limits.max_batch_queries)
        self._at_once = min(self._limits.max_batch_queries, self._limits.max_queue)  # Of one call.
        self._contexts: OrderedDict[str, tuple[TaskSpec, TaskContext]] = OrderedDict()
        self._num_running = 0
        self._is_closed = False
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._opened: Counter[str] = Counter()
        self._cached_tokens = self._computed_tokens = 0

    @property
    def context_tokens(self) -> int:
        """Tokens that demonstrations, query and answer may have together; known once started."""
        return self._context_tokens or 0

    @property
    def context_identity(self) -> str:
        """What decides which examples of a task stand in its context; known once started."""
        return f"{self.name}/{self._encoder.format}/{self.context_tokens}"

    @property
    def is_alive(self) -> bool:
        """Whether what runs the model is there; of a server that is not this one's own it is taken to be."""
        return True

    async def start(self) -> None:
        """Load the tokenizer, and ask the server for the model and for what it takes.

        Raises:
            ModelError: it has no such model, or does not say how many tokens that takes.
            BudgetError: it takes fewer than asked for.
        """
        self._encoder = await asyncio.to_thread(self._make_encoder)
        asked, told = self._context_tokens, await self._server.read_context_tokens()
        if asked is None and told is None:
            raise ModelError(
                f"{self._server.base_url} does not say how many tokens {self.name!r} takes. Give the context in tokens."
            )
        if asked is not None and told is not None and asked > told:
            raise BudgetError(
                f"a context of {asked} tokens was asked of {self.name!r}, which takes {told}. Give a number up to that."
            )
        self._context_tokens = asked if asked is not None else told
        probe = self._encoder.encode_query("A")
        self._abilities: ServerAbilities = await self._server.find_abilities(probe, self._decode(probe))

    async def stop(self) -> None:
        """Finish what has begun, and refuse everything else."""
        self._is_closed = True
        await self._is_idle.wait()
        await self._server.close()

    async def prepare(self, spec: TaskSpec, *, progress: Progress | None = None) -> Prepared:
        """Let the server compute a task's context once; see `backends.Backend.prepare`. Its cache is its own affair."""
        start = time.monotonic()
        context = await self._open(spec)
        num_tokens, computed = len(context.token_ids), 0
        if context.num_shots:
            with self._admit(1):
                answer = await self._server.complete(self._body(context.token_ids, spec) | {"max_tokens": 1, "temperature": 0})
            usage = read_usage(answer)
            is_told = self._abilities.tells_chosen and usage.cached_tokens is not None
            computed = max(0, usage.prompt_tokens - (usage.cached_tokens or 0)) if is_told else num_tokens
            self._computed_tokens += computed
        if progress is not None:
            progress(num_tokens, num_tokens)
        return Prepared(context.num_shots, num_tokens, computed, context.left_out, time.monotonic() - start)

    async def extend(self, spec: TaskSpec, num_old: int, *, progress: Progress | None = None) -> Prepared:
        """Like `prepare`: the server finds what it has of the shorter context in its cache."""
        return await self.prepare(spec, progress=progress)

    async def plan(self, spec: TaskSpec) -> Prepared:
        """What `prepare` would return, without computing anything."""
        context = await run_whole(plan_context, spec, self._encoder, self.context_tokens)
        return Prepared(context.num_shots, context.stops[-1], 0, context.left_out, 0.0)

    async def forget(self, key: str) -> None:
        """Forget a task's context here. What the server's cache holds is used under no other task's key, and goes in time."""
        self._contexts.pop(key, None)

    async def score(
        self, spec: TaskSpec, inputs: Sequence[str], *, num_shots: int | None = None, deadline: float | None = None
    ) -> Scored:
        """Log-probability of each label of the task after each input; see the module."""
        if not spec.labels:
            raise UserInputError("the task has no labels to score. Ask for an answer as text instead.")
        if not (self._abilities.tells_chosen or self._abilities.tells_prompt):
            raise UserInputError(
                "the model's server tells log-probabilities neither of chosen tokens (logprob_token_ids) nor of prompts given as "
                "tokens (echo), so that labels cannot be scored on it."
            )
        context = await self._open(spec)
        trie = build_trie(context.label_ids)
        queries = await asyncio.to_thread(lambda: [self._encoder.encode_query(text) for text in inputs])
        shots = context.fit_inputs(list(map(len, queries)), self.context_tokens, num_shots=num_shots)
        fronts = [context.stops[own] for own in shots]
        makers = [partial(_make_prompt, context, front, query) for front, query in zip(fronts, queries, strict=True)]
        with self._admit(len(inputs)):
            async with _until(deadline):
                found = await self._gather([partial(self._score_one, spec, context.label_ids, trie, make) for make in makers])
        if self._abilities.tells_chosen:
            cached = tuple(fronts)
            computed = tuple(len(query) + len(trie.tokens) for query in queries)
        else:
            cached, labels = (0,) * len(queries), context.label_ids
            sizes = [front + len(query) for front, query in zip(fronts, queries, strict=True)]
            computed = tuple(size * len(labels) + sum(map(len, labels)) for size in sizes)
        self._note(sum(cached), sum(computed))
        return Scored(tuple(found), tuple(shots), cached, computed)

    async def generate(
        self, spec: TaskSpec, input: str, options: GenerationOptions, *, deadline: float | None = None
    ) -> AsyncGenerator[Piece, None]:
        """The answer to an input, piece by piece; see `backends.Backend.generate`."""
        context = await self._open(spec)
        query = self._encoder.encode_query(input)
        shots = context.fitting_shots(len(query), self.context_tokens)
        prompt = context.token_ids[: context.stops[shots]] + query
        left = self.context_tokens - len(prompt)
        body = self._body(prompt, spec) | {
            "max_tokens": left if options.max_tokens is None else min(left, options.max_tokens),
            "temperature": options.temperature,
            "seed": secrets.randbits(63) if options.seed is None else options.seed % 2**63,
            "stream_options": {"include_usage": True},
        }
        if self._abilities.tells_chosen:  # Then it takes these too. Log-probabilities are asked for to count tokens by.
            terminator = self._encoder.terminator_id
            body |= {"stop_token_ids": [terminator], "return_tokens_as_token_ids": True, "logprobs": options.top_logprobs or 0}
        elif options.top_logprobs is not None:
            body |= {"logprobs": options.top_logprobs}
        reader = _AnswerReader(self._encoder, options, cached_tokens=context.stops[shots], computed_tokens=len(query))
        reader.is_salted = self._abilities.tells_chosen
        pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        reading = asyncio.create_task(self._read(body, reader, pieces, deadline))
        try:
            while True:
                piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            reading.cancel()
            await asyncio.wait({reading})

    async def _read(
        self, body: Json, reader: "_AnswerReader", pieces: "asyncio.Queue[Piece | Exception]", deadline: float | None
    ) -> None:
        """Take an answer from the server as fast as it comes: whoever reads it slowly keeps no place from others."""
        try:
            with self._admit(1):
                async with _until(deadline), self._slots, contextlib.aclosing(self._server.stream(body)) as chunks:
                    while not reader.is_finished:
                        chunk = await anext(chunks, None)
                        if chunk is None and not reader.has_ended:
                            raise ManyICLError(f"the server at {self._server.base_url} broke off in the middle of an answer.")
                        for piece in reader.take(chunk):
                            pieces.put_nowait(piece)
            self._note(reader.cached_tokens, reader.computed_tokens + reader.num_tokens)
        except Exception as error:  # Whatever it is, whoever waits for pieces must hear of it.
            pieces.put_nowait(error)

    def check_room(self, num_requests: int) -> None:
        """Refuse a further request where as much as is allowed is with the server; see `backends.Backend.check_room`."""
        self._check_items(1)
        if num_requests >= self._limits.max_queue:
            raise self._overloaded(1)

    def load(self) -> BackendLoad:
        """How busy it is. Passes are the server's own: it batches what reaches it at the same time."""
        return BackendLoad(
            num_running=self._num_running,
            opened=dict(self._opened),
            cached_tokens=self._cached_tokens,
            computed_tokens=self._computed_tokens,
        )

    async def _open(self, spec: TaskSpec) -> TaskContext:
        """The context of a task, made where it is not remembered."""
        held = self._contexts.get(spec.key)
        if held is not None and equal_specs(held[0], spec):
            self._contexts[spec.key] = spec, held[1]  # This one comes again, and is found to be itself at once.
            self._contexts.move_to_end(spec.key)
            self._opened["memory"] += 1
            return held[1]
        context = await asyncio.to_thread(plan_context, spec, self._encoder, self.context_tokens)
        self._opened["computed"] += 1
        self._contexts[spec.key] = spec, context
        self._contexts.move_to_end(spec.key)
        if len(self._contexts) > MAX_CONTEXTS:
            self._contexts.popitem(last=False)
        return context

    @contextlib.contextmanager
    def _admit(self, num_items: int) -> Iterator[None]:
        """Count work that is sent on, of a call of many items as much as goes at once, and refuse what is too much."""
        num_items = min(num_items, self._at_once)
        self._check_items(num_items)
        self._num_running += num_items
        self._is_idle.clear()
        try:
            yield
        finally:
            self._num_running -= num_items
            if not self._num_running:
                self._is_idle.set()

    def _check_items(self, num_items: int) -> None:
        if self._is_closed:
            raise stopping()
        if self._num_running + num_items > self._limits.max_queue:
            raise self._overloaded(num_items)

    def _overloaded(self, num_items: int) -> OverloadedError:
        return OverloadedError(
            f"{self._num_running} queries are with the server and {num_items} more were sent; "
            f"{self._limits.max_queue} are allowed.",
            retry_after_seconds=RETRY_SECONDS,
        )

    async def _score_one(
        self, spec: TaskSpec, label_ids: Sequence[TokenIds], trie: LabelTrie, make_prompt: MakePrompt
    ) -> tuple[float, ...]:
        """Scores of the labels after a prompt."""
        if not self._abilities.tells_chosen:
            told = await self._gather([partial(self._tell_prompt, make_prompt, label) for label in label_ids])
            return tuple(map(sum, told))
        paths, extra = column_paths(trie), self._salt(spec)
        requests = plan_requests(trie, max(1, MAX_REQUEST_TOKENS // len(make_prompt(max(paths, key=len)))))
        answers = await self._gather(
            [
                partial(self._tell_chosen, make_prompt, [paths[column] for column in columns], tokens, extra)
                for columns, tokens in requests
            ]
        )
        values: dict[tuple[int, int], float] = {}
        for (columns, _), found in zip(requests, answers, strict=True):
            for column, own in zip(columns, found, strict=True):
                values |= {(column, token): value for token, value in own.items()}
        edges = np.array([values[edge] for edge in trie.edges])
        return tuple(trie.totals(edges).tolist())

    async def _tell_chosen(
        self, make_prompt: MakePrompt, paths: Sequence[TokenIds], tokens: Sequence[int], extra: Json
    ) -> list[dict[int, float]]:
        async with self._slots:  # Prompts are made when it is their turn: all of a call together may exceed the memory.
            return await self._server.tell_chosen([make_prompt(path) for path in paths], tokens, extra)

    async def _tell_prompt(self, make_prompt: MakePrompt, label: TokenIds) -> list[float]:
        async with self._slots:
            return await self._server.tell_prompt(make_prompt(label), len(label))

    async def _gather(self, work: Sequence[Callable[[], Coroutine[Any, Any, Result]]]) -> list[Result]:
        """All results, begun as others end; when one fails or the caller leaves, the rest is cancelled."""
        left = iter(enumerate(work))
        found: dict[int, Result] = {}

        async def take() -> None:
            for place, begin in left:
                found[place] = await begin()

        tasks = [asyncio.ensure_future(take()) for _ in work[: self._at_once]]
        try:
            await asyncio.gather(*tasks)
            return [found[place] for place in range(len(work))]
        finally:
            for task in tasks:
                task.cancel()

    def _body(self, prompt: TokenIds, spec: TaskSpec) -> Json:
        given: Any = list(prompt) if self._abilities.takes_ids else self._decode(prompt)
        return {"prompt": given} | self._salt(spec)

    def _decode(self, prompt: TokenIds) -> str:
        """A prompt as text; without its start token, which a server puts there by itself."""
        tokenizer = self._encoder.tokenizer
        return str(tokenizer.decode(list(prompt[1:] if prompt[0] == tokenizer.bos_token_id else prompt)))

    def _salt(self, spec: TaskSpec) -> Json:
        return {"cache_salt": spec.key} if self._abilities.tells_chosen else {}

    def _note(self, cached_tokens: int, computed_tokens: int) -> None:
        self._cached_tokens += cached_tokens
        self._computed_tokens += computed_tokens


class _AnswerReader:
    """Makes pieces of the chunks of a streamed answer.

    Attributes:
        is_salted: Whether the server's cache holds this task's tokens alone, so that what it says of them may be told.
    """

    is_salted = False

    def __init__(self, encoder: Encoder, options: GenerationOptions, *, cached_tokens: int, computed_tokens: int) -> None:
        self.cached_tokens = cached_tokens
        self.computed_tokens = computed_tokens
        self.num_tokens = 0
        self.has_ended = self.is_finished = self._has_tokens = False
        self._tokenizer = encoder.tokenizer
        self._terminator_id = encoder.terminator_id
        self._options = options
        # The terminator as text: a server that is not told of it may not know that the answer ends there.
        self._text = ShownText((*options.stop, str(encoder.tokenizer.decode([encoder.terminator_id]))))
        self._reason: FinishReason = "stop"

    def take(self, chunk: Json | None) -> list[Piece]:
        """The pieces of a chunk, None after the last one; the last piece waits for what the server says of its tokens."""
        pieces: list[Piece] = []
        for choice in (chunk or {}).get("choices") or []:
            pieces += self._read(choice)
            self.has_ended = self.has_ended or choice.get("finish_reason") is not None
            self._reason = "length" if choice.get("finish_reason") == "length" else self._reason
        if self._text.is_stopped:
            self.has_ended, self._reason, chunk = True, "stop", None
        if chunk is not None and chunk.get("usage"):
            usage = read_usage(chunk)
            if not self._has_tokens:  # Then chunks were counted, which may hold several.
                self.num_tokens = usage.completion_tokens or self.num_tokens
            if self.is_salted and usage.cached_tokens is not None:
                self.cached_tokens = usage.cached_tokens
                self.computed_tokens = max(0, usage.prompt_tokens - usage.cached_tokens)
        if chunk is None:
            self.is_finished = True
            pieces.append(self._piece(self._text.finish(), reason=self._reason))
        return pieces

    def _read(self, choice: Json) -> list[Piece]:
        """A piece for each token of a chunk; its text comes with the last one."""
        text, told = str(choice.get("text") or ""), choice.get("logprobs") or {}
        self._has_tokens = self._has_tokens or bool(told.get("tokens"))
        tokens = told.get("tokens") or ([text] if text else [])
        values = told.get("token_logprobs") or [None] * len(tokens)
        alternatives = told.get("top_logprobs") or [None] * len(tokens)
        steps = [step for step in zip(tokens, values, alternatives, strict=True) if step[0] != f"{ID_MARK}{self._terminator_id}"]
        shown = self._text.take(text)
        pieces = []
        for place, (token, value, others) in enumerate(steps):
            self.num_tokens += 1
            is_told = self._options.top_logprobs is not None and value is not None
            best = sorted((others or {}).items(), key=lambda item: -item[1])[: self._options.top_logprobs or 0]
            pieces.append(
                self._piece(
                    shown if place + 1 == len(steps) else "",
                    self._describe(token, value) if is_told else None,
                    tuple(self._describe(*other) for other in best),
                )
            )
        return pieces if steps or not shown else [self._piece(shown)]

    def _piece(
        self,
        text: str,
        token: TokenLogprob | None = None,
        alternatives: tuple[TokenLogprob, ...] = (),
        reason: FinishReason | None = None,
    ) -> Piece:
        return Piece(text, token, alternatives, reason, self.num_tokens, self.cached_tokens, self.computed_tokens)

    def _describe(self, token: str, value: float) -> TokenLogprob:
        if token.startswith(ID_MARK):
            return TokenLogprob(*read_token(self._tokenizer, int(token.removeprefix(ID_MARK))), value)
        return TokenLogprob(token, token.encode(), value)


def _make_prompt(context: TaskContext, num_tokens: int, query: TokenIds, more: TokenIds) -> TokenIds:
    """A query after the first so many tokens of a context, and what follows it."""
    return context.token_ids[:num_tokens] + query + more


@contextlib.asynccontextmanager
async def _until(deadline: float | None) -> AsyncGenerator[None, None]:
    """Cancel what is done inside when the deadline passes.

    Raises:
        DeadlineError: it has passed.
    """
    try:
        async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
            yield
    except TimeoutError as error:
        raise DeadlineError("the server has not answered in the time that the query was given.") from error
