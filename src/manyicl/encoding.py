r"""Episode -> Sequence: token ids and answer spans, in the plain or the chat format.

Every segment is tokenised on its own and the ids are concatenated, in training and inference alike; answer spans follow
from construction and never from searching text. Text of users is never read as special tokens, so that the terminator
cannot occur inside an answer. Sees the tokenizer through a small Protocol; loads neither torch nor transformers.

    token_ids   The cat … \nAnswer:  positive <|im_end|> \n\n A dull … \nAnswer:  negative <|im_end|> \n\n
    role        input     input      answer   terminator gap  input    input      answer   terminator gap
    target      .         .          x        x          .    .        .          x        x          .
"""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

from manyicl.episodes import Episode
from manyicl.errors import ModelError, TaskError
from manyicl.templates import PLAIN, Layout, Role

_tokenizer_lock = threading.Lock()


class Tokenizer(Protocol):
    """What is needed of a Hugging Face tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None
    all_special_ids: list[int]
    chat_template: Any

    def __call__(self, text: str, *, add_special_tokens: bool = True, split_special_tokens: bool = False) -> Mapping[str, Any]:
        """Token ids of a text, under "input_ids"."""

    def apply_chat_template(self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool) -> Any:
        """The text of a conversation."""

    def decode(self, token_ids: list[int]) -> Any:
        """The text of token ids, special tokens included."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `[start, stop)` of a sequence that play one role; `shot` is the position of their example, -1 before it."""

    role: Role
    start: int
    stop: int
    shot: int


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """Token ids of one example. `answer_ids` ends with the terminator."""

    input_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    gap_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole example, its gap included."""
        return len(self.input_ids) + len(self.answer_ids) + len(self.gap_ids)


@dataclass(frozen=True)
class Sequence:
    """An encoded episode: the sequence that a model is fed.

    Attributes:
        token_ids: All tokens, in order.
        segments: Consecutive segments that cover every token.
        episode: The text it was made from.
    """

    token_ids: tuple[int, ...]
    segments: tuple[Segment, ...]
    episode: Episode

    @property
    def answer_spans(self) -> tuple[tuple[int, int], ...]:
        """`[start, stop)` of each answer, its terminator included, in order of shots."""
        starts = [segment.start for segment in self.segments if segment.role == "answer"]
        stops = [segment.stop for segment in self.segments if segment.role == "terminator"]
        return tuple(zip(starts, stops, strict=True))

    @property
    def shots(self) -> list[int]:
        """Per token: the shot whose answer it belongs to, or -1 where it is no target. Unshifted."""
        shots = [-1] * len(self.token_ids)
        for shot, (start, stop) in enumerate(self.answer_spans):
            shots[start:stop] = [shot] * (stop - start)
        return shots


class Encoder:
    """Turns text into the token ids that a model is trained on and queried with.

    Costs one tokenizer call per new text; the last 65,536 texts are remembered. Threads may share an encoder, or have encoders
    that share a tokenizer.

    Args:
        tokenizer: A Hugging Face tokenizer.
        format: Plain text, or the tokenizer's own chat template.

    Raises:
        ModelError: the tokenizer has no end token (plain), or no chat template that can be cut into parts (chat).
    """

    def __init__(self, tokenizer: Tokenizer, *, format: Literal["plain", "chat"] = "plain") -> None:
        self.tokenizer = tokenizer
        self.format = format
        self._tokenize = lru_cache(maxsize=65536)(self._tokenize_uncached)
        if format == "chat":
            self.layout, self.terminator_id = chat_layout(tokenizer)
        else:
            if tokenizer.eos_token_id is None:
                raise ModelError(
                    "the tokenizer has no end token (eos_token), which ends every answer. Set one: tokenizer.eos_token = …"
                )
            self.layout, self.terminator_id = PLAIN, tokenizer.eos_token_id

    def _tokenize_uncached(self, text: str, is_markup: bool) -> tuple[int, ...]:
        if not text:
            return ()
        return _token_ids(self.tokenizer, text, add_special_tokens=False, split_special_tokens=not is_markup)

    def encode_opening(self, instruction: str = "") -> tuple[int, ...]:
        """Token ids before the first example: the start token if the tokenizer adds one, and the instruction.

        Raises:
            ModelError: the chat template has no place for an instruction.
        """
        markup = self.layout.is_markup
        start = () if markup else self._start_ids()
        if not instruction:
            return start + self._tokenize(self.layout.opening, markup)
        if self.layout.before_instruction is None:
            raise ModelError(
                "the chat template takes no system message, so the task's instruction has no place. "
                "Use episodes.format=plain, or drop the instruction."
            )
        return (
            start
            + self._tokenize(self.layout.before_instruction, markup)
            + self._tokenize(instruction, False)
            + self._tokenize(self.layout.after_instruction, markup)
        )

    def _start_ids(self) -> tuple[int, ...]:
        """The start token, where the tokenizer puts one before plain text by itself."""
        first = _token_ids(self.tokenizer, "a")[:1]
        return first if first and first[0] == self.tokenizer.bos_token_id else ()

    def encode_query(self, input: str) -> tuple[int, ...]:
        """Token ids of an input part, up to the last token before the answer."""
        markup = self.layout.is_markup
        before, after = (
            self._tokenize(self.layout.before_input, markup),
            self._tokenize(self.layout.after_input, markup),
        )
        return before + self._tokenize(input, False) + after

    def encode_answer(self, answer: str) -> tuple[int, ...]:
        """Token ids of an answer, its terminator last and nowhere else.

        Raises:
            TaskError: the answer is empty.
            ModelError: the tokenizer reads the terminator out of the answer's text.
        """
        ids = self._tokenize(self.layout.answer_lead + answer, False) if answer.strip() else ()
        if not ids:
            raise TaskError(f"the answer {answer!r} is empty. Every example needs an answer; remove it or fill it in.")
        if self.terminator_id in ids:
            raise ModelError(f"the tokenizer reads its end token out of the answer {answer!r}. Use a fast tokenizer.")
        return (*ids, self.terminator_id)

    def encode_example(self, input: str, answer: str) -> EncodedExample:
        """Token ids of one whole example."""
        gap = self._tokenize(self.layout.gap, self.layout.is_markup)
        return EncodedExample(self.encode_query(input), self.encode_answer(answer), gap)

    def encode_labels(self, labels: Iterable[str]) -> list[tuple[int, ...]]:
        """Token ids of each label, terminators included; a label that begins like another is told apart by its terminator.

        Raises:
            TaskError: a label is empty, or two labels have the same token ids.
        """
        seen: dict[tuple[int, ...], str] = {}
        for label in labels:
            ids = self.encode_answer(label)
            if ids in seen:
                raise TaskError(
                    f"labels {seen[ids]!r} and {label!r} have the same {len(ids)} token ids and cannot be told apart. Rename one."
                )
            seen[ids] = label
        return list(seen)

    def count_opening(self, instruction: str) -> int:
        """Tokens before the first example."""
        return len(self.encode_opening(instruction))

    def count_example(self, input: str, answer: str) -> int:
        """Tokens of a whole example: input part, answer, terminator and gap."""
        return self.encode_example(input, answer).num_tokens


def _token_ids(tokenizer: Tokenizer, text: str, **options: bool) -> tuple[int, ...]:
    """Token ids of a text, one thread at a time.

    transformers (5.19 to 5.23) sets `encode_special_tokens` on the tokenizer before each call, so that without the lock one
    thread could read another's text with special tokens in it.
    """
    with _tokenizer_lock:
        return tuple(tokenizer(text, **options)["input_ids"])


def encode_episode(episode: Episode, encoder: Encoder) -> Sequence:
    """The sequence of an episode, with a role for every token."""
    token_ids: list[int] = []
    segments: list[Segment] = []

    def append(role: Role, ids: tuple[int, ...], shot: int) -> None:
        if ids:
            segments.append(Segment(role, len(token_ids), len(token_ids) + len(ids), shot))
            token_ids.extend(ids)

    append("opening", encoder.encode_opening(episode.instruction), -1)
    for shot, example in enumerate(episode.examples):
        encoded = encoder.encode_example(example.input, example.answer)
        append("input", encoded.input_ids, shot)
        append("answer", encoded.answer_ids[:-1], shot)
        append("terminator", encoded.answer_ids[-1:], shot)
        append("gap", encoded.gap_ids, shot)
    return Sequence(tuple(token_ids), tuple(segments), episode)


def chat_layout(tokenizer: Tokenizer) -> tuple[Layout, int]:
    """The tokenizer's chat template cut into the parts of a `Layout`, and the id of the token that ends an answer.

    The template is rendered around placeholders, with one, two and three pairs of messages, with and without the prompt for
    an answer; the cut is taken only if the parts put together give each rendering again.

    Raises:
        ModelError: there is no template, it is not prefix-stable, or no special token ends an answer.
    """
    if not tokenizer.chat_template:
        raise ModelError("the tokenizer has no chat template. Use the plain format: episodes.format=plain.")
    first, after_input, between, after_second, *_, tail = _cut_template(tokenizer, num_pairs=3, instruction=None)
    if after_input != after_second or not between.startswith(tail):
        raise ModelError(
            f"the chat template wraps later messages in other text than earlier ones ({after_input!r} and {after_second!r}, "
            f"{between!r} and {tail!r}), so that demonstrations cannot be appended. Use episodes.format=plain."
        )
    terminator_id, gap = _split_terminator(tokenizer, tail)
    before_input = between[len(tail) :]
    if not first.endswith(before_input):
        raise ModelError(f"the chat template opens its first message differently ({first!r}). Use episodes.format=plain.")
    before_instruction, after_instruction = _cut_instruction(tokenizer, before_input)
    layout = Layout(
        opening=first[: len(first) - len(before_input)],
        before_instruction=before_instruction,
        after_instruction=after_instruction,
        before_input=before_input,
        after_input=after_input,
        answer_lead="",
        gap=gap,
        is_markup=True,
    )
    _check_stable(tokenizer, layout, tail)
    return layout, terminator_id


def _check_stable(tokenizer: Tokenizer, layout: Layout, tail: str) -> None:
    """Check that the parts of a layout, put together, give what the template renders."""
    text, messages = layout.opening, []
    for number in range(3):
        text += layout.before_input + _mark("user", number) + layout.after_input
        messages.append(_user(number))
        prompt = _render(tokenizer, messages, add_generation_prompt=True)
        messages.append({"role": "assistant", "content": _mark("assistant", number)})
        text_with_answer = text + _mark("assistant", number) + tail
        whole = _render(tokenizer, messages)
        if prompt != text or whole != text_with_answer:
            seen = repr(prompt) if prompt != text else repr(whole)
            raise ModelError(
                "the chat template is not prefix-stable: a conversation does not begin with the text of a shorter one "
                f"({number + 1} questions give {seen}). Use episodes.format=plain."
            )
        text = text_with_answer


def _mark(role: str, number: int) -> str:
    return f"[[manyicl {role} {number}]]"


def _user(number: int) -> dict[str, str]:
    return {"role": "user", "content": _mark("user", number)}


def _render(tokenizer: Tokenizer, messages: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except Exception as error:  # A template raises what its author or jinja2 chose, and jinja2 is not ours to import.
        raise ModelError(f"the chat template cannot be rendered: {str(error).rstrip('.')}. Use episodes.format=plain.") from error


def _cut_template(tokenizer: Tokenizer, *, num_pairs: int, instruction: str | None) -> list[str]:
    """The fixed text before, between and after the placeholders of a conversation."""
    messages = [] if instruction is None else [{"role": "system", "content": instruction}]
    marks = [] if instruction is None else [instruction]
    for number in range(num_pairs):
        messages += [_user(number), {"role": "assistant", "content": _mark("assistant", number)}]
        marks += [_mark("user", number), _mark("assistant", number)]
    text = _render(tokenizer, messages)
    pieces = []
    for mark in marks:
        piece, found, text = text.partition(mark)
        if not found:
            raise ModelError(f"the chat template does not show every message ({mark!r} is missing). Use episodes.format=plain.")
        pieces.append(piece)
    return [*pieces, text]


def _split_terminator(tokenizer: Tokenizer, tail: str) -> tuple[int, str]:
    """The special token that begins the text after an answer, and the text that follows it."""
    ids = _token_ids(tokenizer, tail, add_special_tokens=False)
    token = str(tokenizer.decode([ids[0]])) if ids else ""
    if not ids or ids[0] not in tokenizer.all_special_ids or not tail.startswith(token):
        raise ModelError(f"the chat template ends an answer with {tail!r}, which is no special token. Use episodes.format=plain.")
    return ids[0], tail[len(token) :]


def _cut_instruction(tokenizer: Tokenizer, before_input: str) -> tuple[str | None, str]:
    """The text before and after a system message; None where a template takes none, or shows it elsewhere."""
    try:
        before, after, *_ = _cut_template(tokenizer, num_pairs=1, instruction=_mark("system", 0))
    except ModelError:
        return None, ""
    if not after.endswith(before_input):
        return None, ""
    return before, after[: len(after) - len(before_input)]
