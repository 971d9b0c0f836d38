"""Answers written token by token on top of a Prefix: many at once, each with its own temperature and seed.

In: queries, which may join and leave between any two steps. Out: one token of each per step, and from tokens the text that can be
shown. Cost: the tokens of queries that join, and one token of every other; a query that joins makes the states of all that are
being written be copied once.

    step 1   A: q q q q → a          step 2   A: a → a          step 3   A: a → a
                                              B: q q → b                 B: b → b        B joined before step 2

A token is drawn by one random number of the query's own, so that it does not depend on what else is written; only where the
number falls on the border of two tokens can the rounding of another batch size decide. Temperature 0 takes the most probable
token, as `scoring.generate_answers` does.
"""

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.random import Generator, default_rng
from torch import Tensor
from transformers import PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from manyicl.attention import use_shared_prefix_attention
from manyicl.branching import (
    BoolArray,
    Branch,
    FlatRow,
    PastStates,
    check_positions,
    flatten_branches,
    plan_batches,
    query_branch,
)
from manyicl.label_trie import TokenIds
from manyicl.prefix import Prefix, run_branches

FREE_PLACES = 64

Name = TypeVar("Name", bound=Hashable)

_BYTE_OF = {letter: byte for byte, letter in bytes_to_unicode().items()}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token that was chosen.

    Attributes:
        log_probability: At temperature 1; not a number where no alternatives were asked for.
        alternatives: The most probable tokens and their log-probabilities, most probable first.
    """

    token_id: int
    log_probability: float = float("nan")
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass
class _Stream(Generic[Name]):
    name: Name
    query: TokenIds
    temperature: float
    random: Generator
    num_alternatives: int | None
    written: list[int] = field(default_factory=list)


class TokenStreams(Generic[Name]):
    """Answers that are being written behind one prefix. One thread at a time.

    Args:
        max_batch_tokens: Tokens of joining queries in one forward pass; None chooses from free memory.
    """

    def __init__(self, model: PreTrainedModel, prefix: Prefix, *, max_batch_tokens: int | None = None) -> None:
        self._model = model
        self._prefix = prefix
        self._max_batch_tokens = max_batch_tokens
        self._joining: dict[Name, _Stream[Name]] = {}
        self._lines: list[_Stream[Name]] = []
        self._leaving: set[Name] = set()
        self._states = PastStates(FREE_PLACES)
        self._seen: BoolArray = np.zeros((0, 0), dtype=bool)
        use_shared_prefix_attention(model)

    def __len__(self) -> int:
        return len(self._joining) + len(self._lines) - len(self._leaving)

    def add(
        self,
        name: Name,
        query: TokenIds,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        num_alternatives: int | None = None,
    ) -> None:
        """Begin an answer; its first token comes with the next step.

        Args:
            name: What the answer is called; no other that is being written has it.
            num_alternatives: How many of the most probable tokens come with each token; None leaves its log-probability out too.

        Raises:
            BudgetError: the query leaves no room for a token behind the prefix.
        """
        check_positions(self._model, self._prefix, [len(query) + 1])
        self._joining[name] = _Stream(name, query, temperature, default_rng(seed), num_alternatives)

    def drop(self, name: Name) -> None:
        """End an answer; it has no token in the next step."""
        if self._joining.pop(name, None) is None:
            self._leaving.add(name)

    @torch.inference_mode()
    def step(self) -> dict[Name, SampledToken]:
        """The next token of every answer."""
        self._let_leave()
        found = self._continue() if self._lines else {}
        joining = list(self._joining.values())
        self._joining = {}
        lengths = [len(stream.query) for stream in joining]
        batches = plan_batches(self._model, lengths, [1] * len(joining), max_batch_tokens=self._max_batch_tokens)
        for batch in batches:
            found |= self._begin([joining[place] for place in batch])
        return found

    def _let_leave(self) -> None:
        if not self._leaving:
            return
        going = [line for line, stream in enumerate(self._lines) if stream.name not in self._leaving]
        self._leaving = set()
        if not going:
            self._lines, self._seen, self._states = [], np.zeros((0, 0), dtype=bool), PastStates(FREE_PLACES)
            return
        kept = self._states.keep(going)
        self._lines, self._seen = [self._lines[line] for line in kept], self._seen[kept]

    def _continue(self) -> dict[Name, SampledToken]:
        """One token of each answer that has begun."""
        self._seen = np.concatenate([self._seen, np.ones((len(self._lines), 1), dtype=bool)], axis=1)
        branches = [
            Branch(
                np.array(stream.written[-1:], dtype=np.int64),
                np.array([len(stream.query) + len(stream.written) - 1], dtype=np.int64),
                self._seen[line : line + 1],
            )
            for line, stream in enumerate(self._lines)
        ]
        row = flatten_branches(branches, self._prefix, self._model.device, past=self._states)
        return self._draw(row, branches, self._lines)

    def _begin(self, streams: list[_Stream[Name]]) -> dict[Name, SampledToken]:
        """Compute queries and their first tokens, and join them to the others."""
        lengths = np.array([len(stream.query) for stream in streams])
        states = PastStates(int(lengths.max()))
        branches = [query_branch(stream.query) for stream in streams]
        row = flatten_branches(branches, self._prefix, self._model.device, past=states)
        found = self._draw(row, branches, streams)
        joining = [(states, np.arange(lengths.max()) < lengths[:, None])]
        others = [(self._states, self._seen)] if self._lines else []
        self._states, self._seen = PastStates.join([*others, *joining], FREE_PLACES)
        self._lines += streams
        return found

    def _draw(self, row: FlatRow, branches: Sequence[Branch], streams: Sequence[_Stream[Name]]) -> dict[Name, SampledToken]:
        """The next token after the last one of each branch."""
        ends = torch.from_numpy(row.starts + np.array([len(branch.token_ids) for branch in branches]) - 1)
        logits = run_branches(
            self._model, row.input_ids, row.position_ids, row.branches, logits_to_keep=ends.to(row.input_ids.device)
        )[0]
        best = logits.argmax(dim=-1).tolist()
        found = {}
        for line, stream in enumerate(streams):
            token = _draw_token(logits[line], stream) if stream.temperature > 0 else best[line]
            stream.written.append(token)
            found[stream.name] = _describe(logits[line], token, stream.num_alternatives)
        return found


def _draw_token(logits: Tensor, stream: _Stream[Any]) -> int:
    """A token by its probability at the stream's temperature: where one random number falls among the sums over token ids."""
    scaled = logits.double()
    shares = torch.softmax((scaled - scaled.max()) / stream.temperature, dim=-1).cumsum(dim=-1).cpu().numpy()
    place = int(np.searchsorted(shares, stream.random.random() * shares[-1], side="right"))
    return min(place, len(shares) - 1)


def _describe(logits: Tensor, token: int, num_alternatives: int | None) -> SampledToken:
    if num_alternatives is None:
        return SampledToken(token)
    values = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    best, places = values.topk(min(num_alternatives, len(values)))
    return SampledToken(token, float(values[token]), tuple(zip(places.tolist(), best.tolist(), strict=True)))


class ShownText:
    """What can be shown of a text as it comes: without surrounding white space, and up to the first stop string.

    Text is held back while it may be the beginning of a stop string, white space until something follows it.

    Args:
        stops: Strings that end the text and are not part of it.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self.is_stopped = False
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self._has_begun = False

    def take(self, text: str) -> str:
        """What can be shown now that this text has come."""
        self._append(text)
        if self.is_stopped:
            return self.finish()
        shown = self._held[: len(self._held) - self._num_awaited()].rstrip()
        self._held = self._held[len(shown) :]
        return self._begin(shown)

    def finish(self) -> str:
        """The rest, when no more text comes."""
        text, self._held = self._held.rstrip(), ""
        return self._begin(text)

    def _append(self, text: str) -> None:
        """Hold further text, up to the first stop string."""
        if self.is_stopped:
            return
        self._held += text
        places = [place for place in (self._held.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self._held, self.is_stopped = self._held[: min(places)], True

    def _num_awaited(self) -> int:
        """Characters at the end of the held text with which a stop string may begin."""
        longest = max(map(len, self._stops), default=1) - 1
        sizes = range(min(longest, len(self._held)), 0, -1)
        return next((size for size in sizes if any(stop.startswith(self._held[-size:]) for stop in self._stops)), 0)

    def _begin(self, text: str) -> str:
        shown = text if self._has_begun else text.lstrip()
        self._has_begun = self._has_begun or bool(shown)
        return shown


class AnswerText:
    """The text of an answer as its tokens come: whole characters, shown as `ShownText` does.

    What comes out, put together, is what `NativeEngine.write` makes of the same tokens, up to the first stop string.

    Args:
        stops: Strings that end the answer; they may begin and end inside tokens.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._text = ShownText(stops)
        self._ids: list[int] = []
        self._before = self._read = 0  # Text of ids before `_read` has been taken; those from `_before` on are decoded with it.

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._text.is_stopped

    def take(self, token_id: int) -> str:
        """The text that can be shown now that this token is there."""
        self._ids.append(token_id)
        text = self._decode(len(self._ids))
        if text.endswith("\ufffd"):  # Which may be the beginning of a character.
            return ""
        new = text[len(self._decode(self._read)) :]
        self._before, self._read = self._read, len(self._ids)
        return self._text.take(new)

    def finish(self) -> str:
        """The rest of the text, when no token follows."""
        rest = self._decode(len(self._ids))[len(self._decode(self._read)) :]
        self._read = len(self._ids)
        return self._text.take(rest) + self._text.finish()

    def _decode(self, stop: int) -> str:
        return str(self._tokenizer.decode(self._ids[self._before : stop], skip_special_tokens=True))


def read_token(tokenizer: Any, token_id: int) -> tuple[str, bytes]:
    """The text and the bytes of a single token; its text has U+FFFD where the token is part of a character."""
    text = str(tokenizer.decode([token_id]))
    spelling = str(tokenizer.convert_ids_to_tokens(token_id))
    if byte := _BYTE_TOKEN.fullmatch(spelling):
        return text, bytes([int(byte[1], 16)])
    if all(letter in _BYTE_OF for letter in spelling):
        own = bytes(_BYTE_OF[letter] for letter in spelling)
        if own.decode(errors="replace") == text:
            return text, own
    return text, text.encode()
