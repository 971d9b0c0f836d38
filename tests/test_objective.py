"""The loss against a plain reference: whole logits, one sequence at a time, explicit loops."""

import logging
import math
from itertools import product

import pytest
import torch

from manyicl import objective
from manyicl.encoding import Encoder
from manyicl.errors import BudgetError
from manyicl.objective import answer_losses, count_units, head_can_return_losses, select_targets, shot_bucket_names
from model_fixtures import Config, gradients_of, largest_difference, make_batch, reference_loss, sequence_of

# Rows of different lengths: the second packs two sequences, so that the batch also has padding.
ROWS = [[[0, 1, 2, 3, 4, 5]], [[6, 7, 8], [9, 10]]]
NAMES = ("all_answers", "last_answer", "reweighted")
NORMALISATIONS = ("token", "answer", "episode")


@pytest.fixture(scope="module")
def encoder(byte_tokenizer):
    return Encoder(byte_tokenizer)


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model("llama")


@pytest.fixture(scope="module")
def batch(encoder):
    return make_batch(encoder, *ROWS)


def sequences(encoder):
    return [[sequence_of(encoder, numbers) for numbers in row] for row in ROWS]


@pytest.mark.parametrize(("name", "normalisation"), list(product(NAMES, NORMALISATIONS)))
def test_loss_and_gradients_are_those_of_the_plain_reference(model, encoder, batch, name, normalisation):
    config = Config({"name": name, "normalisation": normalisation, "reweight_window": 2, "reweight_temperature": 0.5})
    expected, units = reference_loss(model, sequences(encoder), config)
    (expected / units).backward()
    expected_gradients = gradients_of(model)
    assert int(count_units(batch, config)) == units
    for in_head in (True, False):
        losses = answer_losses(model, batch, config, in_head=in_head)
        (losses.total / units).backward()
        assert losses.total.item() == pytest.approx(expected.item(), rel=1e-5)
        assert largest_difference(gradients_of(model), expected_gradients) < 1e-5


def test_reweighting_changes_the_loss_and_equal_losses_are_not_reweighted(model, encoder, batch):
    plain = answer_losses(model, batch, Config({"name": "all_answers"}), in_head=True).total
    assert abs((answer_losses(model, batch, Config({"name": "reweighted"}), in_head=True).total - plain).item()) > 1e-2
    almost_equal = answer_losses(model, batch, Config({"name": "reweighted", "reweight_temperature": 1e6}), in_head=True).total
    assert almost_equal.item() == pytest.approx(plain.item(), rel=1e-5)


def test_an_answer_much_harder_than_those_before_it_counts_less(encoder):
    batch = make_batch(encoder, [[0, 4, 8]])  # Three answers of a space, a letter and a terminator.
    mask = select_targets(batch, "reweighted")
    kept = mask[:, 1:].any(dim=0).nonzero().flatten()
    easy_easy_hard = torch.tensor([[1.0] * 6 + [9.0] * 3])
    weights = objective._shot_weights(easy_easy_hard, batch, mask, kept, Config({"name": "reweighted"}))
    third = math.exp(-2.0)  # Its advantage, 1 - 9, is clipped to -2.
    expected = [3 / (2 + third)] * 6 + [3 * third / (2 + third)] * 3
    assert weights.flatten().tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("normalisation", NORMALISATIONS)
def test_rows_one_by_one_add_up_to_the_batch(model, encoder, batch, normalisation):
    config = Config({"normalisation": normalisation})
    alone = [make_batch(encoder, row) for row in ROWS]
    total = sum(answer_losses(model, row, config, in_head=True).total.item() for row in alone)
    assert total == pytest.approx(answer_losses(model, batch, config, in_head=True).total.item(), rel=1e-5)
    assert sum(int(count_units(row, config)) for row in alone) == int(count_units(batch, config))


def test_targets_are_every_answer_with_its_terminator_or_the_last_of_each_episode(encoder):
    batch = make_batch(encoder, [[0, 1], [2]])
    tokens = batch["input_ids"][0]
    every, last = (tokens[select_targets(batch, name)[0]].tolist() for name in ("all_answers", "last_answer"))
    end = encoder.terminator_id
    space_a, space_ab, space_abc = (list(encoder.encode_answer(answer)[:-1]) for answer in ("a", "ab", "abc"))
    assert every == [*space_a, end, *space_ab, end, *space_abc, end]
    assert last == [*space_ab, end, *space_abc, end]


@pytest.mark.parametrize("in_head", [True, False])
def test_only_positions_before_a_target_reach_the_head(model, encoder, in_head):
    batch = make_batch(encoder, [[0, 1, 2, 3]], [[4, 5]])
    mask = select_targets(batch, "all_answers")
    union = int(mask.any(dim=0).sum())
    seen = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))
    answer_losses(model, batch, Config({}), in_head=in_head)
    hook.remove()
    assert seen == [(2, union, 32)]
    assert union < batch["input_ids"].shape[1] / 2


def test_the_head_is_asked_in_chunks_and_they_change_nothing(model, batch, monkeypatch):
    whole = answer_losses(model, batch, Config({}), in_head=True)
    whole.total.backward()
    gradients = gradients_of(model)
    monkeypatch.setattr(objective, "CHUNK_POSITIONS", 5)
    rows = []
    head = model.get_output_embeddings()
    original = head.forward
    monkeypatch.setattr(head, "forward", lambda hidden: rows.append(hidden.shape[0]) or original(hidden))
    chunked = answer_losses(model, batch, Config({}), in_head=True)
    num_positions = 2 * int(select_targets(batch, "all_answers").any(dim=0).sum())
    assert max(rows) == 5
    assert sum(rows) == num_positions
    chunked.total.backward()
    assert sum(rows) == 2 * num_positions  # Logits are computed again in the backward pass and never kept.
    assert chunked.total.item() == pytest.approx(whole.total.item(), rel=1e-6)
    assert largest_difference(gradients_of(model), gradients) < 1e-5


def test_the_head_is_itself_again_afterwards_even_when_the_pass_fails(model, batch):
    head = model.get_output_embeddings()
    before = model(input_ids=batch["input_ids"]).logits
    answer_losses(model, batch, Config({}), in_head=True)
    with pytest.raises(IndexError):
        answer_losses(model, batch | {"input_ids": batch["input_ids"] + 10_000}, Config({}), in_head=True)
    assert "forward" not in head.__dict__
    assert torch.equal(model(input_ids=batch["input_ids"]).logits, before)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3"])
def test_heads_whose_output_is_the_logits_return_losses(tiny_model, architecture, caplog):
    model = tiny_model(architecture).train()
    assert head_can_return_losses(model)
    assert model.training
    assert not caplog.records


@pytest.mark.parametrize("cap", [10.0, 30.0, 80.0])
def test_soft_capped_logits_fall_back_with_one_message_however_small_they_are(tiny_model, encoder, batch, caplog, cap):
    model = tiny_model("gemma2", final_logit_softcapping=cap, initializer_range=0.02)
    with caplog.at_level(logging.WARNING):
        assert not head_can_return_losses(model)
    assert [record.getMessage() for record in caplog.records] == [
        "the model alters its logits after the output head: losses are computed from whole logits, which takes more memory"
    ]
    config = Config({})
    expected, _ = reference_loss(model, sequences(encoder), config)
    assert answer_losses(model, batch, config, in_head=False).total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_bfloat16_heads_return_losses_too(tiny_model):
    assert head_can_return_losses(tiny_model("llama").bfloat16())
    assert not head_can_return_losses(tiny_model("gemma2", final_logit_softcapping=30.0).bfloat16())


def test_losses_by_shot_are_sums_over_the_shots_of_each_range(model, encoder):
    numbers = list(range(10))
    batch = make_batch(encoder, [numbers])
    losses = answer_losses(model, batch, Config({}), in_head=True)
    sequence = sequence_of(encoder, numbers)
    logits = model(input_ids=batch["input_ids"]).logits[0].log_softmax(-1)
    sums, counts = {}, {}
    for shot, (start, stop) in enumerate(sequence.answer_spans):
        name = {0: "0", 1: "1", 2: "2-3", 3: "2-3", 8: "8-15", 9: "8-15"}.get(shot, "4-7")
        for place in range(start, stop):
            sums[name] = sums.get(name, 0.0) - logits[place - 1, sequence.token_ids[place]].item()
            counts[name] = counts.get(name, 0) + 1
    got_sums = dict(zip(shot_bucket_names(), losses.shot_sums.tolist(), strict=True))
    got_counts = dict(zip(shot_bucket_names(), losses.shot_counts.tolist(), strict=True))
    assert {name: value for name, value in got_counts.items() if value} == counts
    assert {name: got_sums[name] for name in sums} == pytest.approx(sums, rel=1e-5)
    assert losses.shot_sums.sum().item() == pytest.approx(losses.total.item(), rel=1e-5)


def test_ranges_of_shots_double():
    names = shot_bucket_names()
    assert names[:6] == ["0", "1", "2-3", "4-7", "8-15", "16-31"]
    assert names[-1] == "16384-32767"


@pytest.mark.parametrize("shot", [2**power + offset for power in range(2, 15) for offset in (-1, 0)])
def test_a_shot_at_the_edge_of_a_range_falls_into_the_right_one(model, encoder, shot):
    batch = make_batch(encoder, [[0]])
    batch["shot"] = torch.where(batch["shot"] >= 0, shot, -1)
    counts = answer_losses(model, batch, Config({}), in_head=True).shot_counts
    low, _, high = shot_bucket_names()[int(counts.argmax())].partition("-")
    assert int(low) <= shot <= int(high)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_without_a_target_is_an_error_that_names_it(encoder, name):
    batch = make_batch(encoder, [[0, 1]], [[2, 3]])
    batch["shot"][1] = -1
    with pytest.raises(BudgetError, match=r"row\(s\) \[1\] of a batch of 2 x \d+ tokens have no target"):
        count_units(batch, Config({"name": name}))


def test_padding_never_counts_even_where_it_has_a_target_token_id(model, encoder):
    alone, padded = make_batch(encoder, [[0, 1]]), make_batch(encoder, [[0, 1]], [[2, 3, 4, 5, 6]])
    assert padded["input_ids"].shape[1] > alone["input_ids"].shape[1]
    first = {name: tensor[:1].clone() for name, tensor in padded.items()}
    first["input_ids"][first["episode"] < 0] = encoder.terminator_id
    losses = [answer_losses(model, batch, Config({}), in_head=True) for batch in (alone, first)]
    assert torch.equal(losses[0].shot_counts, losses[1].shot_counts)
    assert losses[0].total.item() == pytest.approx(losses[1].total.item(), rel=1e-6)
