"""OpenAI's addresses for answers: chat and plain completions, whole or as a stream of server-sent events.

The `model` is the name of a task. A task with labels answers with its best label, which counts as one token; a temperature
above 0 draws a label by its probability. A task of free text writes. Inputs are read as training files are.
"""

import asyncio
import itertools
import json
import logging
import random
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Send

from manyicl.serving.backends import FinishReason, GenerationOptions, Piece, TokenLogprob
from manyicl.serving.errors import ApiError, error_response
from manyicl.serving.schemas import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    CompletionRequest,
    PlainChoice,
    PlainCompletion,
    PlainLogprobs,
    PromptDetails,
    Sampling,
    TokenLogprobs,
    TopLogprob,
    Usage,
)
from manyicl.serving.service import Deadline, OwnedNow, Served, Service, ServiceNow, find_served, while_connected

logger = logging.getLogger(__name__)

router = APIRouter(prefix="/v1", tags=["openai"])

_GRACE_SECONDS = 5.0  # In which a reader takes what was written by the deadline, or that it has passed.
_LOWEST = -9999.0  # What OpenAI writes for minus infinity, which JSON has not.
_EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "A chunk or an error as JSON; last of all `[DONE]`."}},
}
# `schema` would be that of the whole stream; FastAPI describes its own streams by `itemSchema` too.
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"itemSchema": _EVENT}}}}
_SYSTEM_ROLES = ("system", "developer")


@dataclass
class Answer:
    """An answer as far as it is written."""

    texts: list[str] = field(default_factory=list)
    tokens: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason = "stop"
    num_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.texts)

    def add(self, piece: Piece) -> list[TokenLogprobs]:
        """Add a piece, and return the log-probabilities that it brings."""
        new = [show_token(piece.token, piece.alternatives)] if piece.token is not None else []
        self.texts.append(piece.text)
        self.tokens += new
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.num_tokens = piece.num_tokens
        self.cached_tokens, self.computed_tokens = piece.cached_tokens, piece.computed_tokens
        return new

    def usage(self) -> Usage:
        """Its tokens."""
        prompt = self.cached_tokens + self.computed_tokens
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=self.num_tokens,
            total_tokens=prompt + self.num_tokens,
            prompt_tokens_details=PromptDetails(cached_tokens=self.cached_tokens),
        )


@dataclass(frozen=True)
class Question:
    """What a request asks, whichever address it came to."""

    request: Request
    served: Served
    input: str
    options: GenerationOptions
    deadline: float


class EventStream(StreamingResponse):
    """Server-sent events. A reader who has not taken them at the end, a time of `time.monotonic()`, is cut off."""

    def __init__(self, events: AsyncGenerator[str, None], *, end: float) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._events = events
        self._end = end

    async def stream_response(self, send: Send) -> None:
        """Send them; what writes them ends with it."""
        async with aclosing(self._events):
            try:
                async with asyncio.timeout(self._end - time.monotonic()):
                    await super().stream_response(send)
            except TimeoutError:
                logger.warning("the reader of a stream did not take it in time")


@dataclass(frozen=True)
class StreamForm:
    """How an answer is streamed: what stands in each chunk, its choice, which takes the piece into the answer, and the usage."""

    head: dict[str, Any]
    show: Callable[[Answer, Piece], dict[str, Any]]
    wants_usage: bool


def show_token(token: TokenLogprob, alternatives: Sequence[TokenLogprob]) -> TokenLogprobs:
    """A token with its log-probability as clients see it."""
    top = [
        TopLogprob(token=other.text, bytes=list(other.token_bytes), logprob=max(other.log_probability, _LOWEST))
        for other in alternatives
    ]
    logprob = max(token.log_probability, _LOWEST)
    return TokenLogprobs(token=token.text, bytes=list(token.token_bytes), logprob=logprob, top_logprobs=top)


def show_plain_logprobs(tokens: Sequence[TokenLogprobs], *, offset: int) -> PlainLogprobs:
    """Log-probabilities in the older form, the first token `offset` characters into the answer."""
    starts = itertools.accumulate((len(token.token) for token in tokens[:-1]), initial=offset) if tokens else ()
    return PlainLogprobs(
        tokens=[token.token for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[{top.token: top.logprob for top in token.top_logprobs} for token in tokens],
        text_offset=list(starts),
    )


def read_input(body: ChatRequest, served: Served) -> str:
    """The input of a chat request.

    Raises:
        ApiError: the last message is not the user's, or a system message is not the one that the task was made with.
    """
    last = body.messages[-1]
    if last.role != "user":
        raise ApiError(
            400, "Invalid value for 'messages': the last one must be the user's.", code="invalid_value", param="messages"
        )
    system = [message.text() for message in body.messages if message.role in _SYSTEM_ROLES]
    if served.row is None:  # The plain model: a system message stands before the input, as in any chat.
        return "\n".join([*filter(None, system), last.text()])
    if any(text != served.spec.instruction for text in system):
        made = "with another" if served.spec.instruction else "without a"
        message = f"'{served.name}' was made {made} system message. Leave it out, or make the task with it."
        raise ApiError(400, message, code="unsupported_parameter", param="messages")
    return last.text()


def read_options(body: Sampling, *, max_tokens: int | None, top_logprobs: int | None) -> GenerationOptions:
    """How an answer is to be written."""
    seed = None if body.seed is None else body.seed % 2**63
    return GenerationOptions(max_tokens, body.temperature or 0.0, seed, body.stop_texts(), top_logprobs)


def check_question(question: Question, service: Service, *, param: str) -> None:
    """Refuse an input that no task takes.

    Args:
        param: The field that it came in.

    Raises:
        ApiError: it is empty or too long.
    """
    length = len(question.input)
    if not length:
        raise ApiError(400, "The input is empty.", code="invalid_value", param=param)
    if length > service.limits.max_text_chars:
        message = f"The input has {length} characters; at most {service.limits.max_text_chars} are taken."
        raise ApiError(400, message, code="invalid_value", param=param)


async def answer_pieces(question: Question, service: Service) -> AsyncGenerator[Piece, None]:
    """The answer piece by piece: a label at once, free text as it is written."""
    if question.served.spec.labels:
        yield await _choose(question, service)
        return
    pieces = service.backend.generate(question.served.spec, question.input, question.options, deadline=question.deadline)
    async with aclosing(pieces):
        async for piece in pieces:
            yield piece


async def _choose(question: Question, service: Service) -> Piece:
    """A label as one piece and one token."""
    spec, options = question.served.spec, question.options
    scored = await service.backend.score(spec, [question.input], deadline=question.deadline)
    scores = np.asarray(scored.log_probabilities[0])
    order = np.argsort(-scores, kind="stable")
    chosen = int(order[0])
    if options.temperature > 0:
        weights = np.exp((scores - scores.max()) / options.temperature)
        draw = random.Random(f"{options.seed}/label") if options.seed is not None else random.SystemRandom()
        chosen = draw.choices(range(len(weights)), weights=[float(weight) for weight in weights])[0]

    def token(index: int) -> TokenLogprob:
        return TokenLogprob(spec.labels[index], spec.labels[index].encode(), float(scores[index]))

    wanted = options.top_logprobs
    return Piece(
        text=spec.labels[chosen],
        token=None if wanted is None else token(chosen),
        alternatives=tuple(token(int(index)) for index in order[: wanted or 0]),
        finish_reason="stop",
        num_tokens=1,
        cached_tokens=scored.cached_tokens[0],
        computed_tokens=scored.computed_tokens[0],
    )


async def write_whole(question: Question, service: Service) -> Answer:
    """The whole answer."""

    async def write() -> Answer:
        answer = Answer()
        async with aclosing(answer_pieces(question, service)) as pieces:
            async for piece in pieces:
                answer.add(piece)
        return answer

    return await while_connected(question.request, write())


async def stream_answer(question: Question, service: Service, form: StreamForm) -> Response:
    """The answer as server-sent events. What is wrong before its first piece is answered with its own status."""
    pieces = answer_pieces(question, service)

    async def take_first() -> Piece:
        return await anext(pieces)

    try:
        first = await while_connected(question.request, take_first())
    except BaseException:
        await pieces.aclose()
        raise

    async def events() -> AsyncGenerator[str, None]:
        answer = Answer()
        empty = {"usage": None} if form.wants_usage else {}
        try:
            async with aclosing(pieces):
                yield _event(form.head | {"choices": [form.show(answer, first)]} | empty)
                async for piece in pieces:
                    yield _event(form.head | {"choices": [form.show(answer, piece)]} | empty)
            if form.wants_usage:
                yield _event(form.head | {"choices": [], "usage": answer.usage().model_dump()})
        except Exception as error:  # The status is sent; all that is left is to say so in the stream.
            yield _event(json.loads(bytes(error_response(error).body)))
        yield "data: [DONE]\n\n"

    return EventStream(events(), end=question.deadline + _GRACE_SECONDS)


def _event(content: Any) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _head(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"{kind}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}


def _wants_usage(body: Sampling) -> bool:
    return body.stream_options is not None and bool(body.stream_options.include_usage)


@router.post("/chat/completions", response_model=ChatCompletion, responses=_STREAM)
async def complete_chat(
    request: Request, body: ChatRequest, owned: OwnedNow, service: ServiceNow, deadline: Deadline
) -> ChatCompletion | Response:
    """Answer a chat's last message."""
    served = await find_served(service, owned, body.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "'top_logprobs' needs 'logprobs' to be true.", code="invalid_value", param="top_logprobs")
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    options = read_options(body, max_tokens=max_tokens, top_logprobs=(body.top_logprobs or 0) if body.logprobs else None)
    question = Question(request, served, read_input(body, served), options, deadline)
    check_question(question, service, param="messages")
    head = _head("chatcmpl", body.model)
    if body.stream:

        def show(answer: Answer, piece: Piece) -> dict[str, Any]:
            role = {} if answer.texts else {"role": "assistant"}
            tokens = answer.add(piece)
            logprobs = ChatLogprobs(content=tokens).model_dump() if body.logprobs else None
            delta = role | {"content": piece.text}
            return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": piece.finish_reason}

        form = StreamForm(head | {"object": "chat.completion.chunk"}, show, _wants_usage(body))
        return await stream_answer(question, service, form)
    answer = await write_whole(question, service)
    choice = ChatChoice(
        message=AnswerMessage(content=answer.text),
        logprobs=ChatLogprobs(content=answer.tokens) if body.logprobs else None,
        finish_reason=answer.finish_reason,
    )
    return ChatCompletion(**head, choices=[choice], usage=answer.usage())


@router.post("/completions", response_model=PlainCompletion, responses=_STREAM)
async def complete(
    request: Request, body: CompletionRequest, owned: OwnedNow, service: ServiceNow, deadline: Deadline
) -> PlainCompletion | Response:
    """Answer a prompt."""
    served = await find_served(service, owned, body.model)
    options = read_options(body, max_tokens=body.max_tokens, top_logprobs=body.logprobs)
    question = Question(request, served, body.text(), options, deadline)
    check_question(question, service, param="prompt")
    head = _head("cmpl", body.model)
    if body.stream:

        def show(answer: Answer, piece: Piece) -> dict[str, Any]:
            tokens = answer.add(piece)
            logprobs = None if body.logprobs is None else show_plain_logprobs(tokens, offset=len(answer.text) - len(piece.text))
            return {
                "index": 0,
                "text": piece.text,
                "logprobs": logprobs and logprobs.model_dump(),
                "finish_reason": piece.finish_reason,
            }

        form = StreamForm(head | {"object": "text_completion"}, show, _wants_usage(body))
        return await stream_answer(question, service, form)
    answer = await write_whole(question, service)
    logprobs = None if body.logprobs is None else show_plain_logprobs(answer.tokens, offset=0)
    choice = PlainChoice(text=answer.text, logprobs=logprobs, finish_reason=answer.finish_reason)
    return PlainCompletion(**head, choices=[choice], usage=answer.usage())
