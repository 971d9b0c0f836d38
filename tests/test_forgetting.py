"""Bits per byte of plain text."""

import math

import pytest
import torch

from manyicl.errors import UserInputError
from manyicl.forgetting import corpus_loss, read_corpus

TEXT = "Plain text with an é and a ☃ in it, and a little more."


@pytest.mark.parametrize("window", [2, 7, 10, 2048])
def test_bits_per_byte_are_those_of_windows_read_one_by_one(tiny_loaded, window):
    loaded = tiny_loaded("llama")
    token_ids = list(TEXT.encode())
    ids = loaded.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(token_ids) == 57  # One token a byte.
    total, predicted = 0.0, 0
    for start in range(0, len(ids), window):
        own = ids[start : start + window]
        logits = loaded.model(input_ids=torch.tensor([own])).logits[0].double().log_softmax(-1)
        total -= sum(logits[place - 1, own[place]].item() for place in range(1, len(own)))
        predicted += len(own) - 1
    found = corpus_loss(loaded, TEXT, window_tokens=window)
    assert found.bits_per_byte == pytest.approx(total / math.log(2) / 57, rel=1e-5)
    assert (found.num_bytes, found.num_tokens) == (57, predicted)


def test_a_window_wider_than_the_positions_is_an_error(tiny_loaded):
    loaded = tiny_loaded("llama", max_position_embeddings=64)
    assert corpus_loss(loaded, TEXT, window_tokens=64).num_tokens == 56
    with pytest.raises(UserInputError, match=r"more than the 64 positions of tiny-llama\. Lower it"):
        corpus_loss(loaded, TEXT, window_tokens=65)


@pytest.mark.parametrize(("max_bytes", "expected"), [(4, "aé☃"[:2]), (5, "aé"), (6, "aé☃"), (100, "aé☃ b")])
def test_a_text_is_cut_back_to_a_whole_character(tmp_path, max_bytes, expected):
    path = tmp_path / "text.txt"
    path.write_text("aé☃ b", encoding="utf-8")
    assert read_corpus(path, max_bytes=max_bytes) == expected


def test_texts_that_cannot_be_read_are_errors(tmp_path):
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "empty.txt").write_bytes(b"")
    for name, message in (
        ("absent.txt", r"absent\.txt: cannot be read \(No such file or directory\)\. Give a plain text file"),
        ("latin.txt", r"latin\.txt: byte 2 is not UTF-8\. Save the text as UTF-8"),
        ("empty.txt", r"empty\.txt: 0 bytes hold no text"),
    ):
        with pytest.raises(UserInputError, match=message):
            read_corpus(tmp_path / name, max_bytes=1000)
