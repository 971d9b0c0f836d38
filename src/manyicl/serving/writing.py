"""Answers of one task as they are written: each step is a turn with the model, and each token becomes a piece for its reader.

In: queries, which join at the next step. Out: their pieces, one a token. All answers behind the same prefix are written in the
same passes; a reader who leaves costs no further token. A slow reader holds up nobody: pieces wait for it.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from functools import partial

from manyicl.encoding import Encoder
from manyicl.errors import DeadlineError
from manyicl.label_trie import TokenIds
from manyicl.sampling import AnswerText, SampledToken, TokenStreams, read_token
from manyicl.serving.backends import FinishReason, Piece, TokenLogprob
from manyicl.serving.batching import Batcher, stopping


@dataclass(eq=False)
class Answer:
    """An answer that is asked for.

    Attributes:
        query: Its tokens, up to the last one before the answer.
        max_tokens: The most tokens it may have; they fit the context.
        top_logprobs: How many alternatives come with each token; None for no log-probabilities at all.
        cached_tokens: Tokens before the query.
        num_tokens: Tokens written so far.
        is_gone: Whether it is finished or its reader has left.
    """

    query: TokenIds
    max_tokens: int
    temperature: float
    seed: int
    stop: tuple[str, ...]
    top_logprobs: int | None
    cached_tokens: int = 0
    num_tokens: int = 0
    is_gone: bool = False
    text: AnswerText = field(init=False)
    pieces: "asyncio.Queue[Piece | BaseException]" = field(default_factory=asyncio.Queue)


class AnswerWriter:
    """Writes the answers behind one prefix.

    Args:
        make_streams: Token streams on the prefix; made anew after a time without answers.
        max_streams: Answers that are written at once; further ones wait.
    """

    def __init__(
        self,
        batcher: Batcher,
        key: str,
        make_streams: Callable[[], TokenStreams[Answer]],
        *,
        encoder: Encoder,
        max_streams: int,
    ) -> None:
        self._batcher = batcher
        self._key = key
        self._make_streams = make_streams
        self._tokenizer = encoder.tokenizer
        self._terminator_id = encoder.terminator_id
        self._max_streams = max_streams
        self._waiting: deque[Answer] = deque()
        self._running: set[Answer] = set()
        self._driver: asyncio.Task[None] | None = None

    @property
    def num_waiting(self) -> int:
        """Answers that have not begun, and whose readers are there."""
        return sum(not answer.is_gone for answer in list(self._waiting))

    @property
    def num_running(self) -> int:
        """Answers that are being written."""
        return sum(not answer.is_gone for answer in list(self._running))

    async def write(self, answer: Answer, *, deadline: float | None) -> AsyncGenerator[Piece, None]:
        """The pieces of an answer.

        Raises:
            DeadlineError: the deadline has passed; a time of `time.monotonic()`.
            OverloadedError: the service stops and the answer has not begun.
        """
        answer.text = AnswerText(self._tokenizer, answer.stop)
        self._waiting.append(answer)
        if self._driver is None:
            self._driver = asyncio.create_task(self._drive())
        try:
            while True:
                try:
                    async with asyncio.timeout(None if deadline is None else deadline - time.monotonic()):
                        piece = await answer.pieces.get()
                except TimeoutError as error:
                    raise DeadlineError(
                        f"the answer was not finished in the time it was given, after {answer.num_tokens} tokens."
                    ) from error
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
                if piece.finish_reason is not None:
                    return
        finally:
            answer.is_gone = True

    async def finish(self) -> None:
        """Refuse the answers that have not begun, and wait for those that have."""
        for answer in self._pop_waiting(len(self._waiting)):
            answer.pieces.put_nowait(stopping())
        if self._driver is not None:
            await asyncio.wait({self._driver})

    async def _drive(self) -> None:
        """Step after step, as long as there are answers."""
        streams = self._make_streams()
        try:
            while self.num_waiting or self.num_running:
                for answer, token in (await self._batcher.compute(self._key, partial(self._step, streams))).items():
                    self._take(answer, token)
        except Exception as error:  # Whatever it is, those who wait for pieces must hear of it.
            for answer in (*self._running, *self._pop_waiting(len(self._waiting))):
                answer.pieces.put_nowait(error)
        finally:
            self._running.clear()
            self._driver = None

    def _step(self, streams: TokenStreams[Answer]) -> dict[Answer, SampledToken]:
        """The next tokens; on the model's thread, so that whoever left before this turn costs nothing."""
        for answer in [answer for answer in self._running if answer.is_gone]:
            streams.drop(answer)
            self._running.remove(answer)
        for answer in self._pop_waiting(self._max_streams - len(self._running)):
            self._running.add(answer)
            streams.add(
                answer,
                answer.query,
                temperature=answer.temperature,
                seed=answer.seed,
                num_alternatives=answer.top_logprobs,
            )
        return streams.step()

    def _pop_waiting(self, limit: int) -> list[Answer]:
        """Answers that wait and whose readers are there, the first ones; both threads take them."""
        taken: list[Answer] = []
        with contextlib.suppress(IndexError):
            while len(taken) < limit:
                answer = self._waiting.popleft()
                taken += [] if answer.is_gone else [answer]
        return taken

    def _take(self, answer: Answer, token: SampledToken) -> None:
        """Make a piece of a token, the last one where it ends the answer."""
        if answer.is_gone:
            return
        if token.token_id == self._terminator_id:
            self._show(answer, answer.text.finish(), "stop")
            return
        answer.num_tokens += 1
        text = answer.text.take(token.token_id)
        finish: FinishReason | None = "stop" if answer.text.is_stopped else None
        if finish is None and answer.num_tokens >= answer.max_tokens:
            text += answer.text.finish()
            finish = "stop" if answer.text.is_stopped else "length"
        self._show(answer, text, finish, token)

    def _show(self, answer: Answer, text: str, finish: FinishReason | None, token: SampledToken | None = None) -> None:
        answer.is_gone = answer.is_gone or finish is not None
        is_told = token is not None and answer.top_logprobs is not None
        piece = Piece(
            text,
            self._describe(token.token_id, token.log_probability) if token is not None and is_told else None,
            tuple(self._describe(*each) for each in token.alternatives) if token is not None else (),
            finish,
            answer.num_tokens,
            answer.cached_tokens,
            len(answer.query),
        )
        answer.pieces.put_nowait(piece)

    def _describe(self, token_id: int, log_probability: float) -> TokenLogprob:
        return TokenLogprob(*read_token(self._tokenizer, token_id), log_probability)
