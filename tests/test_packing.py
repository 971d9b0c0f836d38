import numpy as np
import pytest

from manyicl import packing
from manyicl.config import EpisodesConfig
from manyicl.encoding import Encoder, encode_episode
from manyicl.episodes import Episode, draw_task, sample_episode
from manyicl.errors import BudgetError
from manyicl.packing import Row, RowDataset, build_row, collate
from manyicl.tasks.task import Example


@pytest.fixture
def encoder(byte_tokenizer) -> Encoder:
    return Encoder(byte_tokenizer)


def sequence_of(encoder: Encoder, *pairs: tuple[str, str]):
    return encode_episode(Episode("t", "", tuple(Example(*pair) for pair in pairs)), encoder)


def test_a_many_shot_row_is_one_whole_sequence(small_task, encoder) -> None:
    tasks = [small_task(name=name, num_train=40) for name in ("one", "two", "three")]
    config = EpisodesConfig(max_tokens=300)
    for index in range(6):
        row = build_row(tasks, config=config, encoder=encoder, seed=5, index=index)
        task = draw_task(tasks, seed=5, index=index)
        episode = sample_episode(task, config=config, counter=encoder, seed=5, index=index)
        assert row == Row((encode_episode(episode, encoder),))
        assert row.num_tokens <= 300
        assert row.num_answers == len(episode.examples)


def test_packed_rows_hold_whole_sequences_that_fit(small_task, encoder) -> None:
    tasks = [small_task(name=name, num_train=40) for name in ("one", "two", "three")]
    config = EpisodesConfig(max_tokens=800, num_shots=1, pack=True)
    tasks.append(small_task(name="longer", train=[Example("x" * size, "yes") for size in range(60, 100)]))
    rows = [build_row(tasks, config=config, encoder=encoder, seed=0, index=index) for index in range(5)]
    for row in rows:
        # One after the other: passing over one that does not fit would favour short sequences.
        places = [sequence.episode.index for sequence in row.sequences]
        assert places == list(range(places[0], places[0] + len(places)))
        assert len(row.sequences) > 3
        assert row.num_tokens <= 800
        assert row.num_tokens + 2 * 120 > 800
        assert [len(sequence.answer_spans) for sequence in row.sequences] == [2] * len(row.sequences)
        assert row.num_answers == 2 * len(row.sequences)
    episodes = [sequence.episode for row in rows for sequence in row.sequences]
    assert len({(episode.task, episode.index) for episode in episodes}) == len(episodes)


@pytest.mark.parametrize("pack", [False, True])
def test_rows_are_pure_functions_of_seed_and_index(small_task, encoder, byte_tokenizer, pack: bool) -> None:
    tasks = [small_task(name=name, num_train=40) for name in ("one", "two")]
    config = EpisodesConfig(max_tokens=300, num_shots=2 if pack else None, pack=pack)
    first = RowDataset(tasks, config=config, encoder=encoder, seed=1, num_rows=4)
    second = RowDataset(tasks, config=config, encoder=Encoder(byte_tokenizer), seed=1, num_rows=4)
    wanted = list(first)
    assert [second[index] for index in (3, 1, 0, 2)] == [wanted[index] for index in (3, 1, 0, 2)]
    assert len({row.sequences[0].token_ids for row in wanted}) == 4
    assert RowDataset(tasks, config=config, encoder=encoder, seed=2, num_rows=4)[0] != wanted[0]
    assert len(first) == 4
    for index in (4, -1):
        with pytest.raises(IndexError):
            first[index]


def test_a_row_without_targets_is_an_error(small_task, encoder, monkeypatch) -> None:
    monkeypatch.setattr(packing, "sample_episode", lambda task, **options: Episode(task.name, "Do.", ()))
    with pytest.raises(BudgetError) as raised:
        build_row([small_task()], config=EpisodesConfig(max_tokens=64), encoder=encoder, seed=0, index=7)
    assert str(raised.value) == "row 7 holds no answer within max_tokens=64. Raise episodes.max_tokens."


def test_collated_rows_are_these_arrays(encoder, byte_tokenizer) -> None:
    # "a\nAnswer: b<|end|>\n\n": nine bytes of input part, then " b", the terminator and two line ends.
    long = Row((sequence_of(encoder, ("a", "b"), ("c", "d")), sequence_of(encoder, ("e", "f"))))
    short = Row((sequence_of(encoder, ("g", "h")),))
    batch = collate([long, short], pad_token_id=byte_tokenizer.eos_token_id)
    assert {name: array.shape for name, array in batch.items()} == dict.fromkeys(
        ("input_ids", "position_ids", "shot", "episode"), (2, 42)
    )
    assert {array.dtype for array in batch.values()} == {np.dtype("int64")}
    one = [-1] * 9 + [0] * 3 + [-1] * 2
    two = [-1] * 9 + [1] * 3 + [-1] * 2
    assert batch["shot"].tolist() == [one + two + one, one + [-1] * 28]
    assert batch["position_ids"].tolist() == [[*range(28), *range(14)], [*range(14), *range(28)]]
    assert batch["episode"].tolist() == [[0] * 28 + [1] * 14, [2] * 14 + [-1] * 28]
    text = "a\nAnswer: b<|end|>\n\nc\nAnswer: d<|end|>\n\ne\nAnswer: f<|end|>\n\n"
    assert byte_tokenizer.decode(batch["input_ids"][0].tolist()) == text


def test_padding_is_masked_by_position_where_it_is_the_terminator_too(encoder, byte_tokenizer) -> None:
    end = byte_tokenizer.eos_token_id
    assert encoder.terminator_id == end
    rows = [Row((sequence_of(encoder, ("a", "b" * size)),)) for size in (1, 8)]
    batch = collate(rows, pad_token_id=end)
    assert batch["input_ids"][0, 14:].tolist() == [end] * 7
    assert (batch["input_ids"][0] == end).sum() == 8
    # The terminator is a target; the padding, the same token, is none.
    assert batch["shot"][0].tolist() == [-1] * 9 + [0] * 3 + [-1] * 9
    assert batch["shot"][1].tolist() == [-1] * 9 + [0] * 10 + [-1] * 2
    assert batch["episode"][0].tolist() == [0] * 14 + [-1] * 7
