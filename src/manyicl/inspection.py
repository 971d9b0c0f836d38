"""Show a row as the model is fed it: in colour for people, as JSON for programs. Loads neither torch nor transformers."""

import json
from typing import Any, Protocol

from rich.console import Console
from rich.text import Text

from manyicl.packing import Row, collate

_STYLES = {"opening": "dim", "input": "cyan", "answer": "bold green", "terminator": "bold black on green", "gap": "dim"}


class Decoder(Protocol):
    """Turns token ids back into text."""

    def decode(self, token_ids: list[int]) -> Any:
        """The text of token ids, special tokens included."""


def print_row(row: Row, tokenizer: Decoder, console: Console | None = None) -> None:
    """Print a row: inputs in cyan, trained answers in green, terminators on green, then what was left out and why."""
    console = console or Console()
    for sequence in row.sequences:
        episode = sequence.episode
        heading = (
            f"task {episode.task}, {len(episode.examples)} examples, {len(sequence.token_ids)} tokens, "
            f"{sum(shot >= 0 for shot in sequence.shots)} of them targets"
        )
        console.print(Text(heading, style="bold"))  # As Text throughout: brackets in a task's text are no markup.
        if episode.label_map:
            console.print(Text("labels remapped: " + ", ".join(f"{old} -> {new}" for old, new in episode.label_map)))
        text = Text()
        for segment in sequence.segments:
            text.append(tokenizer.decode(list(sequence.token_ids[segment.start : segment.stop])), style=_STYLES[segment.role])
        console.print(text)
        for left_out in episode.left_out:
            where = left_out.example.source or repr(left_out.example.input[:40])
            console.print(Text(f"left out: {where}: {left_out.reason}", style="yellow"))


def row_as_json(row: Row, tokenizer: Decoder) -> str:
    """A row as JSON: token ids, text of each token, target mask (unshifted), position ids, segments and what was left out."""
    batch = collate([row])
    token_ids = batch["input_ids"][0].tolist()
    content = {
        "token_ids": token_ids,
        "text": [tokenizer.decode([token]) for token in token_ids],
        "target_mask": (batch["shot"][0] >= 0).tolist(),
        "position_ids": batch["position_ids"][0].tolist(),
        "sequences": [
            {
                "task": sequence.episode.task,
                "answer_spans": sequence.answer_spans,
                "segments": [(segment.role, segment.start, segment.stop, segment.shot) for segment in sequence.segments],
                "label_map": dict(sequence.episode.label_map),
                "left_out": [{"source": item.example.source, "reason": item.reason} for item in sequence.episode.left_out],
            }
            for sequence in row.sequences
        ],
    }
    return json.dumps(content, ensure_ascii=False)
