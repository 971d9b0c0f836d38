"""Branches of different lengths in one row: layout, batches, logits in chunks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from manyicl import branching
from manyicl.attention import use_shared_prefix_attention
from manyicl.branching import (
    PastStates,
    check_positions,
    choose_batch_tokens,
    flatten_branches,
    head_is_plain,
    log_probabilities,
    plan_batches,
    plan_decoding,
    query_branch,
)
from manyicl.errors import BudgetError
from manyicl.label_trie import build_trie
from manyicl.planning import prefix_bytes
from manyicl.prefix import Prefix

EMPTY = Prefix((), (0,), ())
CPU = torch.device("cpu")
T = 256


def ragged_row(past: Any = None) -> branching.FlatRow:
    branches = [query_branch((7, 8, 9)), query_branch((4,), build_trie([(5, 6, T), (3, T)]))]
    return flatten_branches(branches, Prefix((1, 2), (2,), ()), CPU, past=past)


def test_a_row_holds_real_tokens_only_and_each_has_its_position_behind_the_prefix() -> None:
    row = ragged_row()
    assert row.input_ids.tolist() == [[7, 8, 9, 4, 5, 6, 3]]
    assert row.position_ids.tolist() == [[2, 3, 4, 2, 3, 4, 3]]
    assert row.starts.tolist() == [0, 3]
    assert row.branches.places.tolist() == [[0, 1, 2, 0], [3, 4, 5, 6]]
    assert row.branches.mask is not None
    assert row.branches.mask[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
    assert row.branches.mask[1].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]


def test_spread_lays_tokens_out_by_branch_and_collect_takes_them_back() -> None:
    branches = ragged_row().branches
    states = torch.arange(7.0).view(1, 1, 7, 1).repeat(1, 3, 1, 2)
    spread = branches.spread(states)
    assert spread.shape == (2, 3, 4, 2)
    assert spread[0, 2, :3, 1].tolist() == [0, 1, 2]
    assert spread[1, 0, :, 0].tolist() == [3, 4, 5, 6]
    assert torch.equal(branches.collect(spread), states)
    assert torch.equal(branches.collect(spread[..., 0]), states[..., 0])


def test_branches_of_one_length_need_no_padding() -> None:
    branches = flatten_branches([query_branch((7, 8)), query_branch((4, 5))], EMPTY, CPU).branches
    states = torch.arange(8.0).view(1, 2, 4, 1)
    assert not branches.is_padded
    assert branches.spread(states)[:, 1, :, 0].tolist() == [[4, 5], [6, 7]]
    assert torch.equal(branches.collect(branches.spread(states)), states)


def test_keys_and_values_are_kept_on_request_only() -> None:
    states = torch.zeros(2, 1, 4, 2)
    forgetful, past = ragged_row().branches, PastStates(6)
    assert [forgetful.append(0, states, states)[0].shape[2] for _ in range(2)] == [4, 4]
    assert [ragged_row(past=past).branches.append(0, states, states)[1].shape[2] for _ in range(2)] == [4, 8]


def test_past_states_are_what_concatenation_gives_whoever_leaves() -> None:
    draw = torch.Generator().manual_seed(0)
    past, lines, whole = PastStates(3), list(range(5)), torch.empty(5, 2, 0, 4)
    for length, leaving in ((2, ()), (1, (1, 3)), (4, (4,)), (1, (0,)), (9, ())):
        order = past.keep([place for place, line in enumerate(lines) if line not in leaving])
        lines = [lines[place] for place in order]
        new = torch.randn(5, 2, length, 4, generator=draw)
        whole = torch.cat([whole, new], dim=2)
        for layer in (0, 1):
            key, value = past.append(layer, new[lines], -new[lines])
            assert torch.equal(key, whole[lines])
            assert torch.equal(value, -whole[lines])
    assert lines == [2]


def test_joined_past_states_hold_what_each_branch_sees_in_order() -> None:
    draw = torch.Generator().manual_seed(0)
    states = [torch.randn(3, 1, 3, 4, generator=draw), torch.randn(1, 1, 2, 4, generator=draw)]
    parts = [PastStates(0), PastStates(0)]
    for part, own in zip(parts, states, strict=True):
        for layer in (0, 1):
            part.append(layer, own + layer, -own)
    seen = [np.array([[True, True, True], [False, True, True]]), np.array([[True, False]])]  # The third branch has left.
    joined, seen_then = PastStates.join(list(zip(parts, seen, strict=True)), 4)
    assert seen_then.tolist() == [[True, True, True], [True, True, False], [True, False, False]]
    assert parts[0].append(0, states[0], states[0])[0].shape == states[0].shape  # What was joined is not there any more.
    new = torch.randn(3, 1, 1, 4, generator=draw)
    for layer in (0, 1):
        key, value = joined.append(layer, new, -new)
        assert key.shape == value.shape == (3, 1, 4, 4)
        for line, (number, branch, places) in enumerate([(0, 0, [0, 1, 2]), (0, 1, [1, 2]), (1, 0, [0])]):
            assert torch.equal(key[line, :, : len(places)], states[number][branch][:, places] + layer)
            assert torch.equal(value[line, :, : len(places)], -states[number][branch][:, places])
            assert torch.equal(key[line, :, 3:], new[line])
        assert torch.cat([key, value]).isfinite().all()  # As what is masked is multiplied by zero, not left out.


def test_batches_are_written_together_within_every_limit(tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches, lengths = tiny_model("llama"), [[0, 1], [2], [3, 4]], [3, 3, 5, 6, 6]

    def plan(limit: int) -> list[list[list[int]]]:
        return list(plan_decoding(model, batches, lengths, 4, max_batch_tokens=limit))

    assert plan(5) == [batches]
    assert plan(4) == [[[0, 1], [2]], [[3, 4]]]
    assert plan(1) == [[batch] for batch in batches]  # A batch is never cut.
    config = model.config.get_text_config()
    monkeypatch.setattr(branching, "MAX_PAST_BYTES", 3 * (5 + 4) * prefix_bytes(config, 1, model.dtype))
    assert plan(5) == [[[0, 1], [2]], [[3, 4]]]
    monkeypatch.setattr(branching, "MAX_PAST_BYTES", 3 * (5 + 4) * prefix_bytes(config, 1, model.dtype) - 1)
    assert plan(5) == [[[0, 1]], [[2]], [[3, 4]]]
    monkeypatch.setattr(branching, "MAX_PAST_BYTES", 2**30)
    gemma = tiny_model("gemma2")  # Its logits are taken whole.
    monkeypatch.setattr(branching, "MAX_LOGIT_BYTES", 3 * 4 * gemma.config.get_text_config().vocab_size)
    assert list(plan_decoding(gemma, batches, lengths, 4, max_batch_tokens=5)) == [[[0, 1], [2]], [[3, 4]]]


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_chunks_of_logits_change_no_score(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    model = tiny_model(architecture)
    use_shared_prefix_attention(model)
    queries = [(5, 6, 7), (8,), (9, 10)]
    sources = np.array([2, 0, 5, 3, 2, 5])
    tokens = np.array([1, 2, 3, 4, 5, 3])

    def score() -> np.ndarray:
        with torch.inference_mode():
            row = flatten_branches([query_branch(query) for query in queries], EMPTY, CPU)
            return log_probabilities(model, row, sources, tokens)

    whole = score()
    for name in ("LOGIT_CHUNK_BYTES", "SLICE_BYTES"):
        monkeypatch.setattr(branching, name, 4 * 261)
        np.testing.assert_allclose(score(), whole, atol=1e-6)
    row_tokens = [token for query in queries for token in query]
    starts = [0, 0, 0, 3, 4, 4]
    for source, token, value in zip(sources, tokens, whole, strict=True):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([row_tokens[starts[source] : source + 1]])).logits[0, -1]
        assert value == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-5)


def test_heads_whose_logits_are_altered_afterwards_are_found(tiny_model: Callable[..., Any]) -> None:
    assert head_is_plain(tiny_model("llama"))
    assert head_is_plain(tiny_model("gemma2", final_logit_softcapping=None))
    assert not head_is_plain(tiny_model("gemma2"))


def test_batches_hold_every_branch_once_and_keep_the_token_limit(tiny_model: Callable[..., Any]) -> None:
    lengths = [5, 30, 7, 9, 100, 6, 30]
    batches = list(plan_batches(tiny_model(), lengths, [1] * 7, max_batch_tokens=40))
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert batches[-1] == [4]
    assert all(sum(lengths[index] for index in batch) <= 40 for batch in batches[:-1])


def test_batches_are_made_even(tiny_model: Callable[..., Any]) -> None:
    batches = list(plan_batches(tiny_model(), [10] * 11, [1] * 11, max_batch_tokens=100))
    assert [len(batch) for batch in batches] == [6, 5]


def test_a_long_branch_shares_its_batch_with_few(tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branching, "MAX_SCORE_BYTES", 4 * 4 * 2 * 50**2)  # Two branches of 50 tokens, four heads, fp32.
    batches = list(plan_batches(tiny_model(), [50, 50, 50, 2], [1] * 4, max_batch_tokens=10_000))
    assert batches == [[3, 0], [1, 2]]


def test_whole_logits_limit_the_batch_of_an_altering_head(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(branching, "MAX_LOGIT_BYTES", 4 * 261 * 10)
    lengths, logits = [8] * 4, [5] * 4
    assert list(plan_batches(tiny_model("gemma2"), lengths, logits, max_batch_tokens=1000)) == [[0, 1], [2, 3]]
    assert list(plan_batches(tiny_model("llama"), lengths, logits, max_batch_tokens=1000)) == [[0, 1, 2, 3]]


@pytest.mark.parametrize(("free_tokens", "tokens"), [(0, 256), (1000, 1000), (10**9, 2048)])
def test_the_batch_budget_follows_free_memory_between_its_ends(
    tiny_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, free_tokens: int, tokens: int
) -> None:
    model = tiny_model()
    # fp32, two layers; hidden 32, inner 64, 4 heads of 8, 2 key-value heads: keys and values 2 · 2 · 2 · 8 numbers of 4 bytes,
    # the widest layer (4 · 32 + 4 · 32 + 4 · 64) numbers of 4 bytes, and six copies of the heads (4 · 8) in fp32.
    bytes_per_token = 4 * 64 + 4 * 512 + 6 * 32 * 4
    monkeypatch.setattr(branching, "available_bytes", lambda device: 8 * free_tokens * bytes_per_token)
    assert choose_batch_tokens(model) == tokens


def test_a_query_that_does_not_fit_is_named(tiny_model: Callable[..., Any]) -> None:
    prefix = Prefix(tuple(range(60)), (60,), ())
    check_positions(tiny_model(max_position_embeddings=64), prefix, [4, 3])
    with pytest.raises(BudgetError, match=r"query 1 and its answer take 5 tokens after a prefix of 60, more than the model's 64"):
        check_positions(tiny_model(max_position_embeddings=64), prefix, [4, 5])
