"""What is asked of another server with OpenAI's API: completions of token ids, and what it can do beyond that API.

In: token ids. Out: next-token log-probabilities, or a stream of text. Costs what the other side computes; it keeps what prompts
begin with alike, where it does that at all. Servers differ, so each is asked once what it takes:

    takes_ids       prompts as token ids; without, they are decoded to text, which the server tokenizes its own way
    tells_chosen    `logprob_token_ids`, as vLLM has it: log-probabilities of chosen tokens after a prompt, read from its cache
    tells_prompt    `echo`: log-probabilities of a prompt's own tokens, for which servers compute the whole prompt again

Its address is for the operator. Errors that reach tenants do not name it, and none tells a password in it.
"""

import json
import logging
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from manyicl.errors import ManyICLError, ModelError, OverloadedError, UserInputError
from manyicl.label_trie import LabelTrie, TokenIds

logger = logging.getLogger(__name__)

# The most that vLLM 0.32 takes.
MAX_CHOSEN_TOKENS = 128
ID_MARK = "token_id:"
RETRY_SECONDS = 1.0

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class ServerAbilities:
    """What a server takes and tells; see the module."""

    takes_ids: bool
    tells_chosen: bool
    tells_prompt: bool


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of prompts and answers, and how many of the prompts' it had computed before; None where a server does not say."""

    prompt_tokens: int
    completion_tokens: int | None
    cached_tokens: int | None


def read_usage(answer: Json) -> Usage:
    """What a server says of the tokens of its prompts."""
    usage = answer.get("usage") or {}
    details = usage.get("prompt_tokens_details") or {}
    return Usage(int(usage.get("prompt_tokens") or 0), usage.get("completion_tokens"), details.get("cached_tokens"))


class RemoteServer:
    """A server with OpenAI's completions.

    Args:
        base_url: Up to and with its `/v1`.
        model: The model's name there.
        api_key: Sent as a bearer token; None for none.

    Attributes:
        base_url: The same, without the name and password that it may hold.
    """

    def __init__(self, base_url: str, model: str, *, api_key: str | None = None) -> None:
        self.base_url = str(httpx.URL(base_url.rstrip("/")).copy_with(userinfo=b""))
        self.model = model
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._client = httpx.AsyncClient(
            base_url=base_url,
            headers=headers,
            timeout=httpx.Timeout(None, connect=10.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )

    async def close(self) -> None:
        """Close every connection."""
        await self._client.aclose()

    async def read_context_tokens(self) -> int | None:
        """Tokens that the model takes, where the server says so (vLLM's `max_model_len`).

        Raises:
            ModelError: the server has no such model.
        """
        answer = await self._send("GET", "/models")
        models = {str(entry.get("id")): entry for entry in answer.get("data") or []}
        if self.model not in models:
            known = ", ".join(sorted(models)[:10]) or "none"
            raise ModelError(f"{self.base_url} has no model {self.model!r}; it names {known}. Give one of these.")
        found = models[self.model].get("max_model_len")
        return int(found) if found else None

    async def find_abilities(self, token_ids: TokenIds, text: str) -> ServerAbilities:
        """What the server takes and tells.

        Args:
            token_ids: At least two harmless tokens to try it with.
            text: The same as text.

        Raises:
            ModelError: it completes neither.
        """
        body: Json = {"prompt": list(token_ids), "max_tokens": 1, "temperature": 0}
        chosen = body | {"logprobs": 1, "logprob_token_ids": [token_ids[0]], "return_tokens_as_token_ids": True}
        answer = await self._try(chosen)
        if answer is not None and _next_token_values(answer, 0).keys() >= {token_ids[0]}:
            return ServerAbilities(takes_ids=True, tells_chosen=True, tells_prompt=True)
        if await self._try(body) is None:
            if await self._try(body | {"prompt": text}) is None:
                raise ModelError(
                    f"{self.base_url}/completions completes no prompt of {self.model!r}, given as text or as tokens."
                )
            return ServerAbilities(takes_ids=False, tells_chosen=False, tells_prompt=False)
        answer = await self._try(body | {"echo": True, "logprobs": 1})
        echoed = answer is not None and len(_token_values(answer)) in (len(token_ids), len(token_ids) + 1)
        return ServerAbilities(takes_ids=True, tells_chosen=False, tells_prompt=echoed)

    async def _try(self, body: Json) -> Json | None:
        """An answer, or None where the server does not take the request."""
        try:
            return await self.complete(body)
        except UserInputError:
            return None

    async def complete(self, body: Json) -> Json:
        """The answer to a completion request.

        Raises:
            UserInputError: the server refuses it.
            OverloadedError: it has too much to do.
            ManyICLError: it cannot be reached, or fails.
        """
        return await self._send("POST", "/completions", body)

    async def tell_chosen(self, prompts: Sequence[TokenIds], token_ids: Sequence[int], extra: Json) -> list[dict[int, float]]:
        """Log-probabilities of the same tokens after each prompt; needs `tells_chosen`.

        How many tokens were cached vLLM (0.32) tells of the last of several prompts alone, so that it is not passed on.
        """
        body: Json = {
            "prompt": [list(prompt) for prompt in prompts],
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": 1,
            "logprob_token_ids": list(token_ids),
            "return_tokens_as_token_ids": True,
        }
        answer = await self.complete(body | extra)
        values = [_next_token_values(answer, place) for place in range(len(prompts))]
        if any(token not in own for own in values for token in token_ids):
            raise ManyICLError(f"{self.base_url} did not tell the log-probabilities of all {len(token_ids)} tokens asked for.")
        return values

    async def tell_prompt(self, prompt: TokenIds, num_last: int) -> list[float]:
        """Log-probabilities of the last tokens of a prompt; needs `tells_prompt`."""
        answer = await self.complete({"prompt": list(prompt), "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1})
        values = _token_values(answer)[: len(prompt)][-num_last:]
        if len(values) < num_last or any(value is None for value in values):
            raise ManyICLError(f"{self.base_url} did not tell the log-probabilities of the last {num_last} tokens of a prompt.")
        return [float(value) for value in values if value is not None]

    async def stream(self, body: Json) -> AsyncGenerator[Json, None]:
        """The chunks of a streamed completion; closing it ends the request.

        Raises:
            UserInputError, OverloadedError, ManyICLError: see `complete`.
        """
        try:
            async with self._client.stream("POST", "/completions", json=self._fill(body) | {"stream": True}) as response:
                if response.status_code != httpx.codes.OK:
                    raise self._refusal(response)
                async for line in response.aiter_lines():
                    data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                    if data == "[DONE]":
                        return
                    if data:
                        yield self._parse(data)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    async def _send(self, method: str, path: str, body: Json | None = None) -> Json:
        try:
            response = await self._client.request(method, path, json=None if body is None else self._fill(body))
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code != httpx.codes.OK:
            raise self._refusal(response)
        return self._parse(response.text)

    def _fill(self, body: Json) -> Json:
        return {"model": self.model, **body}

    def _parse(self, text: str) -> Json:
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or "error" in answer:
            raise ManyICLError(f"{self.base_url} sent {len(text)} characters that are no answer of OpenAI's API.")
        return answer

    def _unreachable(self, error: httpx.HTTPError) -> ManyICLError:
        return ManyICLError(f"the server at {self.base_url} cannot be reached or broke off ({type(error).__name__}).")

    def _refusal(self, response: httpx.Response) -> ManyICLError:
        """What a status that is not 200 means to the caller. The server's own words may hold a prompt, and are not repeated."""
        status = response.status_code
        if status in (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE):
            try:
                seconds = float(response.headers.get("retry-after", RETRY_SECONDS))
            except ValueError:
                seconds = RETRY_SECONDS
            return OverloadedError("the model's server has too much to do. Try again soon.", retry_after_seconds=seconds)
        if status in (httpx.codes.BAD_REQUEST, httpx.codes.UNPROCESSABLE_ENTITY):
            logger.warning("%s refused a request (status %d)", self.base_url, status)
            return UserInputError(f"the model's server refused the request (status {status}).")
        return ManyICLError(f"the server at {self.base_url} answered with status {status}.")


def column_paths(trie: LabelTrie) -> list[TokenIds]:
    """The tokens that lead to each column of a trie: none to column 0, and each node's own and those before it to the others."""
    paths: list[TokenIds] = [()]
    for token, parent in zip(trie.tokens, trie.parents, strict=True):
        paths.append((*paths[parent + 1], token))
    return paths


def plan_requests(trie: LabelTrie, max_prompts: int) -> list[tuple[list[int], list[int]]]:
    """Columns and tokens of each request: together every edge, in as few requests as both numbers allow."""
    by_column: dict[int, list[int]] = {}
    for column, token in trie.edges:
        by_column.setdefault(column, []).append(token)
    requests: list[tuple[list[int], list[int]]] = []
    for column, tokens in by_column.items():
        for first in range(0, len(tokens), MAX_CHOSEN_TOKENS):
            part = tokens[first : first + MAX_CHOSEN_TOKENS]
            known = requests[-1] if requests else ([], [])
            union = list(dict.fromkeys((*known[1], *part)))
            if 0 < len(known[0]) < max_prompts and column not in known[0] and len(union) <= MAX_CHOSEN_TOKENS:
                requests[-1] = ([*known[0], column], union)
            else:
                requests.append(([column], part))
    return requests


def _first_choices(answer: Json) -> list[Json]:
    return sorted(answer.get("choices") or [], key=lambda choice: int(choice.get("index") or 0))


def _token_values(answer: Json) -> list[float | None]:
    """Log-probabilities of the tokens of an answer's first choice."""
    choices = _first_choices(answer)
    return list(((choices[0].get("logprobs") or {}).get("token_logprobs") or []) if choices else [])


def _next_token_values(answer: Json, place: int) -> dict[int, float]:
    """Log-probabilities that a choice tells of tokens at its first place, by token id."""
    choices = _first_choices(answer)
    told = ((choices[place].get("logprobs") or {}).get("top_logprobs") or [None]) if place < len(choices) else [None]
    marked = {token: value for token, value in (told[0] or {}).items() if token.startswith(ID_MARK)}
    return {int(token.removeprefix(ID_MARK)): float(value) for token, value in marked.items()}
