"""Sequences -> rows of at most max_tokens, and rows -> arrays. Loads no torch.

A many-shot row is one sequence. Short sequences (the baselines') share a row: positions restart, so that each attends only
to itself.

    row            | sequence 0 …………………… | sequence 1 ………… |  padding
    position_ids   | 0 1 2 3 4 5 6 7 8 9  | 0 1 2 3 4 5 6  |  0 1 2
    episode        | 0 0 0 0 0 0 0 0 0 0  | 1 1 1 1 1 1 1  | -1 -1 -1
    shot           | . . . 0 0 . . . 1 1  | . . . . . 0 0  |  . . .       ('.' is -1)
"""

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from manyicl.config import EpisodesConfig
from manyicl.encoding import Encoder, Sequence, encode_episode
from manyicl.episodes import draw_task, sample_episode
from manyicl.errors import BudgetError
from manyicl.tasks.task import Task

IntArray = npt.NDArray[np.int64]
_EPISODES_PER_ROW = 65536


@dataclass(frozen=True)
class Row:
    """What the model is fed: one or more sequences, each attending only to itself."""

    sequences: tuple[Sequence, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the row, without padding."""
        return sum(len(sequence.token_ids) for sequence in self.sequences)

    @property
    def num_answers(self) -> int:
        """Answers in the row."""
        return sum(len(sequence.answer_spans) for sequence in self.sequences)


def build_row(tasks: SequenceOf[Task], *, config: EpisodesConfig, encoder: Encoder, seed: int, index: int) -> Row:
    """Row `index` of a run: a pure function of (seed, index).

    Raises:
        BudgetError: see `sample_episode`; or the row holds no answer.
    """
    sequences: list[Sequence] = []
    used = 0
    for number in range(_EPISODES_PER_ROW if config.pack else 1):
        place = index * _EPISODES_PER_ROW + number if config.pack else index
        task = draw_task(tasks, seed=seed, index=place, alpha=config.task_alpha)
        sequence = encode_episode(sample_episode(task, config=config, counter=encoder, seed=seed, index=place), encoder)
        if used + len(sequence.token_ids) > config.max_tokens:
            break
        sequences.append(sequence)
        used += len(sequence.token_ids)
    row = Row(tuple(sequences))
    if not row.num_answers:
        raise BudgetError(f"row {index} holds no answer within max_tokens={config.max_tokens}. Raise episodes.max_tokens.")
    return row


class RowDataset:
    """Rows of a run by index, as a map-style dataset; nothing is built before it is asked for."""

    def __init__(self, tasks: SequenceOf[Task], *, config: EpisodesConfig, encoder: Encoder, seed: int, num_rows: int) -> None:
        self.tasks = tasks
        self.config = config
        self.encoder = encoder
        self.seed = seed
        self.num_rows = num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self.num_rows:
            raise IndexError(index)
        return build_row(self.tasks, config=self.config, encoder=self.encoder, seed=self.seed, index=index)

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(self.num_rows))


def collate(rows: SequenceOf[Row], *, pad_token_id: int = 0) -> dict[str, IntArray]:
    """Rows as int64 arrays [B, T], padded on the right and masked by position, never by id.

    Returns:
        input_ids: tokens; padding holds `pad_token_id`.
        position_ids: restart at 0 with each sequence and with the padding.
        shot: shot of the answer that a token belongs to, -1 for tokens that are no target; unshifted.
        episode: number of the sequence within the batch, -1 for padding.
    """
    length = max(row.num_tokens for row in rows)
    shape = (len(rows), length)
    batch = {
        "input_ids": np.full(shape, pad_token_id, dtype=np.int64),
        "position_ids": np.zeros(shape, dtype=np.int64),
        "shot": np.full(shape, -1, dtype=np.int64),
        "episode": np.full(shape, -1, dtype=np.int64),
    }
    number = 0
    for line, row in enumerate(rows):
        start = 0
        for sequence in row.sequences:
            stop = start + len(sequence.token_ids)
            batch["input_ids"][line, start:stop] = sequence.token_ids
            batch["position_ids"][line, start:stop] = np.arange(stop - start)
            batch["shot"][line, start:stop] = sequence.shots
            batch["episode"][line, start:stop] = number
            number, start = number + 1, stop
        batch["position_ids"][line, start:] = np.arange(length - start)
    return batch
